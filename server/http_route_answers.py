"""What a router answers by itself: errors as OpenAI has them, its models, and why it chose as it did."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web

from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput, KVCacheError, NotAllowed, Unavailable
from kvcache.metrics import CONTENT_TYPE
from kvcache.routing.choose import Choice
from kvcache.server.http_forward import Silent

HEADER_CHARS_MAX = 512
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Server": "kvcache"}
RETRY_AFTER = {"Retry-After": "1"}
TAKEN_S = 2.0
"""So long a client may take for what it was sent before an answer was cut."""

_STATUSES = {"not_allowed": 404, "unknown_model": 404, "too_large": 413, "unavailable": 503}


@dataclass(frozen=True, slots=True)
class Made:
    """A choice that was made, without the prompt. ``tried``: the workers that did not answer before."""

    tenant: str
    model: str
    choice: Choice
    notes: tuple[str, ...]
    tried: tuple[str, ...]
    at_ns: int


class Unauthorised(NotAllowed):
    def __init__(self) -> None:
        super().__init__(
            "not_allowed", "a request without a good token", "", "send Authorization: Bearer TOKEN"
        )


class Busy(Unavailable):
    """Come back in a moment. ``status`` says whether we are (503), or all workers (429)."""

    def __init__(self, what: str, status: int = 503, todo: str = "come back in a moment") -> None:
        super().__init__("unavailable", what, "", todo)
        self.status = status


def host_name(host: str) -> str:
    """Of ``HOST:PORT`` or ``[V6]:PORT``, without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def nothing_here() -> NotAllowed:
    return NotAllowed("not_allowed", "there is nothing here", "or this token may not use it")


def too_large(bytes_max: int) -> BadInput:
    return BadInput("too_large", f"a body of over {bytes_max:,} bytes", "that is the limit", "send less")


def nobody_answered(tried: Sequence[str], silent: Sequence[Silent]) -> Busy:
    if not silent:
        return Busy("the request's time was over before a worker was asked", 503, "see --request-ms")
    if all(each.busy for each in silent):
        return Busy("all workers that were tried are busy", 429)
    return Busy(f"none of {len(tried)} workers answered: {silent[-1].why}", 502, "see the log of the router")


def problem(error: KVCacheError) -> web.Response:
    """The error, where clients of OpenAI look for it; ``code`` is one of ``kvcache.errors.CODES``."""
    status = _STATUSES.get(error.code, 400)
    if isinstance(error, Unauthorised):
        status = 401
    if isinstance(error, Busy):
        status = error.status
    kind = "server_error" if status >= 500 else "invalid_request_error"
    message = "; ".join(part for part in (error.what, error.why, error.todo) if part)
    body = {"error": {"message": message, "type": kind, "param": None, "code": error.code}}
    response = plain(body, status)
    if isinstance(error, Unavailable):
        response.headers.update(RETRY_AFTER)
    if isinstance(error, Unauthorised):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def plain(value: object, status: int = 200) -> web.Response:
    """As JSON."""
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json", headers=HEADERS)


def page(body: bytes) -> web.Response:
    """For Prometheus."""
    return web.Response(body=body, headers={**HEADERS, "Content-Type": CONTENT_TYPE})


def models(names: Sequence[str]) -> web.Response:
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "kvcache"} for name in names]
    return plain({"object": "list", "data": data})


def choices(made: Sequence[Made], now_ns: int) -> web.Response:
    """The last ones first, each with all terms of all its candidates."""
    return plain({"choices": [_told(each, now_ns) for each in made]})


def header_text(text: str) -> str:
    """Of one line, in what a header may hold."""
    kept = "".join(each if " " <= each <= "~" else "?" for each in text)
    return kept if len(kept) <= HEADER_CHARS_MAX else f"{kept[: HEADER_CHARS_MAX - 3]}..."


async def cut(request: web.Request, response: web.StreamResponse, last: bytes) -> None:
    """End an answer that is not whole, so that the client sees that. Between two events of a stream, an event
    says so first."""
    with contextlib.suppress(OSError):
        if response.content_type == "text/event-stream" and last.endswith((b"\n\n", b"\r\n\r\n")):
            error = {"message": "the worker died in the middle of its answer", "type": "server_error"}
            told = msgspec.json.encode({"error": {**error, "param": None, "code": "unavailable"}})
            await response.write(b"data: " + told + b"\n\n")
    if (transport := request.transport) is not None:
        transport.close()  # Without the end that a whole answer has.
        asyncio.get_running_loop().call_later(TAKEN_S, transport.abort)


def _told(made: Made, now_ns: int) -> dict[str, object]:
    choice = made.choice
    return {
        "age_ms": max(0, now_ns - made.at_ns) // NS_PER_MS,
        "model": made.model,
        "worker": choice.worker,
        "cost": choice.cost,
        "how": choice.how,
        "session": choice.session,
        "blind": choice.blind,
        "prompt_tokens": choice.prompt_tokens,
        "why": choice.why,
        "notes": made.notes,
        "tried": made.tried,
        "candidates": [
            {
                "worker": each.worker,
                "cost": each.cost,
                "terms": [
                    {"name": term.name, "raw": term.raw, "weighted": term.weighted} for term in each.terms
                ],
            }
            for each in choice.explanation()
        ],
    }
