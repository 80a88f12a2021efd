"""One simulated worker: a queue, a prompt being computed, requests being decoded, and its caches.

    submit ──► queue ──start──► prefill ──► running (a slot each) ──► over
                 ▲ one prompt at a time; waits for a slot and for room in the cache

All running requests take each step of decode together, so what is kept is how many steps were made, and for
each request at which step it ends: whoever joins or leaves changes how long a step takes, and nobody else's
end has to be found anew. A worker decides and returns; ``kvcache.simulation.run`` keeps the clock.

Invariants: the room of its cache is never exceeded; a request is in one place at most; times never go back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from kvcache.simulation.cache import BlockCache
from kvcache.simulation.service import Service
from kvcache.simulation.workload import Job

HBM, HOST = 0, 1
_STEPS = 1e-6
"""Ends that are so close count as one: sums of floating point are not exact."""


@dataclass(slots=True)
class Told:
    """What a worker tells of its caches, in order: blocks by tier."""

    removed: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    stored: list[tuple[int, Sequence[int], int]] = field(default_factory=list)
    """Tier, blocks of one prefix, and how many blocks are before them."""
    job: Job | None = None

    def __bool__(self) -> bool:
        return bool(self.removed or self.stored)


class Worker:
    def __init__(
        self, number: int, service: Service, block_tokens: int, cache: BlockCache, host: BlockCache | None
    ) -> None:
        """``host``: a slower, larger tier that takes a copy of everything; loads from it take their time."""
        self.number = number
        self.up = True
        self.cache = cache
        self.host = host
        self.busy_s = 0.0
        self.prefill_until_s = 0.0
        self._service = service
        self._block_tokens = block_tokens
        self._queue: deque[Job] = deque()
        self._prefill: Job | None = None
        self._hit_hbm = 0
        self._chunk_s = 0.0
        self._running: list[tuple[float, int, Job]] = []
        self._context_tokens = 0
        self._steps = 0.0
        self._steps_at_s = 0.0
        self._step_s = service.decode_s(0, 0)
        self._prefill_s = 0.0

    def match(self, path: Sequence[int]) -> int:
        """How many leading blocks it could use now, in whatever tier."""
        hit = self.cache.match(path)
        if self.host is not None and hit < len(path):
            return max(hit, self.host.match(path))
        return hit

    def waiting(self) -> Sequence[Job]:
        """Those whose prompt is not being computed yet, in order."""
        return self._queue

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    # --- prefill ---------------------------------------------------------------------------

    def start(self, now_s: float, told: Told) -> float | None:
        """Begin with the next prompt, if there is one and it may begin: when it will be computed, or None."""
        if not self._queue or self._prefill is not None or len(self._running) >= self._service.slots:
            return None
        job = self._queue[0]
        hbm = self.cache.match(job.path)
        gone = self.cache.begin(job.path, hbm, job.answer_blocks, now_s)
        if gone is None:
            return None
        if gone:
            told.removed.append((HBM, gone))
        self._queue.popleft()
        self._count(now_s)
        self._prefill, self._hit_hbm = job, hbm
        job.hit = max(hbm, self.host.match(job.path)) if self.host is not None else hbm
        job.loaded = job.hit - hbm
        self._prefill_s = self._duration_s(job)
        self.prefill_until_s = now_s + self._prefill_s
        self._pace()
        return self.prefill_until_s

    def _duration_s(self, job: Job) -> float:
        service, block = self._service, self._block_tokens
        cached = min(job.hit * block, job.prompt_tokens - 1)
        alone_s = service.prefill_s(job.prompt_tokens, cached, job.loaded * block)
        chunks = service.chunks(job.prompt_tokens, cached)
        self._chunk_s = alone_s / chunks
        between_s = service.decode_s(len(self._running), self._context_tokens) if self._running else 0.0
        return alone_s + chunks * between_s

    def computed(self, now_s: float, told: Told) -> Job:
        """The prompt is computed: its first token is there. REQUIRES: ``start`` said so."""
        job = self._prefill
        assert job is not None
        self._count(now_s)
        self._prefill = None
        self.busy_s += self._prefill_s
        if new := self.cache.commit(job.path, self._hit_hbm, now_s):
            told.stored.append((HBM, new, self._hit_hbm))
        if self.host is not None:
            self._keep_in_host(job, now_s, told)
        if job.answer_tokens > 1:
            heappush(self._running, (self._steps + job.answer_tokens - 1, job.number, job))
            self._context_tokens += job.prompt_tokens + job.answer_tokens // 2
        else:
            self._finish(job)
        told.job = job
        self._pace()
        return job

    def _keep_in_host(self, job: Job, now_s: float, told: Told) -> None:
        """Host memory takes a copy of all that was computed or used."""
        assert self.host is not None
        hit = self.host.match(job.path)
        gone = self.host.begin(job.path, hit, 0, now_s)
        assert gone is not None, "nothing in the host tier stays in use"
        if gone:
            told.removed.append((HOST, gone))
        if new := self.host.commit(job.path, hit, now_s):
            told.stored.append((HOST, new, hit))
        self.host.finish(job.path, 0)

    # --- decode ----------------------------------------------------------------------------

    def next_end_s(self) -> float | None:
        """When the next running request will be over, as things are."""
        if not self._running:
            return None
        return self._steps_at_s + max(0.0, self._running[0][0] - self._steps) * self._step_s

    def ended(self, now_s: float) -> list[Job]:
        """Those that are over by now."""
        self._count(now_s)
        over: list[Job] = []
        while self._running and self._running[0][0] <= self._steps + _STEPS:
            job = heappop(self._running)[2]
            self._context_tokens -= job.prompt_tokens + job.answer_tokens // 2
            self._finish(job)
            over.append(job)
        self._pace()
        return over

    def _finish(self, job: Job) -> None:
        self.cache.finish(job.path, job.answer_blocks)

    def _count(self, now_s: float) -> None:
        """The steps that were made until now."""
        if self._running:
            self._steps += (now_s - self._steps_at_s) / self._step_s
        self._steps_at_s = now_s

    def _pace(self) -> None:
        """How long a step takes from now on. REQUIRES: ``_count`` was called."""
        self._step_s = self._service.decode_s(len(self._running), self._context_tokens)
        if self._prefill is not None:
            self._step_s += self._chunk_s

    # --- failure ---------------------------------------------------------------------------

    def kill(self, now_s: float) -> list[Job]:
        """It is down, and has lost all: the requests that somebody else must serve now."""
        lost = [job for _, _, job in sorted(self._running)]
        lost += [self._prefill] if self._prefill is not None else []
        lost += self._queue
        self.up = False
        self._running.clear()
        self._queue.clear()
        self._prefill = None
        self._context_tokens = 0
        self._steps_at_s = now_s
        self.prefill_until_s = now_s
        self.cache.clear()
        if self.host is not None:
            self.host.clear()
        self._pace()
        return lost

    def check(self) -> None:
        self.cache.check()
        if self.host is not None:
            self.host.check()
        places = [job.number for _, _, job in self._running] + [job.number for job in self._queue]
        places += [self._prefill.number] if self._prefill is not None else []
        assert len(places) == len(set(places))
        assert len(self._running) <= self._service.slots
