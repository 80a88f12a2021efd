"""Who may use which bytes of a tier: extents handed to size classes, several arenas under one budget.

The capacity is cut into *units*. A *size class* is an arena (one trust domain's memory) and a slot
size. Each class takes *extents*, runs of whole units cut into equal slots, and gives an extent back as
soon as none of its slots is used, so that namespaces with different block sizes share the memory
without fragmenting it for good. Slots are taken from the fullest extent that has one free, so that the
others drain.

    unit free ── allocate ──► extent of one class: slots free | used ── last slot freed ──► unit free

An arena's address space is as large as the capacity, but the units in use in all arenas together
never exceed it. Which units an arena gained or lost is told by ``take_moves``.

Invariants (``check``): extents do not overlap; an extent has a used slot; free and used slots of an
extent are all of its slots; units in use plus units free are the units there are.

The sum: taking or freeing a slot costs under 1 us; a run of free units is found by one ``bytearray``
search, about 10 us for 100,000 units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from kvcache.block import Slot
from kvcache.errors import BadInput

ARENA_SHIFT = 44
CAPACITY_BYTES_MAX = 1 << ARENA_SHIFT
SLOT_ALIGN_BYTES = 64
WASTE_PARTS = 8
RUN_UNITS_FACTOR = 8

_OFFSET_MASK = (1 << ARENA_SHIFT) - 1
_FREE = b"\0"
_USED = b"\1"


def make_slot(arena: int, offset: int) -> Slot:
    return Slot(arena << ARENA_SHIFT | offset)


def slot_arena(slot: Slot) -> int:
    return slot >> ARENA_SHIFT


def slot_offset(slot: Slot) -> int:
    """Byte offset in the arena's memory."""
    return slot & _OFFSET_MASK


@dataclass(frozen=True, slots=True)
class Move:
    """``length`` bytes of an arena, from ``offset``, that it gained or lost."""

    arena: int
    offset: int
    length: int
    gained: bool


class _Extent:
    """A run of units, cut into slots of one class."""

    __slots__ = ("free", "size", "unit", "used")

    def __init__(self, size: _Class, unit: int, unit_bytes: int) -> None:
        self.size = size
        self.unit = unit
        first = make_slot(size.arena, unit * unit_bytes)
        # Last to first, so that slots are taken from the front of the extent.
        self.free = [Slot(first + at * size.stride) for at in reversed(range(size.slot_count))]
        self.used: set[Slot] = set()


class _Class:
    """The extents of one arena and slot size."""

    __slots__ = ("_open", "arena", "extents", "slot_count", "stride", "unit_count")

    def __init__(self, arena: int, stride: int, unit_count: int, slot_count: int) -> None:
        self.arena = arena
        self.stride = stride
        self.unit_count = unit_count
        self.slot_count = slot_count
        self.extents: dict[int, _Extent] = {}
        # (-used slots, unit) of extents with a free slot, fullest first. Entries of extents that
        # have changed since are stale; as every change pushes a new one, they are just skipped.
        self._open: list[tuple[int, int]] = []

    def offer(self, extent: _Extent) -> None:
        heappush(self._open, (-len(extent.used), extent.unit))

    def fullest(self) -> _Extent | None:
        """Takes the extent off the heap: ``offer`` it again if it still has a free slot."""
        while self._open:
            used, unit = heappop(self._open)
            extent = self.extents.get(unit)
            if extent is not None and extent.free and len(extent.used) == -used:
                return extent
        return None

    def check(self) -> None:
        offered = set(self._open)
        for unit, extent in self.extents.items():
            assert extent.unit == unit
            assert extent.used
            assert len(extent.free) + len(extent.used) == self.slot_count
            assert not extent.used.intersection(extent.free)
            assert not extent.free or (-len(extent.used), unit) in offered


