"""The memory and the disks of ``ledger_model``: byte arrays that are used only where the space granted it.

A slot is filled whole, its header included, with one number; two that overlap spoil one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvcache.block import Slot
from kvcache.tiers.space import HOST_LAYOUT, NVME_LAYOUT, Layout, Move, Space, slot_arena, slot_offset

NAMESPACES = "mnop"


@dataclass(frozen=True, slots=True)
class World:
    """Two arenas with so many units each, or both together; ``sizes``: namespace -> arena, block bytes."""

    layout: Layout
    unit_bytes: int
    units: tuple[int, int]
    sizes: Mapping[str, tuple[int, int]]

    def space(self) -> Space:
        own = self.layout.own_budgets
        units = sum(self.units) if own else max(self.units)
        space = Space(units * self.unit_bytes, self.unit_bytes, self.layout)
        for count in self.units:
            space.add_arena(count * self.unit_bytes if own else None)
        return space


HOST = World(HOST_LAYOUT, 256, (6, 6), {"m": (0, 64), "n": (0, 192), "o": (1, 64), "p": (1, 448)})
# Without its header, a unit would hold one slot of 8,192 bytes more.
DEVICES = World(
    NVME_LAYOUT,
    5 * 8_192,
    (3, 2),
    {"m": (0, 4_096), "n": (0, 12_288), "o": (1, 4_000), "p": (1, 24_576)},
)


class Memory:
    """What lies in the arenas. A disk keeps what it held when the space takes it back; memory does not."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._bytes = [bytearray(count * world.unit_bytes) for count in world.units]
        self._granted = [[False] * count for count in world.units]

    def move(self, move: Move) -> None:
        unit_bytes, own = self._world.unit_bytes, self._world.layout.own_budgets
        first = move.offset // unit_bytes
        for unit in range(first, first + move.length // unit_bytes):
            assert self._granted[move.arena][unit] != move.gained
            self._granted[move.arena][unit] = move.gained
        if not move.gained and not own:
            self._bytes[move.arena][move.offset : move.offset + move.length] = bytes(move.length)
        assert own or sum(map(sum, self._granted)) <= max(self._world.units)

    def overlap(self, slot: Slot, block_bytes: int, other: Slot, other_bytes: int) -> bool:
        (start, end), (first, last) = self._extent(slot, block_bytes), self._extent(other, other_bytes)
        return slot_arena(slot) == slot_arena(other) and start < last and first < end

    def fill(self, slot: Slot, block_bytes: int, value: int) -> None:
        start, end = self._granted_extent(slot, block_bytes)
        self._bytes[slot_arena(slot)][start:end] = value.to_bytes(8, "little") * ((end - start) // 8)

    def is_filled(self, slot: Slot, block_bytes: int, value: int) -> bool:
        start, end = self._granted_extent(slot, block_bytes)
        expected = value.to_bytes(8, "little") * ((end - start) // 8)
        return self._bytes[slot_arena(slot)][start:end] == expected

    def _extent(self, slot: Slot, block_bytes: int) -> tuple[int, int]:
        """Where in its arena the slot begins and ends."""
        start = slot_offset(slot)
        return start, start + self._world.layout.slot_header_bytes + block_bytes

    def _granted_extent(self, slot: Slot, block_bytes: int) -> tuple[int, int]:
        start, end = self._extent(slot, block_bytes)
        units = range(start // self._world.unit_bytes, (end - 1) // self._world.unit_bytes + 1)
        assert all(self._granted[slot_arena(slot)][unit] for unit in units), "outside what was granted"
        return start, end
