"""One connection, frame by frame: whole frames, in order, and nobody who can wear the node down."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

import pytest

from kvcache import wire
from kvcache.server import session as under_test
from kvcache.server.session import Answer, Following, Later, Outgoing
from tests.server.wires import HIGH_BYTES, Scripted, connect, idle, receive

Result = TypeVar("Result")
STATS = wire.Stats()


def run(work: Coroutine[None, None, Result]) -> Result:
    return asyncio.run(work)


def batch(seq: int, *, snapshot: bool = False, left: int = 0, hashes: bytes = b"") -> wire.EventBatch:
    event = wire.BlockEvent("stored", bytes(16), "host", b"", hashes)
    return wire.EventBatch("node", 1, seq, snapshot, [event], left)


def payload_of(size: int) -> Outgoing:
    return Outgoing(wire.Blocks(1), [memoryview(bytes(size))])


def test_an_event_never_lands_within_a_payload() -> None:
    async def play() -> list[tuple[int, wire.Reply, bytes]]:
        session, transport = connect(Scripted(lambda call, request: payload_of(1 << 20)))
        transport.taking = False
        receive(session, wire.encode(1, wire.Read(1, 0, 1)))
        await asyncio.sleep(0)
        session.push(wire.packed(batch(7)), 5)
        while transport.get_write_buffer_size():
            transport.take(1 << 20)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return transport.replies()

    (read, blocks, payload), (watch, event, _) = run(play())
    assert (read, blocks, payload) == (1, wire.Blocks(1), bytes(1 << 20))
    assert (watch, event) == (5, batch(7))


def test_others_have_their_turn_while_a_peer_takes_a_payload_as_fast_as_it_comes() -> None:
    """A reply of many small pieces, none of which the system makes wait."""
    pieces = [memoryview(bytes(64 << 10))] * 256

    async def play() -> tuple[int, int]:
        session, transport = connect(Scripted(lambda call, request: Outgoing(wire.Blocks(1), pieces)))
        receive(session, wire.encode(1, wire.Read(1, 0, 1)))
        turns = most = sent = 0
        while len(transport.sent) < 16 << 20:
            await asyncio.sleep(0)
            turns, most, sent = turns + 1, max(most, len(transport.sent) - sent), len(transport.sent)
        return turns, most

    turns, most = run(play())
    assert turns >= 8
    assert most <= 3 << 20


def test_what_happens_during_a_snapshot_comes_after_it() -> None:
    snapshot = [batch(3, snapshot=True, left=2 - at, hashes=bytes(1 << 20)) for at in range(3)]

    async def play() -> list[wire.Reply]:
        session, transport = connect(Scripted(lambda call, request: Following(map(wire.packed, snapshot))))
        transport.taking = False
        receive(session, wire.encode(5, wire.Watch()))
        session.push(wire.packed(batch(4)), 5)
        await asyncio.sleep(0)
        session.push(wire.packed(batch(5)), 5)
        while transport.get_write_buffer_size():
            assert transport.get_write_buffer_size() < 2 << 20, "one batch at a time"
            transport.take(4 << 20)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return [reply for _, reply, _ in transport.replies()]

    assert run(play()) == [*snapshot, batch(4), batch(5)]


def test_a_snapshot_larger_than_the_lag_allowed_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "WATCH_BYTES_MAX", 4 << 20)
    snapshot = [batch(3, snapshot=True, left=7 - at, hashes=bytes(1 << 20)) for at in range(8)]

    async def play() -> int:
        responder = Scripted(lambda call, request: Following(map(wire.packed, snapshot)))
        session, transport = connect(responder)
        receive(session, wire.encode(5, wire.Watch()))
        await idle(transport)
        assert responder.lags == 0
        return len(transport.replies())

    assert run(play()) == 8


def test_a_watcher_that_lags_is_dropped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "WATCH_BYTES_MAX", 2 << 20)

    async def play() -> Scripted:
        responder = Scripted(lambda call, request: Following([wire.packed(batch(1))]))
        session, transport = connect(responder)
        receive(session, wire.encode(5, wire.Watch()))
        await idle(transport)
        transport.taking = False
        for seq in range(2, 9):
            session.push(wire.packed(batch(seq, hashes=bytes(1 << 20))), 5)
        assert transport.aborted
        return responder

    assert run(play()).lags == 1


def test_who_takes_no_replies_gets_no_more_made() -> None:
    large = wire.Failure("bad_lease", "x" * 1000)

    async def play() -> None:
        responder = Scripted(lambda call, request: large)
        session, transport = connect(responder)
        transport.taking = False
        receive(session, b"".join(wire.encode(call, STATS) for call in range(1000)))
        assert not transport.reading
        assert transport.get_write_buffer_size() < 2 * HIGH_BYTES
        while transport.get_write_buffer_size():
            transport.take(HIGH_BYTES)
        assert [call for call, _, _ in transport.replies()] == list(range(1000))
        assert transport.reading

    run(play())


def test_who_takes_nothing_for_long_is_disconnected() -> None:
    async def play() -> None:
        session, transport = connect(Scripted(lambda call, request: payload_of(1 << 20)), stall_s=0.001)
        transport.taking = False
        receive(session, wire.encode(1, wire.Read(1, 0, 1)))
        async with asyncio.timeout(20):
            while not transport.aborted:
                await asyncio.sleep(0)

    run(play())


def test_a_slow_taker_is_not_disconnected() -> None:
    async def play() -> None:
        session, transport = connect(Scripted(lambda call, request: payload_of(1 << 20)), stall_s=0)
        transport.taking = False
        receive(session, wire.encode(1, wire.Read(1, 0, 1)))
        await asyncio.sleep(0)
        while transport.get_write_buffer_size():
            transport.take(1000)
            await asyncio.sleep(0)
            assert not transport.aborted

    run(play())


def test_after_garbage_the_end_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last word may find a peer that reads nothing: it is not waited for."""
    monkeypatch.setattr(under_test, "CLOSE_S", 0.001)

    async def play() -> None:
        session, transport = connect(Scripted(lambda call, request: wire.Done()))
        transport.taking = False
        receive(session, b"GET / HTTP/1.1\r\n\r\n")
        assert transport.closing
        async with asyncio.timeout(20):
            while not transport.aborted:
                await asyncio.sleep(0)

    run(play())


