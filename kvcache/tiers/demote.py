"""From host memory down to NVMe: what is written, when, and what is not worth it or may not be.

    committed, touched, cold ──► wanted (a tip: the block and all before it that NVMe does not hold)
    persist ──────────────────►    │ a drive is free: as many as make a batch
                                   ▼
    slots reserved on NVMe, blocks held in host memory, the daily budget and the rate spent
                                   │ unpublish, write, fdatasync, publish (``nvme.Device``), in a thread
                                   ▼
    committed in the NVMe ledger; or aborted, and never found

Write policies: *through* wants what was committed at once; *back* only after ``back_ns``, so that what
does not live so long is never written; *evict* wants what the policy would let go next, while there is
still room. Of these, what has earned it is written (``earned``). ``persist`` passes both by. What the daily
budget has no room for is dropped; what the rate has none for waits.

A block is only written together with, or after, all before it: what NVMe holds is whole prefixes.

Invariants: a block is in at most one batch; a drive has at most one batch, and holds with it no more
than an eighth of the host tier; what is wanted is bounded, and dropped (and counted) beyond that.

The sum: a batch of 64 MiB is 40 ms of disk at 1.7 GB/s, one fdatasync and one or two index commits of
0.3 to 4 ms, and 2 us a block on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from typing import Literal

from kvcache.block import HASH_BYTES, BlockSpec, NamespaceId, StorageKey
from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput
from kvcache.ledger import Lease, Ledger, Reservation
from kvcache.policy import RequestContext
from kvcache.tiers.admission import WriteRate
from kvcache.tiers.drive import Drive, NamespaceMap
from kvcache.tiers.earned import Admission, Earned
from kvcache.tiers.host import HostTier
from kvcache.tiers.jobs import entries_of
from kvcache.tiers.nvme import DeviceFault
from kvcache.tiers.nvme_format import Entry, stride_of

log = logging.getLogger("kvcache.nvme")

BATCH_BYTES_MAX = 64 << 20
BATCH_PARTS = 8
BATCH_BLOCKS_MAX = 256
WANTED_MAX = 65_536
WALKED_BLOCKS_MAX = 4_096
COLD_BLOCKS = 64
HOLD_NS = 3_600 * NS_PER_S
OWNER = "demote"

WritePolicy = Literal["through", "back", "evict"]
SpecOf = Callable[[NamespaceId], tuple[BlockSpec, NamespaceMap] | None]


@dataclass(frozen=True, slots=True)
class Rules:
    """When blocks are written, and which; and how many bytes a second (0: any number)."""

    write: WritePolicy
    admission: Admission
    back_ns: int
    bytes_s: int = 0


@dataclass(slots=True)
class _Wanted:
    """A tip to be written from ``due_ns`` on. ``ended`` are told when it was, or will not be."""

    due_ns: int
    ended: list[asyncio.Future[None]] = field(default_factory=list)


_Wish = tuple[StorageKey, _Wanted]


@dataclass(frozen=True, slots=True)
class _Part:
    """A path of one batch: where it goes, and what holds it in host memory meanwhile."""

    reservation: Reservation
    lease: Lease
    puts: Sequence[tuple[Entry, memoryview]]


class Demoter:
    """One owner, the event loop's thread. ``settle`` is called after every change of a ledger."""

    def __init__(
        self,
        host: Ledger,
        nvme: Ledger,
        memory: HostTier,
        spec_of: SpecOf,
        rules: Rules,
        clock: Clock,
        counters: Counter[str],
        settle: Callable[[], None],
        nvme_bytes: int,
    ) -> None:
        self._host = host
        self._nvme = nvme
        self._memory = memory
        self._spec_of = spec_of
        self._rules = rules
        self._clock = clock
        self._counters = counters
        self._settle = settle
        self._batch_bytes = min(BATCH_BYTES_MAX, memory.capacity_bytes // BATCH_PARTS)
        self._earned = Earned(rules.admission, host, nvme_bytes)
        self._rate = WriteRate(rules.bytes_s, clock.now_ns())
        self._wanted: dict[StorageKey, _Wanted] = {}  # Those due earlier come earlier, but for the urgent.
        self._urgent: dict[StorageKey, None] = {}
        self._writing: set[StorageKey] = set()
        self._bells: dict[int, asyncio.Event] = {}
        self._ended: asyncio.Future[None] | None = None

    @property
    def wanted_count(self) -> int:
        """Tips that wait to be written."""
        return len(self._wanted)

    # --- what is wanted -------------------------------------------------------------------------

    def committed(self, path: Sequence[StorageKey]) -> None:
        """These were just computed, and published in the host tier: a path."""
        self._earned.made(path)
        self._consider(path)

    def asked(self, keys: Sequence[StorageKey]) -> None:
        """A request asks for this path."""
        self._earned.asked(keys)

    def touched(self, path: Sequence[StorageKey]) -> None:
        """A request found these in the host tier: a path."""
        if self._earned.is_choosy and path:
            self._consider(path)

    def cool(self) -> None:
        """Before the host tier must let something go, write what would go next."""
        if self._rules.write != "evict" or self._wanted:
            return
        context = RequestContext(now_ns=self._clock.now_ns())
        for tip in self._earned.tips(self._host.coldest(context, COLD_BLOCKS), self._is_known):
            self._want(tip, context.now_ns)

    async def persist(self, tip: StorageKey) -> None:
        """Write this block and all before it, whatever admission says. Ends when that was tried.

        REQUIRES: the host tier holds it. May be cancelled: it is then written all the same."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wanted = self._wanted.setdefault(tip, _Wanted(0))
        wanted.ended.append(ended)
        wanted.due_ns = 0
        self._urgent[tip] = None
        self._ring()
        await ended

    def is_writing(self, path: Sequence[StorageKey]) -> bool:
        """Is any of these in a batch just now?"""
        return not self._writing.isdisjoint(path)

    async def batch_ended(self) -> None:
        """Until the next batch of any drive has ended."""
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._ended)

    def give_up(self) -> None:
        """No drive takes blocks: nobody is to wait for it."""
        self._end_wishes([(tip, self._wanted[tip]) for tip in self._urgent])

    def wake(self) -> None:
        """Time has passed, or a drive takes blocks again."""
        if self._wanted:
            self._ring()

    def _ring(self) -> None:
        for bell in self._bells.values():
            bell.set()

    def _consider(self, path: Sequence[StorageKey]) -> None:
        self._earned.used(path)
        if self._rules.write == "evict":
            return
        new = path
        if self._earned.is_choosy:
            new = path[sum(1 for _ in takewhile(self._is_known, path)) :]
        count = self._earned.leading(new)
        self._counters["nvme_skipped_blocks:admission"] += len(new) - count
        if count and not self._is_known(new[count - 1]):
            delay_ns = self._rules.back_ns if self._rules.write == "back" else 0
            self._want(new[count - 1], self._clock.now_ns() + delay_ns)

    def _is_known(self, key: StorageKey) -> bool:
        """On NVMe, or on the way there."""
        return key in self._writing or self._nvme.has(key)

    def _is_held(self, key: StorageKey) -> bool:
        return next(self._nvme.ancestors(key), None) is not None

    def _want(self, tip: StorageKey, due_ns: int) -> None:
        if tip in self._wanted:
            return
        if len(self._wanted) >= WANTED_MAX:
            self._counters["nvme_skipped_blocks:queue"] += 1
            return
        self._wanted[tip] = _Wanted(due_ns)
        self._ring()

    # --- writing --------------------------------------------------------------------------------

    async def serve(self, drive: Drive) -> None:
        """Write what is wanted to this drive, batch by batch, until cancelled."""
        bell = self._bells.setdefault(drive.number, asyncio.Event())
        while True:
            bell.clear()
            while drive.writable and await self._write_batch(drive):
                await asyncio.sleep(0)  # A batch that wrote nothing has not waited for anything.
            await bell.wait()

    async def _write_batch(self, drive: Drive) -> bool:
        """False: there was nothing to write just now."""
        parts, tried, done = self._gather(drive, self._due())
        if parts and not await self._write(drive, parts):
            done += tried  # They are not tried again at once: the fault may be theirs.
        self._end_wishes(done)
        return bool(parts or done)

    def _end_wishes(self, wishes: Sequence[_Wish]) -> None:
        """Those that have not been ended meanwhile. A later wish for the same tip stays."""
        for tip, wanted in wishes:
            if self._wanted.get(tip) is not wanted:
                continue
            del self._wanted[tip]
            self._urgent.pop(tip, None)
            for ended in wanted.ended:
                if not ended.done():
                    ended.set_result(None)

    def _due(self) -> list[_Wish]:
        """What somebody waits for first, then what is due, the oldest wish first."""
        now_ns = self._clock.now_ns()
        urgent = ((tip, self._wanted[tip]) for tip in self._urgent)
        due = takewhile(lambda wish: wish[1].due_ns <= now_ns, self._wanted.items())
        rest = (wish for wish in due if not wish[1].ended)
        return list(islice(chain(urgent, rest), 4 * BATCH_BLOCKS_MAX))

    def _gather(self, drive: Drive, wishes: Sequence[_Wish]) -> tuple[list[_Part], list[_Wish], list[_Wish]]:
        """Reserve a batch. The wishes that it is for; those that are done with it, or cannot be done. Nothing
        while the rate allows nothing: what is wanted stays so."""
        parts: list[_Part] = []
        tried: list[_Wish] = []
        done: list[_Wish] = []
        blocks = size = walked = 0
        for wish in wishes:
            tip = wish[0]
            path = self._path(tip)
            walked += len(path)
            spec = self._spec_of(NamespaceId(tip[:HASH_BYTES])) if path else None
            if spec is None:
                if path or tip not in self._writing:  # Else another drive is at it: look again later.
                    done.append(wish)
                continue
            stride = stride_of(spec[0].block_bytes)
            room = min(
                BATCH_BLOCKS_MAX - blocks,
                max(1 if not parts else 0, (self._batch_bytes - size) // stride),
                self._rate.left(self._clock.now_ns(), stride),
            )
            if room <= 0:
                break
            part = self._reserve(drive, path[:room], spec[0], stride)
            if part is not None:
                parts.append(part)
                tried.append(wish)
                blocks += len(part.puts)
                size += len(part.puts) * stride
            if part is None or len(part.puts) == len(path):
                done.append(wish)
            if walked > WALKED_BLOCKS_MAX:
                break
        return parts, tried, done

    def _path(self, tip: StorageKey) -> list[StorageKey]:
        """What has to be written so that NVMe holds ``tip``, first to last. Nothing if it is known there,
        or if the host tier does not hold it any more."""
        if not self._host.has(tip):
            self._counters["nvme_skipped_blocks:gone"] += not self._is_known(tip)
            return []
        path = list(takewhile(lambda key: not self._is_known(key), self._host.ancestors(tip)))
        path.reverse()
        written = takewhile(self._is_held, path)  # Before the other drive has written what they continue.
        return path[sum(1 for _ in written) :]

    def _reserve(
        self, drive: Drive, path: Sequence[StorageKey], spec: BlockSpec, stride: int
    ) -> _Part | None:
        """As much of the path as there is room and budget for. None, counted: nothing."""
        affordable = min(len(path), drive.budget.left() // stride)
        if not affordable:
            drive.short_bytes = stride
            self._skip("budget", path)
            return None
        context = RequestContext(now_ns=self._clock.now_ns())
        before = next(islice(self._host.ancestors(path[0]), 1, None), None)
        try:
            reservation = self._nvme.reserve(
                drive.number,
                before,
                path[:affordable],
                spec.block_bytes,
                OWNER,
                context,
            )
        except BadInput:
            self._skip("parent", path)
            return None
        if not reservation.reservation_id:
            self._settle()
            self._skip("full", path)
            return None
        lease = self._host.borrow(reservation.keys, OWNER, context.now_ns + HOLD_NS)
        if len(lease.keys) < len(reservation.keys):
            reservation = self._nvme.shorten(reservation.reservation_id, OWNER, len(lease.keys))
        self._settle()
        if not lease.keys:
            self._skip("gone", path)
            return None
        spent = drive.budget.allow(len(lease.keys) * stride)
        assert spent, "it was affordable a moment ago"
        self._rate.spend(len(lease.keys) * stride)
        self._writing.update(reservation.keys)
        if reservation.start:
            before = path[reservation.start - 1]
        return _Part(reservation, lease, self._puts(reservation, lease, spec, before))

    def _puts(
        self, reservation: Reservation, lease: Lease, spec: BlockSpec, before: StorageKey | None
    ) -> list[tuple[Entry, memoryview]]:
        entries = entries_of(reservation.keys, reservation.slots, lease.checksums, spec, before)
        views = [self._memory.view(slot, spec.block_bytes) for slot in lease.slots]
        return list(zip(entries, views, strict=True))

    def _skip(self, reason: str, path: Sequence[StorageKey]) -> None:
        self._counters[f"nvme_skipped_blocks:{reason}"] += len(path)

    async def _write(self, drive: Drive, parts: Sequence[_Part]) -> bool:
        puts = [put for part in parts for put in part.puts]
        written = False
        try:
            await drive.write(puts, self._namespaces(parts), durable=False)
            written = drive.readable  # Fenced meanwhile: its blocks are gone, these too.
        except DeviceFault:
            self._counters["nvme_skipped_blocks:error"] += len(puts)
        finally:
            for part in parts if written else reversed(parts):
                self._end(part, written)
            self._settle()
            self._tell_ended()
        return written

    def _end(self, part: _Part, written: bool) -> None:
        reservation, lease = part.reservation, part.lease
        self._writing.difference_update(reservation.keys)
        self._host.release(lease.lease_id, OWNER, self._clock.now_ns())
        if not written:
            self._nvme.abort(reservation.reservation_id, OWNER)
            return
        sums = [b""] * len(reservation.keys)
        self._nvme.commit(reservation.reservation_id, OWNER, lease.checksums, sums)
        self._counters["nvme_written_blocks"] += len(reservation.keys)
        self._counters["nvme_written_bytes"] += len(reservation.keys) * reservation.block_bytes
        self._earned.wrote(len(reservation.keys) * reservation.block_bytes)

    def _tell_ended(self) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended.set_result(None)

    def _namespaces(self, parts: Sequence[_Part]) -> Mapping[bytes, NamespaceMap]:
        found: dict[bytes, NamespaceMap] = {}
        for part in parts:
            name = NamespaceId(part.reservation.keys[0][:HASH_BYTES])
            spec = self._spec_of(name)
            assert spec is not None
            found[name] = spec[1]
        return found
