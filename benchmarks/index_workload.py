"""What bench_index.py tells and asks: families of prompts on many workers.

A family shares a root of 256 blocks and has branches of 128 to 8,192. A branch is on one worker or more,
geometrically many, of which half lost a tail. With a hot root, 834 of a thousand workers hold one
family's root.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from random import Random

EVENT_BLOCKS = 64
ROOT_BLOCKS = 256
BRANCHES = (128, 512, 1024, 2048, 8192)
HOT_SHARE = 0.8145


@dataclass(frozen=True, slots=True)
class Event:
    worker: int
    hashes: array[int]
    parent: int | None


@dataclass(frozen=True, slots=True)
class Workload:
    """``asked``: the prompts that are asked for."""

    events: list[Event]
    asked: list[array[int]]
    unique: int


def workload(workers: int, blocks: int, hot: bool = False) -> Workload:
    generator = Random(1)
    events: list[Event] = []
    prompts: list[array[int]] = []
    unique = 0
    while unique < blocks:
        first = len(prompts)
        unique += family(generator, workers, events, prompts)
        if hot and first == 0:
            root = prompts[0][:ROOT_BLOCKS]
            for worker in generator.sample(range(workers), int(workers * HOT_SHARE)):
                events += told(worker, root, None)
    return Workload(events, prompts[: len(BRANCHES)] if hot else prompts, unique)


def family(generator: Random, workers: int, events: list[Event], prompts: list[array[int]]) -> int:
    """Adds one; returns how many blocks it has."""
    root, rooted = hashes(generator, ROOT_BLOCKS), set()
    for length in BRANCHES:
        branch = hashes(generator, length)
        prompts.append(root + branch)
        replicas = 1
        while generator.random() < 0.44 and replicas < workers:
            replicas += 1
        for number, worker in enumerate(generator.sample(range(workers), replicas)):
            if worker not in rooted:
                events += told(worker, root, None)
                rooted.add(worker)
            kept = length if not number or generator.random() < 0.5 else generator.randrange(1, length)
            events += told(worker, branch[:kept], root[-1])
    return ROOT_BLOCKS + sum(BRANCHES)


def hashes(generator: Random, count: int) -> array[int]:
    """Below 2 ** 63: not everybody takes larger ones."""
    made = array("Q", generator.randbytes(8 * count))
    return array("Q", [value >> 1 for value in made])


def told(worker: int, run: array[int], parent: int | None) -> list[Event]:
    return [
        Event(worker, run[at : at + EVENT_BLOCKS], run[at - 1] if at else parent)
        for at in range(0, len(run), EVENT_BLOCKS)
    ]


def queries_of(load: Workload, length: int, overlap: float, count: int) -> list[array[int]]:
    """Prompts of which the first ``overlap`` is known, and the rest is nobody's."""
    generator = Random(length)
    long_enough = [prompt for prompt in load.asked if len(prompt) >= length]
    known = int(length * overlap)
    return [generator.choice(long_enough)[:known] + hashes(generator, length - known) for _ in range(count)]