class Space:
    """Decides only; touches no memory. One owner."""

    def __init__(self, capacity_bytes: int, unit_bytes: int) -> None:
        """RAISES BadInput when the capacity is under one unit or beyond what a slot can address."""
        if unit_bytes < SLOT_ALIGN_BYTES or capacity_bytes < unit_bytes:
            raise BadInput(
                "too_small",
                f"a tier of {capacity_bytes} bytes",
                f"it is handed out in units of {unit_bytes}",
                "give it at least one unit",
            )
        if capacity_bytes > CAPACITY_BYTES_MAX:
            raise BadInput(
                "too_large",
                f"a tier of {capacity_bytes} bytes",
                f"the limit is {CAPACITY_BYTES_MAX}",
                "run several nodes",
            )
        self.unit_bytes = unit_bytes
        self.unit_count = capacity_bytes // unit_bytes
        self.capacity_bytes = self.unit_count * unit_bytes
        self._units_free = self.unit_count
        self._maps: list[bytearray] = []  # one an arena: which units it uses
        self._owners: list[dict[int, _Extent]] = []  # one an arena: unit -> its extent
        self._classes: dict[tuple[int, int], _Class] = {}
        self._moves: dict[tuple[int, int], bool] = {}

    @property
    def units_free(self) -> int:
        return self._units_free

    def add_arena(self) -> int:
        self._maps.append(bytearray(self.unit_count))
        self._owners.append({})
        return len(self._maps) - 1

    def fits(self, block_bytes: int) -> bool:
        """Could one such block be held if the tier were empty?"""
        return self._stride(block_bytes) <= self.capacity_bytes

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
        return inside + self._units_free // size.unit_count * size.slot_count

    def free(self, slot: Slot) -> None:
        """REQUIRES: allocated, and not freed since."""
        extent = self._extent(slot)
        extent.used.remove(slot)
        extent.free.append(slot)
        if extent.used:
            extent.size.offer(extent)
        else:
            self._give_back(extent)

    def same_class(self, slot: Slot, arena: int, block_bytes: int) -> bool:
        """Would freeing ``slot`` make room for one such block?"""
        return slot >> ARENA_SHIFT == arena and self._extent(slot).size.stride == self._stride(block_bytes)

    def in_the_way(self, arena: int, block_bytes: int, slot: Slot) -> list[Slot]:
        """The used slots that lie, with ``slot``, where an extent for such blocks could be made.

        Freeing them all brings that extent nearer: its units lie side by side, or the budget has more.
        Empty when freeing the extent of ``slot`` would not help. REQUIRES: ``slot`` is used, and
        ``allocate`` found no room."""
        wanted = self._class(arena, block_bytes).unit_count
        extent = self._extent(slot)
        if extent.size.arena == arena:
            return self._window(arena, wanted, extent)
        return list(extent.used) if self._units_free < wanted else []

    def used_slots(self) -> list[Slot]:
        """Every slot that is allocated just now."""
        sizes = self._classes.values()
        return [slot for size in sizes for extent in size.extents.values() for slot in extent.used]

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
        units_used = 0
        for arena, (units, owners) in enumerate(zip(self._maps, self._owners, strict=True)):
            assert [unit for unit in range(self.unit_count) if units[unit]] == sorted(owners)
            for unit, extent in owners.items():
                assert extent.size.arena == arena
                assert 0 <= unit - extent.unit < extent.size.unit_count
            units_used += len(owners)
        assert units_used + self._units_free == self.unit_count
        assert self._units_free >= 0
        for size in self._classes.values():
            size.check()
        assert sum(len(size.extents) * size.unit_count for size in self._classes.values()) == units_used

    # --- classes and extents --------------------------------------------------------------------

    def _stride(self, block_bytes: int) -> int:
        return -(-block_bytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES

    def _class(self, arena: int, block_bytes: int) -> _Class:
        assert block_bytes > 0
        stride = self._stride(block_bytes)
        size = self._classes.get((arena, stride))
        if size is None:
            units = self._run_units(stride)
            size = _Class(arena, stride, units, units * self.unit_bytes // stride)
            self._classes[arena, stride] = size
        return size

    def _run_units(self, stride: int) -> int:
        """Units an extent: the fewest that waste no more than an eighth, else those that waste least."""
        fewest = -(-stride // self.unit_bytes)
        most = max(fewest, min(fewest * RUN_UNITS_FACTOR, self.unit_count // WASTE_PARTS))
        best = fewest
        for units in range(fewest, most + 1):
            length = units * self.unit_bytes
            if (length % stride) * WASTE_PARTS <= length:
                return units
            if (length % stride) * best < (best * self.unit_bytes % stride) * units:
                best = units
        return best

    def _extent(self, slot: Slot) -> _Extent:
        return self._owners[slot >> ARENA_SHIFT][(slot & _OFFSET_MASK) // self.unit_bytes]

    def _grow(self, size: _Class) -> _Extent | None:
        if self._units_free < size.unit_count:
            return None
        units = self._maps[size.arena]
        # Runs from the far end and single units from the near one, so that they keep out of each other's way.
        run = _FREE * size.unit_count
        unit = units.find(run) if size.unit_count == 1 else units.rfind(run)
        if unit < 0:
            return None
        extent = _Extent(size, unit, self.unit_bytes)
        size.extents[unit] = extent
        self._claim(extent, used=True)
        return extent

    def _give_back(self, extent: _Extent) -> None:
        del extent.size.extents[extent.unit]
        self._claim(extent, used=False)

    def _claim(self, extent: _Extent, used: bool) -> None:
        arena, count = extent.size.arena, extent.size.unit_count
        end = extent.unit + count
        self._maps[arena][extent.unit : end] = (_USED if used else _FREE) * count
        self._units_free += -count if used else count
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

    # --- room for runs --------------------------------------------------------------------------

    def _window(self, arena: int, wanted: int, extent: _Extent) -> list[Slot]:
        """The used slots in the run of ``wanted`` units that touches ``extent`` and is emptiest."""
        first = max(0, extent.unit + 1 - wanted)
        last = min(extent.unit + extent.size.unit_count - 1, self.unit_count - wanted)
        units = self._maps[arena]
        start = min(range(first, last + 1), key=lambda at: units[at : at + wanted].count(_USED))
        inside = self._inside(arena, start, wanted)
        return [slot for each in inside for slot in each.used]

    def _inside(self, arena: int, start: int, count: int) -> Iterator[_Extent]:
        seen: set[int] = set()
        for unit in range(start, start + count):
            extent = self._owners[arena].get(unit)
            if extent is not None and extent.unit not in seen:
                seen.add(extent.unit)
                yield extent
