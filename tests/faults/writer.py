"""A process that uses a device as a node would, at random, and tells what it does: see ``work``.

It keeps no promise of its own: it is killed, stopped, traced and lied to, and what it told is then held
against what the next process finds.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

from kvcache.errors import BadInput
from kvcache.tiers import nvme_slots
from kvcache.tiers.nvme import BlockFault, Device, DeviceFault
from kvcache.tiers.nvme_format import SEGMENT_HEADER_BYTES, Entry, slots_in, stride_of
from tests.faults.work import (
    CAPACITY_BYTES,
    NUMBER_OF,
    NUMBERS,
    SEGMENT_BYTES,
    SIZES,
    Job,
    Teller,
    is_right,
    put_of,
    size_of,
)

BATCH_MAX = 8
LOOK_BLOCKS = 32
SMALL_PIECE_BYTES = 24 << 10
"""So that a block of 64 KiB goes in pieces, as one of 6 MiB does in life."""
OPENINGS_MAX = 5
OPENING_S = 0.05
LOCKED_MAX = 200
"""A process that was killed while it started another leaves its lock to that one, until it runs: on a busy
machine that takes a second."""


def run(job: Job) -> None:
    """RAISES AssertionError and whatever the device should not raise."""
    writer = Writer(job)
    if job.waits:
        signal.sigwait([signal.SIGUSR1])
    if job.lazy:
        os.posix_fadvise = lambda *_: None
    if job.unsynced:
        os.fdatasync = lambda fd: None
    if job.seed % 2:
        nvme_slots.PIECE_BYTES = SMALL_PIECE_BYTES
    writer.run()


class Writer:
    """``_held``: what is stored, by offset, as far as it knows."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._random = random.Random(job.seed)
        self._tell = Teller(job.record).tell
        self._held: dict[int, Entry] = {}

    def run(self) -> None:
        device = self._open()
        done = 0
        while device is not None and (not self._job.steps or done < self._job.steps):
            done += 1
            try:
                self._step(device)
            except DeviceFault as fault:
                self._tell("f", fault.errno, fault.what)
                if self._random.random() < 0.5:
                    device.close()
                    device = self._open()
        if device is not None:
            device.close()

    def _open(self) -> Device | None:
        """None: it could not be opened so often that there is no use in trying again."""
        failed = locked = 0
        while failed < OPENINGS_MAX and locked < LOCKED_MAX:
            try:
                device = Device.open(
                    Path(self._job.directory), CAPACITY_BYTES, SEGMENT_BYTES, direct=self._job.direct
                )
            except DeviceFault as fault:
                failed += 1
                self._tell("f", fault.errno, fault.what)
            except BadInput as error:
                is_locked = error.code == "address_in_use"
                failed, locked = failed + (not is_locked), locked + is_locked
                self._tell("o", str(error).replace("\n", " "))
            else:
                self._look(device)
                return device
            signal.sigtimedwait([], OPENING_S)
        return None

    def _look(self, device: Device) -> None:
        """At all that is there."""
        for entry, why in device.rejected:
            self._tell("r", NUMBER_OF[entry.key], why)
        entries = device.take_entries()
        try:
            right = [
                entry
                for first in range(0, len(entries), LOOK_BLOCKS)
                for entry in self._read(device, entries[first : first + LOOK_BLOCKS])
            ]
        except DeviceFault as fault:
            self._held = {}  # So any of them may be written over.
            self._tell("e", *(NUMBER_OF[entry.key] for entry in entries if entry.key in NUMBER_OF))
            self._tell("f", fault.errno, fault.what)
        else:
            self._held = {entry.offset: entry for entry in right}
            self._tell("c", *(NUMBER_OF[entry.key] for entry in right))

    def _read(self, device: Device, entries: Sequence[Entry]) -> list[Entry]:
        """Those that are there and right; what was told says what the others are. RAISES DeviceFault."""
        right = []
        blocks = [bytearray(entry.block_bytes) for entry in entries]
        found = device.read_many(entries, [memoryview(block) for block in blocks])
        for entry, block, each in zip(entries, blocks, found, strict=True):
            number = NUMBER_OF.get(entry.key, -1)
            if isinstance(each, DeviceFault):
                raise each
            if isinstance(each, BlockFault):
                self._tell("r", number, each.reason)
                device.drop([entry.offset])
            elif number < 0 or len(block) != SIZES[size_of(number)][0] or not is_right(number, block):
                self._tell("w", number, entry.offset)
            else:
                right.append(entry)
        return right

    def _step(self, device: Device) -> None:
        choice = self._random.random()
        if choice < 0.7:
            self._put(device)
        elif choice < 0.8:
            self._delete(device)
        elif choice < 0.98:
            entries = [self._held[offset] for offset in self._some(BATCH_MAX)]
            for entry in set(entries).difference(self._read(device, entries)):
                del self._held[entry.offset]
        else:
            device.probe()

    def _put(self, device: Device) -> None:
        segment = self._random.randrange(device.segment_count)
        size, gone = self._size(device, segment)
        stride = stride_of(SIZES[size][0])
        chosen = self._places(slots_in(SEGMENT_BYTES, stride), self._random.randint(1, BATCH_MAX))
        numbers = self._random.sample(range(size, NUMBERS, len(SIZES)), len(chosen))
        first = segment * SEGMENT_BYTES + SEGMENT_HEADER_BYTES
        puts = [
            put_of(number, first + place * stride, aligned=self._random.random() < 0.5)
            for number, place in zip(numbers, chosen, strict=True)
        ]
        targets = {entry.offset for entry, _ in puts}
        gone |= {
            offset for offset, entry in self._held.items() if NUMBER_OF[entry.key] in numbers
        } | targets & self._held.keys()
        self._give_up(gone)
        durable = self._random.random() < 0.5
        for entry in device.write(puts, sorted(gone - targets), durable=durable):
            self._held[entry.offset] = entry
        self._tell("d" if durable else "s", *numbers)

    def _places(self, slots: int, count: int) -> list[int]:
        """Slots of a segment, half of the time one behind the other: those are written in one call."""
        if self._random.random() < 0.5:
            return self._random.sample(range(slots), count)
        first = self._random.randrange(slots - count + 1)
        return list(range(first, first + count))

    def _size(self, device: Device, segment: int) -> tuple[int, set[int]]:
        """What the segment is for from now on, and what must go for that."""
        within = {offset for offset in self._held if offset // SEGMENT_BYTES == segment}
        if within and self._random.random() < 0.95:
            return size_of(NUMBER_OF[self._held[min(within)].key]), set()
        size = self._random.randrange(len(SIZES))
        stays = within and size == size_of(NUMBER_OF[self._held[min(within)].key])
        return size, set() if stays else within

    def _delete(self, device: Device) -> None:
        gone = self._some(BATCH_MAX)
        self._give_up(set(gone))
        device.write((), gone, durable=self._random.random() < 0.5)

    def _give_up(self, offsets: set[int]) -> None:
        if offsets:
            self._tell("e", *sorted(NUMBER_OF[self._held.pop(offset).key] for offset in offsets))

    def _some(self, most: int) -> list[int]:
        held = sorted(self._held)
        return self._random.sample(held, min(len(held), self._random.randint(1, most)))
