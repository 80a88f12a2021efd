"""Threads for jobs that block, seen from the event loop: what is running, since when, what still queues.

    queued ──► running in a thread ──► ended: its result, and its times
       └── drop_queued ──► never begun: Dropped

A job is counted until its thread has returned, whoever has stopped waiting for it: what it works on must
not be used for anything else before. How long it took counts from when its thread began.

The sum: 60 us a job, there and back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

from kvcache.clock import Clock

T = TypeVar("T")
Ended = Callable[[int, int], None]


class Dropped(Exception):
    """The job was not begun, and will not be."""


class _Job:
    """Times are 0 until they are known. The thread sets them."""

    __slots__ = ("began_ns", "ended_ns", "future")

    def __init__(self) -> None:
        self.began_ns = 0
        self.ended_ns = 0
        self.future: Future[object]


class Threads:
    """One owner, the event loop's thread."""

    def __init__(self, name: str, count: int, clock: Clock, patience_ns: int) -> None:
        """At most ``count``. A job that takes over ``patience_ns`` hangs."""
        self._pool = ThreadPoolExecutor(count, name)
        self._clock = clock
        self._patience_ns = patience_ns
        self._jobs: set[_Job] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_busy(self) -> bool:
        """Is anything running or queued?"""
        return bool(self._jobs)

    async def run(self, work: Callable[[], T], ended: Ended | None = None) -> T:
        """Do it in a thread. May be cancelled: it is done all the same. ``ended`` is told when the thread
        began and when it returned, even if nobody waits any more. RAISES what ``work`` raises; Dropped."""
        job = _Job()

        def timed() -> T:
            job.began_ns = self._clock.now_ns()
            try:
                return work()
            finally:
                job.ended_ns = self._clock.now_ns()

        submitted = self._pool.submit(timed)
        job.future = cast("Future[object]", submitted)
        self._jobs.add(job)
        self._idle.clear()
        future = asyncio.wrap_future(submitted)
        future.add_done_callback(lambda done: self._done(done, job, ended))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if future.cancelled():
                raise Dropped from None
            raise

    async def idle(self) -> None:
        """Until nothing is running or queued."""
        await self._idle.wait()

    def hung_ns(self) -> int:
        """How long the job has run that has run longest, if it hangs; else 0."""
        began_ns = min((job.began_ns for job in self._jobs if job.began_ns and not job.ended_ns), default=0)
        took_ns = self._clock.now_ns() - began_ns
        return took_ns if began_ns and took_ns > self._patience_ns else 0

    def drop_queued(self) -> None:
        """Begin none of those that still queue."""
        for job in self._jobs:
            job.future.cancel()

    def close(self) -> None:
        """REQUIRES: nothing is run from now on."""
        self._pool.shutdown(wait=False)

    def _done(self, future: asyncio.Future[T], job: _Job, ended: Ended | None) -> None:
        if not future.cancelled():
            future.exception()  # Whoever waited has it; if nobody does any more, it is no news.
        self._jobs.remove(job)
        if not self._jobs:
            self._idle.set()
        if ended is not None and job.ended_ns:
            ended(job.began_ns, job.ended_ns)
