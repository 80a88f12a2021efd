"""Units that transports register: each while it has pages, and no longer."""

from __future__ import annotations

import ctypes
import mmap
import random

import pytest

from kvcache.block import Slot
from kvcache.tiers.host import HostTier
from kvcache.tiers.space import Space

UNIT = 64 << 10
UNITS = 16
CAPACITY = UNITS * UNIT
ARENAS = 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


class Card:
    """As a network card: whatever it is told of gets pages, and it goes on with those."""

    def __init__(self) -> None:
        self.views: dict[int, memoryview] = {}
        self.told = 0

    def register(self, memory: memoryview) -> None:
        assert len(memory) == UNIT
        start = start_of(memory)
        assert start not in self.views, "registered twice"
        for at in range(0, UNIT, mmap.PAGESIZE):
            memory[at] = memory[at]
        self.views[start] = memory
        self.told += 1

    def forget(self, memory: memoryview) -> None:
        assert self.views.pop(start_of(memory)) is memory
        assert has_pages(memory), "told too late"

    def check(self) -> None:
        assert all(has_pages(memory) for memory in self.views.values()), "its pages went"
        assert len(self.views) <= UNITS, "it holds more memory than there is"

    def knows(self, memory: memoryview) -> bool:
        starts = range(start_of(memory), start_of(memory) + len(memory), UNIT)
        return all(start in self.views for start in starts)


def start_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def has_pages(memory: memoryview) -> bool:
    found = ctypes.create_string_buffer(len(memory) // mmap.PAGESIZE)
    assert _libc.mincore(start_of(memory), len(memory), found) == 0
    return all(page & 1 for page in found.raw)


class Rig:
    def __init__(self) -> None:
        self.card = Card()
        self.space = Space(CAPACITY, UNIT)
        self.host = HostTier(CAPACITY, UNIT, registrar=self.card)
        for number in range(ARENAS):
            assert self.space.add_arena() == self.host.add_arena(f"{number}") == number
        self.slots: dict[Slot, int] = {}

    def write(self, arena: int, units: int = 1) -> Slot | None:
        slot = self.space.allocate(arena, units * UNIT)
        if slot is not None:
            self.slots[slot] = units * UNIT
        self.follow()
        return slot

    def free(self, slot: Slot) -> None:
        del self.slots[slot]
        self.space.free(slot)
        self.follow()

    def follow(self) -> None:
        self.host.apply(self.space.take_moves())
        self.host.check()
        self.card.check()
        for slot, length in self.slots.items():
            assert self.card.knows(self.host.view(slot, length))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_an_arena_without_blocks_is_not_registered(rig: Rig) -> None:
    rig.host.populate(0)
    assert not rig.card.views, "it may all go to another arena"


def test_a_unit_that_comes_back_is_registered_anew(rig: Rig) -> None:
    slot = rig.write(0)
    assert slot is not None
    rig.free(slot)
    assert len(rig.card.views) == 1, "idle: it keeps its pages"
    others = [rig.write(1) for _ in range(UNITS)]
    assert None not in others
    assert len(rig.card.views) == UNITS
    for other in others:
        assert other is not None
        rig.free(other)
    assert rig.write(0) == slot
    assert rig.card.told == UNITS + 2


def test_what_is_idle_and_used_again_is_registered_once(rig: Rig) -> None:
    for _ in range(3):
        slot = rig.write(0)
        assert slot is not None
        rig.free(slot)
    assert rig.card.told == 1


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens(rig: Rig, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        if chance.random() < 0.5:
            rig.write(chance.randrange(ARENAS), chance.choice((1, 1, 3)))
        elif rig.slots:
            rig.free(chance.choice(list(rig.slots)))
    assert rig.card.told > UNITS
    rig.host.close()
