"""A connection without a socket: what a Session writes is kept, and what it is sent comes in any pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

from kvcache import wire
from kvcache.errors import KVCacheError
from kvcache.server.session import Answer, Later, Responder, Session

Result = TypeVar("Result")
HIGH_BYTES = 64 << 10
PATIENCE_S = 20


class MemoryTransport(asyncio.Transport):
    """Takes everything at once, unless ``taking`` is false: then it fills up as a socket would."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self.taking = True
        self.reading = True
        self.closing = False
        self.aborted = False
        self.sent = bytearray()
        self._waiting = bytearray()
        self._paused = False
        session.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:  # type: ignore[override]  # As asyncio's.
        if self.aborted:
            return
        self._waiting += data
        if self.taking:
            self.take(len(self._waiting))
        elif len(self._waiting) > HIGH_BYTES and not self._paused:
            self._paused = True
            self._session.pause_writing()

    def take(self, count: int) -> None:
        """The peer reads this much."""
        self.sent += self._waiting[:count]
        del self._waiting[:count]
        if self._paused and not self._waiting:
            self._paused = False
            self._session.resume_writing()

    def get_write_buffer_size(self) -> int:
        return len(self._waiting)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True
        self.reading = False

    def abort(self) -> None:
        self.aborted = True
        self.close()

    def replies(self) -> list[tuple[int, wire.Reply, bytes]]:
        """All whole frames that were sent, with their payloads. RAISES BadInput when they are none."""
        found = []
        rest = memoryview(bytes(self.sent))
        while rest:
            header = wire.decode_header(rest[: wire.HEADER.size])
            end = wire.HEADER.size + header.body_bytes
            call, reply = wire.decode_reply(rest[wire.HEADER.size : end])
            found.append((call, reply, bytes(rest[end : end + header.payload_bytes])))
            assert len(found[-1][2]) == header.payload_bytes, "cut short"
            rest = rest[end + header.payload_bytes :]
        return found


class Scripted:
    """A Responder that answers as its test says."""

    def __init__(self, answers: Callable[[int, wire.Request], Answer | Later]) -> None:
        self._answers = answers
        self.room: list[memoryview] = []
        self.answered = 0
        self.refusals: list[str] = []
        self.lags = 0
        self.ends = 0

    def answer(self, call: int, request: wire.Request) -> Answer | Later:
        self.answered += 1
        return self._answers(call, request)

    def destination(self, request: wire.Write, payload_bytes: int) -> list[memoryview]:
        return list(self.room)

    def refused(self, error: KVCacheError) -> None:
        self.refusals.append(error.code)

    def lagged(self) -> None:
        self.lags += 1

    def ended(self) -> None:
        self.ends += 1


def connect(responder: Responder, **patience: float) -> tuple[Session, MemoryTransport]:
    session = Session(responder, lambda: None, **patience)
    return session, MemoryTransport(session)


def receive(session: Session, data: bytes) -> None:
    """As the event loop would, with one read of ``data``, in as many as the session's room needs."""
    rest = memoryview(data)
    while rest:
        room = session.get_buffer(-1)
        assert len(room), "no room to receive into"
        count = min(len(room), len(rest))
        room[:count] = rest[:count]
        session.buffer_updated(count)
        rest = rest[count:]


async def idle(transport: MemoryTransport, turns: int = 100) -> None:
    """Until the session reads again or is over; the loop's turns are the only clock."""
    for _ in range(turns):
        await asyncio.sleep(0)
        if transport.reading or transport.closing:
            return


async def feed(session: Session, transport: MemoryTransport, pieces: Iterable[bytes]) -> None:
    """Let the session receive these, one read each, when it reads; what it no longer takes is dropped."""
    for piece in pieces:
        rest = memoryview(piece)
        while rest and not transport.closing:
            room = session.get_buffer(-1)
            assert len(room), "no room to receive into"
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            session.buffer_updated(count)
            rest = rest[count:]
            await settled(transport)


async def settled(transport: MemoryTransport) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not transport.reading and not transport.closing:
            await asyncio.sleep(0)
