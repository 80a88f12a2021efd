"""What ``bench_nvme.py`` measures the NVMe tier against, on the same file system in the same run.

``Fio`` is the ceiling: the same lengths (block and one page of header), the same direct I/O, as many
requests at a time (one a reading thread, two for writes), fdatasync after as many writes. Its memory is
one block for each, of 4 KiB pages, which may lie together or not: where the disk takes requests of few
pieces, that is luck, and its speed doubles or halves from one run to the next. With huge pages it is
steady, and higher: both are shown. ``Bare`` shows what the same calls do from Python on a node's memory,
which is more than a cache holds. Its CPU time is told in milliseconds, so for several threads it is
rough.

``Lmdb`` keeps the values in LMDB, which syncs at each transaction, here as many blocks as a batch has.
``Files`` is a file a block, written under another name, synced and renamed, and read past the page
cache. These two verify nothing, which is to their favour.

Cold: direct I/O goes past this machine's page cache. What LMDB left there is dropped before each turn
and ``resident_share`` looks that it is gone. What lies below a virtual disk nobody here can empty; it is
there for all alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import lmdb
from harness import MIB

from kvcache.tiers.host import HostTier
from kvcache.tiers.space import make_slot

GB = 1e9
PAGE_BYTES = 4096
WRITE_BYTES = 64 * MIB
READ_BYTES = 8 * MIB
WRITES_AT_ONCE = 2
STAMP_BYTES = 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class Took:
    payload_bytes: int
    seconds: float
    cpu_seconds: float

    @property
    def speed(self) -> float:
        return self.payload_bytes / GB / self.seconds


def clocked(payload_bytes: int, action: Callable[[], object]) -> Took:
    """CPU time is that of all threads here and of the processes started here: an index has one."""
    cpu = cpu_seconds()
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return Took(payload_bytes, seconds, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    spent = time.process_time()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # It has just ended.
            for child in (thread / "children").read_text().split():
                spent += int(Path(f"/proc/{child}/schedstat").read_text().split()[0]) / 1e9
    return spent


class Pool:
    """Memory as a node has it, and its address."""

    def __init__(self, pool_bytes: int) -> None:
        self._tier = HostTier(pool_bytes, pool_bytes)
        arena = self._tier.add_arena("bench")
        self._tier.populate(arena)
        self.view = self._tier.view(make_slot(arena, 0), pool_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))
        noise = os.urandom(MIB)
        for start in range(0, pool_bytes, MIB):
            self.view[start : start + MIB] = noise[: pool_bytes - start]


@dataclass(frozen=True, slots=True)
class Work:
    """Blocks in one pool, to be written, and their places in another, to be read into."""

    block_bytes: int
    block_count: int
    source: Pool
    target: Pool

    @property
    def payload_bytes(self) -> int:
        return self.block_bytes * self.block_count

    @property
    def stride(self) -> int:
        return self.block_bytes + PAGE_BYTES

    def taken(self, index: int) -> memoryview:
        return self.source.view[index * self.block_bytes : (index + 1) * self.block_bytes]

    def place(self, index: int) -> memoryview:
        return self.target.view[index * self.block_bytes : (index + 1) * self.block_bytes]

    def groups(self, group_bytes: int) -> list[range]:
        """REQUIRES: the blocks are a whole number of groups."""
        count = group_bytes // self.block_bytes
        return [range(at, at + count) for at in range(0, self.block_count, count)]

    def shuffled(self, seed: int) -> list[int]:
        order = list(range(self.block_count))
        random.Random(seed).shuffle(order)
        return order

    def part(self, divisor: int) -> Work:
        return Work(self.block_bytes, self.block_count // divisor, self.source, self.target)

    def stamp(self, mark: str) -> None:
        """Make every block unlike every other, and unlike what it was before."""
        for index in range(self.block_count):
            block, text = self.taken(index), f"{mark} {index}".encode().ljust(STAMP_BYTES)
            block[:STAMP_BYTES] = block[-STAMP_BYTES:] = text

    def blank(self) -> None:
        """Nothing of an earlier read is left where it would be taken for this one's."""
        for index in range(self.block_count):
            place = self.place(index)
            place[:STAMP_BYTES] = place[-STAMP_BYTES:] = bytes(STAMP_BYTES)

    def compare(self, name: str) -> None:
        """Every byte read against what was written. RAISES SystemExit: a figure for wrong bytes is none."""
        if _libc.memcmp(self.source.address, self.target.address, self.payload_bytes) != 0:
            raise SystemExit(f"{name} gave wrong bytes")


