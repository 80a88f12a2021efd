"""Stalls of the machine are told from time that this process used, or waited as it meant to."""

from __future__ import annotations

from threading import Event

from kvcache.clock import NS_PER_MS
from kvcache.testing.clock import FakeClock
from kvcache.testing.stalls import LEAST_NS, Stalls

MS = NS_PER_MS


class World:
    """A process that is looked at as often as the test says."""

    def __init__(self) -> None:
        self.clock = FakeClock(0)
        self.used_ns = 0
        self.stalls = Stalls(self.clock, lambda: self.used_ns)

    def passes(self, milliseconds: int, used_ms: int = 0) -> None:
        self.clock.advance_ms(milliseconds)
        self.used_ns += used_ms * MS
        self.stalls.look()


def test_a_machine_that_runs_does_not_stand() -> None:
    world = World()
    for _ in range(100):
        world.passes(LEAST_NS // MS - 1)
    assert world.stalls.stood_ns(0, world.clock.now_ns()) == 0
    assert world.stalls.awake_ns() == world.clock.now_ns()


def test_what_the_process_computed_is_no_stall() -> None:
    world = World()
    world.passes(1_000, used_ms=1_000)
    world.passes(1_000, used_ms=1_500)  # Of two threads.
    world.passes(1_000, used_ms=400)
    assert world.stalls.stood_ns(0, 3_000 * MS) == 600 * MS


def test_of_a_stall_what_lies_within_counts() -> None:
    world = World()
    world.passes(10)
    world.passes(1_000)
    world.passes(10)
    stood = [
        world.stalls.stood_ns(since * MS, until * MS) for since, until in ((0, 500), (510, 1_020), (0, 9))
    ]
    assert stood == [490 * MS, 500 * MS, 0]
    assert world.stalls.awake_ns() == 20 * MS


def test_who_asks_at_once_hears_of_the_stall_that_has_just_ended() -> None:
    world = World()
    world.clock.advance_ms(2_000)
    assert world.stalls.awake_ns() == 0


def test_time_that_is_waited_is_no_stall() -> None:
    """Of a machine that stands still meanwhile, that is found out the next time."""
    with Stalls() as stalls:
        while True:
            began_ns = stalls.awake_ns()
            assert not Event().wait(0.1)
            if stalls.awake_ns() - began_ns >= 100 * MS:
                return
