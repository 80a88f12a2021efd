"""The HTTP application: routes, who may use them, their limits, and errors as problems.

It serves what ``http_routes.ROUTES`` lists, to whom the credentials file allows; without a file, to loopback
only. Without a good token all paths look the same; with one, so do those that are not there and those
that it may not use.

Limits: ``BODY_BYTES_MAX`` a request, decompressed; ``REQUESTS_MAX`` at once, more are told to come back;
``DEADLINE_S`` from a request's header to its answer.

The sum: a look-up of 1,000 hashes is about 2 ms, nearly all of it JSON and hex.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar

import msgspec
from aiohttp import web

from kvcache import __version__
from kvcache.clock import Clock
from kvcache.config import is_loopback
from kvcache.credentials import Credential, Credentials
from kvcache.errors import BadInput, KVCacheError, NotAllowed, Unavailable
from kvcache.metrics import CONTENT_TYPE, HttpMetrics
from kvcache.server import http_api as api
from kvcache.server.fleet_index import FleetIndex
from kvcache.server.http_fleet import Subject, place, tuning, workers
from kvcache.server.http_locate import as_of, locate
from kvcache.server.http_rfc1403_app import Rfc1403
from kvcache.server.http_routes import ROUTES
from kvcache.server.openapi import document
from kvcache.wire_tuning import SET, TELL, Tune

log = logging.getLogger("kvcache.server.http")

ROUTE_UNKNOWN = "other"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Allowed = Callable[[web.Request, Credential], Awaitable[web.StreamResponse]]

T = TypeVar("T", bound=api.Strict)


class HttpApp:
    """The routes, who may use them, and their limits. ``subject`` and ``fleet`` are what
    they answer from: one index."""

    def __init__(
        self,
        subject: Subject,
        fleet: FleetIndex,
        metrics: HttpMetrics,
        credentials: Credentials,
        clock: Clock,
    ) -> None:
        self._subject = subject
        self._fleet = fleet
        self._metrics = metrics
        self._credentials = credentials
        self._clock = clock
        self._document = document(ROUTES)
        self._running = 0

    def application(self) -> web.Application:
        handlers: dict[str, Allowed] = {
            "healthz": self._healthz,
            "readyz": self._readyz,
            "metrics": self._show_metrics,
            "openapi": self._openapi,
            "stats": self._stats,
            "tuning": self._tuning,
            "tune": self._tune,
            "locate": self._locate,
            "workers": self._workers,
            "placements": self._place,
            **Rfc1403(self._fleet, self._credentials).handlers(),
        }
        app = web.Application(client_max_size=api.BODY_BYTES_MAX, middlewares=[self._around])
        for route in ROUTES:
            app.router.add_route(route.method, route.path, self._guarded(route, handlers[route.name]))
        return app

    # --- around every request -------------------------------------------------------------------

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Limits, errors as problems, security headers, and the count of it all."""
        started = time.monotonic()
        response = await self._limited(request, handler)
        response.headers.update(api.HEADERS)
        resource = request.match_info.route.resource
        route = ROUTE_UNKNOWN if resource is None else resource.canonical
        self._metrics.answered(route, response.status, time.monotonic() - started)
        return response

    async def _limited(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._running >= api.REQUESTS_MAX:
            response = _problem(_unavailable(f"{self._running} requests are being answered"))
            response.headers["Retry-After"] = "1"
            return response
        self._running += 1
        try:
            async with asyncio.timeout(api.DEADLINE_S):
                return await self._answered(request, handler)
        except TimeoutError:
            return _problem(_unavailable(f"there was no answer within {api.DEADLINE_S:g} s"))
        finally:
            self._running -= 1

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check_host(request)
            if request.match_info.http_exception is not None:
                self._credential(request)
                raise _nothing_here()
            return await handler(request)
        except KVCacheError as error:
            return _problem(error)
        except web.HTTPRequestEntityTooLarge:
            what = f"a body of over {api.BODY_BYTES_MAX} bytes"
            return _problem(BadInput("too_large", what, "that is the limit", "ask in several requests"))
        except web.HTTPException as error:
            status = HTTPStatus(error.status)
            return _problem(BadInput("bad_message", "a request that cannot be read", error.reason), status)
        except web.RequestPayloadError:
            return _problem(BadInput("bad_message", "a body that cannot be read", "see its headers"))

    def _check_host(self, request: web.Request) -> None:
        """Without tokens, a page in somebody's browser must not get here by a name that it controls."""
        if not self._credentials.has_tokens and not is_loopback(_host_name(request.host)):
            raise NotAllowed(
                "not_allowed",
                "a request to another host's name",
                "without tokens only this host may ask, by its own name",
                "use 127.0.0.1, or give the node a credentials file with tokens",
            )

    def _guarded(self, route: api.Route, handler: Allowed) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            credential = self._credential(request) if route.roles else _NOBODY
            if route.roles and not route.roles & credential.roles:
                raise _nothing_here()
            if route.request is not None and request.content_type != "application/json":
                raise BadInput("bad_message", "a body that is not application/json", "it must say so")
            return await handler(request, credential)

        return guarded

    def _credential(self, request: web.Request) -> Credential:
        """RAISES _Unauthorised in the same words for every path, whether there is anything or not."""
        found = self._credentials.anonymous
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if token and kind.lower() == "bearer":
            found = self._credentials.by_token(token.strip())
        if found is None:
            raise _Unauthorised()
        return found

    # --- answers --------------------------------------------------------------------------------

    async def _healthz(self, request: web.Request, _: Credential) -> web.Response:
        return _json(api.Health(alive=True))

    async def _readyz(self, request: web.Request, _: Credential) -> web.Response:
        unready = self._subject.degraded()
        status = HTTPStatus.SERVICE_UNAVAILABLE if unready else HTTPStatus.OK
        degraded = [*unready, *self._subject.troubles]
        return _json(api.Readiness(ready=not unready, degraded=degraded), status)

    async def _show_metrics(self, request: web.Request, _: Credential) -> web.Response:
        """What the index and this process count is there even while the node is not."""
        try:
            await self._subject.stats()
        except Unavailable:
            log.info("metrics without a node")
        self._subject.show()
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _openapi(self, request: web.Request, _: Credential) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")

    async def _stats(self, request: web.Request, _: Credential) -> web.Response:
        values, age_ms = await self._subject.stats()
        index = self._subject.index
        now_ns = self._clock.now_ns()
        state = api.IndexState(
            entries=index.entries,
            bytes=index.bytes,
            bytes_max=index.bytes_max,
            refused_blocks=index.refused_blocks,
            sources={each.source: as_of(each, now_ns) for each in index.sources()},
        )
        return _json(
            api.StatsReply(
                node=self._subject.node,
                incarnation=self._subject.incarnation,
                release=__version__,
                age_ms=age_ms,
                values=values,
                index=state,
            )
        )

    async def _tuning(self, request: web.Request, _: Credential) -> web.Response:
        return _json(tuning(await self._subject.tune(Tune(TELL))))

    async def _tune(self, request: web.Request, _: Credential) -> web.Response:
        asked = await _asked(request, api.TuningRequest)
        return _json(tuning(await self._subject.tune(Tune(SET, asked.tier, asked.policy, asked.params))))

    async def _locate(self, request: web.Request, credential: Credential) -> web.Response:
        asked = await _asked(request, api.LocateRequest)
        key = self._credentials.tenant_key(credential.tenant)
        now_ns = self._clock.now_ns()
        found = locate(self._subject.index, credential.tenant, key, asked, now_ns, self._fleet.is_of)
        return _json(found)

    async def _place(self, request: web.Request, credential: Credential) -> web.Response:
        asked = await _asked(request, api.PlacementRequest)
        key = self._credentials.tenant_key(credential.tenant)
        return _json(place(self._fleet, credential.tenant, key, asked, self._clock))

    async def _workers(self, request: web.Request, credential: Credential) -> web.Response:
        """Without a credentials file there is nobody to keep apart, and a tenant is a label."""
        tenant = credential.tenant if self._credentials.anonymous is None else None
        return _json(workers(self._fleet, self._clock, tenant))


class _Unauthorised(NotAllowed):
    def __init__(self) -> None:
        super().__init__(
            "not_allowed",
            "a token is needed",
            "none was sent, or it is not known here",
            "send Authorization: Bearer TOKEN, with one of the node's credentials file",
        )


_NOBODY = Credential("", frozenset())


def _nothing_here() -> NotAllowed:
    """For a path that is not there and for one that this credential may not use."""
    return NotAllowed(
        "not_allowed",
        "nothing answers this method at this path, or not to this credential",
        "",
        "see docs/http.md for paths, methods and roles",
    )


def _unavailable(why: str) -> Unavailable:
    return Unavailable("unavailable", "this cannot be answered now", why, "ask again in a moment")


async def _asked(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(
            "bad_message", "a body that is not what this path takes", str(error)[:200], "see /openapi.json"
        ) from error


def _json(answer: api.Answer, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type="application/json")


def _problem(error: KVCacheError, status: HTTPStatus | None = None) -> web.Response:
    if isinstance(error, _Unauthorised):
        status = HTTPStatus.UNAUTHORIZED
    problem = api.problem(error, status)
    response = web.Response(
        body=msgspec.json.encode(problem), status=problem.status, content_type="application/problem+json"
    )
    if problem.status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _host_name(host: str) -> str:
    """``[::1]:80`` is ``::1``, ``localhost:80`` is ``localhost``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
