"""The book of what a node has exported and posted: which pieces a ticket stands for, and whether it is good.

    offered ──take──► running ──end──► gone
       ├── until_ns past ─────────────► gone
       └── withdraw ──────────────────► gone     (of a running one: stopped, and waited for)

* A ticket is ``TOKEN_BYTES`` random bytes: who was not told it cannot name it.
* It is spent by the first who presents it, whether or not what he asks fits.
* Between ``take`` and ``Use.end`` the transport may touch the pieces; outside never.
* Decisions are made at once and change nothing else, so a test can play any order of them. For one loop.

The sum: a take is one look-up and one comparison of sizes, 2 us with 16 pieces.
"""

from __future__ import annotations

import asyncio
import heapq
import secrets
from collections.abc import Callable, Sequence
from functools import partial

from kvcache.clock import Clock
from kvcache.transport.base import Ticket, TransferRefused

TOKEN_BYTES = 16
_SPARE_ENTRIES = 1_024


class Use:
    """One transfer's right to the pieces of one ticket, from ``take`` until ``end``."""

    def __init__(self, pieces: Sequence[memoryview], filled: Callable[[], None] | None) -> None:
        self.pieces = tuple(pieces)
        self.is_post = filled is not None
        self.is_stopped = False
        """The owner wants his memory back: touch no more of it than cannot be helped, and ``end``."""
        self._filled = filled
        self._stop: Callable[[], None] | None = None
        self._ended: asyncio.Event | None = None
        self._forget: Callable[[], object] | None = None
        self._is_over = False

    def when_over(self, forget: Callable[[], object]) -> None:
        """For the book: call ``forget`` at the end."""
        self._forget = forget

    def when_stopped(self, stop: Callable[[], None]) -> None:
        """Call ``stop`` when the owner withdraws, at once if he has. It may call ``end``."""
        self._stop = stop
        if self.is_stopped:
            stop()

    def complete(self) -> None:
        """All pieces were transferred: tell the owner of a posted one, and end. REQUIRES: not ended."""
        assert not self._is_over, "a use that ended cannot complete"
        self.end()
        if self._filled is not None:
            self._filled()

    def end(self) -> None:
        """Nothing touches the pieces any more. May be called twice."""
        self._is_over = True
        self._stop = None
        if self._forget is not None:
            self._forget()
            self._forget = None
        if self._ended is not None:
            self._ended.set()

    async def stopped(self) -> None:
        """Ask for the end and wait for it."""
        self.is_stopped = True
        if self._stop is not None:
            self._stop()
        if not self._is_over:
            self._ended = self._ended or asyncio.Event()
            await self._ended.wait()

    @property
    def is_over(self) -> bool:
        return self._is_over


class Book:
    """A transport's tickets. Every ticket's life ends with ``withdraw``, or with its time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offers: dict[bytes, tuple[int, Use]] = {}
        self._running: dict[bytes, Use] = {}
        self._ends: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        """How many tickets are offered or running."""
        return len(self._offers) + len(self._running)

    def export(self, pieces: Sequence[memoryview], until_ns: int) -> Ticket:
        """As ``Transport.export``. REQUIRES: at least one piece, none of them empty."""
        return self._offer(Use(pieces, None), until_ns)

    def post(self, pieces: Sequence[memoryview], until_ns: int, filled: Callable[[], None]) -> Ticket:
        """As ``Transport.post``. REQUIRES: at least one piece, none of them empty, all writable."""
        assert all(not piece.readonly for piece in pieces), "what is posted will be written"
        return self._offer(Use(pieces, filled), until_ns)

    def take_export(self, ticket: bytes, sizes: Sequence[int]) -> Use:
        """A peer wants to read. RAISES TransferRefused."""
        return self._take(ticket, sizes, is_post=False)

    def take_post(self, ticket: bytes, sizes: Sequence[int]) -> Use:
        """A peer wants to write. RAISES TransferRefused."""
        return self._take(ticket, sizes, is_post=True)

    async def withdraw(self, ticket: bytes) -> None:
        """As ``Transport.withdraw``."""
        self._offers.pop(bytes(ticket), None)
        if (use := self._running.get(bytes(ticket))) is not None:
            await use.stopped()

    async def close(self) -> None:
        """Withdraw every ticket. May be called twice."""
        for ticket in [*self._offers, *self._running]:
            await self.withdraw(ticket)

    def _offer(self, use: Use, until_ns: int) -> Ticket:
        assert use.pieces, "a ticket is for one piece at least"
        assert all(piece.nbytes == len(piece) > 0 for piece in use.pieces), "a piece is a flat view of bytes"
        self._sweep()
        ticket = secrets.token_bytes(TOKEN_BYTES)
        self._offers[ticket] = until_ns, use
        heapq.heappush(self._ends, (until_ns, ticket))
        if len(self._ends) > 2 * len(self._offers) + _SPARE_ENTRIES:
            self._ends = [(until_ns, offered) for offered, (until_ns, _) in self._offers.items()]
            heapq.heapify(self._ends)
        return Ticket(ticket)

    def _take(self, ticket: bytes, sizes: Sequence[int], *, is_post: bool) -> Use:
        name = bytes(ticket)
        until_ns, use = self._offers.pop(name, (0, None))
        if use is None:
            raise TransferRefused("no such ticket: used, withdrawn or expired")
        if until_ns <= self._clock.now_ns():
            raise TransferRefused("the ticket has expired")
        if use.is_post != is_post:
            raise TransferRefused("the ticket is for the other direction")
        if [len(piece) for piece in use.pieces] != list(sizes):
            raise TransferRefused("the pieces are of other sizes")
        self._running[name] = use
        use.when_over(partial(self._running.pop, name))
        return use

    def _sweep(self) -> None:
        """Let go of what nobody came for, so that a book does not grow for ever."""
        now_ns = self._clock.now_ns()
        while self._ends and self._ends[0][0] <= now_ns:
            self._offers.pop(heapq.heappop(self._ends)[1], None)
