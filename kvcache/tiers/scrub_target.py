"""What the scrubber sees of the NVMe tier: its blocks in slot order, and how one is verified.

A block is held in the ledger while it is read, so that its slot is not written meanwhile; one that is
bad is withdrawn from the ledger and its index entry goes with the device's next commit.

The sum: the offsets are sorted once a pass and drive, nearly in order as they are: 10 ms for 300,000; and
looked up by bisection.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence

from kvcache.block import Slot
from kvcache.clock import NS_PER_S, Clock
from kvcache.ledger import Ledger
from kvcache.tiers.drive import Drive
from kvcache.tiers.nvme import BlockFault
from kvcache.tiers.scrub import GONE, ScrubTarget, Verdict
from kvcache.tiers.space import make_slot, slot_arena, slot_offset

FOLLOWING_BLOCKS = 256
HOLD_NS = 3_600 * NS_PER_S
OWNER = "scrub"


class Shelves:
    """All drives, as one row of slots. One owner, the event loop's thread."""

    def __init__(
        self,
        ledger: Ledger,
        drives: Sequence[Drive],
        clock: Clock,
        counters: Counter[str],
        settle: Callable[[], None],
        busy: Callable[[], bool],
    ) -> None:
        self._ledger = ledger
        self._drives = drives
        self._clock = clock
        self._counters = counters
        self._settle = settle
        self._busy = busy
        self._order: list[int] = []
        self._ordered = -1  # of which drive these are the offsets
        self._memory = memoryview(b"")

    def target(self) -> ScrubTarget:
        return ScrubTarget(self._following, self._held, self._verify, self._busy)

    def _held(self) -> int:
        return sum(len(drive.entries) for drive in self._drives if drive.readable)

    def _following(self, slot: Slot) -> Sequence[Slot]:
        """Blocks that came after the offsets were sorted are left to the next pass."""
        here = slot_arena(slot) if slot >= 0 else 0
        for drive in self._drives[here:]:
            if not drive.readable:
                continue
            before = slot_offset(slot) if slot >= 0 and drive.number == here else -1
            if self._ordered != drive.number or before < 0:
                self._order, self._ordered = sorted(drive.entries), drive.number
            at = bisect_right(self._order, before)
            if found := self._order[at : at + FOLLOWING_BLOCKS]:
                return [make_slot(drive.number, offset) for offset in found]
        self._order, self._ordered = [], -1
        return []

    async def _verify(self, slot: Slot) -> Verdict:
        drive = self._drives[slot_arena(slot)]
        entry = drive.entries.get(slot_offset(slot))
        if entry is None or not drive.readable:
            return Verdict(0, GONE)
        lease = self._ledger.borrow([entry.key], OWNER, self._clock.now_ns() + HOLD_NS)
        try:
            if lease.slots != (slot,):
                return Verdict(0, GONE)
            (found,) = await drive.read([entry], [self._buffer(entry.block_bytes)])
        finally:
            if lease.lease_id:
                self._ledger.release(lease.lease_id, OWNER, self._clock.now_ns())
        if isinstance(found, bytes):
            return Verdict(entry.block_bytes)
        if not isinstance(found, BlockFault):
            return Verdict(0, GONE)
        self._counters[f"nvme_rejected_blocks:{found.reason}"] += 1
        self._ledger.quarantine(entry.key, lease.generations[0], self._clock.now_ns())
        drive.forget(entry)
        self._settle()
        return Verdict(entry.block_bytes, found.reason)

    def _buffer(self, block_bytes: int) -> memoryview:
        """Page-aligned, as direct reads want it; one read at a time uses it."""
        if len(self._memory) < block_bytes:
            self._memory = memoryview(mmap.mmap(-1, block_bytes))
        return self._memory[:block_bytes]
