"""How the units of a tier are cut into slots: addresses, layouts, extents and size classes.

A slot is an arena and a byte offset in it. A *layout* says what an extent and a slot carry beside the
block: nothing in host memory, nor on a GPU, where it is aligned for wide loads; on NVMe a header each, so
that a file can be read without an index:

    extent  │ header │ slot │ slot │ ... │ slot │ rest │     slot  │ header │ block │ pad │
    offset  └ unit * unit_bytes                                   └ what the slot's number means

Invariants (``SizeClass.check``): an extent has a used slot; free and used slots of an extent are all of
its slots; every extent with a free slot is offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import cast

from kvcache.block import Slot
from kvcache.errors import BadInput

ARENA_SHIFT = 44
CAPACITY_BYTES_MAX = 1 << ARENA_SHIFT
OFFSET_MASK = (1 << ARENA_SHIFT) - 1


def make_slot(arena: int, offset: int) -> Slot:
    return Slot(arena << ARENA_SHIFT | offset)


def slot_arena(slot: Slot) -> int:
    return slot >> ARENA_SHIFT


def slot_offset(slot: Slot) -> int:
    """Byte offset in the arena's memory."""
    return slot & OFFSET_MASK


@dataclass(frozen=True, slots=True)
class Layout:
    """``runs``: may an extent be several units? ``own_budgets``: does each arena have its own units,
    which no other can use (a device), or do all share one budget?"""

    align_bytes: int
    slot_header_bytes: int
    extent_header_bytes: int
    runs: bool
    own_budgets: bool

    def stride(self, block_bytes: int) -> int:
        """From one slot of such blocks to the next."""
        return -(-(self.slot_header_bytes + block_bytes) // self.align_bytes) * self.align_bytes

    def slot_count(self, extent_bytes: int, stride: int) -> int:
        return max(0, extent_bytes - self.extent_header_bytes) // stride

    def waste(self, extent_bytes: int, stride: int) -> int:
        """Bytes of the extent that no slot covers."""
        return extent_bytes - self.slot_count(extent_bytes, stride) * stride


HOST_LAYOUT = Layout(64, 0, 0, runs=True, own_budgets=False)
HBM_LAYOUT = Layout(256, 0, 0, runs=True, own_budgets=True)
NVME_LAYOUT = Layout(4_096, 4_096, 4_096, runs=False, own_budgets=True)


class Extent:
    """A run of units, cut into slots of one class."""

    __slots__ = ("free", "size", "unit", "used")

    def __init__(self, size: SizeClass, unit: int) -> None:
        self.size = size
        self.unit = unit
        # Last to first, so that slots are taken from the front of the extent.
        self.free = size.slots(unit)[::-1]
        self.used: set[Slot] = set()


class SizeClass:
    """The extents of one arena and slot size."""

    __slots__ = ("_layout", "_open", "_unit_bytes", "arena", "extents", "slot_count", "stride", "unit_count")

    def __init__(self, arena: int, stride: int, unit_count: int, unit_bytes: int, layout: Layout) -> None:
        self.arena = arena
        self.stride = stride
        self.unit_count = unit_count
        self.slot_count = layout.slot_count(unit_count * unit_bytes, stride)
        self.extents: dict[int, Extent] = {}
        self._layout = layout
        self._unit_bytes = unit_bytes
        # (-used slots, unit) of extents with a free slot, fullest first. Entries of extents that
        # have changed since are stale; as every change pushes a new one, they are just skipped.
        self._open: list[tuple[int, int]] = []

    def slots(self, unit: int) -> list[Slot]:
        """All slots of an extent that begins at ``unit``, first to last."""
        first = make_slot(self.arena, unit * self._unit_bytes + self._layout.extent_header_bytes)
        return cast("list[Slot]", list(range(first, first + self.slot_count * self.stride, self.stride)))

    def offer(self, extent: Extent) -> None:
        heappush(self._open, (-len(extent.used), extent.unit))

    def fullest(self) -> Extent | None:
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
            assert sorted(extent.used.union(extent.free)) == self.slots(unit)
            assert len(extent.free) + len(extent.used) == self.slot_count
            assert not extent.free or (-len(extent.used), unit) in offered


def by_unit(slots: Sequence[Slot], unit_bytes: int) -> dict[Slot, list[int]]:
    """Places in ``slots`` by arena and unit, put together as a slot's arena and offset are."""
    units: dict[Slot, list[int]] = {}
    places: list[int] = []
    low = high = 0  # Of the unit of the slot before: the next one often lies in it, too.
    for at, slot in enumerate(slots):
        if not low <= slot < high:
            unit, within = divmod(slot_offset(slot), unit_bytes)
            low = slot - within
            high = low + unit_bytes
            places = units.setdefault(make_slot(slot_arena(slot), unit), [])
        places.append(at)
    return units


def check_capacity(capacity_bytes: int, unit_bytes: int, layout: Layout, most: int) -> None:
    """``most``: 0 for no limit. RAISES BadInput (too_small, too_large)."""
    if unit_bytes < layout.align_bytes or capacity_bytes < unit_bytes:
        raise BadInput(
            "too_small",
            f"a tier of {capacity_bytes} bytes",
            f"it is handed out in units of {unit_bytes}",
            "give it at least one unit",
        )
    if most and capacity_bytes > most:
        raise BadInput(
            "too_large",
            f"a tier of {capacity_bytes} bytes",
            f"the limit is {most}",
            "run several nodes",
        )
