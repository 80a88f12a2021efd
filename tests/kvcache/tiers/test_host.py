"""The host tier's memory: sealed, private to a trust domain, populated once, given back."""

import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.block import Slot
from kvcache.errors import BadInput
from kvcache.memfd import SEALS
from kvcache.testing.memory_tiers import ARENA_BYTES, UNIT, Mapped, MemoryTierContract
from kvcache.tiers.host import HostTier, memory_available_bytes
from kvcache.tiers.space import Space

CAPACITY = ARENA_BYTES


@pytest.fixture
def host() -> Iterator[HostTier]:
    tier = HostTier(CAPACITY, UNIT)
    tier.add_arena("one")
    yield tier
    tier.close()


class MappedArena:
    """An arena, as an engine maps it."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, CAPACITY)

    def read(self, offset: int, length: int) -> bytes:
        return self._memory[offset : offset + length]

    def write(self, offset: int, data: bytes) -> None:
        self._memory[offset : offset + len(data)] = data


class TestHost(MemoryTierContract[HostTier]):
    def make(self) -> HostTier:
        return HostTier(ARENA_BYTES, UNIT)

    def space(self) -> Space:
        return Space(ARENA_BYTES, UNIT)

    def add(self, tier: HostTier, space: Space, name: str) -> int:
        arena = space.add_arena()
        assert tier.add_arena(name) == arena
        return arena

    def read(self, tier: HostTier, slot: Slot, length: int) -> bytes:
        return bytes(tier.view(slot, length))

    def write(self, tier: HostTier, slot: Slot, data: bytes) -> None:
        tier.view(slot, len(data))[:] = data

    def map(self, tier: HostTier, arena: int) -> Mapped:
        return MappedArena(tier.descriptor(arena))

    def refuse(self, tier: HostTier) -> None:
        HostTier(1 << 62, UNIT).add_arena("huge")


def resident_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def test_the_descriptor_is_sealed_and_private(host: HostTier) -> None:
    descriptor = host.descriptor(0)
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == SEALS
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    assert os.fstat(descriptor).st_size == CAPACITY
    for size in (0, CAPACITY // 2, CAPACITY * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_populate_takes_the_memory_now(host: HostTier) -> None:
    assert resident_bytes(host.descriptor(0)) == 0
    host.populate(0)
    assert resident_bytes(host.descriptor(0)) == CAPACITY


def test_what_one_arena_gave_back_another_gets() -> None:
    host, space = HostTier(CAPACITY, UNIT), Space(CAPACITY, UNIT)
    for name in ("one", "two"):
        assert host.add_arena(name) == space.add_arena()

    def fill(arena: int) -> list[Slot]:
        slots = []
        while (slot := space.allocate(arena, UNIT)) is not None:
            host.apply(space.take_moves())
            host.view(slot, UNIT)[:] = b"x" * UNIT
            slots.append(slot)
        return slots

    for slot in fill(0):
        space.free(slot)
    host.apply(space.take_moves())
    assert resident_bytes(host.descriptor(0)) == CAPACITY, "kept: the next writer need not pay for pages"
    kept = fill(1)[:3]
    assert resident_bytes(host.descriptor(0)) == 0
    assert resident_bytes(host.descriptor(1)) == CAPACITY
    assert host.resident_units() == CAPACITY // UNIT
    assert all(bytes(host.view(slot, UNIT)) == b"x" * UNIT for slot in kept)
    host.close()


def test_the_map_does_not_reach_forked_children(host: HostTier) -> None:
    maps = Path("/proc/self/smaps").read_text()
    flags = maps.partition("kvcache-one")[2].partition("VmFlags:")[2].splitlines()[0].split()
    assert "dc" in flags, "do not copy on fork"


def test_memory_that_is_not_there_is_refused() -> None:
    host = HostTier(1 << 62, UNIT)
    with pytest.raises(BadInput, match="lower --capacity"):
        host.add_arena("huge")
    assert memory_available_bytes() > 0
