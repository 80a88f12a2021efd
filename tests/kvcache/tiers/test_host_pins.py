"""Arenas that GPUs have registered: nothing is punched under a pin, and no pin keeps memory from others."""

from __future__ import annotations

import os
import random

import pytest

from kvcache.block import Slot
from kvcache.tiers.host import HostTier
from kvcache.tiers.space import Space, slot_arena

UNIT = 64 << 10
UNITS = 16
CAPACITY = UNITS * UNIT
ARENAS = 3


class Rig:
    """Each arena may be pinned. ``ended``: owners whose pins the tier ended, in order."""

    def __init__(self) -> None:
        self.space, self.host = Space(CAPACITY, UNIT), HostTier(CAPACITY, UNIT)
        for number in range(ARENAS):
            assert self.space.add_arena() == self.host.add_arena(f"{number}") == number
        self.slots: list[Slot] = []
        self.pinned: dict[int, tuple[int, int]] = {}
        self.ended: list[int] = []
        self.owners = 0

    def write(self, arena: int, units: int = 1) -> bool:
        """A block of so many units, each byte of them touched. Is there room?"""
        slot = self.space.allocate(arena, units * UNIT)
        self.follow()
        if slot is not None:
            self.host.view(slot, units * UNIT)[:] = b"x" * (units * UNIT)
            self.slots.append(slot)
        return slot is not None

    def free(self, slot: Slot) -> None:
        self.slots.remove(slot)
        self.space.free(slot)
        self.follow()

    def pin(self, arena: int) -> int:
        self.owners += 1
        owner = self.owners
        self.pinned[owner] = arena, self.resident(arena)

        def end() -> None:
            assert self.resident(arena) >= self.pinned.pop(owner)[1], "punched before it was ended"
            self.ended.append(owner)

        self.host.pin(arena, owner, end)
        return owner

    def unpin(self, owner: int) -> None:
        self.host.unpin(owner)
        self.pinned.pop(owner, None)

    def follow(self) -> None:
        self.host.apply(self.space.take_moves())
        self.check()

    def resident(self, arena: int) -> int:
        return os.fstat(self.host.descriptor(arena)).st_blocks * 512

    def check(self) -> None:
        self.space.check()
        self.host.check()
        assert self.host.pin_count == len(self.pinned)
        for owner, (arena, before) in self.pinned.items():
            now = self.resident(arena)
            assert now >= before, "punched under a pin"
            self.pinned[owner] = arena, now


@pytest.fixture
def rig() -> Rig:
    return Rig()


def fill(rig: Rig, arena: int) -> None:
    while rig.write(arena):
        pass


def empty(rig: Rig, arena: int) -> None:
    for slot in [each for each in rig.slots if slot_arena(each) == arena]:
        rig.free(slot)


def test_memory_that_others_need_ends_the_pin_first(rig: Rig) -> None:
    fill(rig, 0)
    mine = [rig.pin(0), rig.pin(0)]
    empty(rig, 0)
    assert rig.resident(0) == CAPACITY
    assert not rig.ended
    rig.write(1)
    assert sorted(rig.ended) == mine
    assert rig.host.ended_pins == 2
    assert rig.resident(0) == CAPACITY - UNIT


def test_memory_is_taken_where_nobody_pins_it(rig: Rig) -> None:
    for arena in (0, 1):
        for _ in range(UNITS // 2):
            rig.write(arena)
    rig.pin(0)
    for arena in (0, 1):
        empty(rig, arena)
    for _ in range(UNITS // 2):
        rig.write(2)
    assert not rig.ended
    assert (rig.resident(0), rig.resident(1)) == (CAPACITY // 2, 0)


def test_one_that_has_ended_by_itself_is_ended_no_more(rig: Rig) -> None:
    fill(rig, 0)
    owner = rig.pin(0)
    rig.unpin(owner)
    rig.unpin(owner)
    empty(rig, 0)
    rig.write(1)
    assert not rig.ended


def test_who_is_alone_may_pin(rig: Rig) -> None:
    assert rig.host.unit_to_pin(0) == UNIT
    rig.write(0)
    assert rig.host.unit_to_pin(0) == UNIT
    assert rig.host.unit_to_pin(1) == 0
    empty(rig, 0)
    assert rig.host.unit_to_pin(1) == UNIT, "what is idle goes to who needs it"


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens(rig: Rig, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(400):
        what = chance.random()
        if what < 0.45:
            rig.write(chance.randrange(ARENAS), chance.choice((1, 1, 3)))
        elif what < 0.85 and rig.slots:
            rig.free(chance.choice(rig.slots))
        elif what < 0.95:
            rig.pin(chance.randrange(ARENAS))
        elif rig.pinned:
            rig.unpin(chance.choice(list(rig.pinned)))
    assert rig.host.ended_pins == len(rig.ended) > 0
    rig.host.close()
