"""Blocks to disk and back through the NVMe tier, verified, beside fio and beside what was not chosen.

    python benchmarks/bench_nvme.py [--directory DIR] [--json] [--quick]

``put`` is durable and in steady state: 64 MiB a batch over slots that hold older blocks, so that index
entries are deleted and committed, blocks written and synced, index entries put and committed, and the
index synced: the largest batch that a node makes. ``put_first`` is into new segments, which are filled
with zeros in the same time. ``get`` reads in random order, past the page cache, into memory of a node's
host tier, and verifies header and checksum: a block at a time, 8 MiB of neighbours a call as a node
brings a prompt, and a block at a time in four threads. ``mixed`` (not in the short form) puts and gets
at once, each in its half. The ceiling is fio's, in the same round (``nvme_rivals.py``, which also holds
the rivals); it has no index and verifies nothing. Needs fio: on Debian, apt-get install fio. Restart:
``nvme_restart.py``.

On paper: a batch is 64 MiB of writing, and beside it an fdatasync of the segment and two commits of an
index of pages, which sync too: five syncs in all. Where a sync takes 0.2 ms and the disk writes 4 GB/s
that is 1 ms beside 17; where it takes 4 ms and the disk 1.6 GB/s, 20 beside 42. A get is one request and
a copy with its sum at memory's speed (0.1 ms in 2 MiB), which hides behind other threads' reads. CPU:
the system's share of direct I/O (pinning pages, requests) and the copy, 0.03 s a GB each; the
interpreter's 40 us a block are 0.02 s a GB at 2 MiB.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import median

import harness
import nvme_restart
from harness import GIB, KIB, MIB, Figure
from nvme_rivals import (
    GB,
    READ_BYTES,
    WRITE_BYTES,
    Bare,
    Files,
    Fio,
    Lmdb,
    Pool,
    Took,
    Work,
    clocked,
    in_threads,
)

from kvcache.block import HASH_BYTES, KEY_BYTES, StorageKey
from kvcache.sums import block_checksum, sum_chunks
from kvcache.tiers.nvme import Device
from kvcache.tiers.nvme_format import PARENT_ROOT, SEGMENT_HEADER_BYTES, Entry, slots_in, stride_of

BLOCK_SIZES = (2 * MIB, 256 * KIB)
SEGMENT_BYTES = 128 * MIB
CHUNK_BYTES = 64 * KIB
WORK_BYTES, WORK_BYTES_QUICK = 512 * MIB, 256 * MIB
ROUNDS, ROUNDS_QUICK = 7, 2
THREADS = 4
MIXED_READERS = 3
MIXED_S = 2.0
FIO, HUGE, BARE = "fio", "fio, huge pages", "bare calls"
FILES, VALUES = "a file a block", "values in LMDB"
LMDB_PART = 4
CPU_GOAL = 0.08
FREE_BYTES_MIN = 8 * GIB
MEMORY_SYSTEMS = ("tmpfs", "ramfs")


class Ours:
    """A device of the NVMe tier with room for exactly the working set."""

    def __init__(self, folder: Path, work: Work) -> None:
        self._work = work
        self._per_segment = slots_in(SEGMENT_BYTES, stride_of(work.block_bytes))
        segments = -(-work.block_count // self._per_segment)
        self._device = Device.open(
            folder / f"tier-{work.block_bytes}", segments * SEGMENT_BYTES, SEGMENT_BYTES
        )
        if not self._device.direct:
            raise SystemExit(f"{folder} takes no direct I/O: give --directory on another file system")
        self._round = 0
        self._entries: list[Entry] = []
        self.first = self.put()  # Into new segments: they are made, with zeros, in this time.

    def put(self) -> Took:
        self._round += 1
        new = [self._entry(index) for index in range(self._work.block_count)]
        self._entries = []
        return clocked(self._work.payload_bytes, partial(self._put, new))

    def _put(self, new: Sequence[Entry]) -> None:
        for group in self._work.groups(WRITE_BYTES):
            puts = [(new[index], self._work.taken(index)) for index in group]
            self._entries += self._device.write(puts, (), durable=True)

    def get(self, threads: int) -> Took:
        self._work.blank()
        order = self._work.shuffled(self._round)
        took = clocked(self._work.payload_bytes, lambda: in_threads(threads, order, self._get))
        self._work.compare("the NVMe tier")
        return took

    def _get(self, index: int) -> None:
        self._device.read(self._entries[index], self._work.place(index))

    def get_groups(self) -> Took:
        """As a node brings a prompt: neighbours are asked for together."""
        self._work.blank()
        groups = self._work.groups(READ_BYTES)
        random.Random(self._round).shuffle(groups)
        took = clocked(self._work.payload_bytes, lambda: [self._get_group(group) for group in groups])
        self._work.compare("the NVMe tier")
        return took

    def _get_group(self, group: range) -> None:
        found = self._device.read_many(
            [self._entries[index] for index in group], [self._work.place(index) for index in group]
        )
        for each in found:
            if not isinstance(each, bytes):
                raise each

    def mixed(self, seconds: float, readers: int) -> tuple[Took, Took]:
        """As ``Fio.mixed``. CPU seconds are those of both sides together."""
        groups = self._work.groups(WRITE_BYTES)
        half = len(groups) // 2
        there = [index for group in groups[half:] for index in group]
        got = [0] * readers
        over = threading.Event()

        def read(reader: int) -> None:
            while not over.is_set():
                self._get(there[(got[reader] * readers + reader) * 7919 % len(there)])
                got[reader] += 1

        def both() -> None:
            threads = [threading.Thread(target=read, args=(reader,)) for reader in range(readers)]
            for thread in threads:
                thread.start()
            nonlocal put
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                group = groups[put % half]
                puts = [(self._entries[index], self._work.taken(index)) for index in group]
                self._entries[group.start : group.stop] = self._device.write(puts, (), durable=True)
                put += 1
            over.set()
            for thread in threads:
                thread.join()

        put = 0
        took = clocked(0, both)
        parts = put * len(groups[0]), sum(got)
        return (
            Took(parts[0] * self._work.block_bytes, took.seconds, took.cpu_seconds),
            Took(parts[1] * self._work.block_bytes, took.seconds, took.cpu_seconds),
        )

    def _entry(self, index: int) -> Entry:
        segment, place = divmod(index, self._per_segment)
        work = self._work
        offset = segment * SEGMENT_BYTES + SEGMENT_HEADER_BYTES + place * work.stride
        key = self._key(index)
        parent = self._key(index - 1)[-HASH_BYTES:] if index else PARENT_ROOT
        sums = sum_chunks([work.taken(index)], CHUNK_BYTES)
        checksum = block_checksum(key, work.block_bytes, CHUNK_BYTES, sums)
        return Entry(offset, key, parent, work.block_bytes, CHUNK_BYTES, 0, checksum, 0)

    def _key(self, index: int) -> StorageKey:
        return StorageKey(blake2b(f"{self._round}/{index}".encode(), digest_size=KEY_BYTES).digest())

    def close(self) -> None:
        self._device.close()


@dataclass(frozen=True, slots=True)
class Names:
    """What the figures of one block size share."""

    size: str
    rounds: int
    machine: str

    def figure(
        self, name: str, value: float, unit: str, ratio: float | None = None, against: str = ""
    ) -> Figure:
        short = None if ratio is None else round(ratio, 3)
        return Figure(f"nvme.{name}", round(value, 3), unit, short, against, self.rounds, self.machine)


Turns = dict[str, list[Took]]


def speeds(names: Names, name: str, turns: Turns) -> Iterator[Figure]:
    """GB/s of ``ours``, against each of the others."""
    gb_s = {who: [took.speed for took in taken] for who, taken in turns.items()}
    for other in gb_s:
        if other != "ours":
            against = f"{other} ({median(gb_s[other]):.2f} GB/s)"
            ratio = harness.compare(gb_s, "ours", other)
            yield names.figure(name, median(gb_s["ours"]), "GB/s", ratio, against)


def costs(names: Names, name: str, turns: Turns) -> Iterator[Figure]:
    """CPU seconds for each GB, of all rounds together; a ratio of 2 is half of the other's."""
    cost = {who: _cost(taken) for who, taken in turns.items()}
    ours = cost.pop("ours")
    yield names.figure(f"{name}.cpu", ours, "s/GB", CPU_GOAL / ours, f"a budget of {CPU_GOAL} s/GB")
    for other, theirs in cost.items():
        yield names.figure(f"{name}.cpu", ours, "s/GB", theirs / ours, f"{other} ({theirs:.3f} s/GB)")


