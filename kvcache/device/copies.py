"""Copies out of an engine's pages or the HBM slab, beside what the engine computes.

    to the host: as the cap lets it (pump) ┐  waits for the engine's stream (event),
    within the device: queued at once      ┴► runs on a stream of its own ──► done: then(None), or then(why)

A copy is *steps*: what queues a part of it, a plain copy of bytes or a launch of gather. Layers are copies of
their own: while layer i is copied, layer i + 1 computes.

Invariants: a copy begins after everything the engine had queued when it was asked for; ``then`` is called
once, and never while a step may still run, so a reservation that ends there covers the copy; tensors that
steps name are kept until then. After a failure of the device nothing new is taken, and what is under way ends
with the reason: slots it was to fill are not filled.

The sum: 20 us of Python a copy, 10 us a step; a step of 2 MiB takes 40 us of PCIe, so Python is hidden from
there on. One owner: the thread that asks, pumps and waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvcache.clock import NS_PER_S, Clock
from kvcache.device.cap import Cap
from kvcache.device.streams import Event, Stream, Streams
from kvcache.errors import KVCacheError, Unavailable

INFLIGHT_BYTES_MAX = 1 << 30

Link = Literal["host", "device"]
Then = Callable[[Unavailable | None], None]


@dataclass(frozen=True, slots=True)
class Step:
    """``work`` queues it on the stream that is current then; ``size_bytes`` is what it moves."""

    size_bytes: int
    work: Callable[[], None]


class Copy:
    """One, made by ``Copies``."""

    def __init__(self, steps: Sequence[Step], stream: Stream, ready: Sequence[Event], then: Then) -> None:
        self.size_bytes = sum(step.size_bytes for step in steps)
        self.failure: Unavailable | None = None
        self.steps = deque(steps)
        self.queued: list[Step] = []
        self.stream = stream
        self.ready = ready
        self.then = then
        self.event: Event | None = None
        self.is_ended = False


class Copies:
    """Those of one device in one process. ``close`` ends."""

    def __init__(
        self,
        streams: Streams,
        clock: Clock,
        cap: Cap | None = None,
        lost: Callable[[str], None] = lambda why: None,
        inflight_bytes_max: int = INFLIGHT_BYTES_MAX,
    ) -> None:
        """``cap``: on copies to the host, none unless given. ``lost`` is told once when the device fails: the
        slab's ``lose``."""
        self._clock = clock
        self._cap = cap
        self._lost = lost
        self._inflight_bytes_max = inflight_bytes_max
        self._streams = streams
        self._lanes: dict[Link, Stream] = {}
        self._waiting: deque[Copy] = deque()
        self._running: list[Copy] = []
        self.failure: Unavailable | None = None

    @property
    def inflight_bytes(self) -> int:
        """Of copies that have not ended."""
        return sum(copy.size_bytes for copy in (*self._waiting, *self._running))

    def save(self, link: Link, steps: Sequence[Step], engine: Stream, then: Then) -> Copy:
        """After what ``engine`` has queued by now; to the host when the cap lets it.

        RAISES Unavailable when the device is lost or too much is under way; ``then`` is not called."""
        return self.save_behind(link, steps, self._mark(engine), then)

    def save_behind(self, link: Link, steps: Sequence[Step], behind: Sequence[Event], then: Then) -> Copy:
        """As ``save``, after these events alone."""
        copy = self._new(link, steps, behind, then)
        if link == "host":
            self._waiting.append(copy)
            self.pump()
        else:
            self._running.append(copy)
            self._queue(copy, len(copy.steps))
        return copy

    def delay_ns(self) -> int:
        """How long the cap lets nothing more through. 0: nothing waits for it."""
        if self._cap is None or not self._waiting:
            return 0
        return self._cap.opens_in_ns(self._clock.now_ns())

    def events(self) -> list[Event]:
        """Of what runs."""
        return [copy.event for copy in self._running if copy.event is not None]

    def drop(self, copy: Copy, why: Unavailable) -> None:
        """Queue no more of it: it fails, as soon as what is queued of it is done."""
        if copy in self._waiting:
            self._waiting.remove(copy)
            self._drop(copy, why)

    def pump(self) -> None:
        """Queue the saves that the cap lets through, and end what is done. To be called often: after each
        layer or step of the engine, and by whoever waits."""
        while self._waiting and (self._cap is None or self._cap.is_open(self._clock.now_ns())):
            copy = self._waiting.popleft()
            self._queue(copy, 1)
            if copy.steps:
                self._waiting.appendleft(copy)
            else:
                self._running.append(copy)
        self._settle()

    def wait(self, copies: Iterable[Copy], timeout_s: float) -> bool:
        """Block until those of these that are queued have ended, or the time is over. Have all?"""
        until_ns = self._clock.now_ns() + int(timeout_s * NS_PER_S)
        asked = list(copies)
        for copy in asked:
            if copy.event is not None and not copy.is_ended:
                try:
                    copy.event.wait(max(0.0, (until_ns - self._clock.now_ns()) / NS_PER_S))
                except Unavailable as failure:
                    self._fail(failure)
        self._settle()
        return all(copy.is_ended for copy in asked)

    def close(self, timeout_s: float) -> int:
        """Begin nothing more, wait for what runs. How many copies still do: their ``then`` is never called,
        as their slots must not be used again. May be called twice."""
        self._refuse(_no("the copies of this device were closed", "the engine or the node ends"))
        self.wait(list(self._running), timeout_s)
        self._streams.close()
        return len(self._running)

    def check(self) -> None:
        """Assert every invariant."""
        for copy in self._waiting:
            assert not copy.is_ended
            assert copy.steps
            assert copy.event is None
        for copy in self._running:
            assert not copy.is_ended
            assert not copy.steps
            assert copy.event is not None or copy.failure is not None
        assert self.failure is None or not self._waiting

    # --- parts ----------------------------------------------------------------------------------

    def _mark(self, engine: Stream) -> list[Event]:
        if self.failure is not None:
            raise self.failure
        try:
            return [engine.mark()]
        except Unavailable as failure:
            self._fail(failure)
            raise

    def lane(self, link: Link) -> Stream:
        """Where they run; made when it is first asked for. RAISES Unavailable."""
        if link not in self._lanes:
            self._lanes[link] = self._streams.new(f"save-{link}", urgent=False)
        return self._lanes[link]

    def _new(self, link: Link, steps: Sequence[Step], behind: Sequence[Event], then: Then) -> Copy:
        assert steps
        if self.failure is not None:
            raise self.failure
        copy = Copy(steps, self.lane(link), behind, then)
        inflight_bytes = self.inflight_bytes
        if inflight_bytes and inflight_bytes + copy.size_bytes > self._inflight_bytes_max:
            raise _no(
                f"{copy.size_bytes} bytes are not copied",
                f"{inflight_bytes} are under way, at most {self._inflight_bytes_max}",
            )
        return copy

    def _queue(self, copy: Copy, count: int) -> None:
        """The next ``count`` steps; and its event, with the last."""
        try:
            for event in copy.ready:
                copy.stream.after(event)
            copy.ready = ()
            for _ in range(count):
                step = copy.steps.popleft()
                copy.queued.append(step)
                copy.stream.run(step.work)
                if self._cap is not None and copy.stream is self._lanes.get("host"):
                    self._cap.spend(step.size_bytes)
        except KVCacheError as error:
            copy.failure = error if isinstance(error, Unavailable) else _no(error.what, error.why)
            copy.steps.clear()
        if not copy.steps:
            try:
                copy.event = copy.stream.mark()
            except Unavailable as failure:  # Then nothing of it runs any more, nor will.
                copy.failure = failure
                self._fail(failure)

    def _settle(self) -> None:
        """End what is done. ``then`` may ask for more copies."""
        for copy in list(self._running):
            if copy.is_ended:
                continue
            failure = copy.failure
            try:
                if copy.event is not None and not copy.event.is_done():
                    continue
            except Unavailable as error:
                failure = error
                self._fail(error)
            self._running.remove(copy)
            self._end(copy, failure)

    def _end(self, copy: Copy, failure: Unavailable | None) -> None:
        assert not copy.is_ended
        copy.is_ended = True
        copy.failure = failure
        copy.queued.clear()
        copy.steps.clear()
        copy.then(failure)

    def _fail(self, failure: Unavailable) -> None:
        if self.failure is None:
            self._lost(failure.why)
        self._refuse(failure)

    def _refuse(self, failure: Unavailable) -> None:
        """Take nothing new; end what was not begun, and let run out what was."""
        self.failure = self.failure or failure
        waiting, self._waiting = self._waiting, deque()
        for copy in waiting:
            self._drop(copy, failure)

    def _drop(self, copy: Copy, failure: Unavailable) -> None:
        """REQUIRES: it is in no list."""
        if copy.queued:
            copy.failure = failure
            copy.steps.clear()
            self._running.append(copy)
            self._queue(copy, 0)
        else:
            self._end(copy, failure)


def copying(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    """The work of a step that copies all of one to the other."""
    return lambda: void(target.copy_(source, non_blocking=True))


def void(_: object) -> None:
    """For a lambda that gives nothing."""


def _no(what: str, why: str) -> Unavailable:
    return Unavailable("unavailable", what, why, "recompute")
