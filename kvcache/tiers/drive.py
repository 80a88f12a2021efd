"""One device of the NVMe tier, as the event loop sees it: its threads, its health, how fast it is.

    closed ── open ──► ok ◄── a write works again ── read_only     (no space, or mounted read-only)
                       │ └──────── a write fails so ──────▲
                       └── an I/O error, vanished, too slow ──► fenced ── probed and opened again ──► ok

``nvme.Device`` does the I/O and blocks; it is called only from the threads made here: one that writes,
a few that read. A read whose thread does not return keeps what it reads into: the memory is used again
only after it has returned, however late. How long a job takes counts from when its thread begins: a long
queue is no fault of the device. Reads that still queue when it is fenced are not begun any more.

Invariants: a device is closed only when no job of its threads is running; the state changes on the event
loop only; every fault has its words in ``trouble`` until it is over.

The sum: handing a job to a thread and back costs about 60 us, so jobs are groups of blocks, megabytes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput
from kvcache.tiers.admission import WriteBudget
from kvcache.tiers.jobs import NamespaceMap as NamespaceMap
from kvcache.tiers.jobs import close_device, is_unreadable, read_blocks, write_blocks
from kvcache.tiers.nvme import BlockFault, Device, DeviceFault
from kvcache.tiers.nvme_files import faults
from kvcache.tiers.nvme_format import Entry
from kvcache.tiers.rates import Rate
from kvcache.tiers.threads import Dropped, Threads
from kvcache.tiers.words import READ_ONLY, Teller, words

log = logging.getLogger("kvcache.nvme")

READERS = 4
LATE_JOBS_MAX = 3
BAD_SPOTS_MAX = 3
HUNG_FACTOR = 5
PROBE_S_MIN = 1.0
PROBE_S_MAX = 8.0
SAVE_BUDGET_NS = 10 * NS_PER_S
RATE_NS_MAX = 30 * NS_PER_S
ZEROING_BYTES_S_MIN = 50_000_000

State = Literal["closed", "loading", "ok", "read_only", "fenced"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device is and what it may hold. ``late_ns``: a job that takes longer is late.
    ``bytes_a_day``: what may be written in 24 hours, None for no limit."""

    path: Path
    capacity_bytes: int
    segment_bytes: int
    direct: str
    late_ns: int
    bytes_a_day: int | None


