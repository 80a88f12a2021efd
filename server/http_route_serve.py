"""A router put together from its settings, and served: the one place that picks its parts."""

from __future__ import annotations

import asyncio
import contextlib
import tomllib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from kvcache.clock import SystemClock
from kvcache.config import parse_size
from kvcache.credentials import Credentials
from kvcache.errors import BadInput, plainly
from kvcache.fleet import Fleet, token
from kvcache.locality import LocalityIndex
from kvcache.locator import Locator
from kvcache.metrics_route import RouteMetrics
from kvcache.routing.fleet_state import FleetState
from kvcache.routing.view import NoView, View
from kvcache.routing.views import IndexView, LocatorView
from kvcache.routing.weights import Weights
from kvcache.server.fleet_index import FleetIndex
from kvcache.server.http_forward import Forwarder, Waits, open_session
from kvcache.server.http_route import Limits, Parts, RouteApp
from kvcache.server.http_serving import HttpSite, checked_bind
from kvcache.server.http_tokens import Tokens

WEIGHTS_BYTES_MAX = 1 << 20
INDEX_BYTES_MIN = 1 << 20
SHUTDOWN_S = 2.0
CONNECTIONS_A_REQUEST = 4
"""So many connections of clients may be open for each request that is answered: pools keep idle ones."""
WORKER_CONNECTIONS_A_REQUEST = 2
OTHER_DESCRIPTORS = 1_024
"""Of an embedded index, which follows many."""

_MS_MAX = 86_400_000
_RANGES = (
    ("requests_max", 1, 65_536),
    ("attempts", 1, 1_024),
    *((name, 1, _MS_MAX) for name in ("connect_ms", "first_byte_ms", "idle_ms", "request_ms", "index_ms")),
    ("tokenize_ms", 0, _MS_MAX),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command is told."""

    fleet: str
    bind: str
    weights: str
    index: str
    index_size: str
    index_ms: int
    credentials: str
    worker_token_file: str
    tokenize_ms: int
    requests_max: int
    attempts: int
    connect_ms: int
    first_byte_ms: int
    idle_ms: int
    request_ms: int
    seed: int


def descriptors(requests_max: int) -> int:
    """How many connections there may be, and what else is open."""
    return (CONNECTIONS_A_REQUEST + WORKER_CONNECTIONS_A_REQUEST) * requests_max + OTHER_DESCRIPTORS


def check(settings: Settings) -> tuple[Fleet, Weights, Credentials, tuple[str, int]]:
    """What the settings name, read. RAISES BadInput that says which of them is wrong."""
    for name, least, most in _RANGES:
        if not least <= (value := getattr(settings, name)) <= most:
            raise BadInput("bad_config", f"{name} is {value}", f"it is a number from {least} to {most:,}")
    fleet = Fleet.from_file(settings.fleet)
    if not any(worker.url for worker in fleet.worker):
        raise BadInput("bad_config", f"{settings.fleet} has no worker with a url", "requests go nowhere")
    credentials = Credentials.named(settings.credentials)
    bind = checked_bind(settings.bind, credentials, "bind", who="the router", harm="use the workers")
    return fleet, _weights(settings.weights), credentials, bind


@contextlib.asynccontextmanager
async def served(settings: Settings) -> AsyncIterator[str]:
    """The router, listening at the address that this gives, until the block is left. RAISES BadInput."""
    fleet, weights, credentials, (host, port) = check(settings)
    clock, metrics = SystemClock(), RouteMetrics()
    waits = Waits(
        settings.connect_ms / 1e3,
        settings.first_byte_ms / 1e3,
        settings.idle_ms / 1e3,
        settings.request_ms / 1e3,
    )
    secret = token(settings.worker_token_file)
    limits = Limits(
        requests_max=settings.requests_max,
        attempts=settings.attempts,
        whole_s=waits.whole_s,
        authorization=f"Bearer {secret}" if secret else "",
    )
    async with contextlib.AsyncExitStack() as stack:
        indexed = await stack.enter_async_context(_indexed(settings, fleet, clock))
        session = await stack.enter_async_context(
            open_session(WORKER_CONNECTIONS_A_REQUEST * settings.requests_max, waits)
        )
        parts = Parts(
            state=FleetState(fleet, weights, credentials.tenant_key, settings.seed),
            view=indexed.view,
            forwarder=Forwarder(session, waits),
            tokens=Tokens(session, clock, settings.tokenize_ms / 1e3) if settings.tokenize_ms else None,
            metrics=metrics,
            credentials=credentials,
            clock=clock,
            limits=limits,
            troubles=indexed.troubles,
        )
        site = HttpSite(
            RouteApp(parts).application(),
            CONNECTIONS_A_REQUEST * settings.requests_max,
            setting="bind",
            shutdown_s=SHUTDOWN_S,
            cancels=True,
        )
        stack.push_async_callback(site.close)
        yield await site.listen(host, port)


@dataclass(frozen=True, slots=True)
class _Indexed:
    view: View
    troubles: Callable[[], list[str]] = list


@contextlib.asynccontextmanager
async def _indexed(settings: Settings, fleet: Fleet, clock: SystemClock) -> AsyncIterator[_Indexed]:
    """The index that was asked for. RAISES BadInput for what is none, or cannot be followed."""
    if settings.index == "none":
        yield _Indexed(NoView("--index is none"))
        return
    if settings.index != "embedded":
        locator = Locator(settings.index, timeout_ms=settings.index_ms, clock=clock)
        with contextlib.closing(locator):
            view = LocatorView(locator, clock)
            yield _Indexed(view, view.troubles)
        return
    bytes_max = parse_size(settings.index_size, "index_size")
    if bytes_max < INDEX_BYTES_MIN:
        raise BadInput(
            "bad_config", f"index_size is {settings.index_size!r}", "an index takes 1 MiB at least"
        )
    index = LocalityIndex(bytes_max)
    followed = FleetIndex(index, clock)
    ticking = asyncio.get_running_loop().create_task(followed.run())
    try:
        followed.follow(fleet)
        yield _Indexed(IndexView(index, clock, followed.node_source), followed.troubles)
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        await followed.close()


def _weights(path: str) -> Weights:
    """RAISES BadInput (bad_config)."""
    if not path:
        return Weights()
    try:
        raw = Path(path).read_bytes()[:WEIGHTS_BYTES_MAX]
        table = tomllib.loads(raw.decode()).get("weights", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(
            "bad_config", f"{path} is no file of weights", plainly(error), "see docs/routing.md"
        ) from error
    if not isinstance(table, dict):
        raise BadInput("bad_config", f"{path} has no table [weights]", "", "see docs/routing.md")
    return Weights.from_table(table)
