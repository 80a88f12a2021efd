"""Ways of routing that do not look at what workers hold: by chance, in turn, by load, by what the prompt is.

Every router sees the same of the load, and at once: it sent the requests itself, and the answers come back
through it. What it takes a prompt to cost is its own estimate.

    routed: waiting, with the tokens it should have to compute ──first token──► decoding ──► over
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from kvcache.simulation.workload import Job

STICKY_TOKENS = 2_048
"""How much of a prompt's start stands for the whole of it: the blocks that these tokens fill, or one."""


@dataclass(slots=True)
class Load:
    """What a router has sent to a worker and has not got back."""

    waiting: int = 0
    waiting_tokens: int = 0
    decoding: int = 0
    decoding_tokens: int = 0
    blocks: int = 0

    @property
    def requests(self) -> int:
        return self.waiting + self.decoding


class Router:
    """Chooses a worker for each job, and is told what becomes of it. REQUIRES: a choice among ``alive``."""

    name = ""

    def __init__(self, worker_count: int, block_tokens: int) -> None:
        self.loads = [Load() for _ in range(worker_count)]
        self.block_tokens = block_tokens

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        """The number of a worker. Where the router looks at what is cached, ``job.credited`` is what it takes
        that worker to have; ``job.expected_tokens`` is what it takes it to have to compute."""
        raise NotImplementedError

    def routed(self, job: Job, now_s: float) -> None:
        load = self.loads[job.worker]
        load.waiting += 1
        load.waiting_tokens += job.expected_tokens
        load.blocks += len(job.path) + job.answer_blocks

    def first_token(self, job: Job, now_s: float) -> None:
        load = self.loads[job.worker]
        load.waiting -= 1
        load.waiting_tokens -= job.expected_tokens
        load.decoding += 1
        load.decoding_tokens += job.prompt_tokens

    def finished(self, job: Job, now_s: float) -> None:
        load = self.loads[job.worker]
        load.decoding -= 1
        load.decoding_tokens -= job.prompt_tokens
        load.blocks -= len(job.path) + job.answer_blocks

    def lost(self, worker: int) -> None:
        """It is down: all that was sent there comes again."""
        self.loads[worker] = Load()


class RandomChoice(Router):
    name = "random"

    def __init__(self, worker_count: int, block_tokens: int, seed: int) -> None:
        super().__init__(worker_count, block_tokens)
        self._random = Random(seed)

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        job.expected_tokens = job.prompt_tokens
        return self._random.choice(alive)


class RoundRobin(Router):
    name = "round-robin"
    _turn = -1

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        job.expected_tokens = job.prompt_tokens
        self._turn += 1
        return alive[self._turn % len(alive)]


class LeastLoaded(Router):
    """The fewest requests; among equals the fewest tokens of prompts that wait."""

    name = "least-loaded"

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        job.expected_tokens = job.prompt_tokens
        return self.least(alive)

    def least(self, alive: Sequence[int]) -> int:
        loads = self.loads
        return min(alive, key=lambda worker: (loads[worker].requests, loads[worker].waiting_tokens))


class StickyPrefix(Router):
    """The hash of a prompt's start says where it goes; while that worker is down, the next one."""

    name = "sticky-prefix"

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        job.expected_tokens = job.prompt_tokens
        home = start_of(job, self.block_tokens) % len(self.loads)
        return next((worker for worker in alive if worker >= home), alive[0])


class StickySession(LeastLoaded):
    """Where its session is; a new one goes where the fewest requests are. Where a trace does not know
    sessions, a prompt's start stands for one."""

    name = "sticky-session"

    def __init__(self, worker_count: int, block_tokens: int) -> None:
        super().__init__(worker_count, block_tokens)
        self._homes: dict[int, int] = {}

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        job.expected_tokens = job.prompt_tokens
        session = job.session if job.session >= 0 else ~start_of(job, self.block_tokens)
        home = self._homes.get(session, -1)
        if home not in alive:
            home = self._homes[session] = self.least(alive)
        return home


def start_of(job: Job, block_tokens: int) -> int:
    """A number for the start of its prompt. A prompt without a whole block has one of its own."""
    if not job.path:
        return job.number
    return job.names[min(max(1, STICKY_TOKENS // block_tokens), len(job.path)) - 1]
