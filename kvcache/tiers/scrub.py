"""The scrubber: reads and verifies every block of a tier, over and over, without being in anybody's way.

A block that has rotted is a miss whenever it is found; found here, it is out of the way before a prompt
asks for it, and the operator learns that a drive goes bad.

    resting ── a pass is due, or start_now ──► passing ── no block is left ──► resting
                                                │   ▲
                                                └───┘ start_now: from the first slot again

It goes in slot order, which is the order on the disk, and what comes next it asks as it goes: blocks
come and go while a pass lasts. Between two reads it rests so long that it takes ``share`` of what the device
gives it (measured by its own reads, one at a time). While others' reads and writes are in flight it
waits, though not for ever: a node that is never idle is scrubbed too, one block each ``yield_s``.

Knows nothing of files: what to read, how to verify and what to do with a bad block is handed in.
Invariants: ``left_blocks`` is 0 exactly while no pass is on or asked for; a pass that ``start_now`` ended
early is not counted.

The sum: 4 TB in blocks of 2 MiB at 5 % of 2 GB/s take 11 hours, and on a node that is never idle 23 days;
each block costs under 20 us of Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvcache.block import Slot
from kvcache.clock import NS_PER_S, Clock
from kvcache.tiers.rates import Rate

BEFORE_ALL: Final = Slot(-1)
"""The position before the first slot."""

GONE: Final = "gone"
"""Said of a slot whose block has left meanwhile, or whose device is away: nothing was learnt."""

_REST_MAX_S = 30.0
_STEP_S = 1.0
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class ScrubSettings:
    """``share`` of the device's bandwidth for passes of its own (0: none), ``asked_share`` for one that an
    operator asked for; a pass starts ``every_s`` after the last one started, or when that has ended."""

    share: float = 0.05
    asked_share: float = 0.5
    every_s: float = 24 * 3_600.0
    yield_s: float = 1.0

    def __post_init__(self) -> None:
        assert 0 <= self.share <= 1
        assert 0 < self.asked_share <= 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason`` is empty for a block that is as it should be, ``GONE``, or what is wrong with it."""

    read_bytes: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ScrubTarget:
    """What is scrubbed.

    ``following(slot)``: blocks behind the slot, in slot order, as many as is convenient; none at the end.
    ``held()``: how many blocks there are. ``verify(slot)`` reads one, and sees to it that a bad one is
    served no more; it raises nothing but cancellation. ``busy()``: others' reads or writes are in flight.
    """

    following: Callable[[Slot], Sequence[Slot]]
    held: Callable[[], int]
    verify: Callable[[Slot], Awaitable[Verdict]]
    busy: Callable[[], bool]


class Pace:
    """How long to rest after a read, so that reads take a share of what the device gives."""

    def __init__(self) -> None:
        self._rate = Rate(samples_min=1)

    def rest_s(self, share: float, read_bytes: int, duration_ns: int) -> float:
        """After ``read_bytes`` in ``duration_ns``. Nothing read needs no rest. REQUIRES: share over 0."""
        self._rate.add(read_bytes, duration_ns)
        rate = self._rate.value()
        if not read_bytes or rate is None:
            return 0.0
        return min(max(0.0, read_bytes / (rate * share) - duration_ns / NS_PER_S), _REST_MAX_S)


class Scrubber:
    """One task runs it; everything else is called on the same loop."""

    def __init__(
        self,
        target: ScrubTarget,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]],
        settings: ScrubSettings,
        position: Slot = BEFORE_ALL,
    ) -> None:
        """``sleep`` takes seconds. ``position``: where an earlier node was, to go on from there."""
        self.passes = 0
        self.scrubbed_blocks = 0
        self.scrubbed_bytes = 0
        self.bad: Counter[str] = Counter()
        self.left_blocks = 0
        self.position = position
        self._target = target
        self._clock = clock
        self._sleep = sleep
        self._settings = settings
        self._pace = Pace()
        self._asked = False
        self._urgent = False
        self._due_ns = clock.now_ns()

    def start_now(self) -> None:
        """Begin a full pass, from the first slot. It is over when ``passes`` has grown by one."""
        self._asked = True
        self.left_blocks = max(1, self._target.held())

    def values(self) -> dict[str, float]:
        """The numbers of the stats, by name."""
        return {
            "scrub_passes": self.passes,
            "scrubbed_blocks": self.scrubbed_blocks,
            "scrub_bad_blocks": self.bad.total(),
            "scrub_left_blocks": self.left_blocks,
        }

    async def run(self) -> None:
        """Pass after pass, until cancelled."""
        while True:
            await self._rest()
            await self.one_pass()

    async def one_pass(self) -> None:
        """Every block behind ``position``; from the first when ``start_now`` was called, before or meanwhile.

        REQUIRES: it was called, or ``share`` is not 0."""
        self._begin()
        while batch := self._target.following(self.position):
            for slot in batch:
                assert slot > self.position, "slots come in order"
                await self._give_way()
                if self._asked:
                    break
                await self._scrub(slot)
            if self._asked:
                self._begin()
        self.passes += 1
        self.left_blocks = 0
        self.position = BEFORE_ALL
        self._urgent = False

    def _begin(self) -> None:
        if self._asked:
            self.position, self._asked, self._urgent = BEFORE_ALL, False, True
        self._due_ns = self._clock.now_ns() + int(self._settings.every_s * NS_PER_S)
        self.left_blocks = max(1, self._target.held())

    async def _rest(self) -> None:
        """Until the next pass is due, in steps: an operator who asks need not wait."""
        while not self._asked:
            left_s = (self._due_ns - self._clock.now_ns()) / NS_PER_S
            if left_s <= 0 and self._settings.share:
                return
            await self._sleep(min(_STEP_S, left_s) if left_s > 0 else _STEP_S)

    async def _give_way(self) -> None:
        """While others read or write, but no longer than ``yield_s``."""
        end_ns = self._clock.now_ns() + int(self._settings.yield_s * NS_PER_S)
        while self._target.busy() and not self._asked and self._clock.now_ns() < end_ns:
            await self._sleep(_LOOK_S)

    async def _scrub(self, slot: Slot) -> None:
        before_ns = self._clock.now_ns()
        verdict = await self._target.verify(slot)
        self.position = slot
        self.left_blocks = max(1, self.left_blocks - 1)
        if verdict.reason != GONE:
            self.scrubbed_blocks += 1
            self.scrubbed_bytes += verdict.read_bytes
            if verdict.reason:
                self.bad[verdict.reason] += 1
        share = self._settings.asked_share if self._urgent else self._settings.share
        took_ns = self._clock.now_ns() - before_ns
        await self._sleep(self._pace.rest_s(share, verdict.read_bytes, took_ns))
