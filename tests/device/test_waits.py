"""How long a device is waited for, by itself: waits take their time of a clock that is a test's."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kvcache.clock import NS_PER_S
from kvcache.device.engine import EngineDevice
from kvcache.device.slab import CpuMemory
from kvcache.device.streams import CpuEvent
from kvcache.device.waits import ANSWER_S, Waits
from kvcache.errors import Unavailable
from kvcache.testing.clock import FakeClock

PATIENCE_S = 60.0


class Gpu(EngineDevice):
    def __init__(self) -> None:
        super().__init__(CpuMemory())
        self.clock: FakeClock = FakeClock()  # type: ignore[assignment]
        self.whys: list[str] = []

    def give_up(self, why: str) -> None:
        self.whys.append(why)
        super().give_up(why)


class After:
    """An event that is done in so many seconds; ``meanwhile`` is called by each wait for it."""

    def __init__(self, gpu: Gpu, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> None:
        self._clock = gpu.clock
        self._end_ns = gpu.clock.now_ns() + int(seconds * NS_PER_S)
        self._meanwhile = meanwhile

    def is_done(self) -> bool:
        return self._clock.now_ns() >= self._end_ns

    def wait(self, timeout_s: float) -> bool:
        self._meanwhile()
        left_s = (self._end_ns - self._clock.now_ns()) / NS_PER_S
        self._clock.advance_ms(int(max(0.0, min(timeout_s, left_s)) * 1000))
        return self.is_done()


def seconds(gpu: Gpu, act: Callable[[], object]) -> float:
    begun_ns = gpu.clock.now_ns()
    act()
    return (gpu.clock.now_ns() - begun_ns) / NS_PER_S


def test_one_that_answers_is_waited_for() -> None:
    gpu = Gpu()
    waits = Waits(gpu)
    assert waits.has_ended(After(gpu, 0.9 * ANSWER_S))
    assert not gpu.is_stuck


def test_all_waits_of_a_request_have_one_deadline() -> None:
    gpu = Gpu()
    waits = Waits(gpu)
    assert waits.has_ended(After(gpu, 0.4 * ANSWER_S))
    assert waits.has_ended(After(gpu, 0.4 * ANSWER_S))
    took_s = seconds(gpu, lambda: waits.has_ended(After(gpu, 0.4 * ANSWER_S)))
    assert took_s == pytest.approx(0.2 * ANSWER_S)
    assert gpu.is_stuck


def test_time_in_which_nobody_waits_is_not_counted() -> None:
    gpu = Gpu()
    waits = Waits(gpu)
    gpu.clock.advance_ms(int(2_000 * ANSWER_S))
    assert waits.has_ended(After(gpu, 0.9 * ANSWER_S))
    assert not gpu.is_stuck


def test_time_in_which_this_process_is_stopped_is_not_counted() -> None:
    """The device may have been stopped with it, and goes on when it does."""
    gpu = Gpu()
    stops_s = [2 * ANSWER_S]
    stopped = After(
        gpu, 2.5 * ANSWER_S, lambda: gpu.clock.advance_ms(int(1_000 * stops_s.pop())) if stops_s else None
    )
    assert Waits(gpu).has_ended(stopped)
    assert not stops_s
    assert not gpu.is_stuck


def test_one_that_was_given_up_is_waited_for_by_nobody() -> None:
    gpu = Gpu()
    first, second = Waits(gpu), Waits(gpu)
    assert seconds(gpu, lambda: first.has_ended(After(gpu, 1e9))) == pytest.approx(ANSWER_S)
    for waits in (first, second, Waits(gpu)):
        event = After(gpu, 1e9)
        assert seconds(gpu, lambda: waits.has_ended(event)) == 0  # noqa: B023
        assert not waits.has_ended(event)
    assert len(gpu.whys) == 1
    assert second.has_ended(After(gpu, 0)), "what is done is done"


def test_who_waits_already_waits_no_more() -> None:
    gpu = Gpu()
    event = After(gpu, 1e9, lambda: gpu.give_up("another waited long enough"))
    assert seconds(gpu, lambda: Waits(gpu).has_ended(event)) < 1
    assert not Waits(gpu).has_ended(event)


def test_who_waits_in_another_thread_waits_no_more() -> None:
    """By the real clock."""
    device, answers = EngineDevice(CpuMemory()), []
    waiting = threading.Thread(target=lambda: answers.append(Waits(device).has_ended(CpuEvent())))
    waiting.start()
    device.give_up("another waited long enough")
    waiting.join(PATIENCE_S / 2)
    assert answers == [False]


def test_one_that_failed_says_so() -> None:
    event = CpuEvent()
    event.settle(RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(Unavailable, match="launch failure"):
        Waits(Gpu()).has_ended(event)
