"""What routers say and are told: understood, answered, or ignored, and never an error."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from kvcache.client.connectors.handoff import Handoff, answer, read
from kvcache.request_hints import RequestHints, session_number

PREFILL = {"v": 1, "do": "prefill", "push_to": "node-b"}
DECODE = {"v": 1, "do": "decode", "source": "node-a", "blocks": 40, "tokens": 1280, "pushed": True}


def test_our_own_words() -> None:
    assert read({"kvcache": PREFILL}) == Handoff("prefill", push_to="node-b")
    assert read({"kvcache": {"v": 1, "do": "prefill"}}) == Handoff("prefill")
    decode = Handoff("decode", source="node-a", block_count=40, pushed=True)
    assert read({"kvcache": DECODE}) == decode
    assert decode.promised == 40


def test_a_router_that_sends_both_at_once_need_not_know_how_much() -> None:
    asked = read({"kvcache": {"v": 1, "do": "decode", "source": "node-a", "wait_ms": 20_000}})
    assert asked == Handoff("decode", source="node-a", wait_ms=20_000)
    assert asked.promised > 1_000_000


def test_what_is_known_of_the_request_comes_with_it_or_alone() -> None:
    said = {"hint": "tool_call", "session": 7, "priority": 60, "gap_ms": 5_000, "keep_ms": 90_000}
    hints = RequestHints("tool_call", 60, 7, 5_000, 90_000)
    assert read({"kvcache": {"v": 1, **said}}) == Handoff(hints=hints)
    assert read({"kvcache": {**PREFILL, **said}}) == Handoff("prefill", push_to="node-b", hints=hints)
    assert read({"kvcache": {**DECODE, **said}}).hints == hints
    named = read({"kvcache": {"v": 1, "session": "chat-17"}})
    assert named.hints == RequestHints(session=session_number("chat-17"))


def test_what_a_prefill_answers_is_what_a_decode_understands() -> None:
    """Through JSON, as a router passes it on."""
    for asked in (read({"kvcache": PREFILL}), read({"do_remote_decode": True, "kvcache": PREFILL})):
        params = json.loads(json.dumps(answer(asked, "node-a", 40, 32)))
        assert params["kvcache"] == DECODE
        assert read(params) == Handoff("decode", source="node-a", block_count=40, pushed=True)


def test_the_flags_of_other_proxies() -> None:
    """What vLLM's proxies send to an engine that is to prefill, and pass on from its answer."""
    sent = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    params = answer(read(sent), "node-a", 3, 32)
    assert params is not None
    assert (params["do_remote_prefill"], params["do_remote_decode"]) == (True, False)
    assert read(params) == Handoff("decode", source="node-a", block_count=3)
    assert read({"do_remote_prefill": True}) == Handoff("decode")
    assert read({"do_remote_prefill": True}).promised == 0


def test_without_blocks_or_a_node_nothing_is_promised() -> None:
    asked = read({"kvcache": PREFILL})
    assert answer(asked, "node-a", 0, 32) is None
    assert answer(asked, "", 5, 32) is None
    flagged = read({"do_remote_decode": True})
    assert answer(flagged, "", 5, 32) == {"do_remote_prefill": True, "do_remote_decode": False}
    assert answer(read({"kvcache": DECODE}), "node-b", 5, 32) is None
    assert answer(read(None), "node-a", 5, 32) is None
    assert read({"kvcache": {**DECODE, "blocks": 0}}) == Handoff("decode", block_count=0)


def test_a_node_pushes_nothing_to_itself() -> None:
    params = answer(read({"kvcache": PREFILL}), "node-b", 5, 32)
    assert params is not None
    assert params["kvcache"]["pushed"] is False  # type: ignore[index]  # it is a dict


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        ({**PREFILL, "v": 2}, "version"),
        ({**PREFILL, "v": 0}, "version"),
        ({**PREFILL, "v": True}, "garbage"),
        ({**PREFILL, "v": "1"}, "garbage"),
        ({"do": "prefill"}, "garbage"),
        ({"v": 1}, "garbage"),
        ({"v": 1, "do": "both"}, "garbage"),
        ({"v": 1, "do": ["prefill"]}, "garbage"),
        ({**PREFILL, "push_to": 5}, "garbage"),
        ({**PREFILL, "push_to": "n" * 256}, "garbage"),
        ({**PREFILL, "push_to": "a\nb"}, "garbage"),
        ({**DECODE, "source": None}, "garbage"),
        ({**DECODE, "blocks": -1}, "garbage"),
        ({**DECODE, "blocks": 1.5}, "garbage"),
        ({**DECODE, "blocks": 1 << 80}, "garbage"),
        ({**DECODE, "pushed": "yes"}, "garbage"),
        ({**DECODE, "wait_ms": 600_001}, "garbage"),
        ({**PREFILL, "hint": "soon"}, "garbage"),
        ({"v": 1, "priority": 101}, "garbage"),
        ({"v": 1, "priority": "high"}, "garbage"),
        ({"v": 1, "session": "n" * 256}, "garbage"),
        ({"v": 1, "gap_ms": -5}, "garbage"),
        ({"v": 1, "keep_ms": 1 << 70}, "garbage"),
        ({"v": 2, "hint": "tool_call"}, "version"),
        ("prefill", "garbage"),
        ([1], "garbage"),
        (0, "garbage"),
    ],
)
def test_what_is_not_understood_is_ignored(ours: object, why: str) -> None:
    assert read({"kvcache": ours}) == Handoff(ignored=why)
    assert read({"kvcache": ours, "do_remote_decode": True}) == Handoff("prefill", flagged=True, ignored=why)


def test_what_a_later_release_adds_is_left_alone() -> None:
    assert read({"kvcache": {**DECODE, "later": [1]}, "other": 3}).source == "node-a"


@pytest.mark.parametrize("params", [5, "text", [], b"x", True])
def test_params_that_are_no_map(params: object) -> None:
    assert read(params) == Handoff(ignored="garbage")


def test_no_params_whatever_raise() -> None:
    draw = random.Random(0)
    values: list[Any] = [None, True, -1, 0, 1, 1.5, "", "prefill", "decode", "node", [], {}, float("nan")]
    names = ["v", "do", "push_to", "source", "blocks", "pushed", "wait_ms", "hint", "session", "priority"]
    for _ in range(2_000):
        ours = {name: draw.choice(values) for name in draw.sample(names, draw.randrange(len(names) + 1))}
        params = {
            "kvcache": draw.choice([ours, draw.choice(values)]),
            "do_remote_decode": draw.choice(values),
        }
        asked = read(params)
        answer(asked, "node-a", 4, 32)
        assert asked.do in ("", "prefill", "decode")
