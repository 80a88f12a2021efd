"""Does the index grow when everything in it changes for long? What bench_index.py --churn does.

64 workers hold 8,000 blocks each: branches of 16 to 1,024 behind shared roots. Each turn a worker stores a
new one and loses its oldest ones, tail first, as an engine does; now and then a root is replaced
everywhere, and a worker starts anew; every turn is asked about. What is held stays as much as it was, so
should the memory.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from kvcache.index import Index, make_index

WORKERS, WORKER_BLOCKS, ROOTS, ROOT_BLOCKS = 64, 8_000, 32, 256
RESTART, REPLACE = 0.0005, 0.002
SAMPLES = 60


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    rss_bytes: int
    index_bytes: int
    members: int
    stored: int


@dataclass(slots=True)
class Worker:
    holder: int
    count: int = 0
    roots: set[int] = field(default_factory=set)
    branches: deque[array[int]] = field(default_factory=deque)


class Churn:
    def __init__(self, index: Index, seed: int = 1) -> None:
        self.index = index
        self.stored = 0
        self._generator = Random(seed)
        self._roots = [self._hashes(ROOT_BLOCKS) for _ in range(ROOTS)]
        self._workers = [Worker(index.open(number)) for number in range(WORKERS)]

    def turn(self) -> None:
        generator = self._generator
        chance = generator.random()
        if chance < RESTART:
            number = generator.randrange(WORKERS)
            self._workers[number] = Worker(self.index.open(number))
        elif chance < RESTART + REPLACE:
            self._replace(generator.randrange(ROOTS))
        worker = generator.choice(self._workers)
        root = generator.randrange(ROOTS)
        if root not in worker.roots:
            worker.roots.add(root)
            assert self.index.store(worker.holder, 0, self._roots[root]) == 0
        branch = self._hashes(generator.randrange(16, 1025))
        assert self.index.store(worker.holder, 0, branch, self._roots[root][-1]) == 0
        worker.branches.append(branch)
        worker.count += len(branch)
        self.stored += len(branch)
        self._shrink(worker)
        found = self.index.match(self._roots[root] + branch)
        assert max(found.blocks) == ROOT_BLOCKS + len(branch)

    def _shrink(self, worker: Worker) -> None:
        while worker.count > WORKER_BLOCKS:
            branch = worker.branches.popleft()
            worker.count -= len(branch)
            half = len(branch) // 2
            for part in (branch[half:], branch[:half]):
                assert self.index.remove(worker.holder, 0, part[::-1]) == len(part)

    def _replace(self, root: int) -> None:
        for worker in self._workers:
            if root in worker.roots:
                worker.roots.remove(root)
                self.index.remove(worker.holder, 0, self._roots[root][::-1])
        self._roots[root] = self._hashes(ROOT_BLOCKS)

    def _hashes(self, count: int) -> array[int]:
        return array("Q", self._generator.randbytes(8 * count))


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def churn(seconds: float) -> list[Sample]:
    """How it was at equal distances, the first one when everybody was full."""
    made = Churn(make_index(1 << 34))
    while made.stored < 4 * WORKERS * WORKER_BLOCKS:
        made.turn()
    samples: list[Sample] = []
    start, before = time.monotonic(), made.stored
    for number in range(SAMPLES + 1):
        while time.monotonic() - start < seconds * number / SAMPLES:
            made.turn()
        gc.collect()
        members = made.index.stats()["members"]
        spent = time.monotonic() - start
        samples.append(Sample(spent, rss_bytes(), made.index.bytes, members, made.stored - before))
    made.index.check()
    return samples
