"""Hot prefixes are copied to peers that lack them, before anybody there asks, within a byte budget.

    used often ──► wanted ── a peer lacks some of it, and the budget allows ──► copying ──► at the next peer
                     │ nobody lacks it: forgotten                                 └── failed: that peer rests

A router sends requests to where the blocks are; one node that alone holds what everybody's prompt begins
with so gets everybody. What is copied is ordinary there: it can go again, and is verified as all that comes.

Invariants: one copy at a time, so that it is never in the way of more than one request; what was copied in
any second is at most the budget of a second, and one block.

The sum: nothing a request but its marks (``heat``); a copy is a push (``kvcache.peers.push``) of lowest
priority.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S, Clock
from kvcache.peers.heat import Heat

WANTED_MAX = 1_024
COPY_BLOCKS_MAX = 256
LOOKS_MAX = 4
"""So many paths are looked up at once: one of 8,000 blocks takes some ms among five peers."""
REST_NS = 10 * NS_PER_S

Copy = Callable[[str, Sequence[StorageKey], int], Awaitable[int]]
"""Copy the blocks of a path from a position on to the peer of this name: how many it holds then beyond."""


@dataclass(frozen=True, slots=True)
class Lack:
    """The peer ``name`` holds the leading ``held`` blocks of a path, and no more."""

    name: str
    held: int


class Budget:
    """So many bytes a second, on average over a second. Takes the time, keeps no clock."""

    def __init__(self, bytes_a_second: int) -> None:
        self._rate = bytes_a_second
        self._left = float(bytes_a_second)
        self._then_ns = 0

    def left(self, now_ns: int) -> int:
        """What may be spent now."""
        passed_s = max(0, now_ns - self._then_ns) / NS_PER_S
        self._left = min(float(self._rate), self._left + passed_s * self._rate)
        self._then_ns = now_ns
        return int(self._left)

    def spend(self, byte_count: int) -> None:
        """May go below nothing: then nothing is left until that is made up for."""
        self._left -= byte_count

    @property
    def is_full(self) -> bool:
        return self._left >= self._rate


class Replicator:
    """One owner, the event loop's thread."""

    def __init__(
        self,
        heat: Heat,
        budget: Budget,
        lacking: Callable[[Sequence[StorageKey]], Sequence[Lack]],
        path_to: Callable[[StorageKey], Sequence[StorageKey]],
        size_of: Callable[[Sequence[StorageKey]], tuple[int, int]],
        copy: Copy,
        clock: Clock,
        counters: Counter[str],
    ) -> None:
        """``lacking`` names the peers that are up and lack some of a path. ``path_to`` gives the blocks from
        the first of a prompt to this one, as far as they are here. ``size_of`` tells how many of a path's
        leading blocks are here, and the bytes of one."""
        self._heat = heat
        self._budget = budget
        self._lacking = lacking
        self._path_to = path_to
        self._size_of = size_of
        self._copy = copy
        self._clock = clock
        self._counters = counters
        self._wanted: dict[StorageKey, tuple[StorageKey, ...]] = {}
        self._given: dict[tuple[str, StorageKey], int] = {}
        self._resting: dict[str, int] = {}
        self._running: asyncio.Task[None] | None = None

    def used(self, path: Sequence[StorageKey]) -> None:
        """A request of an engine was given these blocks, one behind the other."""
        hot = self._heat.used(path, self._clock.now_ns())
        if hot and len(self._wanted) < WANTED_MAX and (whole := self._path_to(path[hot - 1])):
            self._wanted.setdefault(path[hot - 1], tuple(whole))

    def tick(self) -> None:
        """Called by the node's timer: begin a copy, if there is one to make and the budget allows."""
        if self._running is not None or not self._wanted:
            return
        now_ns = self._clock.now_ns()
        left = self._budget.left(now_ns)
        for tip, path in list(islice(self._wanted.items(), LOOKS_MAX)):
            here, block_bytes = self._size_of(path)
            lack = self._who_lacks(tip, path[:here], now_ns)
            if lack is None:
                self._forget(tip)
                continue
            count = min(here - lack.held, COPY_BLOCKS_MAX, left // block_bytes)
            if count <= 0 and self._budget.is_full:  # A block may be larger than the budget of a second.
                count = 1
            if count > 0:
                self._budget.spend(count * block_bytes)
                work = self._run(tip, lack, path[: lack.held + count], block_bytes)
                self._running = asyncio.get_running_loop().create_task(work)
                self._running.add_done_callback(self._ended)
            return

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def _who_lacks(self, tip: StorageKey, path: Sequence[StorageKey], now_ns: int) -> Lack | None:
        self._resting = {name: until for name, until in self._resting.items() if until > now_ns}
        found = [
            Lack(each.name, max(each.held, self._given.get((each.name, tip), 0)))
            for each in self._lacking(path)
            if each.name not in self._resting
        ]
        lacking = [each for each in found if each.held < len(path)]
        return min(lacking, key=lambda each: (-each.held, each.name), default=None)

    def _forget(self, tip: StorageKey) -> None:
        del self._wanted[tip]
        self._given = {key: held for key, held in self._given.items() if key[1] != tip}

    async def _run(self, tip: StorageKey, lack: Lack, path: Sequence[StorageKey], block_bytes: int) -> None:
        copied = await self._copy(lack.name, path, lack.held)
        self._counters["replicated_blocks"] += copied
        self._counters["replicated_bytes"] += copied * block_bytes
        self._given[lack.name, tip] = lack.held + copied  # Its own events tell so a moment later.
        if copied < len(path) - lack.held:
            self._counters["replication_failures"] += 1
            self._resting[lack.name] = self._clock.now_ns() + REST_NS

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running = None
        if not task.cancelled() and (error := task.exception()) is not None:
            # Our own code is wrong: as with any task of the node, the command ends the process.
            task.get_loop().call_exception_handler({"message": "a copy to a peer", "exception": error})