def test_a_reply_that_cannot_be_sent_is_refused_and_the_stream_goes_on() -> None:
    replies: dict[int, wire.Reply] = {1: wire.Leased(2**70, 0, [], [], b"", 0, 0), 2: wire.Done()}

    async def play() -> list[tuple[int, wire.Reply, bytes]]:
        session, transport = connect(Scripted(lambda call, request: replies[call]))
        receive(session, wire.encode(1, STATS) + wire.encode(2, STATS))
        return transport.replies()

    (first, refusal, _), second = run(play())
    assert first == 1
    assert isinstance(refusal, wire.Failure)
    assert second == (2, wire.Done(), b"")


def test_a_fault_of_ours_is_told_to_the_loop_at_once() -> None:
    async def broken() -> Answer:
        raise AssertionError("ours")

    async def play() -> None:
        told: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        session, transport = connect(Scripted(lambda call, request: broken()))
        receive(session, wire.encode(1, STATS))
        for _ in range(4):
            await asyncio.sleep(0)
        assert [str(error) for error in told] == ["ours"]
        assert transport.aborted

    run(play())


def test_a_connection_that_ends_before_its_answer_began() -> None:
    """The answer is neither given nor missed: no warning of a coroutine that nobody awaited."""

    async def play() -> int:
        async def late() -> Answer:
            raise AssertionError("the connection is gone")

        def answers(call: int, request: wire.Request) -> Later:
            return late()

        responder = Scripted(answers)
        session, _ = connect(responder)
        receive(session, wire.encode(1, STATS))
        session.connection_lost(None)
        for _ in range(4):
            await asyncio.sleep(0)
        return responder.ends

    assert run(play()) == 1