def in_threads(count: int, items: Sequence[int], action: Callable[[int], object]) -> None:
    """Each of ``count`` threads takes its share of ``items``, one after another."""

    def share(first: int) -> None:
        for item in items[first::count]:
            action(item)

    if count == 1:
        share(0)
        return
    with ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(share, first) for first in range(count)]:
            done.result()


class Fio:
    """One file of the working set's size. RAISES SystemExit where fio is not installed or fails."""

    def __init__(self, folder: Path, work: Work, *, huge_pages: bool = False) -> None:
        if shutil.which("fio") is None:
            raise SystemExit(
                "fio measures the ceiling, and it is not installed. On Debian: apt-get install fio"
            )
        self._work = work
        self._file = folder / f"fio-{work.block_bytes}-{huge_pages}.bin"
        self._write = (
            "--rw=write",
            f"--fdatasync={WRITE_BYTES // work.block_bytes}",
            "--ioengine=libaio",
            f"--iodepth={WRITES_AT_ONCE}",
        )
        self._environment = dict(os.environ)
        if huge_pages:
            self._environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        self.put()

    def put(self) -> Took:
        return _took(self._run("--name=put", *self._write)["write"], self._work)

    def get(self, threads: int) -> Took:
        share = self._work.block_count // threads * self._work.stride
        jobs = (f"--numjobs={threads}", "--group_reporting", f"--io_size={share}")
        return _took(self._run("--name=get", "--rw=randread", *jobs)["read"], self._work)

    def mixed(self, seconds: float, readers: int) -> tuple[Took, Took]:
        """A thread that puts in the first half of the file while ``readers`` get from the second."""
        half = self._work.block_count // 2 * self._work.stride
        timed = ("--time_based", f"--runtime={seconds:.0f}", f"--size={half}")
        get = ("--name=get", "--rw=randread", f"--offset={half}", f"--numjobs={readers}", "--group_reporting")
        found = self._run(*timed, "--name=put", *self._write, "--new_group", *get)
        return _took(found["write"], self._work), _took(found["read"], self._work)

    def close(self) -> None:
        self._file.unlink()

    def _run(self, *options: str) -> dict[str, dict[str, float]]:
        """By ``write`` and ``read``: what fio says of the jobs that did it, with their CPU seconds."""
        shared = (
            f"--filename={self._file}",
            f"--bs={self._work.stride}",
            f"--size={self._work.block_count * self._work.stride}",
            "--direct=1",
            "--ioengine=psync",
            "--thread",
            "--randrepeat=0",
            "--scramble_buffers=0",
            "--iomem_align=2m",
            "--output-format=json",
        )
        command = ["fio", *shared, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment)
        if done.returncode:
            raise SystemExit(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
        found: dict[str, dict[str, float]] = {}
        for job in json.loads(done.stdout[done.stdout.index("{") :])["jobs"]:
            for side in ("read", "write"):
                if job[side]["io_bytes"]:
                    share = (job["usr_cpu"] + job["sys_cpu"]) / 100
                    found[side] = {**job[side], "cpu_seconds": share * job["job_runtime"] / 1e3}
        return found


def _took(said: dict[str, float], work: Work) -> Took:
    """fio's bytes, without the pages that hold headers in our case."""
    payload_bytes = int(said["io_bytes"]) * work.block_bytes // work.stride
    return Took(payload_bytes, payload_bytes / said["bw_bytes"], said["cpu_seconds"])


class Bare:
    """The same memory to a file and back by the same calls from Python: no header, index or checksum.

    fio writes and reads one and the same buffer, which stays in the processor's cache; this does not."""

    def __init__(self, folder: Path, work: Work) -> None:
        self._work = work
        self._file = folder / f"bare-{work.block_bytes}.bin"
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._descriptor, 0, work.payload_bytes)
        self.put()

    def put(self) -> Took:
        return clocked(self._work.payload_bytes, self._put)

    def _put(self) -> None:
        for group in self._work.groups(WRITE_BYTES):
            in_threads(WRITES_AT_ONCE, group, self._put_one)
            os.fdatasync(self._descriptor)

    def _put_one(self, index: int) -> None:
        os.pwritev(self._descriptor, [self._work.taken(index)], index * self._work.block_bytes)

    def get(self, threads: int) -> Took:
        self._work.blank()
        order = self._work.shuffled(2)
        took = clocked(self._work.payload_bytes, lambda: in_threads(threads, order, self._get_one))
        self._work.compare("a bare file")
        return took

    def _get_one(self, index: int) -> None:
        os.preadv(self._descriptor, [self._work.place(index)], index * self._work.block_bytes)

    def close(self) -> None:
        os.close(self._descriptor)
        self._file.unlink()


