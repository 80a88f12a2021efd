"""The frame reader: whatever the sizes of the pieces, replies and payloads come out whole, or it refuses."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.errors import BadInput, KVCacheError, NotAllowed
from kvcache.frames import SCRATCH_BYTES, Arrival, FrameReader, failure_error
from kvcache.wire import HEADER, Blocks, Failure, Matched, Message, StatsReply, encode


def feed(reader: FrameReader, data: bytes, piece_bytes: int) -> list[Arrival]:
    arrivals: list[Arrival] = []
    at = 0
    while at < len(data):
        buffer = reader.buffer()
        assert len(buffer)
        count = min(len(buffer), piece_bytes, len(data) - at)
        buffer[:count] = data[at : at + count]
        arrivals += reader.received(count)
        at += count
    return arrivals


def frame(call: int, message: Message, payload: bytes = b"") -> bytes:
    return encode(call, message, len(payload)) + payload


@given(piece_bytes=st.integers(1, 300), sizes=st.lists(st.integers(0, 90), min_size=1, max_size=4))
def test_any_cut_gives_the_same_replies(piece_bytes: int, sizes: list[int]) -> None:
    payload = (bytes(range(256)) * 2)[: sum(sizes)]
    views = [memoryview(bytearray(size)) for size in sizes]
    reader = FrameReader()
    reader.expect(1)
    reader.expect(2, views)
    reader.expect(3)
    data = frame(1, Matched(5)) + frame(2, Blocks(1), payload) + frame(3, Matched(7))
    arrivals = feed(reader, data, piece_bytes)
    assert [arrival.call for arrival in arrivals] == [1, 2, 3]
    assert b"".join(views) == payload


@pytest.mark.parametrize("piece_bytes", [1_000, SCRATCH_BYTES, 1 << 20])
def test_a_body_larger_than_the_scratch(piece_bytes: int) -> None:
    values = {f"name-{number}": float(number) for number in range(4_000)}
    reader = FrameReader()
    reader.expect(1)
    reader.expect(2)
    data = frame(1, StatsReply(values)) + frame(2, Matched(1))
    assert len(data) > SCRATCH_BYTES
    arrivals = feed(reader, data, piece_bytes)
    assert [arrival.reply for arrival in arrivals] == [StatsReply(values), Matched(1)]


def test_a_smaller_payload_leaves_the_rest_alone() -> None:
    view = memoryview(bytearray(b"....."))
    reader = FrameReader()
    reader.expect(1, [view])
    feed(reader, frame(1, Blocks(1), b"abc"), 7)
    assert bytes(view) == b"abc.."


def test_a_larger_payload_is_refused_before_a_byte_is_written() -> None:
    view = memoryview(bytearray(b"..."))
    reader = FrameReader()
    reader.expect(1, [view])
    with pytest.raises(BadInput, match="were asked for"):
        feed(reader, frame(1, Blocks(1), b"abcd"), 1 << 20)
    assert bytes(view) == b"..."


@pytest.mark.parametrize("cut", [0, 20, 40, 60])
def test_an_abandoned_call_writes_nothing_more(cut: int) -> None:
    view = memoryview(bytearray(30))
    reader = FrameReader()
    reader.expect(1, [view])
    reader.expect(2)
    data = frame(1, Blocks(1), b"x" * 30) + frame(2, Matched(9))
    feed(reader, data[:cut], 1 << 20)
    before = bytes(view)
    reader.abandon(1)
    arrivals = feed(reader, data[cut:], 11)
    assert bytes(view) == before
    assert arrivals[-1].reply == Matched(9)


def test_a_reply_that_nobody_asked_for_is_refused() -> None:
    reader = FrameReader()
    reader.expect(1)
    assert feed(reader, frame(1, Matched(1)), 1 << 20)
    with pytest.raises(BadInput, match="no such call is open"):
        feed(reader, frame(1, Matched(1)), 1 << 20)


def test_a_failure_to_no_call_says_why_the_stream_ends() -> None:
    with pytest.raises(BadInput) as caught:
        feed(FrameReader(), frame(0, Failure("bad_version", "other version")), 1 << 20)
    assert caught.value.code == "bad_version"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (HEADER.pack(b"XX", 1, 0, 4, 0), "bad_frame"),
        (HEADER.pack(b"KV", 1, 1, 4, 0), "bad_frame"),
        (HEADER.pack(b"KV", 9, 0, 4, 0), "bad_version"),
        (HEADER.pack(b"KV", 1, 0, 1 << 31, 0), "too_large"),
        (HEADER.pack(b"KV", 1, 0, 4, 1 << 60), "too_large"),
        (HEADER.pack(b"KV", 1, 0, 0, 0), "bad_message"),
    ],
)
def test_a_bad_header_is_refused(header: bytes, code: str) -> None:
    with pytest.raises(BadInput) as caught:
        feed(FrameReader(), header, 1 << 20)
    assert caught.value.code == code


@given(data=st.binary(max_size=200), piece_bytes=st.integers(1, 64), tail=st.booleans())
def test_garbage_never_does_worse_than_refuse(data: bytes, piece_bytes: int, tail: bool) -> None:
    reader = FrameReader()
    reader.expect(1)
    if tail:
        data = HEADER.pack(b"KV", 1, 0, len(data), 0) + data
    with contextlib.suppress(KVCacheError):
        assert feed(reader, data, piece_bytes) == []


def test_a_refusal_becomes_the_error_it_was() -> None:
    assert isinstance(failure_error(Failure("not_allowed", "no")), NotAllowed)
    known = failure_error(Failure("bad_lease", "what", "why", "do"))
    assert (known.code, known.what, known.why, known.todo) == ("bad_lease", "what", "why", "do")
    assert failure_error(Failure("of_tomorrow", "what")).code == "bad_message"
