"""What a tcp listener and its endpoints do with a peer who says anything at all."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from functools import partial

import pytest

from kvcache.clock import NS_PER_S
from kvcache.testing.transport_pair import CLOCK, lost, noise, soon, turns
from kvcache.transport.base import PeerLost, Ticket, TransferLate
from kvcache.transport.keys import NONCE_BYTES
from kvcache.transport.tcp_frames import (
    CHUNK_BYTES,
    HEADER,
    HELLO,
    MAGIC,
    VERSION,
    Hello,
    Kind,
    frame,
    pack_head,
    pack_request,
    parse_head,
)
from tests.transport.tcp_place import HELLO_ALONE, PATIENCE_S, WARY, Place, soon_over, visit


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(80),
        HELLO.pack(MAGIC, VERSION + 1, 0, 1, bytes(16), bytes(NONCE_BYTES)),
        HELLO.pack(MAGIC, VERSION, 1, 1, bytes(16), bytes(NONCE_BYTES)),
        HELLO.pack(MAGIC, VERSION, 0, 255, bytes(16), bytes(NONCE_BYTES)),
    ],
)
def test_who_does_not_say_hello_is_sent_away(said: bytes) -> None:
    async def scenario(found: Place) -> None:
        reader, writer = await found.stranger()
        writer.write(said)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        assert found.accepted == []

    visit(scenario)


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize("said", [b"", HELLO_ALONE.pack()[:-1], HELLO_ALONE.pack()])
def test_who_does_not_finish_his_hello_is_sent_away_in_time(said: bytes) -> None:
    async def scenario(found: Place) -> None:
        reader, writer = await found.stranger()
        writer.write(said)
        async with soon_over(WARY.silence_ns):
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
        writer.close()
        assert found.accepted == []

    visit(scenario, WARY)


def test_a_crowd_that_says_nothing_is_bounded() -> None:
    async def scenario(found: Place) -> None:
        crowd = [await found.stranger() for _ in range(80)]
        turned_away = [asyncio.ensure_future(reader.read()) for reader, _ in crowd]
        done, _ = await asyncio.wait(turned_away, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        assert done
        for task in turned_away:
            task.cancel()
        for _, writer in crowd:
            writer.close()
        await asyncio.wait(turned_away)
        await turns(200)

    visit(scenario)


BROKEN = {
    "a kind that there is not": struct.pack("<BBHIQQ", 99, 0, 0, 0, 0, 0),
    "kind zero": bytes(HEADER.size),
    "a note that is too long": pack_head(Kind.NOTE, 1 << 17),
    "a chunk that is too long": pack_head(Kind.READ_DATA, CHUNK_BYTES + 1),
    "a beat with a body": pack_head(Kind.BEAT, 1) + b"x",
    "a request without a ticket": frame(Kind.READ, 1),
    "a request without a piece": frame(Kind.READ, 1, bytes(16)),
    "a request with half a piece": frame(Kind.WRITE, 1, bytes(20)),
}


@pytest.mark.parametrize("said", BROKEN.values(), ids=BROKEN.keys())
def test_who_breaks_the_protocol_is_lost(said: bytes) -> None:
    async def scenario(found: Place) -> None:
        reader, writer, end = await found.guest()
        writer.write(said)
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        assert end.is_lost
        with pytest.raises(PeerLost, match="protocol"):
            await end.notify(b"x", soon())
        writer.close()

    visit(scenario)


def test_data_that_nobody_waits_for_go_nowhere() -> None:
    async def scenario(found: Place) -> None:
        _, writer, end = await found.guest()
        data = noise(2, CHUNK_BYTES)
        for kind in (Kind.READ_DATA, Kind.WRITE_DATA):
            writer.write(pack_head(kind, len(data), 77, offset=1 << 60) + data)
            writer.write(pack_head(kind, 0, 78))
        writer.write(
            frame(Kind.WRITE_DONE, 5)
            + frame(Kind.READ_REFUSED, 6, b"\xff")
            + frame(Kind.READ_STOP, 7)
            + frame(Kind.READ_END, 77)
            + frame(Kind.WRITE_END, 78)
        )
        writer.write(frame(Kind.NOTE, 0, b"still here"))
        assert await found.notes.first(1) == [b"still here"]
        assert not end.is_lost
        writer.close()

    visit(scenario)


@pytest.mark.parametrize(("offset", "length"), [(1, 100), (0, 901), (1 << 63, 1), (0, 900)])
def test_a_write_stays_within_what_was_posted(offset: int, length: int) -> None:
    async def scenario(found: Place) -> None:
        _, writer, end = await found.guest()
        region = memoryview(bytearray(3_000))
        filled: list[bool] = []
        ticket = found.transport.post([region[1_000:1_900]], soon(), lambda: filled.append(True))
        writer.write(frame(Kind.WRITE, 1, pack_request(ticket, [900])))
        writer.write(pack_head(Kind.WRITE_DATA, length, 1, offset=offset) + noise(3, length))
        writer.write(frame(Kind.WRITE_END, 1))
        writer.write(pack_head(Kind.WRITE_DATA, 1, 1, offset=900) + b"x")  # More than it said.
        writer.write(frame(Kind.NOTE, 0, b"end"))
        if (offset, length) == (0, 900):
            await found.notes.first(1)
            assert filled == [True]
        else:
            await lost(end)
            assert filled == []
            assert not any(region)
        assert not any(region[:1_000])
        assert not any(region[1_900:])
        writer.close()

    visit(scenario)


@pytest.mark.parametrize("length", [0, 899])
def test_a_write_that_ends_before_its_end_loses_the_peer(length: int) -> None:
    async def scenario(found: Place) -> None:
        _, writer, end = await found.guest()
        filled: list[bool] = []
        ticket = found.transport.post([memoryview(bytearray(900))], soon(), lambda: filled.append(True))
        writer.write(frame(Kind.WRITE, 1, pack_request(ticket, [900])))
        writer.write(frame(Kind.WRITE_DATA, 1, noise(3, length)) + frame(Kind.WRITE_END, 1))
        await lost(end)
        assert filled == []
        writer.close()

    visit(scenario)


def test_a_number_that_runs_cannot_be_asked_for_again() -> None:
    async def scenario(found: Place) -> None:
        _, writer, end = await found.guest()
        for _ in range(2):
            ticket = found.transport.post([memoryview(bytearray(9))], soon(), lambda: None)
            writer.write(frame(Kind.WRITE, 1, pack_request(ticket, [9])))
        await lost(end)
        writer.close()

    visit(scenario)


@pytest.mark.slow
def test_who_asks_and_never_takes_the_answers_is_lost() -> None:
    async def scenario(found: Place) -> None:
        _, writer, end = await found.guest()
        request = frame(Kind.READ, 1, pack_request(bytes(16), [1])) * 1_000
        with contextlib.suppress(ConnectionError):
            while not end.is_lost:
                writer.write(request)
                await writer.drain()
        assert end.is_lost
        writer.transport.abort()

    visit(scenario)


@pytest.mark.slow
@pytest.mark.timed
def test_one_who_goes_on_slowly_is_not_lost_and_a_call_of_his_ends_in_time() -> None:
    async def scenario(found: Place) -> None:
        reader, writer, end = await found.guest()
        ticket, into = Ticket(bytes(16)), memoryview(bytearray(1_000))

        async def trickle() -> None:
            async def one(byte: bytes) -> None:
                writer.write(byte)
                await writer.drain()
                await asyncio.sleep(0.05)

            head = HEADER.size
            while True:
                asked = parse_head(bytearray(await reader.readexactly(head)))
                body = await reader.readexactly(asked.length)
                if asked.kind is Kind.READ:
                    assert body[:16] == ticket
                    break
            for byte in pack_head(Kind.READ_DATA, 1_000, asked.transfer) + noise(4, 1_000):
                await one(bytes([byte]))

        slow = asyncio.ensure_future(trickle())
        async with soon_over(NS_PER_S):
            with pytest.raises(TransferLate):
                await end.read(ticket, [into], CLOCK.now_ns() + NS_PER_S)
        assert not end.is_lost
        slow.cancel()
        writer.close()

    visit(scenario, WARY)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_any_bytes_at_all_lose_him_or_do_nothing(seed: int) -> None:
    async def scenario(found: Place) -> None:
        draw = random.Random(seed)
        for _ in range(30):
            _, writer, end = await found.guest()
            into = memoryview(bytearray(5_000))
            reading = asyncio.ensure_future(end.read(Ticket(bytes(16)), [into], soon()))
            for _ in range(draw.randrange(1, 20)):
                kind = draw.choice([*Kind, draw.randrange(256)])
                length = draw.choice([0, 1, 24, 100, 5_000])
                head = struct.pack("<BBHIQQ", kind, draw.randrange(256), 0, length, draw.choice([0, 1, 2]), 0)
                writer.write(head + draw.randbytes(draw.choice([length, length, draw.randrange(200)])))
            writer.write_eof()
            with contextlib.suppress(Exception):
                await reading
            await lost(end)
            writer.close()

    visit(scenario)


@pytest.mark.slow
def test_a_cut_in_the_middle_of_a_chunk_loses_the_peer() -> None:
    async def scenario(found: Place) -> None:
        for after in (0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 1, HEADER.size + 4_999):
            _, writer, end = await found.guest()
            filled: list[bool] = []
            ticket = found.transport.post(
                [memoryview(bytearray(5_000))], soon(), partial(filled.append, True)
            )
            data = pack_head(Kind.WRITE_DATA, 5_000, 1) + noise(5, 5_000)
            writer.write(frame(Kind.WRITE, 1, pack_request(ticket, [5_000])) + data[:after])
            writer.write_eof()
            await lost(end)
            assert filled == []
            await asyncio.wait_for(found.transport.withdraw(ticket), PATIENCE_S)
            writer.close()

    visit(scenario)


def test_streams_of_two_sessions_do_not_mix() -> None:
    async def scenario(found: Place) -> None:
        one, other = (Hello(name * 16, at, 2, bytes(NONCE_BYTES)) for at, name in enumerate((b"1", b"2")))
        writers = [(await found.proven(hello))[1] for hello in (one, other)]
        await turns(20)
        assert found.accepted == []
        for writer in writers:
            writer.close()

    visit(scenario)
