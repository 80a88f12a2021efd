"""How the index learns what workers hold: batches that come late, get lost, and are asked for again.

    worker ──batch, numbered──► delay ──► index      (lost with a given chance)
             a number is missing, or a beat tells one ──► suspect: nothing more is taken
             ──resync_s──► the worker's content as of then ──delay──► loaded beside, then served
    restart ──► the worker's first batch has a new incarnation ──delay──► all it had is forgotten

It is what ``kvcache.locality`` does with a node's stream, over the same structure (``kvcache.index``). Left
out are digests (nothing here drifts but by loss), leases (a router sees at once that a worker is down) and
the replay ring (a gap always costs a snapshot).

Invariant: with no delay, no loss and no restart, the index is exactly what the workers hold.

The sum: 1 us a batch and 0.1 us a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from kvcache.index import Match, make_index
from kvcache.simulation.worker import HBM, HOST, Told, Worker

BEAT_S = 1.0
INDEX_BYTES_MAX = 1 << 30

Removed = Callable[[int, Sequence[int]], None]
"""A worker, and what it told that it has no more."""
Later = Callable[[float, Callable[[float], None]], None]
"""``later(at_s, action)``: call ``action`` with the time when it is ``at_s``; at once where that is now."""


@dataclass(frozen=True, slots=True)
class Stream:
    """How events travel. ``loss``: the chance that a batch gets lost, 0 to 1."""

    delay_s: float = 1e-4
    loss: float = 0.0
    resync_s: float = 0.2


class Feed:
    """Holds the index. One worker's batches arrive in the order in which they were told."""

    def __init__(
        self, workers: Sequence[Worker], block_names: array[int], stream: Stream, seed: int, later: Later
    ) -> None:
        self.index = make_index(INDEX_BYTES_MAX)
        self.suspect = [False] * len(workers)
        self.refused_blocks = 0
        self.lost_batches = 0
        self.resyncs = 0
        self.removed: Removed = lambda worker, blocks: None
        self._workers = workers
        self._block_names = block_names
        self._stream = stream
        self._random = Random(seed)
        self._later = later
        self._holders = [self.index.open(worker.number) for worker in workers]
        self._told = [0] * len(workers)  # The number of the last batch that the worker told.
        self._heard = [0] * len(workers)  # Of the last one that was taken.
        self._lives = [0] * len(workers)
        self._beat_set = [False] * len(workers)

    def match(self, names: array[int]) -> Match:
        return self.index.match(names)

    def held(self, worker: int, tier: int) -> memoryview:
        """The names of what the index takes this worker to hold there."""
        return self.index.held(self._holders[worker], tier)

    def tell(self, worker: Worker, told: Told, now_s: float) -> None:
        """The worker has done this. REQUIRES: ``told`` says something."""
        at = worker.number
        self._told[at] += 1
        number, life = self._told[at], self._lives[at]
        if self._stream.loss and self._random.random() < self._stream.loss:
            self.lost_batches += 1
            self._expect_beat(at, now_s)
            return
        self._later(now_s + self._stream.delay_s, lambda then_s: self._take(at, life, number, told, then_s))

    def restarted(self, worker: Worker, now_s: float) -> None:
        """It serves again, and has nothing."""
        at = worker.number
        self._lives[at] += 1
        self._told[at] = 0
        life = self._lives[at]
        self._later(now_s + self._stream.delay_s, lambda then_s: self._forget(at, life))

    # --- arriving --------------------------------------------------------------------------

    def _take(self, at: int, life: int, number: int, told: Told, now_s: float) -> None:
        if life != self._lives[at] or self.suspect[at] or number <= self._heard[at]:
            return
        if number != self._heard[at] + 1:
            self._lose(at, now_s)
            return
        self._heard[at] = number
        for tier, blocks in told.removed:
            self.index.remove(self._holders[at], tier, self._names_of(blocks))
            self.removed(at, blocks)
        if told.job is None:
            assert not told.stored
            return
        names = told.job.names
        for tier, blocks, before in told.stored:
            parent = names[before - 1] if before else None
            run = names[before : before + len(blocks)]
            self.refused_blocks += self.index.store(self._holders[at], tier, run, parent)

    def _expect_beat(self, at: int, now_s: float) -> None:
        """The next beat tells the number of the last batch, so a lost one is noticed even if none follows."""
        if self._beat_set[at]:
            return
        self._beat_set[at] = True
        beat_s = (int(now_s / BEAT_S) + 1) * BEAT_S
        life = self._lives[at]

        def told(then_s: float) -> None:
            self._beat_set[at] = False
            number = self._told[at]
            self._later(then_s + self._stream.delay_s, lambda heard_s: beat(number, heard_s))

        def beat(number: int, heard_s: float) -> None:
            if life == self._lives[at] and not self.suspect[at] and number > self._heard[at]:
                self._lose(at, heard_s)

        self._later(beat_s, told)

    def _forget(self, at: int, life: int) -> None:
        if life == self._lives[at]:
            self._holders[at] = self.index.open(at)
            self._heard[at] = 0
            self.suspect[at] = False

    # --- a snapshot ------------------------------------------------------------------------

    def _lose(self, at: int, now_s: float) -> None:
        self.suspect[at] = True
        life = self._lives[at]
        self._later(now_s + self._stream.resync_s, lambda then_s: self._ask(at, life, then_s))

    def _ask(self, at: int, life: int, now_s: float) -> None:
        if life != self._lives[at]:
            return
        worker, number = self._workers[at], self._told[at]
        content = [(HBM, self._names_of(worker.cache.content()))]
        if worker.host is not None:
            content.append((HOST, self._names_of(worker.host.content())))
        self._later(now_s + self._stream.delay_s, lambda _: self._load(at, life, number, content))

    def _load(self, at: int, life: int, number: int, content: Sequence[tuple[int, array[int]]]) -> None:
        if life != self._lives[at]:
            return
        shadow = self.index.open_shadow(at)
        for tier, names in content:
            self.refused_blocks += self.index.store_loose(shadow, tier, names)
        self.index.serve(shadow)
        self._holders[at] = shadow
        self._heard[at] = number
        self.suspect[at] = False
        self.resyncs += 1

    def _names_of(self, blocks: Sequence[int]) -> array[int]:
        names = self._block_names
        return array("Q", [names[block] for block in blocks])
