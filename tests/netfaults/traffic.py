"""Calls at a peer whose network fails, and whether each kept the contract of transports.

    line down ── connect ─► line up ── ask, read or write, look ─► line up
        ▲                      └── PeerLost ──┐
        └─────────────────────────────────────┘

Every call has a deadline, and how far past it it ended is kept, less what the machine stood still meanwhile.
What a read brought is compared. As soon as
a call has failed, its memory is another's: it is filled anew, and looked at again at the end, when whatever
the network still held has come. What a write sent is summed by who was written to: he never has anything
that nobody sent.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.testing.stalls import Stalls
from kvcache.testing.transport_pair import CLOCK, LATE_NS
from kvcache.testing.transport_peer import digest, peer_bytes
from kvcache.transport.base import (
    Endpoint,
    Limits,
    PeerLost,
    Ticket,
    TransferLate,
    TransferRefused,
    Transport,
)

T = TypeVar("T")

NEVER_NS = 3_600 * NS_PER_S
FAILURES = (PeerLost, TransferLate, TransferRefused)
FOREIGN = 0xEE
"""What the next owner of memory keeps there."""
AGAIN_S = 0.002
FENCE_NS = 20 * NS_PER_S


@dataclass(frozen=True, slots=True)
class Call:
    """``began_ns`` on the clock; ``over_ns`` after its deadline it ended; ``outcome`` is "done" or what was
    raised."""

    what: str
    began_ns: int
    ended_ns: int
    over_ns: int
    outcome: str

    @property
    def is_done(self) -> bool:
        return self.outcome == "done"


class Calls:
    """Every call that was made, and the memory of those that failed."""

    def __init__(self, stalls: Stalls) -> None:
        self.stalls = stalls
        self.all: list[Call] = []
        self.wrong: list[str] = []
        self._running: dict[int, tuple[str, int]] = {}
        self._numbers = itertools.count()
        self._expected: dict[tuple[int, int], tuple[list[bytes], bytes]] = {}
        self._left_behind: list[memoryview] = []

    async def hold(self, what: str, call: Awaitable[T], deadline_ns: int) -> T:
        """Await it, and note when it ended. It is not ended by this: a call that hangs is to be seen."""
        began_ns, outcome, number = CLOCK.now_ns(), "done", next(self._numbers)
        self._running[number] = what, deadline_ns
        try:
            return await call
        except FAILURES as error:
            outcome = type(error).__name__
            raise
        finally:
            del self._running[number]
            ended_ns = CLOCK.now_ns()
            self.all.append(Call(what, began_ns, ended_ns, self._over_ns(deadline_ns, ended_ns), outcome))

    def expected(self, count: int, size: int) -> tuple[list[bytes], bytes]:
        """What the peer has, and its digest. Made once, and before: the loop that times calls must not stand
        for it."""
        if (count, size) not in self._expected:
            pieces = peer_bytes(count, size)
            self._expected[count, size] = pieces, digest(list(map(memoryview, pieces)))
        return self._expected[count, size]

    def leave_behind(self, pieces: list[memoryview]) -> None:
        """The call that had this memory has failed, and it has a new owner."""
        for piece in pieces:
            piece[:] = bytes([FOREIGN]) * len(piece)
        self._left_behind += pieces

    def overdue(self) -> list[str]:
        """What should have ended by now, and has not."""
        now_ns = CLOCK.now_ns()
        return [
            what
            for what, deadline_ns in self._running.values()
            if self._over_ns(deadline_ns, now_ns) > LATE_NS
        ]

    def outcomes(self, since_ns: int = 0, until_ns: int = NEVER_NS**2) -> Counter[str]:
        """Of the calls that began since then and ended by then."""
        return Counter(
            call.outcome for call in self.all if since_ns <= call.began_ns and call.ended_ns <= until_ns
        )

    def latest_ns(self) -> int:
        """How far past its deadline a call ended."""
        return max(call.over_ns for call in self.all)

    def check(self) -> None:
        """No call was late, and nobody touched memory that had another owner by then."""
        late = [call for call in self.all if call.over_ns > LATE_NS]
        assert not late, late[:5]
        assert not self.wrong
        for piece in self._left_behind:
            assert piece == bytes([FOREIGN]) * len(piece), "memory was written after its call had returned"
        self._left_behind.clear()

    def _over_ns(self, deadline_ns: int, now_ns: int) -> int:
        return now_ns - deadline_ns - self.stalls.stood_ns(deadline_ns, now_ns)


class Line:
    """A connection to ``address`` that is made anew when it is lost."""

    def __init__(self, transport: Transport, address: str, calls: Calls) -> None:
        self._transport = transport
        self._address = address
        self._calls = calls
        self._end: Endpoint | None = None
        self._tickets: asyncio.Queue[bytes] = asyncio.Queue()
        self._asking = asyncio.Lock()
        self._sent: set[bytes] = set()
        self.told: asyncio.Queue[bytes] = asyncio.Queue()
        """What the peer said of itself."""

    @property
    def is_up(self) -> bool:
        return self._end is not None and not self._end.is_lost

    async def up(self, deadline_ns: int) -> Endpoint:
        """RAISES PeerLost, TransferLate."""
        if self._end is None or self._end.is_lost:
            self._tickets = tickets = asyncio.Queue()

            def hear(_: Endpoint, note: bytes) -> None:
                word, _, rest = note.partition(b" ")
                if word == b"filled":
                    if rest not in self._sent:
                        self._calls.wrong.append("the peer was filled with what nobody wrote")
                elif word in (b"has", b"wrote", b"failed"):
                    self.told.put_nowait(note)
                else:
                    tickets.put_nowait(note)

            connecting = self._transport.connect(self._address, deadline_ns, hear)
            self._end = await self._calls.hold("connect", connecting, deadline_ns)
        return self._end

    async def say(self, note: str, deadline_ns: int) -> None:
        end = await self.up(deadline_ns)
        await self._calls.hold("notify", end.notify(note.encode(), deadline_ns), deadline_ns)

    async def ticket(self, word: str, count: int, size: int, deadline_ns: int) -> Ticket:
        """RAISES PeerLost, TransferLate."""
        async with self._asking:  # Tickets come in the order of the questions.
            tickets = self._tickets
            while not tickets.empty():
                tickets.get_nowait()  # Of a question that was too late for its answer.
            await self.say(f"{word} {count} {size}", deadline_ns)
            while self._tickets.empty():
                if not self.is_up:
                    raise PeerLost("before it gave a ticket")
                if CLOCK.now_ns() >= deadline_ns:
                    raise TransferLate("no ticket came")
                await asyncio.sleep(AGAIN_S)
            return Ticket(self._tickets.get_nowait())

    async def read(self, count: int, size: int, patience_ns: int) -> None:
        """RAISES what a transport raises."""
        deadline_ns = CLOCK.now_ns() + patience_ns
        end = await self.up(deadline_ns)
        ticket = await self.ticket("export", count, size, deadline_ns)
        into = rooms(count, size)
        try:
            await self._calls.hold("read", end.read(ticket, into, deadline_ns), deadline_ns)
        except FAILURES:
            self._calls.leave_behind(into)
            raise
        for piece, expected in zip(into, self._calls.expected(count, size)[0], strict=True):
            assert bytes(piece) == expected, (
                "wrong bytes"
            )  # A view is compared byte by byte, 30 times as long.

    async def write(self, count: int, size: int, patience_ns: int) -> None:
        """RAISES what a transport raises."""
        deadline_ns = CLOCK.now_ns() + patience_ns
        end = await self.up(deadline_ns)
        ticket = await self.ticket("post", count, size, deadline_ns)
        source = rooms(count, size)
        pieces, summed = self._calls.expected(count, size)
        for piece, data in zip(source, pieces, strict=True):
            piece[:] = data
        self._sent.add(summed)
        try:
            await self._calls.hold("write", end.write(ticket, source, deadline_ns), deadline_ns)
        except FAILURES:
            self._calls.leave_behind(source)
            raise


class Traffic:
    """Several lines in use, each by one caller after another, until ``stop``."""

    def __init__(
        self,
        transport: Transport,
        address: str,
        seed: int,
        stalls: Stalls,
        *,
        lines: int,
        patience_ns: int,
    ) -> None:
        self.calls = Calls(stalls)
        self.lines = [Line(transport, address, self.calls) for _ in range(lines)]
        self._patience_ns = patience_ns
        self._ways = [random.Random(seed + at) for at in range(lines)]
        self._is_over = False
        self._tasks: list[asyncio.Task[None]] = []
        self._done = [0] * lines

    def start(self, sizes: tuple[int, ...], counts: tuple[int, ...]) -> None:
        for count, size in itertools.product(counts, sizes):
            self.calls.expected(count, size)
        for at in range(len(self.lines)):
            self._tasks.append(asyncio.ensure_future(self._use(at, sizes, counts)))

    async def progress(self, within_ns: int) -> int:
        """How long until every line has done one more transfer; it must be within ``within_ns``."""
        began_ns, before = self._now_ns(), list(self._done)
        while any(now <= then for now, then in zip(self._done, before, strict=True)):
            assert not self.calls.overdue(), "a call does not end"
            assert self._now_ns() - began_ns < within_ns, "the traffic does not go on"
            self._look()
            await asyncio.sleep(AGAIN_S)
        return self._now_ns() - began_ns

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)

    def _now_ns(self) -> int:
        return self.calls.stalls.awake_ns()

    def _look(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def _use(self, at: int, sizes: tuple[int, ...], counts: tuple[int, ...]) -> None:
        way, line = self._ways[at], self.lines[at]
        while not self._is_over:
            move = way.choice([line.read, line.write])
            try:
                await move(way.choice(counts), way.choice(sizes), self._patience_ns)
                self._done[at] += 1
            except FAILURES:
                await asyncio.sleep(AGAIN_S)  # It is refused at once, perhaps: others want to run as well.


def rooms(count: int, size: int) -> list[memoryview]:
    region = memoryview(bytearray(count * size))
    return [region[at * size : (at + 1) * size] for at in range(count)]


def wary(silence_ms: int = 1_000) -> Limits:
    """Of a peer whose network is watched closely, and whose transfers have little room."""
    silence_ns = silence_ms * NS_PER_MS
    return Limits(16 << 20, 32 << 20, heartbeat_ns=silence_ns // 5, silence_ns=silence_ns)


async def fence(line: Line) -> None:
    """What bounds bytes in flight is free again: a transfer larger than every bound goes, and goes alone."""
    until_ns = CLOCK.now_ns() + FENCE_NS
    while True:
        try:
            await line.read(1, wary().total_bytes_max + 1, FENCE_NS)
            return
        except FAILURES:  # To make so many bytes, once, takes longer than a silence, where it is short.
            assert CLOCK.now_ns() < until_ns, "what bounds bytes in flight does not come back"
