"""How long a start takes with 300,000 stored blocks, with the index and without, and what it costs in memory.

The program is one start, in a process of its own: open the directory, load what it holds, restore the
ledger, say so, and what the memory grew by. ``figures`` makes the directory, through the tier's own
writes, and starts it. Blocks are of 4 KiB in chains of 50, so that 300,000 take 2.4 GB; a start reads
none of them, so their size does not matter, but without the index the slot headers are read, and with
larger blocks those lie further apart.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from statistics import median

import harness
from harness import KIB, MIB, Figure

from kvcache.block import HASH_BYTES, StorageKey
from kvcache.eviction.registry import policy_class
from kvcache.ledger import Ledger
from kvcache.restored import Restored
from kvcache.sums import block_checksum, sum_chunks
from kvcache.tiers.nvme import Device
from kvcache.tiers.nvme_format import PARENT_ROOT, SEGMENT_HEADER_BYTES, Entry, slots_in, stride_of
from kvcache.tiers.space import NVME_LAYOUT, Space, make_slot

ENTRY_COUNT = 300_000
BLOCK_BYTES = 4 * KIB
CHAIN = 50
SEGMENT_BYTES = 128 * MIB
BATCH = 4_096
PER_SEGMENT = slots_in(SEGMENT_BYTES, stride_of(BLOCK_BYTES))
CAPACITY_BYTES = (ENTRY_COUNT // PER_SEGMENT + 1) * SEGMENT_BYTES
NAMESPACE = bytes(HASH_BYTES)
GOAL_S = 1.5
POLICY = "leaf-lru"


def figures(folder: Path, chosen: harness.Options, machine: str) -> Iterator[Figure]:
    fill(folder)
    rounds = chosen.rounds(5, 2)
    starts = [start(folder) for _ in range(rounds)]
    took = median(each["seconds"] for each in starts)
    against = f"a budget of {GOAL_S} s"
    yield Figure("nvme.restart.300k", round(took, 3), "s", round(GOAL_S / took, 2), against, rounds, machine)
    for name in ("open", "restore"):
        part = median(each[name] for each in starts)
        yield Figure(f"nvme.restart.300k.{name}", round(part, 3), "s", None, "", rounds, machine)
    memory = median(each["bytes"] for each in starts)
    yield Figure("nvme.entry", round(memory / ENTRY_COUNT), "B", None, "", rounds, machine)
    shutil.rmtree(folder / "index")
    took = start(folder)["seconds"]
    yield Figure("nvme.rebuild.300k", round(took, 3), "s", None, "", 1, machine)
    shutil.rmtree(folder)


def fill(folder: Path) -> None:
    """Every slot's block is the same page; each has its own key, and so its own checksum."""
    page = memoryview(bytes(range(256)) * (BLOCK_BYTES // 256))
    sums = sum_chunks([page], BLOCK_BYTES)
    device = Device.open(folder, CAPACITY_BYTES, SEGMENT_BYTES)
    for first in range(0, ENTRY_COUNT, BATCH):
        numbers = range(first, min(first + BATCH, ENTRY_COUNT))
        device.write([(_entry(number, sums), page) for number in numbers], (), durable=False)
    device.close()


def _entry(number: int, sums: bytes) -> Entry:
    segment, place = divmod(number, PER_SEGMENT)
    offset = segment * SEGMENT_BYTES + SEGMENT_HEADER_BYTES + place * stride_of(BLOCK_BYTES)
    key = StorageKey(NAMESPACE + _hash(number))
    parent = _hash(number - 1) if number % CHAIN else PARENT_ROOT
    checksum = block_checksum(key, BLOCK_BYTES, BLOCK_BYTES, sums)
    return Entry(offset, key, parent, BLOCK_BYTES, BLOCK_BYTES, 0, checksum, 0)


def _hash(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "big"), digest_size=HASH_BYTES).digest()


def start(folder: Path) -> dict[str, float]:
    """One start: seconds from before the process is there to when it says that it is ready, and more."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        seconds = time.perf_counter() - began
        line = process.stdout.read()
    if process.returncode or not ready:
        raise SystemExit("a start failed")
    said: dict[str, float] = json.loads(line)
    if said["count"] != ENTRY_COUNT:
        raise SystemExit(f"{said['count']:.0f} of {ENTRY_COUNT} entries came back")
    return {**said, "seconds": seconds}


def main(folder: Path) -> None:
    before = _resident_bytes()
    began = time.perf_counter()
    device = Device.open(folder, CAPACITY_BYTES, SEGMENT_BYTES)
    entries = device.take_entries()
    opened = time.perf_counter()
    space = Space(CAPACITY_BYTES, SEGMENT_BYTES, NVME_LAYOUT)
    arena = space.add_arena(CAPACITY_BYTES)
    ledger = Ledger(space, policy_class(POLICY))
    refused = ledger.restore([_restored(entry, arena) for entry in entries])
    held = {entry.offset: entry for entry in entries}
    restored = time.perf_counter()
    print("ready", flush=True)
    del entries
    ledger.take_changes()
    gc.collect()
    said = {
        "count": len(held) - len(refused),
        "open": opened - began,
        "restore": restored - opened,
        "bytes": _resident_bytes() - before,
    }
    print(json.dumps(said), flush=True)
    device.close()


def _restored(entry: Entry, arena: int) -> Restored:
    parent = None
    if entry.parent != PARENT_ROOT:
        parent = StorageKey(entry.key[:HASH_BYTES] + entry.parent)
    return Restored(entry.key, parent, make_slot(arena, entry.offset), entry.block_bytes, entry.checksum)


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("the system does not say how much memory is resident")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
