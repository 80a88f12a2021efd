"""One device of the NVMe tier: a directory of segment files and the index of what is in them.

A slot goes through

    free ── unpublish (index delete, committed) ──► header and block written ── fdatasync ──►
         ── publish (index put, committed) ──► stored

so the index never names a slot that is being written, and a crash at any point leaves blocks that are
whole and found, or not found. Which block goes where is decided elsewhere; here bytes are moved and
verified. Blocking calls: writes by one thread at a time, reads by any number beside it.

Invariants: ``_indexed`` holds every offset that the index may have an entry for; a block is published
only after the fdatasync of its segment; a generation or epoch is never given twice: they count on from
the largest ever seen here, and from the wall clock at opening, in nanoseconds, which is far ahead of
what the last process counted to even if all that it wrote is lost.

A read returns bytes only when header, key, generation, shape and checksum are all those expected.

The sum: a block of 2 MiB takes 1.3 ms at 1.6 GB/s, and 40 us of interpreter; a batch adds an fdatasync a
segment and one or two commits, 0.5 to 4 ms each, so batches are tens of blocks. CPU time a GB: 0.065 s to
write, and to read and verify. Memory: about 100 bytes a stored block, for ``_indexed``.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

from kvcache.errors import BadInput
from kvcache.namespace import Namespace
from kvcache.sums import block_checksum
from kvcache.tiers.nvme_files import BlockFault as BlockFault
from kvcache.tiers.nvme_files import Buffers, faults, read_all, replace_file, write_all
from kvcache.tiers.nvme_files import DeviceFault as DeviceFault
from kvcache.tiers.nvme_format import (
    PAGE_BYTES,
    SEGMENT_HEADER_BYTES,
    BadRecord,
    Entry,
    SegmentHeader,
    pack_segment_header,
    parse_superblock,
    slots_in,
    stride_of,
)
from kvcache.tiers.nvme_load import (
    BUDGET,
    NAMESPACES,
    PROBE,
    SUPERBLOCK,
    Opened,
    free_disk_bytes,
    inspect_directory,
    open_directory,
)
from kvcache.tiers.nvme_scan import Progress, Segment
from kvcache.tiers.nvme_slots import READ_BYTES_MAX, WRITE_BYTES_MAX, Held, Slots, neighbours

LATE_DELETES_MAX = 4_096

_ZEROS = memoryview(bytes(PAGE_BYTES))


def _silent(what: str, done: int, total: int) -> None:
    pass


class Device:
    """Made by ``open``. ``findings`` says in plain words what was found wrong then; ``direct``, whether
    direct I/O is used; ``segment_count``, how many segments there may be."""

    def __init__(self, opened: Opened, newest: int) -> None:
        """``newest``: generations and epochs count on from here."""
        contents = opened.contents
        self.path = opened.path
        self.directory_id = opened.superblock.directory_id
        self.segment_bytes = opened.superblock.segment_bytes
        self.segment_count = opened.segment_count
        self.direct = opened.files.direct
        self.findings = opened.findings
        self.rejected = contents.rejected
        self.written_bytes = 0
        self.read_bytes = 0
        self.zeroed_bytes = 0
        self._lock: int | None = opened.lock
        self._files = opened.files
        self._index = opened.index
        self._segments = contents.segments
        self._entries = contents.entries
        self._late_deletes = {entry.offset for entry, _ in contents.rejected}
        self._indexed = {entry.offset for entry in contents.entries} | self._late_deletes
        self._newest = newest
        self._wanted_bytes = 0  # What the file system had no room for.
        self._pages = Buffers(PAGE_BYTES)
        self._slots = Slots(direct=self.direct)
        self._counting = threading.Lock()
        self._second = ThreadPoolExecutor(1, "kvcache-write-too")

    @classmethod
    def open(
        cls,
        path: Path,
        capacity_bytes: int = 0,
        segment_bytes: int = 0,
        *,
        direct: str = "auto",
        read_only: bool = False,
        progress: Progress = _silent,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> Device:
        """Make or check the directory, take its lock, and find what it holds. RAISES BadInput, DeviceFault.

        ``capacity_bytes`` 0: as many segments as are there. ``direct`` is "auto" (where the file system
        takes it), "on" (refuse where it does not) or "off". ``read_only``: the sizes are those that the
        directory says, and nothing is changed: what is damaged stays for a report (``findings``,
        ``rejected``); REQUIRES then: no writes. ``progress`` is told (what, done, total) by an opening that
        has to read every header, in this thread."""
        assert direct in ("auto", "on", "off"), direct
        if read_only:
            opened = inspect_directory(path, progress)
        else:
            opened = open_directory(path, capacity_bytes, segment_bytes, direct, progress)
        return cls(opened, max(opened.contents.newest, wall_ns()))

    def entries(self) -> list[Entry]:
        """What was found at opening and not taken yet."""
        return list(self._entries)

    def take_entries(self) -> list[Entry]:
        """What is stored, one entry a key. Once: it is not kept."""
        entries, self._entries = self._entries, []
        return entries

    def drop(self, offsets: Sequence[int]) -> None:
        """Of these nobody will know: their index entries go with the next commits. Writer's thread."""
        self._late_deletes.update(offsets)

    # --- writing --------------------------------------------------------------------------------

    def write(
        self, puts: Sequence[tuple[Entry, memoryview]], deletes: Sequence[int], *, durable: bool
    ) -> list[Entry]:
        """Store blocks and forget others; on a fault nothing new is found. One thread at a time.

        ``puts`` are entries, whose generation and epoch are filled in here (the result), with their bytes;
        ``deletes`` are offsets that were given up elsewhere. ``durable``: a power cut loses none of it.
        RAISES DeviceFault. REQUIRES: nobody reads the slots of ``puts``; their offsets are slots of their
        size; a segment that changes its slot size holds nothing that is wanted."""
        assert self._index is not None, "opened read-only, or closed"
        wanted = self._wanted_segments(puts)
        deleted = set(deletes)
        self._unpublish({entry.offset for entry, _ in puts}, wanted, deleted)
        for number, stride in wanted.items():
            self._format(number, stride)
        final = [self._stamp(entry) for entry, _ in puts]
        self._write_blocks(final, [view for _, view in puts])
        self._publish(final, deleted, durable=durable)
        return final

    def _wanted_segments(self, puts: Sequence[tuple[Entry, memoryview]]) -> dict[int, int]:
        """Segments to be made or formatted anew, and their strides."""
        strides: dict[int, int] = {}
        for entry, view in puts:
            stride = stride_of(entry.block_bytes)
            number, inside = divmod(entry.offset, self.segment_bytes)
            assert view.nbytes == entry.block_bytes
            assert number < self.segment_count and strides.setdefault(number, stride) == stride
            at, rest = divmod(inside - SEGMENT_HEADER_BYTES, stride)
            assert not rest and 0 <= at < slots_in(self.segment_bytes, stride), entry.offset
        assert len({entry.offset for entry, _ in puts}) == len(puts), "two blocks for one slot"
        return {
            number: stride
            for number, stride in strides.items()
            if number not in self._segments or self._segments[number].stride != stride
        }

    def _unpublish(self, offsets: set[int], wanted: Mapping[int, int], deleted: set[int]) -> None:
        """No slot that is about to be written has an index entry, durably enough for a killed process."""
        stale = offsets & self._indexed
        if wanted:
            stale |= {offset for offset in self._indexed if offset // self.segment_bytes in wanted}
        if stale:
            self._commit([], stale | deleted & self._indexed, durable=False)

    def _publish(self, final: Sequence[Entry], deleted: set[int], *, durable: bool) -> None:
        late = set(sorted(self._late_deletes)[:LATE_DELETES_MAX])
        written = {entry.offset for entry in final}
        deletes = (deleted | late) & self._indexed  # Of what was written, nothing: it was unpublished.
        if final or deletes or durable:
            self._indexed |= written  # Before: a commit that failed may have happened.
            self._commit(final, deletes, durable=durable)
        self._late_deletes -= late | written

    def _commit(self, puts: Sequence[Entry], deletes: set[int], *, durable: bool) -> None:
        assert self._index is not None
        with faults(f"writing the index of {self.path}"):
            self._index.commit(puts, sorted(deletes), durable=durable)
        self._indexed -= deletes

    def _format(self, number: int, stride: int) -> None:
        """Make the segment one of slots of ``stride``. REQUIRES: the index has no entry in it."""
        epoch = self._next()
        header = SegmentHeader(self.directory_id, number, self.segment_bytes, stride, epoch)
        page = pack_segment_header(header)
        file = self._files.path(number)
        if self._segments.pop(number, None) is None:  # If this fails now, it is made anew next time.
            self._wanted_bytes = self.segment_bytes
            with faults(f"making the segment file {file}"):
                self._files.create(number, self.segment_bytes, page)
            self._wanted_bytes = 0
            self.zeroed_bytes += self.segment_bytes
        else:
            with faults(f"formatting the segment file {file}"), self._files.hold(number) as descriptor:
                with self._pages.take() as memory:
                    memory[:] = page
                    write_all(descriptor, [memory], 0)
                os.fdatasync(descriptor)
        self._segments[number] = Segment(stride, epoch)

    def _stamp(self, entry: Entry) -> Entry:
        segment = self._segments[entry.offset // self.segment_bytes]
        return entry._replace(generation=self._next(), epoch=segment.epoch)

    def _next(self) -> int:
        self._newest += 1
        return self._newest

    def _write_blocks(self, final: Sequence[Entry], views: Sequence[memoryview]) -> None:
        """All of them are on the device, not only on their way to it, when this returns."""
        descriptors: dict[int, int] = {}
        with faults(f"writing blocks to {self.path}"), ExitStack() as held:
            for number in sorted({entry.offset // self.segment_bytes for entry in final}):
                descriptors[number] = held.enter_context(self._files.hold(number))
            runs = list(neighbours(final, views, WRITE_BYTES_MAX))
            # Two calls at a time, so that the device always has one to do. None may be under way behind
            # this: a late write could fall on a block that took the slot meanwhile.
            other = self._second.submit(self._write_runs, descriptors, runs[1::2])
            try:
                self._write_runs(descriptors, runs[::2])
            finally:
                wait([other])
            other.result()
            for descriptor in descriptors.values():
                os.fdatasync(descriptor)
                self._files.forget_cached(descriptor)
        self.written_bytes += sum(view.nbytes for view in views)

    def _write_runs(self, descriptors: Mapping[int, int], runs: Sequence[list[Held]]) -> None:
        for run in runs:
            number, inside = divmod(run[0][0].offset, self.segment_bytes)
            self._slots.write(descriptors[number], inside, run)

    # --- reading --------------------------------------------------------------------------------

    def read(self, expected: Entry, into: memoryview) -> bytes:
        """Fill ``into`` with the block: the sums of its chunks. RAISES BlockFault, DeviceFault; then the
        content of ``into`` is undefined. Any thread. REQUIRES: ``into`` has the block's length."""
        (found,) = self.read_many([expected], [into])
        if isinstance(found, bytes):
            return found
        raise found

    def read_many(
        self, expected: Sequence[Entry], into: Sequence[memoryview]
    ) -> list[bytes | BlockFault | DeviceFault]:
        """As ``read``, for each block, neighbours in one call. Behind a fault of the device nothing more is
        tried: the rest has it, too. REQUIRES: no slot twice."""
        found: dict[int, bytes | BlockFault | DeviceFault] = {}
        for run in neighbours(expected, into, READ_BYTES_MAX):
            try:
                found.update(zip((entry.offset for entry, _ in run), self._read_run(run), strict=True))
            except DeviceFault as fault:
                return [found.get(entry.offset, fault) for entry in expected]
        return [found[entry.offset] for entry in expected]

    def _read_run(self, run: Sequence[Held]) -> list[bytes | BlockFault]:
        """RAISES DeviceFault."""
        assert all(view.nbytes == entry.block_bytes for entry, view in run)
        number, inside = divmod(run[0][0].offset, self.segment_bytes)
        length = sum([stride_of(view.nbytes) for _, view in run])
        with faults(f"reading segment {number} of {self.path}"), self._files.hold(number) as descriptor:
            read = self._slots.read(descriptor, inside, run)
            self._files.forget_cached(descriptor, inside, length)
        with self._counting:
            self.read_bytes += sum([view.nbytes for _, view in run])
        return [_verified(entry, each) for (entry, _), each in zip(run, read, strict=True)]

    # --- its health, and what else it keeps -----------------------------------------------------

    def probe(self) -> None:
        """Can this directory be written and read? RAISES DeviceFault: no, or it is another one now, or it
        still lacks the space that it lacked before."""
        file = self.path / PROBE
        with faults(f"trying the directory {self.path}"):
            try:
                superblock = parse_superblock((self.path / SUPERBLOCK).read_bytes())
            except BadRecord as error:
                raise DeviceFault(errno.EIO, f"{self.path / SUPERBLOCK}: {error.what}") from error
            if superblock.directory_id != self.directory_id:
                raise DeviceFault(errno.ENODEV, f"{self.path} is another directory than it was")
            if free_disk_bytes(self.path) < self._wanted_bytes:
                raise OSError(errno.ENOSPC, "")
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
            descriptor = os.open(file, flags, 0o600)
            try:
                self._write_and_compare(descriptor)
            finally:
                os.close(descriptor)
            file.unlink(missing_ok=True)

    def _write_and_compare(self, descriptor: int) -> None:
        pattern = os.urandom(PAGE_BYTES)
        with self._pages.take() as page:
            page[:] = pattern
            write_all(descriptor, [page], 0)
            os.fdatasync(descriptor)
            page[:] = _ZEROS
            if read_all(descriptor, [page], 0) < PAGE_BYTES or page != pattern:
                raise DeviceFault(errno.EIO, f"{self.path} gives other bytes back than were written")

    def save_namespace(self, fields: Mapping[str, str | int]) -> None:
        """Keep what a namespace of stored blocks is. RAISES DeviceFault. REQUIRES: a whole namespace."""
        namespace = Namespace.from_map(fields)
        file = self.path / NAMESPACES / f"{namespace.namespace_id().hex()}.json"
        text = json.dumps(namespace.to_map(), indent=2).encode()
        with faults(f"writing {file}"):
            if not file.exists() or file.read_bytes() != text:
                replace_file(file, text)

    def namespaces(self) -> list[dict[str, str | int]]:
        """Those saved. A file that does not say what its name does is left out. RAISES DeviceFault."""
        folder = self.path / NAMESPACES
        found = []
        with faults(f"reading {folder}"):
            for file in sorted(folder.glob("*.json")):
                try:
                    namespace = Namespace.from_map(json.loads(file.read_bytes()))
                except (ValueError, TypeError, AttributeError, RecursionError, BadInput):
                    continue
                if namespace.namespace_id().hex() == file.stem:
                    found.append(namespace.to_map())
        return found

    def save_budget(self, state: Mapping[str, object]) -> None:
        """Keep what was written in the last hours (``WriteBudget.state``). RAISES DeviceFault."""
        file = self.path / BUDGET
        with faults(f"writing {file}"):
            replace_file(file, json.dumps(state).encode())

    def load_budget(self) -> dict[str, object]:
        """What was kept, as far as it can be read; nothing when it cannot."""
        try:
            state = json.loads((self.path / BUDGET).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return state if isinstance(state, dict) else {}

    def close(self) -> None:
        """Give the directory back. REQUIRES: no call is under way. May be called twice."""
        self._second.shutdown()
        self._files.close()
        index, self._index = self._index, None
        if index is not None:
            index.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _verified(expected: Entry, sums: bytes | BlockFault) -> bytes | BlockFault:
    """``sums``, if they are those of the block that is expected."""
    if isinstance(sums, BlockFault):
        return sums
    checksum = block_checksum(expected.key, expected.block_bytes, expected.chunk_bytes, sums)
    return sums if checksum == expected.checksum else BlockFault("checksum")
