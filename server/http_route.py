"""The application of ``kvcache route``: OpenAI's requests, each passed on to the worker that suits it.

    request ──read──► tokens ──choose──► worker ──answer──► the client, byte by byte
                        │         ▲         │ nothing came: the next best, at most ``attempts``
                        │         └─────────┘
                        └ not known: the choice is made without the index, and says so

What is wrong with the index, a tokenizer or one worker never fails a request. An answer that ends in the
middle is not mended: the connection is cut, so that nobody takes a part for the whole.

Limits: ``requests_max`` at once, ``body_bytes_max`` each, ``Waits`` for everything, the last ``CHOICES_KEPT``
choices. Tenants meet neither workers nor choices of each other.

The sum: 1.7 ms a request beside the worker's, for 4,096 token ids (parsed, named, chosen; a connection made,
two HTTP heads); 40 us a chunk. So one process passes on some 500 requests or 20,000 chunks a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from kvcache.clock import Clock
from kvcache.config import is_loopback
from kvcache.credentials import Credential, Credentials
from kvcache.errors import BadInput, KVCacheError, NotAllowed
from kvcache.fleet import Worker
from kvcache.metrics_route import RouteMetrics
from kvcache.routing.fleet_state import FleetState, NoWorker, Placement, Routed
from kvcache.routing.view import View
from kvcache.routing.waiting import Waiting
from kvcache.server import http_route_answers as answers
from kvcache.server.http_forward import Answer, Cut, Forwarder, Silent, passed_on
from kvcache.server.http_tokens import Tokens
from kvcache.server.route_hints import HEADERS as HINT_HEADERS
from kvcache.server.route_hints import with_hints
from kvcache.server.route_prompt import Prompt, read_prompt

log = logging.getLogger("kvcache.server.route")

CHOICES_KEPT = 256
READ_S = 30.0
CLIENTS = frozenset({"reader"})
OPERATORS = frozenset({"router", "operator"})
NOT_SENT = (
    *("host", "content-length", "content-encoding", "authorization"),
    *("x-kvcache-session", *HINT_HEADERS, "expect", "cookie"),
)
"""``content-encoding``: a body that came compressed was decompressed to be read, and goes on as that."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the application. ``authorization`` is what workers are shown; empty: what the client sent, unless
    that was meant for us."""

    requests_max: int = 1_024
    body_bytes_max: int = 16 << 20
    attempts: int = 3
    whole_s: float = 600.0
    authorization: str = ""


@dataclass(slots=True)
class Parts:
    """What the application works with. ``tokens`` None: no worker is asked for any."""

    state: FleetState
    view: View
    forwarder: Forwarder
    tokens: Tokens | None
    metrics: RouteMetrics
    credentials: Credentials
    clock: Clock
    limits: Limits = field(default_factory=Limits)
    troubles: Callable[[], list[str]] = list
    """What is wrong with the index, in plain words."""


Handler = Callable[[web.Request, Credential], Awaitable[web.StreamResponse]]


class RouteApp:
    """One event loop owns it. To be run with ``handler_cancellation``: who leaves ends his request."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._state = parts.state
        self._metrics = parts.metrics
        self._limits = parts.limits
        self._running = 0
        self._waiting: Waiting[Placement] = Waiting()
        self._choices: deque[answers.Made] = deque(maxlen=CHOICES_KEPT)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=self._limits.body_bytes_max, middlewares=[self._around])
        for method, path, roles, handler in (
            ("POST", "/v1/completions", CLIENTS, self._complete),
            ("POST", "/v1/chat/completions", CLIENTS, self._complete),
            ("GET", "/v1/models", CLIENTS, self._models),
            ("GET", "/v1/choices", OPERATORS, self._show_choices),
            ("GET", "/metrics", OPERATORS, self._show_metrics),
            ("GET", "/healthz", frozenset[str](), self._healthz),
            ("GET", "/readyz", frozenset[str](), self._readyz),
        ):
            app.router.add_route(method, path, self._guarded(roles, handler))
        return app

    # --- around every request -------------------------------------------------------------------

    @web.middleware
    async def _around(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Errors as OpenAI has them, and the count of it all."""
        try:
            if request.match_info.http_exception is not None:
                self._credential(request)
                raise answers.nothing_here()
            response = await handler(request)
        except KVCacheError as error:
            response = answers.problem(error)
        except web.HTTPRequestEntityTooLarge:
            response = answers.problem(answers.too_large(self._limits.body_bytes_max))
        except web.HTTPException as error:
            response = answers.problem(BadInput("bad_message", "a request that cannot be read", error.reason))
        resource = request.match_info.route.resource
        route = "other" if resource is None else resource.canonical
        self._metrics.requests.labels(route, str(response.status)).inc()
        return response

    def _guarded(
        self, roles: frozenset[str], handler: Handler
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def guarded(request: web.Request) -> web.StreamResponse:
            if not roles:
                return await handler(request, _NOBODY)
            self._check_host(request)
            credential = self._credential(request)
            if not roles & credential.roles:
                raise answers.nothing_here()
            if self._running >= self._limits.requests_max:
                raise answers.Busy(f"{self._running} requests are being answered")
            self._running += 1
            self._metrics.running.set(self._running)
            try:
                return await handler(request, credential)
            finally:
                self._running -= 1
                self._metrics.running.set(self._running)

        return guarded

    def _check_host(self, request: web.Request) -> None:
        """Without tokens, a page in somebody's browser must not get here by a name that it controls."""
        if not self._parts.credentials.has_tokens and not is_loopback(answers.host_name(request.host)):
            raise NotAllowed("not_allowed", "a request to another host's name", "use 127.0.0.1, or tokens")

    def _credential(self, request: web.Request) -> Credential:
        found = self._parts.credentials.anonymous
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if self._parts.credentials.has_tokens and token and kind.lower() == "bearer":
            found = self._parts.credentials.by_token(token.strip())
        if found is None:
            raise answers.Unauthorised()
        return found

    # --- completions ----------------------------------------------------------------------------

    async def _complete(self, request: web.Request, credential: Credential) -> web.StreamResponse:
        if request.content_type != "application/json":
            raise BadInput("bad_message", "a body that is not application/json", "it must say so")
        began = time.monotonic()
        try:
            async with asyncio.timeout(READ_S):
                raw = await request.read()
        except TimeoutError as error:
            raise BadInput("bad_message", "a body that did not come", f"within {READ_S:g} s") from error
        except web.RequestPayloadError as error:
            raise BadInput("bad_message", "a body that cannot be read", "see its headers") from error
        prompt = read_prompt(raw, request.path, request.headers.get("x-kvcache-session", ""))
        raw = with_hints(raw, request.headers, prompt.session)
        headers = self._headers(request)
        tokens = await self._tokens(prompt, credential.tenant, headers)
        return await self._attempts(request, credential.tenant, prompt, tokens, headers, raw, began)

    async def _attempts(
        self,
        request: web.Request,
        tenant: str,
        prompt: Prompt,
        tokens: array[int] | None,
        headers: Mapping[str, str],
        raw: bytes,
        began: float,
    ) -> web.StreamResponse:
        """One worker after another, until one answers."""
        tried: list[str] = []
        silent: list[Silent] = []
        while len(tried) < self._limits.attempts and (left_s := self._left_s(began)) > 0:
            try:
                routed = self._choose(tenant, prompt, tokens, tried)
            except NoWorker:
                if not tried:
                    raise
                break
            now_ns = self._parts.clock.now_ns()
            number = self._state.begin(routed, now_ns)
            self._waiting.begin(number, routed.placements, now_ns)
            try:
                opened = self._parts.forwarder.open(
                    routed.worker, request.path_qs, headers, raw, prompt.stream, left_s
                )
                async with opened as answer:
                    self._metrics.first_byte.observe(time.monotonic() - began)
                    self._heard(routed, answer, number)
                    return await self._relay(request, routed, answer, began)
            except Silent as error:
                self._silent(routed, error)
                tried.append(routed.worker.name)
                silent.append(error)
            finally:
                self._state.loads.end(number)
                self._waiting.end(number)
        raise answers.nobody_answered(tried, silent)

    def _choose(self, tenant: str, prompt: Prompt, tokens: array[int] | None, tried: list[str]) -> Routed:
        """RAISES NoWorker."""
        state, view = self._state, self._parts.view
        session = prompt.session or ("" if tokens is not None else prompt.beginning)
        asked = state.ask(
            view,
            prompt.model,
            tokens,
            prompt_tokens=prompt.about,
            session=f"{tenant}\0{session}" if session else "",
            tenant=tenant,
        )
        now_ns = self._parts.clock.now_ns()
        self._place(self._waiting.due(now_ns))
        routed = state.choose(asked, view.find(asked.queries), view, now_ns, avoid=tried, url_needed=True)
        self._place(routed.placements)
        self._choices.append(
            answers.Made(tenant, prompt.model, routed.choice, routed.notes, tuple(tried), now_ns)
        )
        metrics, chosen = self._metrics, routed.choice
        metrics.choices.labels(chosen.how).inc()
        metrics.blind.inc(chosen.blind)
        metrics.prompt_tokens.inc(chosen.prompt_tokens)
        metrics.cached_tokens.inc(min(chosen.prompt_tokens, sum(chosen.candidate.cached)))
        return routed

    def _left_s(self, began: float) -> float:
        return max(0.0, self._limits.whole_s - (time.monotonic() - began))

    def _heard(self, routed: Routed, answer: Answer, number: int) -> None:
        self._state.health.succeeded(routed.worker.name)
        if answer.status < 400:
            self._state.loads.first_token(number, self._parts.clock.now_ns())
            self._place(self._waiting.first_token(number))

    def _place(self, placements: Sequence[Placement]) -> None:
        for each in placements:
            self._parts.view.place(each.source, each.namespace, each.hints)

    def _silent(self, routed: Routed, error: Silent) -> None:
        self._metrics.failures.labels("before").inc()
        name = routed.worker.name
        log.warning("worker %s did not answer: %s", name, error.why)
        if error.dead:
            self._state.health.failed(name, error.why, self._parts.clock.now_ns())

    async def _relay(
        self, request: web.Request, routed: Routed, answer: Answer, began: float
    ) -> web.StreamResponse:
        """The answer as it comes. When it ends before its end, so does the connection."""
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        response.headers["x-kvcache-worker"] = routed.worker.name
        response.headers["x-kvcache-why"] = answers.header_text(routed.why)
        last = answer.first
        try:
            await response.prepare(request)
            async with asyncio.timeout(self._left_s(began)):
                await response.write(answer.first)
                async for chunk in answer.rest():
                    await response.write(chunk)
                    last = chunk
                await response.write_eof()
        except (Cut, TimeoutError) as error:
            self._metrics.failures.labels("after").inc()
            log.warning("the answer of worker %s was cut: %s", routed.worker.name, str(error) or "too long")
            await answers.cut(request, response, last)
        except ConnectionResetError:
            log.info("a client left in the middle of its answer")
        return response

    # --- tokens and headers ---------------------------------------------------------------------

    async def _tokens(self, prompt: Prompt, tenant: str, headers: Mapping[str, str]) -> array[int] | None:
        if prompt.tokens is not None:
            self._metrics.tokenized.labels("given").inc()
            return array("I", prompt.tokens)
        found = None
        if prompt.tokenize and self._parts.tokens is not None:
            now_ns = self._parts.clock.now_ns()
            serving = self._state.serving(prompt.model, "any", tenant)
            alive = [each for each in serving if not self._state.health.why_down(each.name, now_ns)]
            found = await self._parts.tokens.of(prompt.tokenize, tenant, alive, self._shown(headers))
        self._metrics.tokenized.labels("unknown" if found is None else "a worker").inc()
        return found

    def _headers(self, request: web.Request) -> Mapping[str, str]:
        """What a worker is sent. A token that was meant for us goes no further."""
        sent = passed_on(request.headers)
        given = request.headers.get("Authorization", "")
        for name in NOT_SENT:
            sent.popall(name, None)
        if self._limits.authorization:
            sent["Authorization"] = self._limits.authorization
        elif given and not self._parts.credentials.has_tokens:
            sent["Authorization"] = given
        return sent

    def _shown(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {name: headers[name] for name in ("Authorization",) if name in headers}

    # --- all else -------------------------------------------------------------------------------

    async def _models(self, request: web.Request, credential: Credential) -> web.StreamResponse:
        serving = self._state.serving("", None, credential.tenant)
        return answers.models(sorted({each.model for each in serving if each.model}))

    async def _show_choices(self, request: web.Request, credential: Credential) -> web.StreamResponse:
        wanted = request.query.get("limit", str(CHOICES_KEPT))
        limit = int(wanted) if wanted.isdecimal() and len(wanted) < 9 else CHOICES_KEPT
        mine = [each for each in reversed(self._choices) if each.tenant == credential.tenant]
        return answers.choices(mine[:limit], self._parts.clock.now_ns())

    async def _show_metrics(self, request: web.Request, credential: Credential) -> web.StreamResponse:
        self._metrics.workers.set(len(self._state.workers))
        self._metrics.workers_up.set(len(self._up()))
        return answers.page(self._metrics.render())

    async def _healthz(self, request: web.Request, credential: Credential) -> web.StreamResponse:
        return answers.plain({"alive": True})

    async def _readyz(self, request: web.Request, credential: Credential) -> web.StreamResponse:
        up = self._up()
        down = sorted({each.name for each in self._state.workers} - {each.name for each in up})
        degraded = [f"worker {name} is passed over" for name in down] + self._parts.troubles()
        if not up:
            degraded.insert(0, "no worker can be sent requests")
        return answers.plain({"ready": bool(up), "degraded": degraded[:100]}, 200 if up else 503)

    def _up(self) -> list[Worker]:
        now_ns, health = self._parts.clock.now_ns(), self._state.health
        return [each for each in self._state.workers if each.url and not health.why_down(each.name, now_ns)]


_NOBODY = Credential("", frozenset())
