"""From NVMe up into host memory: what is asked for, what is on its way, and whether it is worth it.

    ask ──► worth loading? ── no ──► a miss, counted
              │ yes
              ▼
    group of blocks: slots reserved in the host tier, blocks held on NVMe
              │ read and verified, in threads
              ▼
    the leading good ones are committed in the host tier; what failed its check is withdrawn on NVMe

The copy on NVMe stays: taking it away would mean writing it again, up to 14 times. Ten who ask for one
block cause one read. Whoever waits has a deadline; the read goes on without him, and what it brought is
there for the next.

Invariants: a block that is coming belongs to exactly one group; a slot that is read into stays reserved
until the thread has returned; with what comes from peers, at most a quarter of the host tier is on its way,
or one group.

The sum: 2 MiB at 1.5 GB/s take 1.4 ms, and summing them 0.1 to 0.2 ms in the same thread; the event loop
spends some 100 us a group, so groups are ``GROUP_BYTES``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput
from kvcache.ledger import Lease, Ledger, Reservation
from kvcache.policy import RequestContext
from kvcache.tiers.drive import Drive
from kvcache.tiers.host import HostTier
from kvcache.tiers.nvme import BlockFault, DeviceFault
from kvcache.tiers.nvme_format import Entry
from kvcache.tiers.rates import worth_loading
from kvcache.tiers.space import slot_arena, slot_offset

GROUP_BYTES = 8 << 20
GROUP_BLOCKS_MAX = 256
IN_FLIGHT_PARTS = 4
HOLD_NS = 3_600 * NS_PER_S
OWNER = "promote"

Found = bytes | BlockFault | DeviceFault


class Promoter:
    """One owner, the event loop's thread. ``settle`` is called after every change of a ledger."""

    def __init__(
        self,
        host: Ledger,
        nvme: Ledger,
        memory: HostTier,
        drives: Sequence[Drive],
        clock: Clock,
        counters: Counter[str],
        settle: Callable[[], None],
    ) -> None:
        self._host = host
        self._nvme = nvme
        self._memory = memory
        self._drives = drives
        self._clock = clock
        self._counters = counters
        self._settle = settle
        self._groups: dict[StorageKey, asyncio.Task[None]] = {}
        self._bytes = 0
        self._bytes_max = memory.capacity_bytes // IN_FLIGHT_PARTS

    @property
    def in_flight_bytes(self) -> int:
        """Bytes that are being read into host memory just now."""
        return self._bytes

    def ask(self, keys: Sequence[StorageKey], arena: int, block_tokens: int, prefill_tokens_s: int) -> int:
        """How many leading blocks are in host memory, or will be if all goes well. Starts reading them
        into ``arena``, unless that takes longer than computing them anew."""
        host = self._host.match(keys)
        there = host + self._nvme.match(keys[host:]) if host < len(keys) else host
        fresh = [at for at in range(host, there) if keys[at] not in self._groups]
        if not fresh:
            return there
        first = fresh[0]
        if not self._is_worth([keys[at] for at in fresh], block_tokens, prefill_tokens_s):
            self._counters["nvme_declined_loads"] += 1
            return first
        while first < there and keys[first] not in self._groups:
            taken = self._start(keys, first, there, arena)
            if not taken:
                return first
            first += taken
        return there

    def coming(self, keys: Sequence[StorageKey]) -> int:
        """How many of these, leading, are on their way."""
        return next((at for at, key in enumerate(keys) if key not in self._groups), len(keys))

    async def wait(self, keys: Sequence[StorageKey], wait_ns: int) -> None:
        """Until none of these is on its way any more, or the time is over."""
        groups = {self._groups[key] for key in keys if key in self._groups}
        if groups:
            _, late = await asyncio.wait(groups, timeout=wait_ns / NS_PER_S)
            self._counters["nvme_late_loads"] += bool(late)

    async def close(self) -> None:
        """Wait for what is being read: threads write into host memory until then."""
        groups = set(self._groups.values())
        if groups:
            await asyncio.wait(groups)

    # --- one group ------------------------------------------------------------------------------

    def _is_worth(self, keys: Sequence[StorageKey], block_tokens: int, prefill_tokens_s: int) -> bool:
        if not prefill_tokens_s:
            return True
        sizes: Counter[int] = Counter()
        for key in keys:
            entry = self._entry(key)
            if entry is not None:
                sizes[self._number(key)] += entry.block_bytes
        tokens = len(keys) * block_tokens
        drives = [(self._drives[number], size) for number, size in sizes.items()]
        return all(
            worth_loading(size, drive.rate.value(), drive.queue_ns, tokens, prefill_tokens_s)
            for drive, size in drives
        )

    def _start(self, keys: Sequence[StorageKey], first: int, end: int, arena: int) -> int:
        """Reserve for a group from ``first`` on and begin to read it. How many blocks it has."""
        now_ns = self._clock.now_ns()
        context = RequestContext(now_ns=now_ns)
        group = self._cut(keys, first, end)
        size = sum(entry.block_bytes for _, entry in group)
        if not group or (self._groups and self._memory.coming_bytes + size > self._bytes_max):
            return 0
        names = [key for key, _ in group]
        before = next(islice(self._nvme.ancestors(names[0]), 1, None), None)
        try:
            reservation = self._host.reserve(arena, before, names, group[0][1].block_bytes, OWNER, context)
        except BadInput:
            return 0  # What comes before it has left the host tier meanwhile.
        self._settle()
        if reservation.start or not reservation.reservation_id:
            self._give_up(reservation)
            return 0
        lease = self._nvme.lease(reservation.keys, OWNER, now_ns + HOLD_NS, context)
        if not lease.keys:  # So many groups are on their way that none may lease more.
            self._give_up(reservation)
            return 0
        entries = [entry for _, entry in group[: len(reservation.keys)]]
        self._count(len(entries) * reservation.block_bytes)
        task = asyncio.get_running_loop().create_task(self._bring(reservation, lease, entries))
        self._groups.update(dict.fromkeys(reservation.keys, task))
        return len(entries)

    def _cut(self, keys: Sequence[StorageKey], first: int, end: int) -> list[tuple[StorageKey, Entry]]:
        group: list[tuple[StorageKey, Entry]] = []
        size = 0
        for key in keys[first : min(end, first + GROUP_BLOCKS_MAX)]:
            entry = None if key in self._groups else self._entry(key)
            if entry is None or (group and size + entry.block_bytes > GROUP_BYTES):
                break
            group.append((key, entry))
            size += entry.block_bytes
        return group

    async def _bring(self, reservation: Reservation, lease: Lease, entries: Sequence[Entry]) -> None:
        good: list[bytes] = []
        try:
            found = await self._read(reservation, lease, entries)
            for each in found:
                if not isinstance(each, bytes):
                    break
                good.append(each)
            self._report(lease, entries, found)
        finally:
            self._count(-len(entries) * reservation.block_bytes)
            for key in reservation.keys:
                del self._groups[key]
            self._end(reservation, lease, good)

    async def _read(self, reservation: Reservation, lease: Lease, entries: Sequence[Entry]) -> list[Found]:
        """By device, side by side; in the order of the entries."""
        places: dict[int, list[int]] = {}
        for at, slot in enumerate(lease.slots):
            places.setdefault(slot_arena(slot), []).append(at)
        views = [self._memory.view(slot, reservation.block_bytes) for slot in reservation.slots]
        found: list[Found] = [DeviceFault(0, "the device was fenced")] * len(entries)

        async def read(number: int, positions: Sequence[int]) -> None:
            drive = self._drives[number]
            if drive.readable:
                wanted, into = [entries[at] for at in positions], [views[at] for at in positions]
                for at, each in zip(positions, await drive.read(wanted, into), strict=True):
                    found[at] = each

        await asyncio.gather(*(read(number, positions) for number, positions in places.items()))
        return found

    def _report(self, lease: Lease, entries: Sequence[Entry], found: Sequence[Found]) -> None:
        """What was not what it should be is not found any more, and not written back either."""
        for at, each in enumerate(found):
            if isinstance(each, BlockFault):
                self._counters[f"nvme_rejected_blocks:{each.reason}"] += 1
                self._nvme.quarantine(lease.keys[at], lease.generations[at], self._clock.now_ns())
                self._drives[slot_arena(lease.slots[at])].forget(entries[at])
            elif isinstance(each, DeviceFault):
                self._counters["nvme_failed_reads"] += 1

    def _end(self, reservation: Reservation, lease: Lease, good: Sequence[bytes]) -> None:
        self._nvme.release(lease.lease_id, OWNER, self._clock.now_ns())
        count = len(good)
        if count < len(reservation.keys):
            reservation = self._host.shorten(reservation.reservation_id, OWNER, count)
        if count:
            self._host.commit(reservation.reservation_id, OWNER, lease.checksums[:count], good)
            self._counters["nvme_read_blocks"] += count
            self._counters["nvme_read_bytes"] += count * reservation.block_bytes
        self._settle()

    def _count(self, size: int) -> None:
        self._bytes += size
        self._memory.coming_bytes += size

    def _give_up(self, reservation: Reservation) -> None:
        """Somebody else holds or writes some of it just now: it will be there without us."""
        if reservation.reservation_id:
            self._host.abort(reservation.reservation_id, OWNER)
            self._settle()

    def _entry(self, key: StorageKey) -> Entry | None:
        """What its device knows of a block that can be found on NVMe; nothing while it cannot be read."""
        slot = self._nvme.slot_of(key)
        if slot is None:
            return None
        drive = self._drives[slot_arena(slot)]
        entry = drive.entries.get(slot_offset(slot)) if drive.readable else None
        assert entry is None or entry.key == key, "the ledger and the device disagree about a slot"
        return entry

    def _number(self, key: StorageKey) -> int:
        slot = self._nvme.slot_of(key)
        return slot_arena(slot) if slot is not None else 0
