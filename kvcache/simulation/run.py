"""One run: a workload, workers, a router, and a clock that jumps from event to event.

    arrivals (from the workload, in order) ─┐
    computed, ended, restart, up, feed ─────┴─► the earliest next; at equal times, events before arrivals

Everything is decided by the seed, so the same settings give the same figures on every machine; only how fast
the router chose is measured, and kept apart.

The sum: 100 to 300 us a request, most of it the router's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from random import Random
from time import perf_counter

from kvcache.errors import BadInput
from kvcache.routing.weights import Weights
from kvcache.simulation.aware import Approximate, Exact, ExactDefault, Oracle
from kvcache.simulation.cache import BlockCache, TailLru
from kvcache.simulation.feed import Feed, Stream
from kvcache.simulation.policy_cache import PolicyCache, depths
from kvcache.simulation.routers import (
    LeastLoaded,
    RandomChoice,
    RoundRobin,
    Router,
    StickyPrefix,
    StickySession,
)
from kvcache.simulation.service import Service
from kvcache.simulation.worker import Told, Worker
from kvcache.simulation.workload import Job, Workload

ROUTERS = (
    "random",
    "round-robin",
    "least-loaded",
    "sticky-prefix",
    "sticky-session",
    "approximate",
    "exact-default",
    "exact",
    "oracle",
)
OURS = "exact"
WORKERS_MAX = 4_096
TAIL_LRU = "tail-lru"
_FED = ("exact-default", "exact")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is simulated. ``capacity`` and ``host_blocks`` are blocks a worker; no host tier with 0.
    RAISES BadInput (bad_config)."""

    workers: int = 16
    capacity: int = 2_048
    host_blocks: int = 0
    policy: str = TAIL_LRU
    stream: Stream = field(default_factory=Stream)
    restarts: int = 0
    down_s: float = 10.0
    seed: int = 1
    service: Service = field(default_factory=Service)
    weights: Weights = field(default_factory=Weights)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("workers", 1, WORKERS_MAX),
            ("capacity", 1, 1 << 24),
            ("host_blocks", 0, 1 << 24),
            ("restarts", 0, 10_000),
            ("down_s", 0, 86_400),
        ):
            if not low <= getattr(self, name) <= high:
                raise BadInput("bad_config", f"{name} {getattr(self, name)}", f"{low} to {high} is possible")
        if not 0 <= self.stream.delay_s <= 86_400:
            raise BadInput("bad_config", f"delay {self.stream.delay_s} s", "0 s to a day is possible")
        if not 0 <= self.stream.loss <= 1:
            raise BadInput("bad_config", f"loss {self.stream.loss}", "0 to 100 % is possible")


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it: every job, and what the workers did. ``choose_s``: what all choices took, really."""

    router: str
    jobs: Sequence[Job]
    busy_s: Sequence[float]
    choices: int
    choose_s: float
    lost_batches: int
    resyncs: int
    refused_blocks: int


def simulate(
    workload: Workload,
    router: str,
    settings: Settings,
    progress: Callable[[int], None] | None = None,
    check: bool = False,
) -> Run:
    """Replay it all. ``progress`` is told the number of requests that arrived, now and then; ``check``
    asserts every invariant at every event. RAISES BadInput (bad_config)."""
    return Simulation(workload, router, settings, check).run(progress)


class Simulation:
    def __init__(self, workload: Workload, router: str, settings: Settings, check: bool = False) -> None:
        if router not in ROUTERS:
            raise BadInput("bad_config", f"no router is called {router!r}", f"there are {', '.join(ROUTERS)}")
        _check_room(workload, settings)
        self._settings = settings
        self._workload = workload
        self._jobs = workload.jobs()
        self._check = check
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = 0
        self._now_s = 0.0
        self._make_cache = _cache_maker(workload, settings)
        self.workers = [self._worker(number) for number in range(settings.workers)]
        self._alive = list(range(settings.workers))
        self._versions = [0] * settings.workers
        self._lives = [0] * settings.workers
        self.feed: Feed | None = None
        if router in _FED:
            self.feed = Feed(self.workers, workload.block_names, settings.stream, settings.seed, self._later)
        self.router = self._make_router(router)
        self._held: list[Job] = []  # They arrived while all workers were down.
        self._choices = 0
        self._choose_s = 0.0
        self._plan_restarts()

    def run(self, progress: Callable[[int], None] | None = None) -> Run:
        heap = self._heap
        for number, job in enumerate(self._jobs):
            while heap and heap[0][0] <= job.arrival_s:
                self._step()
            self._now_s = job.arrival_s
            self._arrive(job, job.arrival_s)
            if progress is not None and number % 256 == 0:
                progress(number)
        while heap:
            self._step()
        if progress is not None:
            progress(len(self._jobs))
        feed = self.feed
        return Run(
            router=self.router.name,
            jobs=self._jobs,
            busy_s=[worker.busy_s for worker in self.workers],
            choices=self._choices,
            choose_s=self._choose_s,
            lost_batches=feed.lost_batches if feed else 0,
            resyncs=feed.resyncs if feed else 0,
            refused_blocks=feed.refused_blocks if feed else 0,
        )

    # --- making ----------------------------------------------------------------------------

    def _worker(self, number: int) -> Worker:
        settings = self._settings
        host = TailLru(settings.host_blocks) if settings.host_blocks else None
        return Worker(number, settings.service, self._workload.block_tokens, self._make_cache(), host)

    def _make_router(self, name: str) -> Router:
        settings, block = self._settings, self._workload.block_tokens
        count = settings.workers
        if name == "random":
            return RandomChoice(count, block, settings.seed)
        if name == "oracle":
            return Oracle(block, self.workers, settings.service)
        if self.feed is not None:
            if name == "exact":
                return Exact(count, block, self.feed, settings.weights, settings.capacity, settings.seed)
            return ExactDefault(count, block, self.feed)
        for kind in (RoundRobin, LeastLoaded, StickyPrefix, StickySession, Approximate):
            if kind.name == name:
                return kind(count, block)
        raise AssertionError(name)

    def _plan_restarts(self) -> None:
        random = Random(self._settings.seed + 1)
        for _ in range(self._settings.restarts):
            worker = random.randrange(self._settings.workers)
            self._at(random.random() * self._workload.span_s, partial(self._kill, worker))

    # --- time ------------------------------------------------------------------------------

    def _at(self, at_s: float, action: Callable[[float], None]) -> None:
        self._order += 1
        heappush(self._heap, (at_s, self._order, action))

    def _later(self, at_s: float, action: Callable[[float], None]) -> None:
        """As ``_at``, but what is due happens before this returns."""
        if at_s <= self._now_s:
            action(self._now_s)
        else:
            self._at(at_s, action)

    def _step(self) -> None:
        at_s, _, action = heappop(self._heap)
        self._now_s = at_s
        action(at_s)
        if self._check:
            for worker in self.workers:
                worker.check()

    # --- events ----------------------------------------------------------------------------

    def _arrive(self, job: Job, now_s: float) -> None:
        """Also one that comes again, as its worker went down."""
        if not self._alive:
            self._held.append(job)
            return
        began_s = perf_counter()
        job.worker = self.router.choose(job, self._alive, now_s)
        self._choose_s += perf_counter() - began_s
        self._choices += 1
        worker = self.workers[job.worker]
        job.truth = worker.match(job.path)
        self.router.routed(job, now_s)
        worker.submit(job)
        self._start(worker, now_s)

    def _start(self, worker: Worker, now_s: float) -> None:
        told = Told()
        done_s = worker.start(now_s, told)
        if done_s is None:
            return
        self._tell(worker, told, now_s)
        life = self._lives[worker.number]
        self._at(done_s, lambda then_s: self._computed(worker, life, then_s))
        self._plan_end(worker)

    def _computed(self, worker: Worker, life: int, now_s: float) -> None:
        if life != self._lives[worker.number]:
            return
        told = Told()
        job = worker.computed(now_s, told)
        self._tell(worker, told, now_s)
        if job.first_s < 0:
            job.first_s, job.used = now_s, job.hit
        self.router.first_token(job, now_s)
        if job.answer_tokens <= 1:
            self._over(job, now_s)
        self._plan_end(worker)
        self._start(worker, now_s)

    def _plan_end(self, worker: Worker) -> None:
        """When the next of its running requests ends has changed."""
        at = worker.number
        self._versions[at] += 1
        version = self._versions[at]
        end_s = worker.next_end_s()
        if end_s is not None:
            self._at(max(end_s, self._now_s), lambda then_s: self._ended(worker, version, then_s))

    def _ended(self, worker: Worker, version: int, now_s: float) -> None:
        if version != self._versions[worker.number]:
            return
        for job in worker.ended(now_s):
            self._over(job, now_s)
        self._plan_end(worker)
        self._start(worker, now_s)

    def _over(self, job: Job, now_s: float) -> None:
        assert job.finish_s < 0, "a request is served once"
        job.finish_s = now_s
        self.router.finished(job, now_s)

    def _tell(self, worker: Worker, told: Told, now_s: float) -> None:
        if told and self.feed is not None:
            self.feed.tell(worker, told, now_s)

    # --- failure ---------------------------------------------------------------------------

    def _kill(self, at: int, now_s: float) -> None:
        worker = self.workers[at]
        if not worker.up:
            return
        self._lives[at] += 1
        self._versions[at] += 1
        self._alive.remove(at)
        self.router.lost(at)
        self._at(now_s + self._settings.down_s, lambda then_s: self._raise(at, then_s))
        for job in worker.kill(now_s):
            job.resent += 1
            self._arrive(job, now_s)

    def _raise(self, at: int, now_s: float) -> None:
        """It serves again, with nothing cached."""
        self.workers[at].up = True
        self._alive.append(at)
        self._alive.sort()
        if self.feed is not None:
            self.feed.restarted(self.workers[at], now_s)
        held, self._held = self._held, []
        for job in held:
            self._arrive(job, now_s)


def _check_room(workload: Workload, settings: Settings) -> None:
    needed = workload.largest_blocks
    if settings.capacity < needed or 0 < settings.host_blocks < needed:
        raise BadInput(
            "bad_config",
            f"a worker of {settings.capacity} blocks (host memory {settings.host_blocks})",
            f"the largest request of {workload.name} needs {needed} blocks of {workload.block_tokens} tokens",
            "give more with --capacity and --host",
        )


def _cache_maker(workload: Workload, settings: Settings) -> Callable[[], BlockCache]:
    if settings.policy == TAIL_LRU:
        return lambda: TailLru(settings.capacity)
    depth = depths(workload.parents)
    return lambda: PolicyCache(settings.capacity, settings.policy, workload.parents, depth)
