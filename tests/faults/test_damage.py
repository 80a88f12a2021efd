"""Whole files cut short, gone, swapped or taken from another directory, several at once, again and again.

What is damaged costs blocks. What is served of the rest is right, and the device goes on: what is stored
after the damage is there the next time.

The sum: a round is some damage, a start of the device's two processes with a look, 20 steps of work, and a
look: half a second.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.nursery import Nursery
from tests.faults.test_kill import look
from tests.faults.work import SEGMENT_BYTES, Job, Record

ROUNDS = 30
STEPS = 20
FILLING_STEPS = 100
DAMAGES_MAX = 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]

Harm = Callable[[random.Random, Path, Path], None]
"""Done to the first directory. The second is another, of the same shape."""


def a_segment(way: random.Random, tier: Path) -> Path:
    return way.choice(sorted((tier / "segments").glob("*.seg")))


def cut_a_segment(way: random.Random, tier: Path, _: Path) -> None:
    os.truncate(a_segment(way, tier), way.choice((0, 100, 4_096, way.randrange(SEGMENT_BYTES))))


def lengthen_a_segment(way: random.Random, tier: Path, _: Path) -> None:
    os.truncate(a_segment(way, tier), SEGMENT_BYTES + way.choice((1, 4_096)))


def lose_a_segment(way: random.Random, tier: Path, _: Path) -> None:
    a_segment(way, tier).unlink()


def swap_segments(way: random.Random, tier: Path, _: Path) -> None:
    one, other = a_segment(way, tier), a_segment(way, tier)
    aside = one.with_suffix(".aside")
    one.rename(aside)
    if other != one:
        other.rename(one)
    aside.rename(other)


def take_anothers_segment(way: random.Random, tier: Path, other: Path) -> None:
    shutil.copy(a_segment(way, other), a_segment(way, tier))


def zero_a_stretch(way: random.Random, tier: Path, _: Path) -> None:
    with a_segment(way, tier).open("r+b") as file:
        file.seek(way.randrange(SEGMENT_BYTES // 2))
        file.write(bytes(way.randrange(SEGMENT_BYTES // 2)))


def move_a_stretch(way: random.Random, tier: Path, _: Path) -> None:
    """What a misdirected write does: good pages, elsewhere."""
    source, target = a_segment(way, tier), a_segment(way, tier)
    length = 4_096 * way.randint(1, 20)
    pages = range(0, SEGMENT_BYTES - length, 4_096)
    with source.open("rb") as file:
        file.seek(way.choice(pages))
        content = file.read(length)
    with target.open("r+b") as file:
        file.seek(way.choice(pages))
        file.write(content)


def lose_the_index(_: random.Random, tier: Path, __: Path) -> None:
    shutil.rmtree(tier / "index")


def cut_the_index(way: random.Random, tier: Path, _: Path) -> None:
    data = tier / "index" / "data.mdb"
    if data.exists():
        os.truncate(data, way.randrange(data.stat().st_size + 1))


def take_anothers_index(_: random.Random, tier: Path, other: Path) -> None:
    shutil.copytree(other / "index", tier / "index", dirs_exist_ok=True)


def lose_the_superblock(_: random.Random, tier: Path, __: Path) -> None:
    (tier / "tier.json").unlink(missing_ok=True)


def empty_the_superblock(_: random.Random, tier: Path, __: Path) -> None:
    (tier / "tier.json").write_bytes(b"")


HARMS: tuple[Harm, ...] = (
    cut_a_segment,
    lengthen_a_segment,
    lose_a_segment,
    swap_segments,
    take_anothers_segment,
    zero_a_stretch,
    move_a_stretch,
    lose_the_index,
    cut_the_index,
    take_anothers_index,
    lose_the_superblock,
    empty_the_superblock,
)


def work(nursery: Nursery, tier: Path, record: Path, seed: int, steps: int = STEPS) -> None:
    child = nursery.start(Job(str(tier), str(record), seed, steps=steps))
    assert child.end() == 0, child.said()


def test_it_goes_on_with_what_is_left(nursery: Nursery, scratch: Path, factor: int) -> None:
    way = random.Random(13)
    tier, other = scratch / "tier", scratch / "other"
    work(nursery, tier, scratch / "filling", 1, FILLING_STEPS)
    work(nursery, other, scratch / "other-filling", 2, FILLING_STEPS)
    refused = 0
    for seed in range(ROUNDS * factor):
        chosen = way.sample(HARMS, way.randint(1, DAMAGES_MAX))
        for harm in chosen:
            harm(way, tier, other)
        names = [harm.__name__ for harm in chosen]
        damaged = Record(scratch / f"damaged-{seed}", durable_only=False, lies=True)
        work(nursery, tier, damaged.path, seed)
        damaged.read()
        assert not damaged.problems, f"{names}: {damaged.problems}"
        if not damaged.looks:  # Without its superblock, and with segments that disagree on whose they are.
            assert {lose_the_superblock, empty_the_superblock} & set(chosen), names
            refused += 1
            shutil.rmtree(tier)
            work(nursery, tier, scratch / "filling", seed, FILLING_STEPS)
            continue
        after = Record(scratch / f"after-{seed}", durable_only=False)
        after.required = damaged.required
        work(nursery, tier, after.path, seed)
        look(nursery, tier, after)
        assert not after.problems, f"{names}: {after.problems}"
    assert refused < ROUNDS * factor / 4
