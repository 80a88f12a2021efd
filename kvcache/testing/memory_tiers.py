"""The contract of tiers that are memory: arenas that other processes map, whatever memory it is.

Subclass it, and say how the tier is made, filled and mapped. ``Space`` decides, the tier follows.
"""

from __future__ import annotations

import fcntl
import os
from abc import abstractmethod
from collections.abc import Iterable
from random import Random
from typing import Generic, Protocol, TypeVar

import pytest

from kvcache.block import Slot
from kvcache.errors import KVCacheError
from kvcache.tiers.space import Move, Space, slot_offset

UNIT = 1 << 20
ARENA_BYTES = 8 * UNIT
SEEDS = 6
STEPS = 120


class MemoryTier(Protocol):
    """What the tiers share."""

    def descriptor(self, arena: int) -> int:
        """Of the arena's memory."""

    def apply(self, moves: Iterable[Move]) -> None:
        """Follow ``Space``."""

    def resident_units(self) -> int:
        """Units with memory."""

    def close(self) -> None:
        """May be called twice."""


class Mapped(Protocol):
    """An arena as another process maps it."""

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...


T = TypeVar("T", bound=MemoryTier)


class MemoryTierContract(Generic[T]):
    @abstractmethod
    def make(self) -> T:
        """A tier in units of ``UNIT``, without arenas."""

    @abstractmethod
    def space(self) -> Space:
        """One of the same layout, without arenas."""

    @abstractmethod
    def add(self, tier: T, space: Space, name: str) -> int:
        """An arena of ``ARENA_BYTES``, in both."""

    @abstractmethod
    def read(self, tier: T, slot: Slot, length: int) -> bytes: ...

    @abstractmethod
    def write(self, tier: T, slot: Slot, data: bytes) -> None: ...

    @abstractmethod
    def map(self, tier: T, arena: int) -> Mapped:
        """As another process that was handed the descriptor; closed with the last reference."""

    @abstractmethod
    def refuse(self, tier: T) -> None:
        """Ask for more memory than any machine has."""

    def allocate(self, tier: T, space: Space, arena: int, size: int) -> Slot:
        slot = space.allocate(arena, size)
        assert slot is not None
        tier.apply(space.take_moves())
        return slot

    def test_the_descriptor_is_private(self) -> None:
        tier, space = self.make(), self.space()
        descriptor = tier.descriptor(self.add(tier, space, "one"))
        assert not os.get_inheritable(descriptor)
        assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        tier.close()

    def test_what_one_mapping_writes_another_sees(self) -> None:
        tier, space = self.make(), self.space()
        arena = self.add(tier, space, "one")
        slot = self.allocate(tier, space, arena, 4096)
        self.write(tier, slot, b"block")
        other = self.map(tier, arena)
        assert other.read(slot_offset(slot), 5) == b"block"
        other.write(slot_offset(slot) + 5, b"!!")
        assert self.read(tier, slot, 7) == b"block!!"
        tier.close()

    def test_arenas_are_apart(self) -> None:
        tier, space = self.make(), self.space()
        slots = []
        for number, name in enumerate(("one", "two")):
            slots.append(self.allocate(tier, space, self.add(tier, space, name), 4096))
            self.write(tier, slots[-1], bytes([number + 1]) * 4096)
        assert [self.read(tier, slot, 1)[0] for slot in slots] == [1, 2]
        tier.close()

    def test_the_memory_outlives_the_tier_while_it_is_mapped(self) -> None:
        """A node that dies takes nothing away from under an engine."""
        tier, space = self.make(), self.space()
        arena = self.add(tier, space, "one")
        slot = self.allocate(tier, space, arena, 4096)
        self.write(tier, slot, b"still there")
        other = self.map(tier, arena)
        tier.close()
        assert other.read(slot_offset(slot), 11) == b"still there"

    @pytest.mark.parametrize("seed", range(SEEDS))
    def test_slots_never_share_a_byte(self, seed: int) -> None:
        """A random caller of ``Space`` in two arenas; every slot keeps what was written into it."""
        chance = Random(seed)
        tier, space = self.make(), self.space()
        arenas = [self.add(tier, space, name) for name in ("one", "two")]
        held: dict[Slot, bytes] = {}
        for step in range(STEPS):
            if held and chance.random() < 0.4:
                slot = chance.choice(sorted(held))
                data = held.pop(slot)
                assert self.read(tier, slot, len(data)) == data
                space.free(slot)
                tier.apply(space.take_moves())
                continue
            size = chance.choice([4096, 5000, 300_000, 2 * UNIT])
            taken = space.allocate(chance.choice(arenas), size)
            tier.apply(space.take_moves())
            if taken is not None:
                held[taken] = step.to_bytes(4, "little") * (size // 4)
                self.write(tier, taken, held[taken])
            space.check()
            assert tier.resident_units() <= len(arenas) * ARENA_BYTES // UNIT
        for slot, data in held.items():
            assert self.read(tier, slot, len(data)) == data
        tier.close()

    def test_memory_that_is_not_there_is_refused(self) -> None:
        tier = self.make()
        with pytest.raises(KVCacheError) as caught:
            self.refuse(tier)
        assert caught.value.todo
        tier.close()

    def test_close_twice(self) -> None:
        tier, space = self.make(), self.space()
        self.add(tier, space, "one")
        tier.close()
        tier.close()
