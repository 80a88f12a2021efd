"""Ways of routing that look at what workers hold: by an exact index, or by what was routed where before.

| router | what is cached | what a worker costs |
| --- | --- | --- |
| ``approximate`` | a tree of what was routed there in the last 120 s | as ``exact-default`` |
| ``exact-default`` | the index | prompt tokens to compute there, in blocks, + blocks of all requests there |
| ``exact`` | the index, and what waits there or is not told of yet | ``kvcache.routing``, its weights |
| ``oracle`` | the truth, and what will be there by then | seconds until the first token, as it really is |

The cost of the first two is the documented one of NVIDIA Dynamo with its default weights: one for either sum,
where both count what is there already and what this request adds; blocks that requests share count once.
``oracle`` is greedy: it has no equal for one request, and can be beaten over many.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.clock import NS_PER_S
from kvcache.locality import PLACE_NS
from kvcache.routing.backlog import Backlog
from kvcache.routing.choose import Chooser
from kvcache.routing.cost import Candidate
from kvcache.routing.weights import Weights
from kvcache.simulation.cache import leading
from kvcache.simulation.feed import Feed
from kvcache.simulation.routers import Router
from kvcache.simulation.service import Service
from kvcache.simulation.worker import HBM, Worker
from kvcache.simulation.workload import Job

TTL_S = 120.0
PLACE_S = PLACE_NS / NS_PER_S
_SWEEP_BLOCKS = 1 << 16


class Active:
    """The blocks of the requests that are at one worker, shared ones once."""

    def __init__(self) -> None:
        self.users: dict[int, int] = {}

    def add(self, path: Sequence[int]) -> None:
        users = self.users
        for block in path:
            users[block] = users.get(block, 0) + 1

    def remove(self, path: Sequence[int]) -> None:
        users = self.users
        for block in path:
            left = users[block] - 1
            if left:
                users[block] = left
            else:
                del users[block]

    def leading(self, path: Sequence[int]) -> int:
        return leading(self.users, path)


class _Counting(Router):
    """Keeps ``Active`` of each worker."""

    def __init__(self, worker_count: int, block_tokens: int) -> None:
        super().__init__(worker_count, block_tokens)
        self.active = [Active() for _ in self.loads]

    def routed(self, job: Job, now_s: float) -> None:
        super().routed(job, now_s)
        self.active[job.worker].add(job.path)

    def finished(self, job: Job, now_s: float) -> None:
        super().finished(job, now_s)
        self.active[job.worker].remove(job.path)

    def lost(self, worker: int) -> None:
        super().lost(worker)
        self.active[worker] = Active()


class _DefaultCost(_Counting):
    """Prefill blocks + decode blocks, each as they would be with this request."""

    def cheapest(self, job: Job, alive: Sequence[int], cached: Sequence[int]) -> int:
        block = self.block_tokens
        best, best_cost, best_blocks = -1, 0.0, 0
        for worker in alive:
            computed = job.prompt_tokens - cached[worker] * block
            prefill = (self.loads[worker].waiting_tokens + max(0, computed)) / block
            active = self.active[worker]
            blocks = len(active.users) + len(job.path) - active.leading(job.path)
            cost = prefill + blocks
            if best < 0 or (cost, blocks) < (best_cost, best_blocks):
                best, best_cost, best_blocks = worker, cost, blocks
        job.credited = cached[best]
        job.expected_tokens = max(1, job.prompt_tokens - cached[best] * block)
        return best


class Approximate(_DefaultCost):
    name = "approximate"

    def __init__(self, worker_count: int, block_tokens: int) -> None:
        super().__init__(worker_count, block_tokens)
        self._until_s: list[dict[int, float]] = [{} for _ in self.loads]

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        cached = [0] * len(self.loads)
        for worker in alive:
            cached[worker] = _live(self._until_s[worker], job.path, now_s)
        return self.cheapest(job, alive, cached)

    def routed(self, job: Job, now_s: float) -> None:
        super().routed(job, now_s)
        until = self._until_s[job.worker]
        until.update(dict.fromkeys(job.path, now_s + TTL_S))
        _sweep(until, now_s)


def _live(until: dict[int, float], path: Sequence[int], now_s: float) -> int:
    """How many leading blocks are believed to be there: no block lasts longer than those before it."""
    high = leading(until, path)
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if until[path[middle - 1]] > now_s:
            low = middle
        else:
            high = middle - 1
    return low


def _sweep(until: dict[int, float], now_s: float) -> None:
    """Drop what is over, now and then."""
    if len(until) > _SWEEP_BLOCKS:
        for block in [block for block, until_s in until.items() if until_s <= now_s]:
            del until[block]


class ExactDefault(_DefaultCost):
    name = "exact-default"

    def __init__(self, worker_count: int, block_tokens: int, feed: Feed) -> None:
        super().__init__(worker_count, block_tokens)
        self._feed = feed

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        cached = [0] * len(self.loads)
        match = self._feed.match(job.names)
        for worker, blocks in zip(match.workers, match.blocks, strict=True):
            cached[worker] = blocks
        return self.cheapest(job, alive, cached)


class Exact(Router):
    """``kvcache.routing``: what ``kvcache route`` does."""

    name = "exact"

    def __init__(
        self, worker_count: int, block_tokens: int, feed: Feed, weights: Weights, capacity: int, seed: int
    ) -> None:
        super().__init__(worker_count, block_tokens)
        self._feed = feed
        self._capacity = capacity
        self._chooser = Chooser(weights, seed)
        self._names = [str(worker) for worker in range(worker_count)]
        self._waiting = [Active() for _ in self.loads]
        self._backlogs = [Backlog() for _ in self.loads]
        self._placed_s: list[dict[int, float]] = [{} for _ in self.loads]
        feed.removed = self._removed

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        cached = [(0, 0)] * len(self.loads)
        match = self._feed.match(job.names)
        for worker, blocks, hbm in zip(match.workers, match.blocks, match.tier(HBM), strict=True):
            cached[worker] = (blocks, hbm)
        candidates = [self._candidate(job, worker, *cached[worker], now_s) for worker in alive]
        session = str(job.session) if job.session >= 0 else ""
        choice = self._chooser.choose(job.prompt_tokens, candidates, session)
        chosen = int(choice.worker)
        candidate = next(each for each in candidates if each.worker == choice.worker)
        job.credited = cached[chosen][0]
        job.expected_tokens = max(1, job.prompt_tokens - sum(candidate.cached) - candidate.placed)
        return chosen

    def _candidate(self, job: Job, worker: int, blocks: int, hbm: int, now_s: float) -> Candidate:
        load, block = self.loads[worker], self.block_tokens
        return Candidate(
            self._names[worker],
            (hbm * block, (blocks - hbm) * block, 0),
            self._placed(job.path, worker, blocks, now_s) * block,
            self._feed.suspect[worker],
            0.0,
            load.waiting_tokens,
            load.decoding,
            load.waiting,
            load.decoding_tokens,
            max(0.0, 1.0 - load.blocks / self._capacity),
            self._backlogs[worker].left(_ns(now_s)),
        )

    def _placed(self, path: Sequence[int], worker: int, blocks: int, now_s: float) -> int:
        """How many blocks behind the cached ones wait there to be computed, or were so lately."""
        placed, end = self._placed_s[worker], max(blocks, self._waiting[worker].leading(path))
        while end < len(path) and placed.get(path[end], 0.0) > now_s:
            end += 1
        return end - blocks

    def routed(self, job: Job, now_s: float) -> None:
        super().routed(job, now_s)
        self._waiting[job.worker].add(job.path)
        self._backlogs[job.worker].begin(job.number, job.expected_tokens, job.prompt_tokens, _ns(now_s))

    def first_token(self, job: Job, now_s: float) -> None:
        """Its blocks are there; until the worker has told so, they are taken to be."""
        super().first_token(job, now_s)
        self._waiting[job.worker].remove(job.path)
        self._backlogs[job.worker].first_token(job.number, _ns(now_s))
        placed = self._placed_s[job.worker]
        until_s = (now_s // PLACE_S + 2) * PLACE_S  # To the end of the next turn: ``locality_placed``.
        placed.update(dict.fromkeys(job.path[job.credited :], until_s))
        _sweep(placed, now_s)

    def _removed(self, worker: int, blocks: Sequence[int]) -> None:
        """The worker told that it has these no more, so they are not on their way either."""
        placed = self._placed_s[worker]
        for block in blocks:
            placed.pop(block, None)

    def lost(self, worker: int) -> None:
        super().lost(worker)
        self._waiting[worker] = Active()
        self._backlogs[worker] = Backlog()
        self._placed_s[worker] = {}


def _ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)


class Oracle(_Counting):
    name = "oracle"

    def __init__(self, block_tokens: int, workers: Sequence[Worker], service: Service) -> None:
        super().__init__(len(workers), block_tokens)
        self._workers = workers
        self._service = service

    def choose(self, job: Job, alive: Sequence[int], now_s: float) -> int:
        best, best_s, best_own_s, best_cached = -1, 0.0, 0.0, 0
        for number in alive:
            worker = self._workers[number]
            cached = max(worker.match(job.path), self.active[number].leading(job.path))
            own_s = self._service.prefill_s(
                job.prompt_tokens, min(cached * self.block_tokens, job.prompt_tokens - 1), 0
            )
            queued_s = sum(each.expected_s for each in worker.waiting())
            total_s = max(0.0, worker.prefill_until_s - now_s) + queued_s + own_s
            if best < 0 or total_s < best_s:
                best, best_s, best_own_s, best_cached = number, total_s, own_s, cached
        job.expected_s = best_own_s
        job.expected_tokens = max(1, job.prompt_tokens - best_cached * self.block_tokens)
        return best
