"""A process that writes blocks until it is killed: ``python -m tests.kvcache.tiers.nvme_writer PATH SEED``.

Its steps follow from the seed, so who killed it knows what every step was. A step is printed when the
device says that it is durable.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from kvcache.tiers.nvme_format import slots_in, stride_of
from tests.kvcache.tiers.nvme_blocks import BLOCK, PAGE, SEGMENT, SEGMENTS, block_of, offset_of, open_device

SIZES = (BLOCK, PAGE, 5_000)


@dataclass(frozen=True, slots=True)
class Step:
    """``puts``: seeds of blocks and where they go. ``gone``: what is not there any more afterwards."""

    block_bytes: int
    puts: dict[int, int]
    deletes: frozenset[int]
    gone: frozenset[int]


def steps(seed: int) -> Iterator[Step]:
    """Blocks come, replace others and go; now and then a segment is formatted for another size."""
    pick = random.Random(seed)
    sizes = dict.fromkeys(range(SEGMENTS), BLOCK)
    stored: set[int] = set()
    for at in count():
        number = pick.randrange(SEGMENTS)
        gone: set[int] = set()
        if pick.random() < 0.1:
            sizes[number] = pick.choice([size for size in SIZES if size != sizes[number]])
            gone = {offset for offset in stored if offset // SEGMENT == number}
        size = sizes[number]
        slots = pick.sample(range(slots_in(SEGMENT, stride_of(size))), pick.randint(1, 4))
        puts = {offset_of(number, slot, size): 100 * at + slot for slot in slots}
        rest = sorted(stored - gone - puts.keys())
        deletes = frozenset(pick.sample(rest, min(len(rest), pick.randrange(3))))
        stored = stored - gone - deletes | puts.keys()
        yield Step(size, puts, deletes, frozenset(gone - puts.keys()) | deletes)


def main(path: str, seed: str) -> None:
    device = open_device(Path(path))
    for at, step in enumerate(steps(int(seed))):
        puts = [
            block_of(each, offset, step.block_bytes, step.block_bytes) for offset, each in step.puts.items()
        ]
        device.write(puts, sorted(step.deletes), durable=True)
        print(at, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
