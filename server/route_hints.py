"""What a client says of its request in headers, as engines understand it: in the body.

    x-kvcache-hint: tool_call        x-kvcache-gap-ms: 8000       ──►  "kv_transfer_params":
    x-kvcache-priority: 70           x-kvcache-keep-ms: 120000             {"kvcache": {"v": 1, "hint": ...}}

Without one of these headers a body passes as it came. With one, the session goes along. A body that says
something of that kind itself is left as it is.

The sum: a body of 1 MB costs 2 ms, and only where there is such a header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import msgspec

from kvcache.errors import BadInput
from kvcache.request_hints import UNKNOWN, RequestHints, session_number

HEADERS = ("x-kvcache-hint", "x-kvcache-priority", "x-kvcache-gap-ms", "x-kvcache-keep-ms")
_PARAMS, _OURS, _VERSION = "kv_transfer_params", "kvcache", 1


def with_hints(raw: bytes, headers: Mapping[str, str], session: str) -> bytes:
    """The body for a worker. REQUIRES: it is a JSON object. RAISES BadInput for headers that say nothing."""
    said = {name: headers[name].strip() for name in HEADERS if name in headers}
    if not said:
        return raw
    hints = RequestHints(
        said.get("x-kvcache-hint", UNKNOWN.hint),
        _number(said, "x-kvcache-priority", UNKNOWN.priority),
        session_number(session) if session else UNKNOWN.session,
        _number(said, "x-kvcache-gap-ms", UNKNOWN.gap_ms),
        _number(said, "x-kvcache-keep-ms", UNKNOWN.keep_ms),
    )
    body = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    if _PARAMS in body:
        return raw
    plain = asdict(UNKNOWN)
    told = {name: value for name, value in asdict(hints).items() if value != plain[name]}
    part = {_OURS: {"v": _VERSION, **told}} if told else {}
    return msgspec.json.encode({**body, _PARAMS: part}) if part else raw


def _number(said: Mapping[str, str], name: str, default: int) -> int:
    text = said.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > len(str(1 << 63)):
        raise BadInput("bad_message", f"{name} is {text!r:.40}", "it is a whole number", "see docs/hints.md")
    return int(text)
