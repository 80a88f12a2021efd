"""How long a node takes to start with 300,000 stored blocks, with the index and without, and their memory.

The directory is filled through the tier's own writes; then ``kvcache serve`` is started on it, in its own
process, until it says that it is ready and has every block. Blocks are of 4 KiB in chains of 50, so that
300,000 take 2.4 GB. With the index a start reads none of them, so their size does not matter; without it
the slot headers are read, and those of larger blocks lie further apart. Memory is what the process has
more than on an empty directory.

On paper, for each entry: 1.3 us to read it from the index and check it, 2 us for the ledger's tree and
policy, 1 us to announce it; 1.3 s for all, and 0.4 s for any start. The limit is the interpreter.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import median

import harness
from harness import KIB, MIB, Figure

from kvcache.block import HASH_BYTES, BlockSpec, StorageKey
from kvcache.cli_info import ask
from kvcache.namespace import Namespace, shape_of
from kvcache.sums import block_checksum, sum_chunks
from kvcache.testing.processes import NodeProcess
from kvcache.tiers.nvme import Device
from kvcache.tiers.nvme_format import PARENT_ROOT, SEGMENT_HEADER_BYTES, Entry, slots_in, stride_of

ENTRY_COUNT = 300_000
BLOCK_BYTES = 4 * KIB
CHAIN = 50
SEGMENT_BYTES = 128 * MIB
BATCH = 4_096
PER_SEGMENT = slots_in(SEGMENT_BYTES, stride_of(BLOCK_BYTES))
CAPACITY_BYTES = (ENTRY_COUNT // PER_SEGMENT + 1) * SEGMENT_BYTES
SPEC = BlockSpec(block_tokens=16, plane_count=1, head_count=8, head_bytes=BLOCK_BYTES // 8)
NAMESPACE = Namespace(
    model="bench",
    weights="bench",
    dtype="bfloat16",
    layout="canonical",
    block_tokens=SPEC.block_tokens,
    shape=shape_of(SPEC),
)
GOAL_S = 1.5
POLL_S = 0.05
LOAD_S = 120.0


@dataclass(frozen=True, slots=True)
class Start:
    seconds: float
    cpu_seconds: float
    resident_bytes: int


def figures(folder: Path, chosen: harness.Options, machine: str) -> Iterator[Figure]:
    rounds = chosen.rounds(5, 1)
    empty = [start(folder, 0) for _ in range(rounds)]
    fill(folder)
    starts = [start(folder, ENTRY_COUNT) for _ in range(rounds)]
    rebuilt: list[Start] = []
    if not chosen.quick:
        shutil.rmtree(folder / "index")
        rebuilt = [start(folder, ENTRY_COUNT)]
    shutil.rmtree(folder)
    took = median(each.seconds for each in starts)
    held = median(each.resident_bytes for each in starts) - median(each.resident_bytes for each in empty)

    def figure(name: str, value: float, unit: str, ratio: float | None = None, against: str = "") -> Figure:
        return Figure(f"nvme.{name}", round(value, 3), unit, ratio, against, rounds, machine)

    yield figure("restart.300k", took, "s", round(GOAL_S / took, 3), f"a budget of {GOAL_S} s")
    yield figure("restart.300k.cpu", median(each.cpu_seconds for each in starts), "s")
    yield figure("restart.empty", median(each.seconds for each in empty), "s")
    for each in rebuilt:
        yield figure("rebuild.300k", each.seconds, "s")
    yield figure("entry", held / ENTRY_COUNT, "B")


def fill(folder: Path) -> None:
    """Every slot's block is the same page; each has its own key, and so its own checksum."""
    page = memoryview(mmap.mmap(-1, BLOCK_BYTES))
    page[:] = bytes(range(256)) * (BLOCK_BYTES // 256)
    sums = sum_chunks([page], BLOCK_BYTES)
    device = Device.open(folder, CAPACITY_BYTES, SEGMENT_BYTES)
    device.save_namespace(NAMESPACE.to_map())
    for first in range(0, ENTRY_COUNT, BATCH):
        numbers = range(first, min(first + BATCH, ENTRY_COUNT))
        device.write([(_entry(number, sums), page) for number in numbers], (), durable=False)
    device.close()


def _entry(number: int, sums: bytes) -> Entry:
    segment, place = divmod(number, PER_SEGMENT)
    offset = segment * SEGMENT_BYTES + SEGMENT_HEADER_BYTES + place * stride_of(BLOCK_BYTES)
    key = StorageKey(NAMESPACE.namespace_id() + _hash(number))
    parent = _hash(number - 1) if number % CHAIN else PARENT_ROOT
    checksum = block_checksum(key, BLOCK_BYTES, BLOCK_BYTES, sums)
    return Entry(offset, key, parent, BLOCK_BYTES, BLOCK_BYTES, 0, checksum, 0)


def _hash(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "big"), digest_size=HASH_BYTES).digest()


def start(folder: Path, entry_count: int) -> Start:
    """From before the process is there until it is ready and has all. RAISES SystemExit: it never has."""
    with tempfile.TemporaryDirectory(prefix="kvcache-bench-") as home:
        settings = {
            "nvme": f"{folder}:{CAPACITY_BYTES}",
            "nvme_segment": str(SEGMENT_BYTES),
            "socket": f"{home}/node.sock",
            "http": "none",
            "capacity": "64MiB",
        }
        node = NodeProcess(settings, Path(home) / "log")
        began = time.perf_counter()
        with node:
            while (found := ask(node.socket, "")[1].values["blocks:nvme"]) != entry_count:
                if time.perf_counter() - began > LOAD_S:
                    raise SystemExit(f"a node has {found:.0f} of {entry_count} blocks after {LOAD_S:.0f} s")
                time.sleep(POLL_S)
            seconds = time.perf_counter() - began
            return Start(seconds, _cpu_seconds(node.pid), _resident_bytes(node.pid))


def _cpu_seconds(pid: int) -> float:
    """Of all its threads, so far."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in threads) / 1e9


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("the system does not say how much memory is resident")
