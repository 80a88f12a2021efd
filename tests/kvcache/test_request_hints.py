"""What is said of a request: checked where it is said and where it arrives, and told as it was said."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest

from kvcache import wire
from kvcache.errors import BadInput
from kvcache.policy import HINTS
from kvcache.request_hints import AHEAD_MS_MAX, SESSION_MAX, UNKNOWN, RequestHints, hints_of, session_number


@dataclass(frozen=True)
class Message:
    hint: str = "unknown"
    priority: int = 50
    session: int = -1
    gap_ms: int = -1
    keep_ms: int = -1


def test_what_is_said_is_told() -> None:
    context = RequestHints("tool_call", 70, 5, 8_000, 60_000).context(9, "t", 48)
    assert (context.hint, context.priority, context.session) == ("tool_call", 70, 5)
    assert (context.expected_gap_ms, context.keep_ms) == (8_000, 60_000)
    assert (context.now_ns, context.tenant, context.prompt_tokens) == (9, "t", 48)


def test_what_is_not_said_is_not_known() -> None:
    context = UNKNOWN.context(9, "")
    assert (context.hint, context.priority, context.session) == ("unknown", 50, -1)
    assert (context.expected_gap_ms, context.keep_ms) == (None, None)


@pytest.mark.parametrize("hint", HINTS)
def test_every_hint_of_the_policies_can_be_said(hint: str) -> None:
    assert RequestHints(hint).context(1, "").hint == hint


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"hint": "assistant"}, "assistant"),
        ({"priority": 101}, "priority is 101"),
        ({"priority": -1}, "priority is -1"),
        ({"priority": True}, "priority is True"),
        ({"session": 1 << 63}, "session"),
        ({"session": "chat"}, "session"),
        ({"gap_ms": AHEAD_MS_MAX + 1}, "gap_ms"),
        ({"keep_ms": -2}, "keep_ms"),
        ({"keep_ms": 1.5}, "keep_ms"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], word: str) -> None:
    with pytest.raises(BadInput, match=word) as refused:
        RequestHints(**fields)  # type: ignore[arg-type]  # That is what is tried.
    assert refused.value.code == "bad_message"


def test_times_of_clients_that_did_not_bound_them_are_cut() -> None:
    told = hints_of(Message(gap_ms=1 << 60, keep_ms=1 << 62, session=(1 << 64) - 1))
    assert (told.gap_ms, told.keep_ms) == (AHEAD_MS_MAX, AHEAD_MS_MAX)
    assert 0 <= told.session <= SESSION_MAX
    with pytest.raises(BadInput, match="soon"):
        hints_of(Message(hint="soon"))


def test_a_session_that_has_a_name_has_a_number() -> None:
    assert session_number("chat-17") == session_number("chat-17") != session_number("chat-18")
    assert 0 <= session_number("") <= SESSION_MAX
    RequestHints(session=session_number("\udc80"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"type": "lease", "namespace": b"n", "prefix": b"p"}, wire.TakeLease(b"n", b"p")),
        (
            {
                "type": "lease",
                "namespace": b"n",
                "prefix": b"p",
                "request": "",
                "duration_ms": 30_000,
                "wait_ms": 0,
                "prefill_tokens_s": 0,
                "source": "",
                "pushed": False,
                "parent": b"",
            },
            wire.TakeLease(b"n", b"p"),
        ),
        (
            {
                "type": "reserve",
                "namespace": b"n",
                "parent": b"",
                "prefix": b"p",
                "hint": "turn_end",
                "priority": 50,
                "session": -1,
                "gap_ms": -1,
                "push": "",
            },
            wire.Reserve(b"n", b"", b"p", "turn_end"),
        ),
    ],
)
def test_what_earlier_clients_send_is_understood(old: dict[str, object], new: wire.Request) -> None:
    assert wire.decode_request(msgspec.msgpack.encode([1, old])) == (1, new)


def test_nothing_is_sent_of_what_is_not_said() -> None:
    """So that a node of an earlier release understands whoever says nothing new."""
    sent = msgspec.msgpack.decode(wire.encode(1, wire.TakeLease(b"n", b"p"))[wire.HEADER.size :])
    assert sent == [1, {"type": "lease", "namespace": b"n", "prefix": b"p"}]
    sent = msgspec.msgpack.decode(wire.encode(1, wire.Reserve(b"n", b"", b"p"))[wire.HEADER.size :])
    assert sent == [1, {"type": "reserve", "namespace": b"n", "parent": b"", "prefix": b"p"}]
