"""What is about to leave a GPU and is nowhere else goes to host memory first, behind everybody's back.

    little is free ──► the coldest that no tier below has ──► the path to each, first to last:
        reserved in host memory, held in HBM ── copied, summed ──► published in host memory
                                                    └── not what it was: withdrawn from HBM

What leaves before its turn comes is gone: a miss. A path goes whole, because host memory is prefix-closed in
itself.

Invariants: a block is published below only when the bytes that arrived have the checksum under which HBM
held it; one batch a GPU at a time, of ``BATCH_BYTES_MAX``; a slot that a copy may still write to is not used
again. A GPU that does not answer in ``ANSWER_S`` is lost: whatever its driver does, it does to a thread.

The sum: 64 MiB take 1 to 4 ms of the link, or so long as the rate says (``hbm_demote_rate``); on the event
loop a batch takes 10 us a block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, TypeVar

from kvcache.block import HASH_BYTES, BlockSpec, NamespaceId, StorageKey
from kvcache.clock import NS_PER_S, Clock
from kvcache.device.cap import Cap
from kvcache.errors import BadInput, Unavailable
from kvcache.ledger import Lease, Ledger, Reservation
from kvcache.policy import RequestContext
from kvcache.sums import block_checksum
from kvcache.tiers.demote import SpecOf
from kvcache.tiers.hbm_arena import ARENA, HbmArena
from kvcache.tiers.host import HostTier

if TYPE_CHECKING:
    from kvcache.device.served import Outlet

log = logging.getLogger("kvcache.hbm")

T = TypeVar("T")

BATCH_BYTES_MAX = 64 << 20
COLD_BLOCKS = 64
SHORT_PARTS = 8
"""Little is free when it is less than this part of the whole."""
HOLD_NS = 3_600 * NS_PER_S
PROBE_NS = 5 * NS_PER_S
PROBE_BYTES = 1
PAUSE_S_MAX = 60.0
ANSWER_S = 30.0
"""Longer than an ``Outlet`` waits for a copy: then the driver itself hangs."""
OWNER = "hbm-demote"


@dataclass(frozen=True, slots=True)
class Below:
    """The tiers under the GPU. ``arena`` is the host memory of the same trust domain; ``has``: is it in any
    of them? ``committed`` is told what was published in host memory, ``settle`` called after each change."""

    host: Ledger
    memory: HostTier
    arena: int
    has: Callable[[StorageKey], bool]
    spec_of: SpecOf
    committed: Callable[[Sequence[StorageKey]], None]
    settle: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Part:
    reservation: Reservation
    lease: Lease
    spec: BlockSpec


class HbmDemoter:
    """Of one arena. One owner, the event loop's thread."""

    def __init__(
        self,
        arena: HbmArena,
        outlet: Outlet,
        below: Below,
        clock: Clock,
        counters: Counter[str],
        quarantine_ns: int,
        bytes_s: int = 0,
    ) -> None:
        """``bytes_s``: no more than so many are copied; 0: as fast as it goes."""
        self._arena = arena
        self._outlet = outlet
        self._below = below
        self._clock = clock
        self._counters = counters
        self._quarantine_ns = quarantine_ns
        self._pool = ThreadPoolExecutor(1, "kvcache-hbm")
        self._task: asyncio.Task[None] | None = None
        self._probe_ns = clock.now_ns() + PROBE_NS
        self._cap = Cap(bytes_s, clock.now_ns()) if bytes_s else None
        self._closing = asyncio.Event()
        self._is_closed = False
        self._is_working = False

    @property
    def is_busy(self) -> bool:
        return self._task is not None

    @property
    def is_stuck(self) -> bool:
        """May something still be written to host memory, or read from the GPU's, for all that is known?"""
        return self._is_working or self._outlet.is_stuck

    def cool(self) -> None:
        """Something was written, or time has passed: begin, unless it is under way or there is nothing."""
        if self._task is not None or self._arena.is_lost or self._is_closed:
            return
        if self._tips():
            self._begin(self._demote_all())
        elif self._clock.now_ns() >= self._probe_ns:
            self._begin(self._probe())

    async def close(self) -> None:
        """Wait for what is being copied: a thread writes into host memory until then. May be cancelled, and
        called twice. RAISES Unavailable when it does not end."""
        self._is_closed = True
        self._closing.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        if not self.is_stuck:
            await self._done(self._outlet.close)
        self._pool.shutdown(wait=False)

    # --- what is to go --------------------------------------------------------------------------

    def _tips(self) -> list[StorageKey]:
        """Blocks that are cold, while little is free, and that no tier below has."""
        if self._arena.is_lost or self._arena.free_bytes * SHORT_PARTS > self._arena.capacity_bytes:
            return []
        context = RequestContext(now_ns=self._clock.now_ns())
        coldest = self._arena.ledger.coldest(context, COLD_BLOCKS)
        return [key for key in coldest if not self._below.has(key)]

    def _path(self, tip: StorageKey) -> list[StorageKey]:
        """What has to be copied so that host memory can hold ``tip``, first to last."""
        if not self._arena.ledger.has(tip):
            return []
        up = takewhile(lambda key: not self._below.host.has(key), self._arena.ledger.ancestors(tip))
        return list(up)[::-1]

    def _reserve(self, tip: StorageKey) -> _Part | None:
        """The first batch of the path. None, counted: nothing."""
        path = self._path(tip)
        spec = self._below.spec_of(NamespaceId(tip[:HASH_BYTES]))
        if not path or spec is None:
            self._skip("gone", 1)
            return None
        path = path[: max(1, BATCH_BYTES_MAX // spec[0].block_bytes)]
        before = next(islice(self._arena.ledger.ancestors(path[0]), 1, None), None)
        context = RequestContext(now_ns=self._clock.now_ns())
        try:
            reservation = self._below.host.reserve(
                self._below.arena, before, path, spec[0].block_bytes, OWNER, context
            )
        except BadInput:
            self._skip("parent", len(path))
            return None
        if not reservation.reservation_id:
            self._below.settle()
            self._skip("busy" if reservation.reason in ("busy", "held") else "full", len(path))
            return None
        return self._hold(reservation, spec[0])

    def _hold(self, reservation: Reservation, spec: BlockSpec) -> _Part | None:
        """Against eviction, while it is copied. REQUIRES: the path could be found just now."""
        lease = self._arena.ledger.borrow(reservation.keys, OWNER, self._clock.now_ns() + HOLD_NS)
        if len(lease.keys) < len(reservation.keys):
            number = reservation.reservation_id
            reservation = self._below.host.shorten(number, OWNER, len(lease.keys))
        self._below.settle()
        if not lease.keys:
            self._skip("gone", 1)
            return None
        return _Part(reservation, lease, spec)

    def _skip(self, reason: str, count: int) -> None:
        self._counters[f"hbm_skipped_blocks:{reason}"] += count

    # --- doing it -------------------------------------------------------------------------------

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            # Our own code is wrong: as with any task of the node, the command ends the process.
            task.get_loop().call_exception_handler({"message": "a task of the HBM tier", "exception": error})

    async def _demote_all(self) -> None:
        tried: set[StorageKey] = set()
        while fresh := [tip for tip in self._tips() if tip not in tried]:
            tried.add(fresh[0])
            while await self._may_go() and (part := self._reserve(fresh[0])) and await self._copy(part):
                if self._is_closed or self._below.host.has(fresh[0]):
                    break
            if self._is_closed:
                break

    async def _may_go(self) -> bool:
        """Wait until the cap lets one more batch through. Not when the node ends meanwhile."""
        while self._cap is not None and (wait_ns := self._cap.opens_in_ns(self._clock.now_ns())):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), min(wait_ns / NS_PER_S, PAUSE_S_MAX))
                return False
        return True

    async def _copy(self, part: _Part) -> bool:
        """Did all of it arrive? What did is published below."""
        arrived: list[bytes] = []
        try:
            arrived = await self._arrived(part)
        except Unavailable as failure:
            self._skip("error", len(part.reservation.keys))
            self.lose(failure.why or failure.what)
        finally:
            self._arena.ledger.release(part.lease.lease_id, OWNER, self._clock.now_ns())
            if not self.is_stuck:
                self._publish(part, arrived)
            self._below.settle()
        return len(arrived) == len(part.reservation.keys)

    async def _arrived(self, part: _Part) -> list[bytes]:
        """The sums of the leading blocks that arrived as they should. RAISES Unavailable."""
        size, chunk_bytes = part.reservation.block_bytes, part.spec.chunk_bytes
        if self._cap is not None:
            self._cap.spend(size * len(part.reservation.keys))
        sources = [self._arena.memory.tensor(slot, size) for slot in part.lease.slots]
        targets = [self._below.memory.view(slot, size) for slot in part.reservation.slots]
        sums = await self._done(lambda: self._outlet.copy(sources, targets, chunk_bytes))
        for at, (key, checksum) in enumerate(zip(part.lease.keys, part.lease.checksums, strict=True)):
            if block_checksum(key, size, chunk_bytes, sums[at]) != checksum:
                self._reject(key, part.lease.generations[at])
                return sums[:at]
        return sums

    def _reject(self, key: StorageKey, generation: int) -> None:
        """What is in HBM is not this block any more."""
        self._arena.ledger.quarantine(key, generation, self._clock.now_ns() + self._quarantine_ns)
        self._counters["hbm_rejected_blocks:checksum"] += 1

    def _publish(self, part: _Part, sums: Sequence[bytes]) -> None:
        number, count = part.reservation.reservation_id, len(sums)
        left = self._below.host.shorten(number, OWNER, count)
        if not count:
            return
        self._below.host.commit(number, OWNER, part.lease.checksums[:count], sums)
        self._counters["hbm_demoted_blocks"] += count
        self._counters["hbm_demoted_bytes"] += count * left.block_bytes
        self._below.committed(left.keys)

    async def _probe(self) -> None:
        """Does the GPU still answer? One that does not is lost also to those who ask for nothing."""
        self._probe_ns = self._clock.now_ns() + PROBE_NS
        try:
            source = self._arena.memory.start(ARENA, PROBE_BYTES)
            await self._done(lambda: self._outlet.probe(source))
        except Unavailable as failure:
            self.lose(failure.why or failure.what)

    async def _done(self, work: Callable[[], T]) -> T:
        """What the thread gives. RAISES Unavailable, also when it does not return: then it is left alone, as
        it is when nobody waits for it any more."""
        running = asyncio.get_running_loop().run_in_executor(self._pool, work)
        running.add_done_callback(_seen)
        self._is_working = True
        done, _ = await asyncio.wait([running], timeout=ANSWER_S)
        self._is_working = not done
        if not done:
            raise Unavailable("unavailable", "a GPU", f"its driver has not answered for {ANSWER_S} s")
        return running.result()

    def lose(self, why: str) -> None:
        """The GPU failed or was reset."""
        log.error("the HBM of %s is lost: %s", self._arena.name, why)
        self._arena.lose(why, self._clock.now_ns())
        self._below.settle()


def _seen(running: asyncio.Future[T]) -> None:
    """Whoever waited has what it raised; if nobody does any more, it is no news."""
    if not running.cancelled():
        running.exception()
