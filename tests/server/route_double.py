"""Workers that are not there: real HTTP servers that answer as a test wants, and a router before them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import ClientResponse, ClientSession, web

from kvcache.credentials import Credentials
from kvcache.fleet import Fleet, Worker
from kvcache.metrics_route import RouteMetrics
from kvcache.routing.fleet_state import FleetState
from kvcache.routing.view import NoView, View
from kvcache.routing.views import IndexView
from kvcache.routing.weights import Weights
from kvcache.server.http_forward import Forwarder, Waits, open_session
from kvcache.server.http_route import Limits, Parts, RouteApp
from kvcache.server.http_tokens import Tokens
from tests.kvcache.routing.fleet_double import Told

Act = Callable[[web.Request], Awaitable[web.StreamResponse]]
PATIENCE_S = 20.0
SHORT_S = (0.05, 0.5, 5.0)
"""Too short for who hangs. For who does not, the machine may have to be fast: then the next is tried."""
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns


class FakeWorker:
    """Answers completions with ``act``, and ``/tokenize`` with ``tokens`` (None: ``no_tokens``)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.act: Act = self.whole
        self.tokens: list[int] | None = None
        self.no_tokens = 404
        self.seen: list[tuple[dict[str, str], bytes]] = []
        self.tokenized: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        """Set when a request was cancelled, as its client had gone."""
        self.go = asyncio.Event()
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeWorker]:
        app = web.Application()
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/{path:.*}", self._complete)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield self
        finally:
            self.go.set()
            await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((dict(request.headers), await request.read()))
        try:
            return await self.act(request)
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        self.tokenized.append(await request.json())
        if self.tokens is None:
            return web.Response(status=self.no_tokens)
        return web.json_response({"count": len(self.tokens), "tokens": self.tokens})

    # --- what it may do -------------------------------------------------------------------------

    async def whole(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"from": self.name}, headers={"X-Request-Id": "7", "Keep-Alive": "5"})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """One event, then waits for ``go``, then the other and the end."""
        response = await self._begun(request)
        await self.go.wait()
        await response.write(b"data: two\n\n")
        return response

    async def die_before(self, request: web.Request) -> web.StreamResponse:
        return self._gone(request)

    async def die_after(self, request: web.Request) -> web.StreamResponse:
        await self._begun(request)
        await self.go.wait()
        return self._gone(request)

    async def die_in_a_body(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"part")
        await self.go.wait()
        return self._gone(request)

    async def hang(self, request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async def hang_after(self, request: web.Request) -> web.StreamResponse:
        await self._begun(request)
        return await self.hang(request)

    def answers(self, status: int) -> Act:
        async def act(request: web.Request) -> web.StreamResponse:
            return web.json_response({"status": status}, status=status)

        return act

    async def _begun(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: one\n\n")
        return response

    def _gone(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


class Routing:
    """A router in this process, and the workers behind it."""

    def __init__(self, workers: list[FakeWorker], url: str, session: ClientSession, parts: Parts) -> None:
        self.workers = {each.name: each for each in workers}
        self.url = url
        self.session = session
        self.parts = parts
        self.state = parts.state

    def post(self, body: object, path: str = COMPLETIONS, **headers: str) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.session.post(
            self.url + path, data=data, headers={"Content-Type": "application/json"} | named
        )

    async def asked(self, body: object, path: str = COMPLETIONS, **headers: str) -> ClientResponse:
        """The answer, read to its end."""
        async with self.post(body, path, **headers) as response:
            await response.read()
            answer: ClientResponse = response
            return answer

    async def got(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path, headers=headers) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type.endswith("json") else text

    async def choices(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.got("/v1/choices"))[1]["choices"]
        return found


@asynccontextmanager
async def routing(
    *names: str,
    told: Told | None = None,
    weights: Weights | None = None,
    waits: Waits | None = None,
    limits: Limits | None = None,
    credentials: Credentials | None = None,
    tenants: dict[str, str] | None = None,
    tokenize_s: float = PATIENCE_S,
    missing: tuple[str, ...] = (),
) -> AsyncIterator[Routing]:
    """Workers of these names; ``missing`` ones are in the fleet, and nobody listens there."""
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(FakeWorker(name).running()) for name in names]
        urls = {each.name: each.url for each in workers} | {
            name: stack.enter_context(closed_url()) for name in missing
        }
        fleet = Fleet.of(
            Worker(
                name=name,
                url=f"{url}/v1" if number % 2 else url,
                model="m",
                events=f"tcp://127.0.0.1:{5_000 + number}",
                tenant=(tenants or {}).get(name, "default"),
            )
            for number, (name, url) in enumerate(urls.items())
        )
        clock, waits = Clock(), waits or Waits(connect_s=PATIENCE_S)
        credentials = credentials or Credentials.default()
        session = await stack.enter_async_context(open_session(100, waits))
        view: View = IndexView(told.index, clock) if told is not None else NoView()
        parts = Parts(
            state=FleetState(fleet, weights or Weights(), credentials.tenant_key),
            view=view,
            forwarder=Forwarder(session, waits),
            tokens=Tokens(session, clock, tokenize_s) if tokenize_s else None,
            metrics=RouteMetrics(),
            credentials=credentials,
            clock=clock,
            limits=limits or Limits(),
        )
        runner = web.AppRunner(
            RouteApp(parts).application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        client = await stack.enter_async_context(ClientSession(auto_decompress=False))
        async with asyncio.timeout(PATIENCE_S):
            yield Routing(workers, f"http://{host}:{port}", client, parts)
            parts.state.loads.check()


@contextmanager
def closed_url() -> Iterator[str]:
    """Where nobody listens, nor can meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
