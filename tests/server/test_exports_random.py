"""Tickets in any order of events: no slot is used again while somebody may still touch it."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.exports_world import World

SEEDS = range(10 * int(os.environ.get("KVCACHE_FAULT_FACTOR", "1")))


async def run(random: Random, steps: int) -> Counter[str]:
    world = World(random)
    await world.run(steps)
    return world.done


@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_a_few_steps(random: Random, steps: int) -> None:
    asyncio.run(run(random, steps))


@pytest.mark.slow
def test_long_days() -> None:
    done: Counter[str] = Counter()
    for seed in SEEDS:
        try:
            done.update(asyncio.run(run(Random(seed), 600)))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    idle = [name for name, count in done.items() if count < 10]
    assert not idle, f"these hardly ever did anything: {idle}"
