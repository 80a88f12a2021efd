"""Which entries of a directory of the NVMe tier can be taken: whole segments, and what lies in them.

An entry, from the index or from a slot header, is taken only when its segment is there, whole, formatted
for its size and of its epoch, and when it is the newest of its key; the rest is *rejected*, with the
reason. What is taken may still be wrong in its bytes: a read finds that. Nothing here writes.

The sum: 300,000 entries are sifted in about 0.1 s; a header read from disk costs 65 us of waiting, eight
at a time, so as many headers take some 4 s where the disk gives them.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter

from kvcache.tiers.nvme_files import Buffers, SegmentFiles, faults, read_all
from kvcache.tiers.nvme_format import (
    PAGE_BYTES,
    SEGMENT_HEADER_BYTES,
    BadRecord,
    Entry,
    SegmentHeader,
    Superblock,
    parse_segment_header,
    parse_slot_header,
    slots_in,
    stride_of,
)

SCAN_THREADS = 8
SCAN_SLOTS = 256

_OFFSET = Entry._fields.index("offset")
_KEY = Entry._fields.index("key")
_GENERATION = Entry._fields.index("generation")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment file that is whole, and what it is formatted for."""

    stride: int
    epoch: int


@dataclass(slots=True)
class Contents:
    """``entries``: one a key, the newest. ``rejected``: the others and why; they may be in the index."""

    segments: dict[int, Segment]
    entries: list[Entry] = field(default_factory=list)
    rejected: list[tuple[Entry, str]] = field(default_factory=list)
    newest: int = 0
    """The largest generation or epoch that was seen."""


def survey(files: SegmentFiles, superblock: Superblock, segment_count: int, findings: list[str]) -> Contents:
    """The segments that are whole. Of each other file ``findings`` says what is wrong. RAISES DeviceFault."""
    found = Contents({})
    with faults(f"reading {files.folder}"), Buffers(PAGE_BYTES).take() as page:
        for number in files.numbers():
            if number >= segment_count:
                continue
            header = _read_header(files, number, superblock, page)
            if isinstance(header, str):
                findings.append(f"{files.path(number)}: {header}; its blocks are lost")
                continue
            found.segments[number] = Segment(header.stride, header.epoch)
            found.newest = max(found.newest, header.epoch)
    return found


def sift(found: Contents, entries: Sequence[Entry], segment_bytes: int) -> None:
    """Sort ``entries`` into those that are taken and those that are rejected. REQUIRES: by offset."""
    fitting: list[Entry] = []
    for number, run in _runs(entries, segment_bytes):
        segment = found.segments.get(number)
        if segment is not None and _all_fit(run, number * segment_bytes, segment_bytes, segment):
            fitting += run
            continue
        for entry in run:
            if why := _misfit(entry, segment_bytes, segment):
                found.rejected.append((entry, why))
            else:
                fitting.append(entry)
    keys, generations = itemgetter(_KEY), itemgetter(_GENERATION)
    newest = dict(zip(map(keys, fitting), fitting, strict=True))
    if len(newest) < len(fitting):
        newest = {entry.key: entry for entry in sorted(fitting, key=generations)}
        older = [entry for entry in fitting if newest[entry.key] is not entry]
        found.rejected += [(entry, "a newer copy is there") for entry in older]
    found.entries = list(newest.values())
    found.newest = max(found.newest, max(map(generations, entries), default=0))


def scan(
    files: SegmentFiles, segments: Mapping[int, Segment], segment_bytes: int, progress: Progress
) -> tuple[list[Entry], int]:
    """The entry of every slot header that stands where it says, and how many headers are damaged.

    RAISES DeviceFault."""
    jobs = list(_scan_jobs(segments, segment_bytes))
    total = sum(len(slots) for _, slots in jobs)
    entries: list[Entry] = []
    done = damaged = 0
    buffers = Buffers(PAGE_BYTES)
    with ThreadPoolExecutor(SCAN_THREADS, "kvcache-scan") as pool:
        tasks = [
            pool.submit(_scan_slots, files, buffers, number, segment_bytes, slots) for number, slots in jobs
        ]
        try:
            for (_, slots), task in zip(jobs, tasks, strict=True):
                progress("reading slot headers", done, total)
                some, bad = task.result()
                entries += some
                damaged += bad
                done += len(slots)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    progress("reading slot headers", done, total)
    return entries, damaged


