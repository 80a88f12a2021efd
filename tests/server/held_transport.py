"""A transport that touches memory as long as it may: until ``withdraw`` has returned, when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvcache.transport.base import Endpoint, Note, Ticket


class Out:
    """A ticket of the double. ``before``: what its pieces held, when they were exported."""

    def __init__(self, pieces: Sequence[memoryview], filled: Callable[[], None] | None) -> None:
        self.pieces = list(pieces)
        self.filled = filled
        self.before = [bytes(piece) for piece in pieces] if filled is None else []
        self.is_done = False
        """All of it was written: the peer, who is told so, touches it no more."""
        self.returned: asyncio.Future[None] | None = None

    def check(self) -> None:
        assert [bytes(piece) for piece in self.pieces[: len(self.before)]] == self.before, (
            "exported, and changed"
        )

    def scribble(self) -> None:
        if self.filled is not None and not self.is_done:
            for piece in self.pieces:
                piece[:] = b"\xee" * len(piece)


class HeldTransport:
    """It listens nowhere. Use ``World``."""

    scheme = "held"
    address = "held://here"

    def __init__(self) -> None:
        self.out: dict[bytes, Out] = {}
        self._count = 0

    async def listen(self, address: str, accepted: Callable[[Endpoint], None], note: Note) -> HeldTransport:
        return self

    async def connect(self, address: str, deadline_ns: int, note: Note) -> Endpoint:
        raise AssertionError("nobody connects")

    def register(self, memory: memoryview) -> None:
        """Nothing to prepare."""

    def forget(self, memory: memoryview) -> None:
        """Nothing to undo."""

    def export(self, pieces: Sequence[memoryview], until_ns: int) -> Ticket:
        return self._enter(Out(pieces, None))

    def post(self, pieces: Sequence[memoryview], until_ns: int, filled: Callable[[], None]) -> Ticket:
        return self._enter(Out(pieces, filled))

    async def withdraw(self, ticket: Ticket) -> None:
        out = self.out[ticket]
        out.returned = out.returned or asyncio.get_running_loop().create_future()
        await asyncio.shield(out.returned)

    async def close(self) -> None:
        """It keeps nothing."""

    def let_return(self, ticket: bytes) -> None:
        """The withdrawal that waits returns: nothing is touched any more."""
        out = self.out.pop(ticket)
        assert out.returned is not None
        out.returned.set_result(None)

    def _enter(self, out: Out) -> Ticket:
        self._count += 1
        ticket = Ticket(b"%d" % self._count)
        self.out[ticket] = out
        return ticket
