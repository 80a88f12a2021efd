"""Jobs in threads: when they count as begun, and that nobody uses what a thread still works on."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvcache.tiers.threads import Dropped, Threads

PATIENCE_NS = 10
WAIT_S = 20


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.ns = 1

    def now_ns(self) -> int:
        return self.ns


class Gate:
    """A job that goes on when it is let."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.go_on.wait(WAIT_S)
        return "done"


def test_time_in_the_queue_does_not_count() -> None:
    async def run() -> None:
        clock, first, second = Hands(), Gate(), Gate()
        threads = Threads("test", 1, clock, PATIENCE_NS)
        spans: list[tuple[int, int]] = []
        jobs = [
            asyncio.create_task(threads.run(gate, lambda began, ended: spans.append((began, ended))))
            for gate in (first, second)
        ]
        await asyncio.to_thread(first.began.wait, WAIT_S)
        clock.ns += PATIENCE_NS
        assert not threads.hung_ns()
        clock.ns += 1
        assert threads.hung_ns() == PATIENCE_NS + 1
        first.go_on.set()
        await jobs[0]
        await asyncio.to_thread(second.began.wait, WAIT_S)
        assert not threads.hung_ns(), "the second has only just begun"
        clock.ns += 5
        second.go_on.set()
        assert await jobs[1] == "done"
        assert spans == [(1, 12), (12, 17)]
        threads.close()

    asyncio.run(run())


def test_who_stops_waiting_leaves_the_job_counted() -> None:
    async def run() -> None:
        gate = Gate()
        threads = Threads("test", 1, Hands(), PATIENCE_NS)
        job = asyncio.create_task(threads.run(gate))
        await asyncio.to_thread(gate.began.wait, WAIT_S)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert threads.is_busy
        gate.go_on.set()
        await threads.idle()
        assert not threads.is_busy
        threads.close()

    asyncio.run(run())


def test_what_queues_can_be_dropped_and_what_runs_cannot() -> None:
    async def run() -> None:
        first, second = Gate(), Gate()
        threads = Threads("test", 1, Hands(), PATIENCE_NS)
        jobs = [asyncio.create_task(threads.run(gate)) for gate in (first, second)]
        await asyncio.to_thread(first.began.wait, WAIT_S)
        threads.drop_queued()
        with pytest.raises(Dropped):
            await jobs[1]
        assert threads.is_busy
        first.go_on.set()
        assert await jobs[0] == "done"
        assert not second.began.is_set()
        await threads.idle()
        threads.close()

    asyncio.run(run())


def test_what_a_job_raises_is_raised_to_who_waits() -> None:
    def fails() -> None:
        raise ValueError("no")

    async def run() -> None:
        threads = Threads("test", 1, Hands(), PATIENCE_NS)
        with pytest.raises(ValueError, match="no"):
            await threads.run(fails)
        assert not threads.is_busy
        threads.close()

    asyncio.run(run())
