"""Headers of a request that become hints in its body, or do not."""

from __future__ import annotations

import json

import pytest

from kvcache.client.connectors.handoff import read
from kvcache.errors import BadInput
from kvcache.request_hints import RequestHints, session_number
from kvcache.server.route_hints import with_hints
from tests.kvcache.routing.fleet_double import TOKENS
from tests.server.http_double import in_loop
from tests.server.route_double import routing

RAW = b'{ "model": "m", "prompt": "hello", "seed": 12345678901234567890 }'


def test_what_the_headers_say_is_what_the_engine_reads() -> None:
    headers = {
        "x-kvcache-hint": "tool_call",
        "x-kvcache-priority": " 70 ",
        "x-kvcache-gap-ms": "8000",
        "x-kvcache-keep-ms": "120000",
    }
    body = json.loads(with_hints(RAW, headers, "chat-17"))
    told = read(body.pop("kv_transfer_params")).hints
    assert told == RequestHints("tool_call", 70, session_number("chat-17"), 8_000, 120_000)
    assert body == json.loads(RAW)


@pytest.mark.parametrize("headers", [{}, {"x-kvcache-session": "chat-17"}, {"x-kvcache-hint": "unknown"}])
def test_a_body_of_which_nothing_is_said_passes_as_it_came(headers: dict[str, str]) -> None:
    assert with_hints(RAW, headers, "") is RAW


def test_a_body_that_says_so_itself_passes_as_it_came() -> None:
    raw = b'{"prompt": "x", "kv_transfer_params": {"do_remote_decode": true}}'
    assert with_hints(raw, {"x-kvcache-hint": "tool_call"}, "") is raw


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-kvcache-hint", "soon"),
        ("x-kvcache-hint", ""),
        ("x-kvcache-priority", "101"),
        ("x-kvcache-priority", "-1"),
        ("x-kvcache-gap-ms", "1e3"),
        ("x-kvcache-gap-ms", "9" * 5_000),
        ("x-kvcache-keep-ms", "604800001"),
    ],
)
def test_headers_that_say_nothing_are_refused(name: str, value: str) -> None:
    with pytest.raises(BadInput) as refused:
        with_hints(RAW, {name: value}, "")
    assert refused.value.code == "bad_message"


@in_loop
async def test_a_router_passes_them_on() -> None:
    async with routing("a") as here:
        raw = json.dumps({"model": "m", "prompt": TOKENS}).encode()
        answer = await here.asked(raw, x_kvcache_hint="tool_call", x_kvcache_session="chat-17")
        assert answer.status == 200
        [(headers, body)] = here.workers["a"].seen
        told = read(json.loads(body)["kv_transfer_params"]).hints
        assert told == RequestHints("tool_call", session=session_number("chat-17"))
        assert "x-kvcache-hint" not in headers
        refused = await here.asked(raw, x_kvcache_hint="soon")
        assert (refused.status, len(here.workers["a"].seen)) == (400, 1)
