"""What a verified copy costs: ``kvcache.sums.copy_and_sum`` against one thread's bare ``memmove``.

Blocks lie in two pools of 512 MiB, as in use: a shared memfd (a node's slab) and private memory (an
engine's); pages of both are touched before anything is timed. Blocks are visited in a shuffled order
that goes on from contestant to contestant, so 1 GiB passes before a block comes again: it is cold.
``memmove`` is glibc's memcpy, called through ctypes once a block, without a sum and without numpy.

The sum: memory is the limit. A plain store reads the line it is about to overwrite, so a copy moves 3
bytes a byte; past the caches it moves 2, up to 1.5 times as fast. XXH3 needs 8 instructions for 64
bytes: it hides. So the fused copy should reach 1.0 of a memmove that stores through the caches and more where
it streams; a second pass, which reads every byte again, should cost a quarter (what was just written is
still in a cache) to a half.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from statistics import median

import harness
from harness import KIB, MIB, Figure

from kvcache import sums, sums_twin

POOL_BYTES = 512 * MIB
TURN_BYTES = 64 * MIB
BLOCK_BYTES = (256 * KIB, 2 * MIB, 32 * MIB)
CHUNK_BYTES = 64 * KIB
PLANE_BYTES = 64 * KIB
BASE = "memmove"
NOT_COMPARED = (BASE, "two_passes", "sum_only")  # Not the store's copy: shown, without a ratio.

Copy = Callable[[memoryview, memoryview], object]


def main() -> None:
    chosen = harness.options("fused copy and sum against memmove")
    machine = harness.machine()
    slab, memory = pools()
    figures: list[Figure] = []
    for block_bytes in BLOCK_BYTES:
        rounds = chosen.rounds(full=51, quick=15)
        results = measure(slab, memory, block_bytes, rounds)
        size = harness.size_name(block_bytes)
        for name, values in results.items():
            ratio = None if name in NOT_COMPARED else round(harness.compare(results, name, BASE), 3)
            value = round(median(values), 3)
            figures.append(Figure(f"copy.{name}.{size}", value, "GB/s", ratio, BASE, rounds, machine))
    harness.report(figures, chosen)


def pools() -> tuple[memoryview, memoryview]:
    descriptor = os.memfd_create("bench-slab")
    os.ftruncate(descriptor, POOL_BYTES)
    slab = memoryview(mmap.mmap(descriptor, POOL_BYTES))
    os.close(descriptor)
    memory = memoryview(mmap.mmap(-1, POOL_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    noise = random.Random(1).randbytes(MIB)
    for at in range(0, POOL_BYTES, MIB):
        slab[at : at + MIB] = noise
        memory[at : at + MIB] = noise
    return slab, memory


def contestants() -> dict[str, Copy]:
    """``fused`` is what the store calls; the two after it fix the kind of store, where it is native."""
    found: dict[str, Copy] = {
        BASE: memmove,
        "fused": lambda source, target: sums.copy_and_sum([source], [target], CHUNK_BYTES),
        "planes": lambda source, target: sums.copy_and_sum(planes(source), planes(target), CHUNK_BYTES),
        "twin": lambda source, target: sums_twin.copy_and_sum([source], [target], CHUNK_BYTES),
        "two_passes": two_passes,
        "sum_only": lambda source, _: sums.sum_chunks([source], CHUNK_BYTES),
    }
    if sums.NATIVE:
        from kvcache._native import core

        def store(source: memoryview, target: memoryview, stores: str) -> bytes:
            return core.copy_and_sum([source], [target], CHUNK_BYTES, stores=stores)

        found |= {stores: partial(store, stores=stores) for stores in ("cached", "streaming")}
    return found


def memmove(source: memoryview, target: memoryview) -> None:
    from_address = ctypes.addressof(ctypes.c_char.from_buffer(source))
    to_address = ctypes.addressof(ctypes.c_char.from_buffer(target))
    ctypes.memmove(to_address, from_address, len(source))


def two_passes(source: memoryview, target: memoryview) -> None:
    memmove(source, target)
    sums.sum_chunks([target], CHUNK_BYTES)


def planes(block: memoryview) -> list[memoryview]:
    return [block[at : at + PLANE_BYTES] for at in range(0, len(block), PLANE_BYTES)]


def measure(slab: memoryview, memory: memoryview, block_bytes: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of each contestant, round by round."""
    pairs = cycle(shuffled_pairs(slab, memory, block_bytes))
    count = TURN_BYTES // block_bytes

    def speed(copy: Copy) -> float:
        blocks = list(islice(pairs, count))
        return TURN_BYTES / harness.seconds(lambda: [copy(*pair) for pair in blocks]) / 1e9

    source, target = next(pairs)
    for name, copy in contestants().items():
        target[:] = bytes(block_bytes)
        copy(source, target)
        assert name == "sum_only" or source == target, name
    return harness.interleaved({name: partial(speed, copy) for name, copy in contestants().items()}, rounds)


def shuffled_pairs(
    slab: memoryview, memory: memoryview, block_bytes: int
) -> Iterator[tuple[memoryview, memoryview]]:
    """Each block of the slab once, each with another place in the engine's memory."""
    starts = list(range(0, POOL_BYTES, block_bytes))
    generator = random.Random(block_bytes)
    sources, targets = generator.sample(starts, len(starts)), generator.sample(starts, len(starts))
    for source, target in zip(sources, targets, strict=True):
        yield slab[source : source + block_bytes], memory[target : target + block_bytes]


if __name__ == "__main__":
    main()
