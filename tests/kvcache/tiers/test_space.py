"""Extents, size classes and arenas under one budget."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from kvcache.block import Slot
from kvcache.errors import BadInput
from kvcache.tiers import nvme_format
from kvcache.tiers.space import (
    CAPACITY_BYTES_MAX,
    HBM_LAYOUT,
    NVME_LAYOUT,
    Move,
    Space,
    make_slot,
    slot_arena,
    slot_offset,
)

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
    assert space_of(2).fits(0, 2 * UNIT)
    assert not space_of(2).fits(0, 2 * UNIT + 1)
    assert space_of(2).allocate(0, 3 * UNIT) is None


def test_a_block_larger_than_one_arena_is_known_beforehand() -> None:
    """What other arenas have of their own is no room for it, and no measure for its extents."""
    sizes = (1, 2, 12)
    space = Space(sum(sizes) * UNIT, UNIT, HBM_LAYOUT)
    for count in sizes:
        space.add_arena(count * UNIT)
    for arena, count in enumerate(sizes):
        assert space.fits(arena, count * UNIT)
        assert not space.fits(arena, count * UNIT + 1)
        assert space.allocate(arena, count * UNIT + 1) is None
        assert space.allocate(arena, count * UNIT) is not None
    space.check()


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


# --- NVMe: headers, one unit an extent, a budget an arena ---------------------------------------

SEGMENT = 64 << 10
PAYLOAD = 10_000
STRIDE = 16_384  # 4,096 of header and 10,000 of payload, rounded up to 4 KiB


def devices(*units: int, unit_bytes: int = SEGMENT) -> Space:
    space = Space(sum(units) * unit_bytes, unit_bytes, NVME_LAYOUT)
    assert [space.add_arena(count * unit_bytes) for count in units] == list(range(len(units)))
    return space


@pytest.mark.parametrize("count", [1, 2, 63])
@pytest.mark.parametrize("block_bytes", [1, 4_096, 4_097, PAYLOAD, 2 << 20])
def test_a_segment_holds_its_header_and_whole_strides(count: int, block_bytes: int) -> None:
    """Off by one header, the last slot would run over the end of the file, or one would be lost."""
    stride = -(-(block_bytes + 4_096) // 4_096) * 4_096
    exact = devices(1, unit_bytes=4_096 + count * stride)
    slots = exact.allocate_many(0, block_bytes, count + 1)
    assert [slot_offset(slot) for slot in slots] == [4_096 + at * stride for at in range(count)]
    short = devices(1, unit_bytes=4_096 + count * stride - 1)
    assert len(short.allocate_many(0, block_bytes, count + 1)) == count - 1
    assert short.fits(0, block_bytes) == (count > 1)
    for space in (exact, short):
        space.check()


def test_slots_and_headers_are_what_the_files_say() -> None:
    for block_bytes in (1, 4_095, 4_096, 4_097, PAYLOAD, 2 << 20):
        assert NVME_LAYOUT.stride(block_bytes) == nvme_format.stride_of(block_bytes)
        for segment_bytes in (1 << 20, 64 << 20, (64 << 20) + 4_096):
            stride = NVME_LAYOUT.stride(block_bytes)
            expected = nvme_format.slots_in(segment_bytes, stride)
            assert NVME_LAYOUT.slot_count(segment_bytes, stride) == expected


def test_slots_of_several_segments_do_not_overlap() -> None:
    space = devices(3)
    slots = sorted(space.allocate_many(0, PAYLOAD, 100))
    assert len(slots) == 9
    assert all(later - earlier >= STRIDE for earlier, later in pairwise(slots))
    assert all(slot_offset(slot) // SEGMENT == (slot_offset(slot) + STRIDE - 1) // SEGMENT for slot in slots)


def test_a_block_larger_than_a_segment_does_not_fit() -> None:
    space = devices(4)
    assert space.fits(0, SEGMENT - 8_192)
    assert not space.fits(0, SEGMENT - 8_191)
    assert space.allocate(0, SEGMENT) is None
    space.check()


def test_a_device_has_its_own_budget() -> None:
    space = devices(1, 2)
    assert len(space.allocate_many(0, PAYLOAD, 100)) == 3
    assert space.room(0, PAYLOAD) == 0
    assert space.room(1, PAYLOAD) == 6
    other = one(space, 1, PAYLOAD)
    assert space.allocate(0, PAYLOAD) is None
    assert space.in_the_way(0, 2 * PAYLOAD, other) == []
    assert space.units_free == 1
    space.check()


def test_an_arena_needs_a_whole_segment_and_an_address_for_each() -> None:
    space = Space(1 << 45, 64 << 20, NVME_LAYOUT)
    for capacity in ((64 << 20) - 1, CAPACITY_BYTES_MAX + 1):
        with pytest.raises(BadInput):
            space.add_arena(capacity)
    assert space.add_arena(CAPACITY_BYTES_MAX) == 0


def test_what_was_restored_is_used_and_the_rest_is_free() -> None:
    first = devices(2, 2)
    kept = [*first.allocate_many(0, PAYLOAD, 4), *first.allocate_many(1, 40_000, 1)]
    space = devices(2, 2)
    assert space.restore(kept, [PAYLOAD] * 4 + [40_000]) == []
    assert sorted(space.used_slots()) == sorted(kept)
    assert [move.length for move in space.take_moves()] == [2 * SEGMENT, SEGMENT]
    assert len(space.allocate_many(0, PAYLOAD, 9)) == 2
    space.check()
    for slot in kept:
        space.free(slot)
    space.check()


@pytest.mark.parametrize(
    ("slot", "block_bytes"),
    [
        (make_slot(0, 4_096), PAYLOAD),  # used already
        (make_slot(0, 4_096 + STRIDE), 4_096),  # another class's unit
        (make_slot(0, SEGMENT), PAYLOAD),  # the segment's header
        (make_slot(0, SEGMENT + 4_096 + 512), PAYLOAD),  # between two slots
        (make_slot(0, SEGMENT + 4_096 + 3 * STRIDE), PAYLOAD),  # over the segment's end
        (make_slot(0, 2 * SEGMENT + 4_096), PAYLOAD),  # beyond the arena
        (make_slot(1, 4_096), PAYLOAD),  # no such arena
        (make_slot(0, SEGMENT + 4_096), SEGMENT),  # larger than a segment
    ],
)
def test_what_cannot_be_restored_is_refused_and_takes_nothing(slot: Slot, block_bytes: int) -> None:
    space = devices(2)
    assert space.restore([make_slot(0, 4_096)], [PAYLOAD]) == []
    assert space.restore([make_slot(0, 4_096 + STRIDE), slot], [PAYLOAD, block_bytes]) == [1]
    assert space.units_free == 1
    assert len(space.used_slots()) == 2
    space.check()


def test_a_free_place_in_another_class_is_refused() -> None:
    space = devices(1)
    space.restore([make_slot(0, 4_096 + STRIDE)], [PAYLOAD])
    assert space.restore([make_slot(0, 4_096)], [4_096]) == [0]
    assert len(space.allocate_many(0, PAYLOAD, 9)) == 2
    space.check()


def test_of_two_that_claim_one_slot_the_first_has_it() -> None:
    space = devices(1)
    assert space.restore([make_slot(0, 4_096)] * 2, [PAYLOAD] * 2) == [1]
    space.check()


@pytest.mark.parametrize("seed", range(4))
def test_devices_taken_freed_and_restored_never_overlap(seed: int) -> None:
    random = Random(seed)
    sizes = (1, 4_096, PAYLOAD, 30_000, 50_000)
    space, used = devices(3, 2), dict[Slot, int]()
    for _ in range(400):
        if used and random.random() < 0.5:
            slot = random.choice(sorted(used))
            space.free(slot)
            del used[slot]
        else:
            length = random.choice(sizes)
            taken = space.allocate_many(random.randrange(2), length, random.randint(1, 3))
            used.update((slot, length) for slot in taken)
        space.check()
        ends = sorted((slot, slot + 4_096 + length) for slot, length in used.items())
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    again = devices(3, 2)
    order = random.sample(sorted(used), len(used))
    assert again.restore(order, [used[slot] for slot in order]) == []
    assert sorted(again.used_slots()) == sorted(used)
    assert again.units_free == space.units_free
    again.check()