class Lmdb:
    """Values in LMDB: a batch a transaction, synced; read with LMDB's and the system's read-ahead."""

    def __init__(self, folder: Path, work: Work) -> None:
        self._work = work
        self._folder = folder / f"lmdb-{work.block_bytes}"
        self._file = self._folder / "data.mdb"
        self._map_bytes = 3 * work.payload_bytes + 64 * MIB
        self._open()

    def _open(self) -> None:
        self._environment = lmdb.open(str(self._folder), map_size=self._map_bytes)

    def put(self) -> Took:
        return clocked(self._work.payload_bytes, self._put)

    def _put(self) -> None:
        for group in self._work.groups(WRITE_BYTES):
            with self._environment.begin(write=True) as transaction:
                for index in group:
                    transaction.put(index.to_bytes(32, "big"), self._work.taken(index))

    def get(self) -> Took:
        self._environment.close()
        drop_pages(self._file)
        self._open()
        self._work.blank()
        took = clocked(self._work.payload_bytes, self._get)
        self._work.compare("LMDB")
        return took

    def _get(self) -> None:
        for index in self._work.shuffled(1):
            with self._environment.begin(buffers=True) as transaction:
                self._work.place(index)[:] = transaction.get(index.to_bytes(32, "big"))

    def close(self) -> None:
        self._environment.close()
        shutil.rmtree(self._folder)


class Files:
    """A file a block: direct I/O, synced, renamed over the old one; the folder synced with each group."""

    def __init__(self, folder: Path, work: Work) -> None:
        self._work = work
        self._folder = folder / f"files-{work.block_bytes}"
        self._folder.mkdir()
        self._descriptor = os.open(self._folder, os.O_RDONLY)

    def put(self) -> Took:
        return clocked(self._work.payload_bytes, self._put)

    def _put(self) -> None:
        for group in self._work.groups(WRITE_BYTES):
            for index in group:
                self._put_one(index)
            os.fsync(self._descriptor)

    def _put_one(self, index: int) -> None:
        path = self._folder / f"{index:064x}"
        temporary = path.with_suffix(".tmp")
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        os.pwritev(file, [self._work.taken(index)], 0)
        os.fdatasync(file)
        os.close(file)
        temporary.rename(path)

    def get(self) -> Took:
        self._work.blank()
        took = clocked(self._work.payload_bytes, self._get)
        self._work.compare("a file a block")
        return took

    def _get(self) -> None:
        for index in self._work.shuffled(1):
            file = os.open(self._folder / f"{index:064x}", os.O_RDONLY | os.O_DIRECT)
            os.preadv(file, [self._work.place(index)], 0)
            os.close(file)

    def close(self) -> None:
        os.close(self._descriptor)
        shutil.rmtree(self._folder)


def drop_pages(path: Path) -> None:
    """Out of the page cache. RAISES SystemExit when they stay: a warm read is no cold one."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        share = resident_share(file.fileno())
    if share > 0.01:
        raise SystemExit(f"{share:.0%} of {path.name} stayed in the page cache: it cannot be read cold")


def resident_share(descriptor: int) -> float:
    """How much of a file the page cache holds."""
    length = os.fstat(descriptor).st_size
    page_count = -(-length // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * page_count)()
    # Private and writable only so that its address can be taken; nothing is written.
    memory = mmap.mmap(descriptor, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    first = ctypes.c_char.from_buffer(memory)
    if _libc.mincore(ctypes.addressof(first), length, flags):
        raise OSError(ctypes.get_errno(), "mincore")
    del first
    memory.close()
    return sum(flag & 1 for flag in bytes(flags)) / page_count
