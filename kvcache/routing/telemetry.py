"""How busy each worker is: what it told, put together with what was sent to it since.

    told    ──every second or so, with a time──┐
    begin ──► first_token ──► end              ├──► estimate, with the age of what was told
      own requests, each until its end ────────┘

What a worker tells is old when it is read, and many requests are routed in between. So when something new is
told, our own sums are noted beside it, and the estimate is what was told plus what has changed in our own
since; and never less than our own, which surely are there. What was told longer than ``TOLD_NS_MAX`` ago
counts for nothing.

Limits: ``REQUESTS_MAX`` own requests (more are not counted, which ``uncounted`` says), each for at most
``REQUEST_NS_MAX``: a request whose end nobody told must not weigh on a worker for ever.

The sum: 1 us a call.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.routing.backlog import Backlog

TOLD_NS_MAX = 10 * NS_PER_S
NEWER_NS = 20 * NS_PER_MS
REQUEST_NS_MAX = 600 * NS_PER_S
REQUESTS_MAX = 65_536
NUMBER_MAX = float(1 << 40)

RUNNING = "requests_running"
WAITING = "requests_waiting"
WAITING_PREFILL = "prefill_tokens_waiting"
DECODE = "decode_tokens"
FREE_SHARE = "free_share"


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker said of itself at ``at_ns``, on our clock."""

    at_ns: int
    running: int = 0
    waiting: int = 0
    waiting_prefill_tokens: int = 0
    decode_tokens: int = 0
    free_share: float = 1.0

    @classmethod
    def read(cls, values: Mapping[str, float], at_ns: int) -> Told:
        """From the plain numbers of a batch. What is not told is 0, and all memory free; what is no number
        that makes sense is taken as not told."""
        return cls(
            at_ns=at_ns,
            running=_count(values, RUNNING),
            waiting=_count(values, WAITING),
            waiting_prefill_tokens=_count(values, WAITING_PREFILL),
            decode_tokens=_count(values, DECODE),
            free_share=_free_share(values),
        )

    def and_of(self, other: Told) -> Told:
        """Two sources of one worker: of each number the busier, and the older time."""
        return Told(
            at_ns=min(self.at_ns, other.at_ns),
            running=max(self.running, other.running),
            waiting=max(self.waiting, other.waiting),
            waiting_prefill_tokens=max(self.waiting_prefill_tokens, other.waiting_prefill_tokens),
            decode_tokens=max(self.decode_tokens, other.decode_tokens),
            free_share=min(self.free_share, other.free_share),
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """How busy a worker is believed to be. ``backlog_tokens``: what it has still to compute
    (``kvcache.routing.backlog``). ``age_ms``: of what it told; -1: it told nothing that counts."""

    running: int
    waiting: int
    waiting_prefill_tokens: int
    backlog_tokens: float
    decode_tokens: int
    free_share: float
    age_ms: float


@dataclass(slots=True)
class _Sums:
    """Of our own requests on one worker."""

    running: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0

    def copy(self) -> _Sums:
        return _Sums(self.running, self.prefill_tokens, self.decode_tokens)


@dataclass(slots=True)
class _Worker:
    own: _Sums = field(default_factory=_Sums)
    told: Told | None = None
    noted: _Sums = field(default_factory=_Sums)
    """Our own when ``told`` came."""
    backlog: Backlog = field(default_factory=Backlog)


@dataclass(slots=True)
class _Request:
    worker: str
    began_ns: int
    uncached_tokens: int
    context_tokens: int
    decoding: bool = False


class Loads:
    """The load of every worker. One owner; every call returns at once; reads no clock."""

    def __init__(self, requests_max: int = REQUESTS_MAX, request_ns_max: int = REQUEST_NS_MAX) -> None:
        self.uncounted = 0
        """Requests that were not counted for want of room."""
        self.expired = 0
        """Requests whose end nobody told in time."""
        self._requests_max = requests_max
        self._request_ns_max = request_ns_max
        self._workers: dict[str, _Worker] = {}
        self._requests: OrderedDict[int, _Request] = OrderedDict()
        self._last = 0

    @property
    def requests(self) -> int:
        """Those that have begun and not ended."""
        return len(self._requests)

    def told(self, worker: str, told: Told) -> None:
        """Telemetry of this worker. What is not newer by ``NEWER_NS`` than what was told before is ignored:
        it may be the same, by a clock that is read anew."""
        state = self._workers.setdefault(worker, _Worker())
        if state.told is None or told.at_ns >= state.told.at_ns + NEWER_NS:
            state.told, state.noted = told, state.own.copy()

    def begin(self, worker: str, uncached_tokens: int, context_tokens: int, now_ns: int) -> int:
        """A request goes to this worker, which has to compute so many of its tokens. Returns its number, by
        which ``first_token`` and ``end`` know it; 0 when it is not counted."""
        self.expire(now_ns)
        if len(self._requests) >= self._requests_max:
            self.uncounted += 1
            return 0
        self._last += 1
        request = _Request(worker, now_ns, max(0, uncached_tokens), max(0, context_tokens))
        self._requests[self._last] = request
        state = self._workers.setdefault(worker, _Worker())
        state.own.prefill_tokens += request.uncached_tokens
        state.backlog.begin(self._last, request.uncached_tokens, request.context_tokens, now_ns)
        return self._last

    def first_token(self, number: int, now_ns: int) -> None:
        """Its prompt is computed. A number that is not known, or not any more, is ignored."""
        request = self._requests.get(number)
        if request is not None and not request.decoding:
            state = self._workers[request.worker]
            state.backlog.first_token(number, now_ns)
            own = state.own
            own.prefill_tokens -= request.uncached_tokens
            own.running += 1
            own.decode_tokens += request.context_tokens
            request.decoding = True

    def end(self, number: int) -> None:
        """It is over, however it went. May be called twice."""
        request = self._requests.pop(number, None)
        if request is None:
            return
        state = self._workers[request.worker]
        own = state.own
        if request.decoding:
            own.running -= 1
            own.decode_tokens -= request.context_tokens
        else:
            own.prefill_tokens -= request.uncached_tokens
            state.backlog.end(number)

    def expire(self, now_ns: int) -> None:
        """End the requests that began too long ago."""
        while self._requests:
            number, oldest = next(iter(self._requests.items()))
            if now_ns - oldest.began_ns < self._request_ns_max:
                return
            self.expired += 1
            self.end(number)

    def estimate(self, worker: str, now_ns: int) -> Estimate:
        """How busy it is believed to be now. A worker never heard of is idle."""
        state = self._workers.get(worker)
        if state is None:
            return _IDLE
        own, told, noted = state.own, state.told, state.noted
        left = state.backlog.left(now_ns)
        if told is None or now_ns - told.at_ns > TOLD_NS_MAX:
            return Estimate(own.running, 0, own.prefill_tokens, left, own.decode_tokens, 1.0, -1.0)
        others_tokens = max(0, told.waiting_prefill_tokens - noted.prefill_tokens)
        return Estimate(
            running=max(own.running, told.running + own.running - noted.running),
            waiting=told.waiting,
            waiting_prefill_tokens=own.prefill_tokens + others_tokens,
            backlog_tokens=left + others_tokens,
            decode_tokens=max(
                own.decode_tokens, told.decode_tokens + own.decode_tokens - noted.decode_tokens
            ),
            free_share=told.free_share,
            age_ms=max(0, now_ns - told.at_ns) / NS_PER_MS,
        )

    def keep(self, workers: Iterable[str]) -> None:
        """Forget all other workers, and the requests on them."""
        kept = set(workers)
        for number in [number for number, each in self._requests.items() if each.worker not in kept]:
            self.end(number)
        for worker in [worker for worker in self._workers if worker not in kept]:
            del self._workers[worker]

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to the requests."""
        sums: dict[str, _Sums] = {worker: _Sums() for worker in self._workers}
        for request in self._requests.values():
            own = sums[request.worker]
            if request.decoding:
                own.running += 1
                own.decode_tokens += request.context_tokens
            else:
                own.prefill_tokens += request.uncached_tokens
        assert len(self._requests) <= self._requests_max
        for name, state in self._workers.items():
            assert sums[name] == state.own
            state.backlog.check()


_IDLE = Estimate(0, 0, 0, 0.0, 0, 1.0, -1.0)


def _count(values: Mapping[str, float], name: str) -> int:
    value = values.get(name, 0.0)
    return int(min(value, NUMBER_MAX)) if value > 0 and not math.isnan(value) else 0


def _free_share(values: Mapping[str, float]) -> float:
    """An engine's. What a node has free says nothing: a store that is warm is full, and is none the worse."""
    share = values.get(FREE_SHARE, math.nan)
    return 1.0 if math.isnan(share) else min(1.0, max(0.0, share))
