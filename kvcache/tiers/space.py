"""Who may use which bytes of a tier: extents handed to size classes, several arenas.

The capacity is cut into *units*. A *size class* is an arena (one trust domain's memory, or one device)
and a slot size. Each class takes *extents*, runs of whole units cut into equal slots (``extents``), and
gives an extent back as soon as none of its slots is used, so that namespaces with different block sizes
share the memory without fragmenting it for good. Slots are taken from the fullest extent that has one
free, so that the others drain.

    unit free ── allocate, restore ──► extent of one class: slots free | used ── last slot freed ──► unit free

With one budget for all, an arena's address space is as large as the capacity, but the units in use in
all arenas together never exceed it. With own budgets each arena is as large as its capacity, and what
one frees is no help to another. Which units an arena gained or lost is told by ``take_moves``.

Invariants (``check``): extents do not overlap; those of ``extents``; units in use plus units free are
the units there are.

The sum: taking or freeing a slot costs under 1 us; a run of free units is found by one ``bytearray``
search, about 10 us for 100,000 units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvcache.block import Slot
from kvcache.tiers.extents import (
    ARENA_SHIFT,
    CAPACITY_BYTES_MAX,
    HBM_LAYOUT,
    HOST_LAYOUT,
    NVME_LAYOUT,
    OFFSET_MASK,
    Extent,
    Layout,
    SizeClass,
    by_unit,
    check_capacity,
    make_slot,
    slot_arena,
    slot_offset,
)

__all__ = [
    "CAPACITY_BYTES_MAX",
    "HBM_LAYOUT",
    "HOST_LAYOUT",
    "NVME_LAYOUT",
    "Layout",
    "Move",
    "Space",
    "make_slot",
    "slot_arena",
    "slot_offset",
]

WASTE_PARTS = 8
RUN_UNITS_FACTOR = 8

_FREE = b"\0"
_USED = b"\1"


@dataclass(frozen=True, slots=True)
class Move:
    """``length`` bytes of an arena, from ``offset``, that it gained or lost."""

    arena: int
    offset: int
    length: int
    gained: bool


class Space:
    """Decides only; touches no memory. One owner."""

    def __init__(self, capacity_bytes: int, unit_bytes: int, layout: Layout = HOST_LAYOUT) -> None:
        """``capacity_bytes`` is that of all arenas together.

        RAISES BadInput when the capacity is under one unit or beyond what a slot can address."""
        check_capacity(capacity_bytes, unit_bytes, layout, 0 if layout.own_budgets else CAPACITY_BYTES_MAX)
        self.layout = layout
        self.unit_bytes = unit_bytes
        self.unit_count = capacity_bytes // unit_bytes
        self.capacity_bytes = self.unit_count * unit_bytes
        self._units_free: list[int] = [] if layout.own_budgets else [self.unit_count]
        self._maps: list[bytearray] = []  # one an arena: which units it uses
        self._owners: list[dict[int, Extent]] = []  # one an arena: unit -> its extent
        self._classes: dict[tuple[int, int], SizeClass] = {}
        self._moves: dict[tuple[int, int], bool] = {}

    @property
    def units_free(self) -> int:
        return sum(self._units_free)

    def add_arena(self, capacity_bytes: int | None = None) -> int:
        """``capacity_bytes``: its own budget, REQUIRED where arenas have their own, and senseless else.

        RAISES BadInput as the constructor does."""
        assert (capacity_bytes is not None) == self.layout.own_budgets
        unit_count = self.unit_count
        if capacity_bytes is not None:
            check_capacity(capacity_bytes, self.unit_bytes, self.layout, CAPACITY_BYTES_MAX)
            unit_count = capacity_bytes // self.unit_bytes
            self._units_free.append(unit_count)
        self._maps.append(bytearray(unit_count))
        self._owners.append({})
        return len(self._maps) - 1

    def fits(self, arena: int, block_bytes: int) -> bool:
        """Could the arena hold one such block if the tier were empty?"""
        most = len(self._maps[arena]) if self.layout.runs else 1
        return self.layout.slot_count(most * self.unit_bytes, self.layout.stride(block_bytes)) > 0

    def allocate(self, arena: int, block_bytes: int) -> Slot | None:
        slots = self.allocate_many(arena, block_bytes, 1)
        return slots[0] if slots else None

    def allocate_many(self, arena: int, block_bytes: int, count: int) -> list[Slot]:
        """As many slots as there is room for without anything going, at most ``count``."""
        size = self._class(arena, block_bytes)
        slots: list[Slot] = []
        while len(slots) < count:
            extent = size.fullest() or self._grow(size)
            if extent is None:
                break
            taken = extent.free[len(slots) - count :]
            del extent.free[len(slots) - count :]
            taken.reverse()
            extent.used.update(taken)
            slots += taken
            if extent.free:
                size.offer(extent)
        return slots

    def room(self, arena: int, block_bytes: int) -> int:
        """How many more such blocks could be allocated, if no run of units is broken up."""
        size = self._class(arena, block_bytes)
        inside = sum(len(extent.free) for extent in size.extents.values())
        return inside + self._units_free[self._budget(arena)] // size.unit_count * size.slot_count

    def free(self, slot: Slot) -> None:
        """REQUIRES: allocated, and not freed since."""
        extent = self._extent(slot)
        extent.used.remove(slot)
        extent.free.append(slot)
        if extent.used:
            extent.size.offer(extent)
        else:
            self._give_back(extent)

    def restore(self, slots: Sequence[Slot], block_bytes: Sequence[int]) -> list[int]:
        """Mark these as used, each by a block of that size, as they were when the tier was last in use.

        Which, by their places in ``slots``, could not be had: out of range, not where a slot of that
        size begins, in a unit that is another class's, or used already. REQUIRES: no runs."""
        assert not self.layout.runs
        strides = {each: self.layout.stride(each) for each in set(block_bytes)}
        refused: list[int] = []
        for unit, places in by_unit(slots, self.unit_bytes).items():
            first = block_bytes[places[0]]
            extent = self._at_unit(slot_arena(unit), slot_offset(unit), first)
            if extent is None:
                refused += places
                continue
            if len(strides) > 1:
                others = [at for at in places if strides[block_bytes[at]] != extent.size.stride]
                refused += others
                places = [at for at in places if at not in others] if others else places
            elif strides[first] != extent.size.stride:
                refused += places
                continue
            refused += self._restore_unit(extent, places, slots)
        return refused

    def free_all(self, slots: Sequence[Slot]) -> None:
        """As many ``free``, in a fifth of the time."""
        for unit, places in by_unit(slots, self.unit_bytes).items():
            extent = self._owners[slot_arena(unit)][slot_offset(unit)]
            freed = [slots[at] for at in places]
            extent.used.difference_update(freed)
            extent.free += freed
            assert len(extent.used) + len(extent.free) == extent.size.slot_count
            if extent.used:
                extent.size.offer(extent)
            else:
                self._give_back(extent)

    def same_class(self, slot: Slot, arena: int, block_bytes: int) -> bool:
        """Would freeing ``slot`` make room for one such block?"""
        return slot >> ARENA_SHIFT == arena and self._extent(slot).size.stride == self.layout.stride(
            block_bytes
        )

    def in_the_way(self, arena: int, block_bytes: int, slot: Slot) -> list[Slot]:
        """The used slots that lie, with ``slot``, where an extent for such blocks could be made.

        Freeing them all brings that extent nearer: its units lie side by side, or the budget has more.
        Empty when freeing the extent of ``slot`` would not help. REQUIRES: ``slot`` is used, and
        ``allocate`` found no room."""
        wanted = self._class(arena, block_bytes).unit_count
        extent = self._extent(slot)
        if extent.size.arena == arena:
            return self._window(arena, wanted, extent)
        if self.layout.own_budgets:
            return []
        return list(extent.used) if self._units_free[0] < wanted else []

    def used_slots(self) -> list[Slot]:
        """Every slot that is allocated just now."""
        sizes = self._classes.values()
        return [slot for size in sizes for extent in size.extents.values() for slot in extent.used]

    def used_in(self, arena: int) -> Iterator[Slot]:
        """Those of one arena, a segment after the other. The space must not change meanwhile."""
        for (each, _), size in self._classes.items():
            if each == arena:
                for extent in size.extents.values():
                    yield from extent.used

    def take_moves(self) -> list[Move]:
        """What each arena lost and gained since the last call, losses first. What an arena lost and
        gained again in between is not told."""
        moves: list[Move] = []
        for (arena, unit), gained in sorted(self._moves.items(), key=lambda item: (item[1], item[0])):
            offset = unit * self.unit_bytes
            last = moves[-1] if moves else None
            if last and last.arena == arena and last.gained == gained and last.offset + last.length == offset:
                moves[-1] = Move(arena, last.offset, last.length + self.unit_bytes, gained)
            else:
                moves.append(Move(arena, offset, self.unit_bytes, gained))
        self._moves.clear()
        return moves

    def check(self) -> None:
        """Assert every invariant."""
        units_used = [0] * len(self._units_free)
        for arena, (units, owners) in enumerate(zip(self._maps, self._owners, strict=True)):
            assert [unit for unit in range(len(units)) if units[unit]] == sorted(owners)
            for unit, extent in owners.items():
                assert extent.size.arena == arena
                assert 0 <= unit - extent.unit < extent.size.unit_count
            units_used[self._budget(arena)] += len(owners)
        budgets = [len(units) for units in self._maps] if self.layout.own_budgets else [self.unit_count]
        for used, free, budget in zip(units_used, self._units_free, budgets, strict=True):
            assert free >= 0
            assert used + free == budget
        for size in self._classes.values():
            size.check()
        held = sum(len(size.extents) * size.unit_count for size in self._classes.values())
        assert held == sum(units_used)

    # --- classes and extents --------------------------------------------------------------------

    def _budget(self, arena: int) -> int:
        return arena if self.layout.own_budgets else 0

    def _class(self, arena: int, block_bytes: int) -> SizeClass:
        assert block_bytes > 0
        stride = self.layout.stride(block_bytes)
        size = self._classes.get((arena, stride))
        if size is None:
            units = self._run_units(arena, stride) if self.layout.runs else 1
            size = SizeClass(arena, stride, units, self.unit_bytes, self.layout)
            self._classes[arena, stride] = size
        return size

    def _run_units(self, arena: int, stride: int) -> int:
        """Units an extent: the fewest that waste no more than an eighth, else those that waste least."""
        fewest = -(-(stride + self.layout.extent_header_bytes) // self.unit_bytes)
        most = max(fewest, min(fewest * RUN_UNITS_FACTOR, len(self._maps[arena]) // WASTE_PARTS))
        best, waste = fewest, self.layout.waste
        for units in range(fewest, most + 1):
            length = units * self.unit_bytes
            if waste(length, stride) * WASTE_PARTS <= length:
                return units
            if waste(length, stride) * best < waste(best * self.unit_bytes, stride) * units:
                best = units
        return best

    def _extent(self, slot: Slot) -> Extent:
        return self._owners[slot >> ARENA_SHIFT][(slot & OFFSET_MASK) // self.unit_bytes]

    def _grow(self, size: SizeClass) -> Extent | None:
        if self._units_free[self._budget(size.arena)] < size.unit_count or not size.slot_count:
            return None
        units = self._maps[size.arena]
        # Runs from the far end and single units from the near one, so that they keep out of each other's way.
        run = _FREE * size.unit_count
        unit = units.find(run) if size.unit_count == 1 else units.rfind(run)
        if unit < 0:
            return None
        extent = Extent(size, unit)
        size.extents[unit] = extent
        self._claim(extent, used=True)
        return extent

    def _give_back(self, extent: Extent) -> None:
        del extent.size.extents[extent.unit]
        self._claim(extent, used=False)

    def _claim(self, extent: Extent, used: bool) -> None:
        arena, count = extent.size.arena, extent.size.unit_count
        end = extent.unit + count
        self._maps[arena][extent.unit : end] = (_USED if used else _FREE) * count
        self._units_free[self._budget(arena)] += -count if used else count
        owners = self._owners[arena]
        for unit in range(extent.unit, end):
            if used:
                owners[unit] = extent
            else:
                del owners[unit]
            if self._moves.get((arena, unit), used) != used:
                del self._moves[arena, unit]
            else:
                self._moves[arena, unit] = used

    # --- restoring ------------------------------------------------------------------------------

    def _at_unit(self, arena: int, unit: int, block_bytes: int) -> Extent | None:
        """The extent there, or a new one for such blocks that is not claimed yet."""
        if not 0 <= arena < len(self._maps) or unit >= len(self._maps[arena]):
            return None
        return self._owners[arena].get(unit) or Extent(self._class(arena, block_bytes), unit)

    def _restore_unit(self, extent: Extent, places: list[int], slots: Sequence[Slot]) -> list[int]:
        """The places refused. REQUIRES: all are of the extent's class."""
        free = set(extent.free)
        taken = {slots[at] for at in places}
        refused: list[int] = []
        if len(taken) < len(places) or not taken <= free:
            taken.clear()
            for at in places:
                if slots[at] in free and slots[at] not in taken:
                    taken.add(slots[at])
                else:
                    refused.append(at)
        if taken and not extent.used:
            extent.size.extents[extent.unit] = extent
            self._claim(extent, used=True)
        extent.used |= taken
        extent.free = [slot for slot in extent.free if slot not in taken]
        if extent.used and extent.free:
            extent.size.offer(extent)
        return refused

    # --- room for runs --------------------------------------------------------------------------

    def _window(self, arena: int, wanted: int, extent: Extent) -> list[Slot]:
        """The used slots in the run of ``wanted`` units that touches ``extent`` and is emptiest."""
        first = max(0, extent.unit + 1 - wanted)
        units = self._maps[arena]
        last = min(extent.unit + extent.size.unit_count - 1, len(units) - wanted)
        start = min(range(first, last + 1), key=lambda at: units[at : at + wanted].count(_USED))
        inside = self._inside(arena, start, wanted)
        return [slot for each in inside for slot in each.used]

    def _inside(self, arena: int, start: int, count: int) -> Iterator[Extent]:
        seen: set[int] = set()
        for unit in range(start, start + count):
            extent = self._owners[arena].get(unit)
            if extent is not None and extent.unit not in seen:
                seen.add(extent.unit)
                yield extent
