"""A transport that lies: what it brings is reordered, repeated, cut, flipped or not brought at all.

It wraps another one and says of every damaged transfer that it went well. So it is what the readers of
blocks are tested with: whoever believes what it brought, without a check of his own, has wrong bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from enum import Enum

from kvcache.transport.base import Endpoint, Listener, Note, Priority, Ticket, Transport


class Fault(Enum):
    REORDER = "two pieces have changed places"
    REPEAT = "one piece has come in another's place as well"
    SHIFT = "a piece has come a few bytes late"
    CUT = "the end of a piece has not come"
    FLIP = "one bit is another"
    LOSE = "nothing has come"


class FaultyEndpoint:
    """Damages one transfer of two, as ``draw`` says. Notes go through as they are."""

    def __init__(self, inner: Endpoint, draw: random.Random) -> None:
        self._inner = inner
        self._draw = draw
        self.faults: dict[Fault, int] = dict.fromkeys(Fault, 0)

    @property
    def peer(self) -> str:
        return self._inner.peer

    @property
    def is_lost(self) -> bool:
        return self._inner.is_lost

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        before = [bytes(view) for view in into]
        await self._inner.read(ticket, into, deadline_ns, priority)
        damaged = self._damaged([bytes(view) for view in into], before)
        for view, data in zip(into, damaged, strict=True):
            view[:] = data

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        zeroes = [bytes(len(piece)) for piece in pieces]
        damaged = self._damaged([bytes(piece) for piece in pieces], zeroes)
        await self._inner.write(ticket, [memoryview(data) for data in damaged], deadline_ns, priority)

    async def notify(self, note: bytes, deadline_ns: int) -> None:
        await self._inner.notify(note, deadline_ns)

    async def close(self) -> None:
        await self._inner.close()

    def _damaged(self, pieces: list[bytes], before: list[bytes]) -> list[bytes]:
        """Of the same lengths as they were."""
        if self._draw.random() < 0.5:
            return pieces
        fault = self._draw.choice(list(Fault))
        self.faults[fault] += 1
        one, other = self._draw.randrange(len(pieces)), self._draw.randrange(len(pieces))
        size = len(pieces[one])
        at = self._draw.randrange(size)
        match fault:
            case Fault.REORDER:
                pieces[one], pieces[other] = (
                    _as_long(pieces[other], size),
                    _as_long(pieces[one], len(pieces[other])),
                )
            case Fault.REPEAT:
                pieces[one] = _as_long(pieces[other], size)
            case Fault.SHIFT:
                pieces[one] = _as_long(pieces[one][-(at % 64) :] + pieces[one], size)
            case Fault.CUT:
                pieces[one] = pieces[one][:at] + before[one][at:]
            case Fault.FLIP:
                flipped = bytearray(pieces[one])
                flipped[at] ^= 1 << self._draw.randrange(8)
                pieces[one] = bytes(flipped)
            case Fault.LOSE:
                return before
        return pieces


class FaultyTransport:
    """``inner``, whose endpoints lie."""

    def __init__(self, inner: Transport, seed: int) -> None:
        self._inner = inner
        self._draw = random.Random(seed)

    @property
    def scheme(self) -> str:
        return self._inner.scheme

    async def listen(self, address: str, accepted: Callable[[Endpoint], None], note: Note) -> Listener:
        ends: dict[int, FaultyEndpoint] = {}

        def wrapped(inner: Endpoint) -> FaultyEndpoint:
            return ends.setdefault(id(inner), FaultyEndpoint(inner, self._draw))

        return await self._inner.listen(
            address, lambda inner: accepted(wrapped(inner)), lambda inner, told: note(wrapped(inner), told)
        )

    async def connect(self, address: str, deadline_ns: int, note: Note) -> FaultyEndpoint:
        ends: list[FaultyEndpoint] = []
        inner = await self._inner.connect(address, deadline_ns, lambda _, told: note(ends[0], told))
        ends.append(FaultyEndpoint(inner, self._draw))
        return ends[0]

    def register(self, memory: memoryview) -> None:
        self._inner.register(memory)

    def forget(self, memory: memoryview) -> None:
        self._inner.forget(memory)

    def export(self, pieces: Sequence[memoryview], until_ns: int) -> Ticket:
        return self._inner.export(pieces, until_ns)

    def post(self, pieces: Sequence[memoryview], until_ns: int, filled: Callable[[], None]) -> Ticket:
        return self._inner.post(pieces, until_ns, filled)

    async def withdraw(self, ticket: Ticket) -> None:
        await self._inner.withdraw(ticket)

    async def close(self) -> None:
        await self._inner.close()


def _as_long(data: bytes, size: int) -> bytes:
    return (data * (size // len(data) + 1))[:size]
