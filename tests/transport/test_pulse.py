"""Signs of life, on a clock that goes when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvcache.clock import NS_PER_MS
from kvcache.testing.clock import FakeClock
from kvcache.transport.base import Limits
from kvcache.transport.pulse import Pulse

LIMITS = Limits(heartbeat_ns=100 * NS_PER_MS, silence_ns=1_000 * NS_PER_MS)


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.beats = 0
        self.losses: list[str] = []
        self.pulse = Pulse(LIMITS, self.clock, self._beat, self.losses.append)
        self.pulse.start()

    def _beat(self) -> None:
        self.beats += 1

    def pass_ms(self, milliseconds: int, step: int = 50) -> None:
        """As time goes on a loop that is not held up."""
        for _ in range(0, milliseconds, step):
            self.clock.advance_ms(step)
            if not self.losses:
                self.pulse.tick()


def play(scenario: Callable[[World], None]) -> None:
    async def main() -> None:
        world = World()
        scenario(world)
        world.pulse.stop()
        world.pulse.stop()

    asyncio.run(main())


def test_an_idle_side_says_that_it_lives() -> None:
    def scenario(world: World) -> None:
        for _ in range(10):
            world.pulse.heard()
            world.pass_ms(100)
        assert 9 <= world.beats <= 20
        assert world.losses == []

    play(scenario)


def test_who_says_something_need_not_beat() -> None:
    def scenario(world: World) -> None:
        for _ in range(40):
            world.pulse.heard()
            world.pulse.said()
            world.pass_ms(25, step=25)
        assert world.beats == 0

    play(scenario)


def test_a_peer_is_lost_after_its_silence_and_not_before() -> None:
    def scenario(world: World) -> None:
        world.pass_ms(950)
        assert world.losses == []
        world.pass_ms(50)
        assert len(world.losses) == 1
        assert "1.0 s" in world.losses[0]

    play(scenario)


def test_whatever_is_heard_counts() -> None:
    def scenario(world: World) -> None:
        world.pass_ms(950)
        world.pulse.heard()
        world.pass_ms(950)
        assert world.losses == []
        world.pass_ms(50)
        assert len(world.losses) == 1

    play(scenario)


def test_who_stood_still_himself_blames_nobody_at_once() -> None:
    def scenario(world: World) -> None:
        world.pass_ms(100)
        world.clock.advance_ms(60_000)
        world.pulse.tick()
        assert world.losses == []
        world.pass_ms(50)
        assert world.losses == []
        world.pass_ms(100)
        assert len(world.losses) == 1  # But he must say something now.

    play(scenario)