def _read_header(
    files: SegmentFiles, number: int, superblock: Superblock, page: memoryview
) -> SegmentHeader | str:
    """The header, or what is wrong with the file."""
    with files.hold(number) as descriptor:
        length = os.fstat(descriptor).st_size
        if length != superblock.segment_bytes:
            return f"it is {length:,} bytes long, not {superblock.segment_bytes:,}"
        if read_all(descriptor, [page], 0) < PAGE_BYTES:
            raise OSError(errno.EIO, "a read stopped short")
    try:
        header = parse_segment_header(page)
    except BadRecord as error:
        return error.what
    if (header.directory_id, header.segment_bytes) != (superblock.directory_id, superblock.segment_bytes):
        return "it is a segment of another directory"
    return header if header.number == number else f"it is segment {header.number} under another's name"


def _runs(entries: Sequence[Entry], segment_bytes: int) -> Iterator[tuple[int, Sequence[Entry]]]:
    """Segment number and the entries in it."""
    first = 0
    while first < len(entries):
        number = entries[first].offset // segment_bytes
        last = bisect_left(entries, (number + 1) * segment_bytes, lo=first, key=itemgetter(_OFFSET))
        yield number, entries[first:last]
        first = last


def _all_fit(run: Sequence[Entry], base: int, segment_bytes: int, segment: Segment) -> bool:
    """``_misfit`` of none of them, at a quarter of the price. REQUIRES: by offset, not empty."""
    first = base + SEGMENT_HEADER_BYTES
    return (
        {entry.epoch for entry in run} == {segment.epoch}
        and {stride_of(size) for size in {entry.block_bytes for entry in run}} == {segment.stride}
        and {(entry.offset - first) % segment.stride for entry in run} == {0}
        and first <= run[0].offset <= run[-1].offset <= base + segment_bytes - segment.stride
    )


def _misfit(entry: Entry, segment_bytes: int, segment: Segment | None) -> str:
    """Why the entry cannot be taken; empty when it can."""
    if segment is None:
        return "its segment is not there"
    if segment.epoch != entry.epoch or segment.stride != stride_of(entry.block_bytes):
        return "its segment was formatted anew"
    inside = entry.offset % segment_bytes
    if (inside - SEGMENT_HEADER_BYTES) % segment.stride or not 0 < inside <= segment_bytes - segment.stride:
        return "no slot begins there"
    return ""


def _scan_jobs(segments: Mapping[int, Segment], segment_bytes: int) -> Iterator[tuple[int, range]]:
    """Segment number and offsets in it."""
    for number, segment in sorted(segments.items()):
        end = SEGMENT_HEADER_BYTES + slots_in(segment_bytes, segment.stride) * segment.stride
        step = SCAN_SLOTS * segment.stride
        for first in range(SEGMENT_HEADER_BYTES, end, step):
            yield number, range(first, min(first + step, end), segment.stride)


def _scan_slots(
    files: SegmentFiles, buffers: Buffers, number: int, segment_bytes: int, slots: range
) -> tuple[list[Entry], int]:
    entries: list[Entry] = []
    damaged = 0
    what = f"reading slot headers of {files.path(number)}"
    with faults(what), files.hold(number) as descriptor, buffers.take() as page:
        for inside in slots:
            if read_all(descriptor, [page], inside) < PAGE_BYTES:
                damaged += 1
                continue
            try:
                entry = parse_slot_header(page)
            except BadRecord as error:
                damaged += error.reason != "empty"
                continue
            if entry.offset == number * segment_bytes + inside:
                entries.append(entry)
            else:
                damaged += 1
    return entries, damaged