def _cost(taken: Sequence[Took]) -> float:
    return sum(took.cpu_seconds for took in taken) * GB / sum(took.payload_bytes for took in taken)


def figures(names: Names, name: str, turns: Turns) -> Iterator[Figure]:
    yield from speeds(names, name, turns)
    yield from costs(names, name, turns)


def transfers(folder: Path, block_bytes: int, chosen: harness.Options, machine: str) -> Iterator[Figure]:
    work_bytes = WORK_BYTES_QUICK if chosen.quick else WORK_BYTES
    work = Work(block_bytes, work_bytes // block_bytes, Pool(work_bytes), Pool(work_bytes))
    work.stamp(str(block_bytes))
    size, rounds = harness.size_name(block_bytes), chosen.rounds(ROUNDS, ROUNDS_QUICK)
    names = Names(size, rounds, machine)
    with ExitStack() as stack:
        fio = stack.enter_context(closing(Fio(folder, work)))
        huge = stack.enter_context(closing(Fio(folder, work, huge_pages=True)))
        bare = stack.enter_context(closing(Bare(folder, work)))
        files = stack.enter_context(closing(Files(folder, work)))
        values = stack.enter_context(closing(Lmdb(folder, work.part(LMDB_PART))))
        ours = stack.enter_context(closing(Ours(folder, work)))
        put = {
            FIO: fio.put,
            HUGE: huge.put,
            BARE: bare.put,
            "ours": ours.put,
            FILES: files.put,
            VALUES: values.put,
        }
        yield from figures(names, f"put.{size}", harness.interleaved(put, rounds))
        yield names.figure(f"put_first.{size}", ours.first.speed, "GB/s")
        one: dict[str, Callable[[], Took]] = {
            FIO: partial(fio.get, 1),
            HUGE: partial(huge.get, 1),
            BARE: partial(bare.get, 1),
            "ours": partial(ours.get, 1),
            FILES: files.get,
            VALUES: values.get,
        }
        yield from figures(names, f"get.{size}", harness.interleaved(one, rounds))
        grouped = {
            FIO: partial(fio.get, 1),
            HUGE: partial(huge.get, 1),
            BARE: partial(bare.get, 1),
            "ours": ours.get_groups,
        }
        yield from figures(
            names, f"get.{size}.batch{READ_BYTES // block_bytes}", harness.interleaved(grouped, rounds)
        )
        several = {
            FIO: partial(fio.get, THREADS),
            HUGE: partial(huge.get, THREADS),
            BARE: partial(bare.get, THREADS),
            "ours": partial(ours.get, THREADS),
        }
        yield from figures(names, f"get.{size}.threads{THREADS}", harness.interleaved(several, rounds))
        if chosen.quick:
            return
        both = {who: partial(each.mixed, MIXED_S, MIXED_READERS) for who, each in ((FIO, fio), (HUGE, huge))}
        both["ours"] = partial(ours.mixed, MIXED_S, MIXED_READERS)
        mixed = harness.interleaved(both, rounds // 2)
        for at, op in enumerate(("put", "get")):
            sides = {who: [took[at] for took in taken] for who, taken in mixed.items()}
            yield from speeds(names, f"mixed.{op}.{size}", sides)


def check_directory(folder: Path) -> None:
    """RAISES SystemExit: a figure from here would mean nothing."""
    name = file_system(folder)
    if name in MEMORY_SYSTEMS:
        raise SystemExit(f"{folder} is {name}, which is memory and no disk: give --directory on a disk")
    if shutil.disk_usage(folder).free < FREE_BYTES_MIN:
        raise SystemExit(f"{folder} has under {FREE_BYTES_MIN // GIB} GiB free: give --directory with more")


def file_system(folder: Path) -> str:
    """The kind of file system that ``folder`` is on; empty when the system does not say."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return ""


def main() -> None:
    parser = harness.parser((__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--directory", type=Path, default=Path.cwd(), help="where to work, on the disk to be measured"
    )
    parsed = parser.parse_args()
    chosen, machine = harness.choose(parsed), harness.machine()
    with tempfile.TemporaryDirectory(prefix="kvcache-bench-", dir=parsed.directory) as name:
        folder = Path(name)
        check_directory(folder)
        found: list[Figure] = []
        for block_bytes in BLOCK_SIZES:
            found += transfers(folder, block_bytes, chosen, machine)
        found += nvme_restart.figures(folder / "restart", chosen, machine)
    harness.report(found, chosen)


if __name__ == "__main__":
    main()
