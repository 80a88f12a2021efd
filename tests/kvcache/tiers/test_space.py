"""Extents, size classes and arenas under one budget."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from kvcache.block import Slot
from kvcache.errors import BadInput
from kvcache.tiers.space import CAPACITY_BYTES_MAX, Move, Space, make_slot, slot_arena, slot_offset

UNIT = 1_024


def space_of(units: int, arenas: int = 1) -> Space:
    space = Space(units * UNIT, UNIT)
    assert [space.add_arena() for _ in range(arenas)] == list(range(arenas))
    return space


def one(space: Space, arena: int, block_bytes: int) -> Slot:
    slot = space.allocate(arena, block_bytes)
    assert slot is not None
    return slot


def test_a_slot_is_an_arena_and_an_offset() -> None:
    slot = make_slot(3, 4_096)
    assert (slot_arena(slot), slot_offset(slot)) == (3, 4_096)
    assert slot_offset(make_slot(1, CAPACITY_BYTES_MAX - 64)) == CAPACITY_BYTES_MAX - 64


def test_slots_of_one_size_share_an_extent() -> None:
    space = space_of(2)
    assert [slot_offset(slot) for slot in space.allocate_many(0, 256, 5)] == [0, 256, 512, 768, 1_024]
    assert space.take_moves() == [Move(0, 0, 2 * UNIT, True)]
    space.check()


def test_there_are_no_more_slots_than_fit() -> None:
    space = space_of(2)
    assert len(space.allocate_many(0, 256, 100)) == 8
    assert space.allocate(0, 256) is None
    assert space.allocate(0, 64) is None


def test_an_extent_is_given_back_with_its_last_slot() -> None:
    space = space_of(1, arenas=2)
    first, second = space.allocate_many(0, 512, 2)
    space.free(first)
    assert space.allocate(1, 512) is None
    space.free(second)
    assert space.take_moves() == []
    assert one(space, 1, 128) == make_slot(1, 0)
    assert space.take_moves() == [Move(1, 0, UNIT, True)]


def test_losses_are_told_before_gains() -> None:
    space = space_of(2, arenas=2)
    slot = one(space, 1, 64)
    one(space, 0, 64)
    space.take_moves()
    space.free(slot)
    one(space, 0, 1_024)
    assert space.take_moves() == [Move(1, 0, UNIT, False), Move(0, UNIT, UNIT, True)]
    assert space.take_moves() == []


def test_the_fullest_extent_is_used_first_so_that_others_drain() -> None:
    space = space_of(3)
    slots = space.allocate_many(0, 256, 12)
    for at in (0, 1, 2, 4, 9, 10):  # Extents with 1, 3 and 2 slots used.
        space.free(slots[at])
    assert space.allocate_many(0, 256, 3) == [slots[4], slots[10], slots[9]]
    space.free(slots[3])
    assert space.units_free == 1
    space.check()


def test_a_block_larger_than_a_unit_gets_a_run() -> None:
    space = space_of(4)
    assert slot_offset(one(space, 0, 2 * UNIT)) == 2 * UNIT
    assert slot_offset(one(space, 0, UNIT)) == 0
    assert space.allocate(0, 2 * UNIT) is None
    assert space.units_free == 1
    space.check()


def test_runs_are_long_enough_to_waste_little() -> None:
    """The block of a common model is 2.25 MiB: in runs of 2 units of 2 MiB nearly half would be lost."""
    space = Space(1 << 30, 2 << 20)
    slots = space.allocate_many(space.add_arena(), 9 << 18, 10_000)
    assert len(slots) * (9 << 18) >= 0.85 * (1 << 30)


def test_in_a_small_tier_a_run_takes_no_more_than_it_must() -> None:
    space = space_of(3)
    assert len(space.allocate_many(0, UNIT + 64, 9)) == 1
    assert space.units_free == 1


def test_one_unit_is_in_the_way_of_one_unit_whoever_has_it() -> None:
    space = space_of(1, arenas=2)
    slots = space.allocate_many(1, 256, 2)
    assert sorted(space.in_the_way(0, 512, slots[0])) == slots


def test_neighbours_are_in_the_way_of_a_run() -> None:
    space = space_of(4, arenas=2)
    slots = space.allocate_many(0, UNIT, 4)
    space.free(slots[1])
    assert space.in_the_way(0, 2 * UNIT, slots[0]) == [slots[0]]
    assert sorted(space.in_the_way(0, 2 * UNIT, slots[3])) == slots[2:]
    assert space.in_the_way(0, 2 * UNIT, slots[2]) == [slots[2]]
    assert sorted(space.in_the_way(0, 3 * UNIT, slots[2])) == [slots[0], slots[2]]


def test_another_arena_is_not_in_the_way_when_only_the_place_lacks() -> None:
    space = space_of(6, arenas=2)
    mine = space.allocate_many(0, UNIT, 5)
    other = one(space, 1, UNIT)
    for at in (1, 3):
        space.free(mine[at])
    assert space.units_free == 2
    assert space.allocate(0, 2 * UNIT) is None
    assert space.in_the_way(0, 2 * UNIT, other) == []
    assert space.in_the_way(0, 3 * UNIT, other) == [other]
    assert space.in_the_way(0, 2 * UNIT, mine[4]) == [mine[4]]


def test_slots_are_classed_by_arena_and_size() -> None:
    space = space_of(2, arenas=2)
    slot = one(space, 0, 100)
    assert space.same_class(slot, 0, 128)
    assert not space.same_class(slot, 0, 129)
    assert not space.same_class(slot, 1, 100)


def test_what_is_freed_twice_is_a_bug() -> None:
    space = space_of(1)
    first, _ = space.allocate_many(0, 256, 2)
    space.free(first)
    with pytest.raises(KeyError):
        space.free(first)


@pytest.mark.parametrize(("capacity", "code"), [(UNIT - 1, "too_small"), (1 << 45, "too_large")])
def test_a_capacity_that_cannot_be_used_is_refused(capacity: int, code: str) -> None:
    with pytest.raises(BadInput) as refused:
        Space(capacity, UNIT)
    assert refused.value.code == code


def test_a_block_larger_than_all_is_known_beforehand() -> None:
    assert space_of(2).fits(2 * UNIT)
    assert not space_of(2).fits(2 * UNIT + 1)
    assert space_of(2).allocate(0, 3 * UNIT) is None


@pytest.mark.parametrize("seed", range(4))
def test_slots_never_overlap_and_the_budget_holds(seed: int) -> None:
    random = Random(seed)
    space = space_of(12, arenas=3)
    used: dict[Slot, int] = {}
    granted: set[tuple[int, int]] = set()
    for _ in range(1_000):
        if used and random.random() < 0.5:
            slot = random.choice(sorted(used))
            space.free(slot)
            del used[slot]
        else:
            length = random.choice((64, 192, 512, 1_024, 1_500, 3_000))
            used.update(
                (slot, length)
                for slot in space.allocate_many(random.randrange(3), length, random.randint(1, 4))
            )
        for move in space.take_moves():
            units = {(move.arena, at // UNIT) for at in range(move.offset, move.offset + move.length, UNIT)}
            assert units.isdisjoint(granted) if move.gained else units <= granted
            granted = granted | units if move.gained else granted - units
        assert len(granted) == 12 - space.units_free
        space.check()
        ends = sorted((slot, slot + length) for slot, length in used.items())
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert all((slot_arena(slot), slot_offset(slot) // UNIT) in granted for slot in used)