class Drive:
    """``number`` is the arena of its slots. All methods are for the event loop's thread."""

    def __init__(
        self,
        number: int,
        place: Place,
        clock: Clock,
        wall_hour: Callable[[], int],
        lost: Callable[[Drive], None],
    ) -> None:
        """``lost`` is called when the drive is fenced: what is on it cannot be had any more.
        ``wall_hour`` is that of ``WriteBudget``."""
        self.number = number
        self.place = place
        self.state: State = "closed"
        self.why = ""
        self._tried = ""
        self.refusal: BadInput | None = None
        """Why it could not be opened when last tried, if that is not the device's fault."""
        self.entries: dict[int, Entry] = {}
        self.rate = Rate()
        self.budget = WriteBudget(place.bytes_a_day, wall_hour)
        self.short_bytes = 0
        """What was last too much for the budget."""
        self.unsynced = False
        self.fences = 0
        self._clock = clock
        self._lost = lost
        self._device: Device | None = None
        # A write may have to fill new segments with zeros first.
        zeroing_ns = 2 * place.segment_bytes * NS_PER_S // ZEROING_BYTES_S_MIN
        patience_ns = HUNG_FACTOR * place.late_ns
        self._reading = Threads(f"kvcache-read-{number}", READERS, clock, patience_ns)
        self._writing = Threads(f"kvcache-write-{number}", 1, clock, patience_ns + zeroing_ns)
        self._read_ns = 0  # The last read ended then.
        self._late_jobs = 0
        self._bad_spots = 0
        self._queued_bytes = 0
        self._deletes: list[int] = []
        self._told: set[bytes] = set()
        self._budget_known = False
        self._save_budget_ns = 0
        self._progress = ""
        self._teller = Teller(place.path, place.segment_bytes, clock)
        self._opening: list[Device] = []

    # --- its life -------------------------------------------------------------------------------

    async def open(self) -> list[Entry]:
        """Take the directory and read what it holds; then ``ready`` is to be called.

        RAISES BadInput, DeviceFault; then it is fenced."""
        is_first = self.state == "closed"
        self.state, self._progress, self.refusal = "loading", "", None
        place, began_ns = self.place, self._clock.now_ns()
        self._teller.opening()
        try:
            spent, entries, found = await self._writing.run(self._open_device)
        except (BadInput, DeviceFault) as error:
            self.state, self.why = "fenced", words(error)
            self._tried = self.why if is_first else self._tried
            self.refusal = error if isinstance(error, BadInput) else None
            raise
        self._device = device = self._opening.pop()
        if not self._budget_known:
            self.budget.restore(spent)
            self._budget_known = True
        self.entries = found
        self._deletes, self._told = [], set()
        self.unsynced = True  # Who committed this may have been killed before it was on the disk.
        self._late_jobs = self._bad_spots = 0
        self._read_ns = self._clock.now_ns()
        self.rate.forget()
        for finding in device.findings:
            log.warning("%s", finding)  # Each names its file.
        took_s = (self._clock.now_ns() - began_ns) / NS_PER_S
        log.info("%s: read in %.1f s, %d blocks", place.path, took_s, len(entries))
        return entries

    def _open_device(self) -> tuple[dict[str, object], list[Entry], dict[int, Entry]]:
        """In a thread: what was spent of the budget, what is stored, and that by offset. If nobody waits for
        it any more, ``close`` finds the device."""
        place = self.place
        with faults(f"opening {place.path}"):
            device = Device.open(
                place.path,
                place.capacity_bytes,
                place.segment_bytes,
                direct=place.direct,
                progress=self._loading,
            )
        self._opening.append(device)
        entries = device.take_entries()
        return device.load_budget(), entries, {entry.offset: entry for entry in entries}

    def ready(self) -> None:
        """What it holds can be found: from now on it is read and written."""
        self.state, self.why, self._tried = "ok", "", ""

    async def namespaces(self) -> list[NamespaceMap]:
        """Those of its blocks, as far as they are known there. RAISES DeviceFault."""
        device = self._opened()
        return list(await self._reading.run(device.namespaces))

    async def close(self) -> None:
        """Wait for its jobs and give the directory back. REQUIRES: nobody starts another."""
        await self._idle()
        devices, self._opening, self._device = [self._device, *self._opening], [], None
        for device in devices:
            if device is not None:
                await self._writing.run(partial(self._save_and_close, device))
        self.state = "closed"
        self._reading.close()
        self._writing.close()

    def _save_and_close(self, device: Device) -> None:
        if self._budget_known and self.budget.bytes_a_day is not None:
            with suppress(DeviceFault):
                device.save_budget(self.budget.state())
        with suppress(DeviceFault):
            close_device(device)

    async def heal(self) -> list[Entry] | None:
        """See whether a drive that is not ok works again. What it holds, as after ``open``, if it had been
        fenced.

        RAISES BadInput, DeviceFault when it does not."""
        if self.state == "read_only":
            await self._writing.run(self._opened().probe)
            if self.state == "read_only":  # It may have been fenced meanwhile.
                self.state, self.why = "ok", ""
                log.warning("%s: writes work again", self.place.path)
            return None
        await self._idle()
        device = self._device
        if device is not None:
            before_ns = self._clock.now_ns()
            await self._writing.run(device.probe)
            if self._clock.now_ns() - before_ns > self.place.late_ns:
                raise DeviceFault(errno.ETIMEDOUT, "the device is still too slow")
            self._device = None
            await self._writing.run(partial(close_device, device))
        entries = await self.open()
        log.warning("%s: the device works again, %d blocks are back", self.place.path, len(entries))
        return entries

    # --- blocks ---------------------------------------------------------------------------------

    @property
    def readable(self) -> bool:
        return self.state in ("ok", "read_only")

    @property
    def writable(self) -> bool:
        return self.state == "ok"

    @property
    def is_busy(self) -> bool:
        """Is a thread of it at work?"""
        return self._reading.is_busy or self._writing.is_busy

    @property
    def queue_ns(self) -> int:
        """How long what is asked of it already will take; 0 while that is not known."""
        rate = self.rate.value()
        return int(self._queued_bytes / rate * NS_PER_S) if rate else 0

    async def read(
        self, wanted: Sequence[Entry], into: Sequence[memoryview]
    ) -> list[bytes | BlockFault | DeviceFault]:
        """Fill ``into[i]`` with the block of ``wanted[i]``, verified: its chunk sums, or why not.

        ``into`` is written until this returns, cancelled or not: it is shielded, wait for it."""
        device = self._opened()
        size = sum(map(len, into))
        self._queued_bytes += size
        try:
            found = await self._reading.run(
                lambda: read_blocks(device, wanted, into), partial(self._has_read, size)
            )
        except Dropped:
            return [DeviceFault(errno.ECANCELED, f"{self.place.path} was fenced")] * len(wanted)
        finally:
            self._queued_bytes -= size
        for entry, each in zip(wanted, found, strict=True):
            if isinstance(each, BlockFault):
                self._teller.bad_block(entry, each)
            self._bad_spots = self._bad_spots + 1 if is_unreadable(each) else 0
            if isinstance(each, DeviceFault):
                self.failed(each)
                break
            if self._bad_spots >= BAD_SPOTS_MAX:
                self.fence(f"{self._bad_spots} blocks in a row cannot be read")
                break
        return found

    async def write(
        self,
        puts: Sequence[tuple[Entry, memoryview]],
        namespaces: Mapping[bytes, NamespaceMap],
        *,
        durable: bool,
    ) -> None:
        """Write and publish in the drive's index. ``durable``: a power cut does not lose them.

        RAISES DeviceFault; then nothing of it is published, and the state says what is wrong."""
        device = self._opened()
        deletes, self._deletes = self._deletes, []
        fresh = {name: fields for name, fields in namespaces.items() if name not in self._told}
        spent = self._spent_to_save()
        try:
            final = await self._writing.run(
                lambda: write_blocks(device, puts, deletes, list(fresh.values()), spent, durable)
            )
        except DeviceFault as error:
            self._deletes = deletes + self._deletes
            self.failed(error)
            raise
        self._told |= fresh.keys()
        self.unsynced = not durable
        written = {entry.offset: entry for entry in final}
        self._deletes = [offset for offset in self._deletes if offset not in written]
        if self.readable:
            self.entries.update(written)

    def _spent_to_save(self) -> Mapping[str, object]:
        """Now and then: saving costs two syncs, and a crash may forget a few seconds."""
        now_ns = self._clock.now_ns()
        if self.budget.bytes_a_day is None or now_ns < self._save_budget_ns:
            return {}
        self._save_budget_ns = now_ns + SAVE_BUDGET_NS
        return self.budget.state()

    async def sync(self) -> None:
        """What was written so far is durable. RAISES DeviceFault."""
        if self.unsynced:
            await self.write((), {}, durable=True)

    def forget(self, entry: Entry) -> None:
        """This block is not to come back at the next start. Another that is in its slot by now stays."""
        if self.entries.get(entry.offset) == entry:
            del self.entries[entry.offset]
            self._deletes.append(entry.offset)

    # --- its health -----------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """In plain words, what is wrong and what is done about it; empty when nothing is."""
        where = f"the NVMe directory {self.place.path}"
        if self.state == "loading":
            return f"{where} is being read{self._progress}; its blocks are not found yet"
        if self.state == "read_only":
            return f"{where} takes no new blocks: {self.why}; those it has are served; it is tried again"
        if self.state == "fenced":
            return f"{where} is not used: {self.why}; blocks are served from memory; it is tried again"
        return ""

    def failed(self, fault: DeviceFault) -> None:
        """The device refused. Reads go on where only writes cannot; else it is fenced."""
        if not self.readable:
            return
        if fault.errno in READ_ONLY:
            if self.state == "ok":
                log.error("%s: no more writes: %s", self.place.path, fault)
            self.state, self.why = "read_only", READ_ONLY[fault.errno]
            return
        self.fence(words(fault))

    def still(self, error: BadInput | DeviceFault) -> None:
        """It was tried and does not work yet. What is wrong may be something else by now."""
        why = words(error)
        if self.state == "fenced" and why != self._tried:
            self.why = self._tried = why
            log.warning("%s: still not used: %s", self.place.path, why)

    def fence(self, why: str) -> None:
        if not self.readable:
            return
        self.state, self.why, self._tried = "fenced", why, why
        self.fences += 1
        self.entries = {}
        log.error("%s: fenced: %s", self.place.path, why)
        self._reading.drop_queued()
        self._lost(self)

    def tick(self) -> None:
        """Called now and then: a job that hangs is found here, as nobody may be waiting for it. A rate that
        was measured long ago is forgotten: because of it nothing may have been read since."""
        now_ns = self._clock.now_ns()
        if now_ns - self._read_ns > RATE_NS_MAX:
            self.rate.forget()
        hung_ns = max(self._reading.hung_ns(), self._writing.hung_ns())
        if hung_ns and self.readable:
            self.fence(f"it has not answered for {hung_ns / NS_PER_S:.0f} s")

    # --- threads --------------------------------------------------------------------------------

    def _opened(self) -> Device:
        assert self._device is not None, "the drive is not open"
        return self._device

    async def _idle(self) -> None:
        """Until no thread is at work and none has anything to do."""
        while self.is_busy:
            await self._reading.idle()
            await self._writing.idle()

    def _has_read(self, size: int, began_ns: int, ended_ns: int) -> None:
        self.rate.add(size, max(1, ended_ns - max(began_ns, self._read_ns)))
        self._read_ns = max(self._read_ns, ended_ns)
        self._late_jobs = self._late_jobs + 1 if ended_ns - began_ns > self.place.late_ns else 0
        if self._late_jobs >= LATE_JOBS_MAX:
            self.fence(f"it is too slow: {self._late_jobs} reads in a row took over their deadline")

    def _loading(self, what: str, done: int, total: int) -> None:
        """Called in a thread, by the device that is being opened."""
        self._teller.progress(what, done, total)
        self._progress = f" ({what}: {done:,} of {total:,})"
