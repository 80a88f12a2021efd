"""What goes over the wire when a transfer ends early: nothing of memory that was given back."""

from __future__ import annotations

import asyncio

from kvcache.testing.transport_pair import soon, turns
from kvcache.transport.base import Priority, Ticket
from kvcache.transport.tcp_frames import HEADER, Head, Kind, frame, pack_request, parse_head
from tests.transport.tcp_place import Place, visit

BIG = 8 << 20
LAST = 1 << 20
"""A transfer of one chunk, which is the last: more than the system takes in one call on one host."""
OURS, LATER = b"\x11", b"\x99"

Frames = list[tuple[Head, bytes]]


async def frames_until(reader: asyncio.StreamReader, *last: Kind) -> Frames:
    """What comes, to the first frame of such a kind; beats are left out."""
    came: Frames = []
    async with asyncio.timeout(20):
        while not came or came[-1][0].kind not in last:
            head = parse_head(bytearray(await reader.readexactly(HEADER.size)))
            body = await reader.readexactly(head.length)
            if head.kind is not Kind.BEAT:
                came.append((head, body))
    return came


def of_kind(came: Frames, kind: Kind) -> list[bytes]:
    return [body for head, body in came if head.kind is kind]


def memory(byte_count: int) -> memoryview:
    return memoryview(bytearray(OURS * byte_count))


def test_a_cancelled_write_sends_none_of_what_its_memory_holds_later() -> None:
    async def scenario(found: Place) -> None:
        reader, writer, end = await found.guest()
        source = memory(BIG)
        task = asyncio.ensure_future(end.write(Ticket(bytes(16)), [source], soon()))
        await turns(5)  # The system takes some of it, and then no more: nobody reads.
        task.cancel()
        await asyncio.wait([task])
        source[:] = LATER * BIG
        came = await frames_until(reader, Kind.WRITE_STOP)
        data = b"".join(of_kind(came, Kind.WRITE_DATA))
        assert 0 < len(data) < BIG
        assert LATER not in data
        writer.close()

    visit(scenario)


def test_a_withdrawn_export_sends_none_of_what_its_memory_holds_later() -> None:
    async def scenario(found: Place) -> None:
        reader, writer, _ = await found.guest()
        source = memory(BIG)
        ticket = found.transport.export([source], soon())
        writer.write(frame(Kind.READ, 1, pack_request(ticket, [BIG])))
        first = await reader.readexactly(HEADER.size)
        await found.transport.withdraw(ticket)
        source[:] = LATER * BIG
        rest = await reader.readexactly(parse_head(bytearray(first)).length)
        came = await frames_until(reader, Kind.READ_REFUSED)
        data = rest + b"".join(of_kind(came, Kind.READ_DATA))
        assert len(data) < BIG
        assert LATER not in data
        writer.close()

    visit(scenario)


def test_a_write_that_is_cancelled_in_its_last_chunk_is_not_whole() -> None:
    async def scenario(found: Place) -> None:
        reader, writer, end = await found.guest()
        source = memory(LAST)
        task = asyncio.ensure_future(end.write(Ticket(bytes(16)), [source], soon()))
        await turns(1)
        task.cancel()
        await asyncio.wait([task])
        source[:] = LATER * LAST
        came = await frames_until(reader, Kind.WRITE_STOP)
        (data,) = of_kind(came, Kind.WRITE_DATA)
        assert 0 < data.count(OURS) < LAST  # It was filled up, with what nobody may take for his.
        assert not of_kind(came, Kind.WRITE_END)
        writer.close()

    visit(scenario)


def test_an_export_that_is_withdrawn_in_its_last_chunk_is_not_whole() -> None:
    async def scenario(found: Place) -> None:
        reader, writer, _ = await found.guest()
        source = memory(LAST)
        ticket = found.transport.export([source], soon())
        writer.write(frame(Kind.READ, 1, pack_request(ticket, [LAST])))
        head = parse_head(bytearray(await reader.readexactly(HEADER.size)))
        await found.transport.withdraw(ticket)
        source[:] = LATER * LAST
        data = await reader.readexactly(head.length)
        assert 0 < data.count(OURS) < LAST
        assert not of_kind(await frames_until(reader, Kind.READ_REFUSED), Kind.READ_END)
        writer.close()

    visit(scenario)


def test_what_has_gone_whole_is_whole_whatever_comes_after() -> None:
    async def scenario(found: Place) -> None:
        reader, writer, _ = await found.guest()
        ticket = found.transport.export([memory(LAST)], soon())
        writer.write(frame(Kind.READ, 1, pack_request(ticket, [LAST])))
        came = await frames_until(reader, Kind.READ_END)
        await found.transport.withdraw(ticket)
        assert of_kind(came, Kind.READ_DATA) == [bytes(memory(LAST))]
        writer.close()

    visit(scenario)


def test_a_read_that_is_stopped_is_served_no_further() -> None:
    async def scenario(found: Place) -> None:
        reader, writer, _ = await found.guest()
        ticket = found.transport.export([memory(4 * BIG)], soon())
        writer.write(frame(Kind.READ, 1, pack_request(ticket, [4 * BIG])))
        await reader.readexactly(HEADER.size + (1 << 20))
        writer.write(frame(Kind.READ_STOP, 1) + frame(Kind.READ, 2, pack_request(ticket, [4 * BIG])))
        came = await frames_until(reader, Kind.READ_REFUSED)
        assert sum(map(len, of_kind(came, Kind.READ_DATA))) < 3 * BIG
        writer.close()

    visit(scenario)


def test_a_cancelled_read_says_so() -> None:
    async def scenario(found: Place) -> None:
        reader, writer, end = await found.guest()
        task = asyncio.ensure_future(end.read(Ticket(bytes(16)), [memory(100)], soon()))
        (asked, _), *_ = await frames_until(reader, Kind.READ)
        task.cancel()
        (stopped, _), *_ = await frames_until(reader, Kind.READ_STOP)
        assert stopped.transfer == asked.transfer
        writer.close()

    visit(scenario)


def test_a_better_transfer_overtakes_between_two_chunks() -> None:
    async def scenario(found: Place) -> None:
        reader, writer, _ = await found.guest()
        for number, priority in ((1, Priority.REPLICATE), (2, Priority.PREFETCH), (3, Priority.DECODE)):
            ticket = found.transport.export([memory(BIG)], soon())
            writer.write(frame(Kind.READ, number, pack_request(ticket, [BIG]), priority))
        writer.write(frame(Kind.READ, 4, pack_request(bytes(16), [1])))
        await frames_until(reader, Kind.READ_REFUSED)  # All four were heard; some of the first has gone.
        ends: list[int] = []
        while len(ends) < 3:
            *_, (end, _) = await frames_until(reader, Kind.READ_END)
            ends.append(end.transfer)
        assert ends == [3, 2, 1]
        writer.close()

    visit(scenario)
