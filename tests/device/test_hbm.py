"""The HBM tier keeps the contract of memory tiers; which arena an engine gets; what a lost GPU does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from kvcache.block import Slot
from kvcache.device.slab import CpuMemory, CudaMemory, Memory, Slab
from kvcache.device.vmm import Vmm
from kvcache.errors import Unavailable
from kvcache.testing.memory_tiers import ARENA_BYTES, UNIT, Mapped, MemoryTierContract
from kvcache.tiers.hbm import HbmTier
from kvcache.tiers.space import HBM_LAYOUT, Space, make_slot
from tests.device.driver_double import FakeDriver, Machine, over_double
from tests.device.rigs import DEVICES, memory_of


class MappedSlab:
    """An arena, as an engine has it."""

    def __init__(self, slab: Slab) -> None:
        self._slab = slab

    def read(self, offset: int, length: int) -> bytes:
        [slot] = self._slab.slots([offset], length, self._slab.ticket.incarnation)
        return bytes(slot.cpu().numpy())

    def write(self, offset: int, data: bytes) -> None:
        [slot] = self._slab.slots([offset], len(data), self._slab.ticket.incarnation)
        slot.copy_(tensor_of(data))
        if slot.is_cuda:
            torch.cuda.synchronize(slot.device)


class TestHbm(MemoryTierContract[HbmTier]):
    """On CPU memory, on a GPU, and through the calls for GPUs on a double of the driver."""

    @pytest.fixture(autouse=True, params=[*DEVICES, "double"])
    def on(self, request: pytest.FixtureRequest) -> Iterator[None]:
        machine = Machine()
        self.memory: Memory
        if request.param == "double":
            self.memory = CudaMemory(Vmm(FakeDriver(machine)), machine.uuids[0], over=over_double)
        else:
            self.memory = memory_of(request.param)
        yield
        machine.close()

    def make(self) -> HbmTier:
        return HbmTier(UNIT)

    def space(self) -> Space:
        return Space(2 * ARENA_BYTES, UNIT, HBM_LAYOUT)

    def add(self, tier: HbmTier, space: Space, name: str) -> int:
        arena = space.add_arena(ARENA_BYTES)
        assert tier.add_arena(name, self.memory, ARENA_BYTES) == arena
        return arena

    def read(self, tier: HbmTier, slot: Slot, length: int) -> bytes:
        tier.check()
        return bytes(tier.tensor(slot, length).cpu().numpy())

    def write(self, tier: HbmTier, slot: Slot, data: bytes) -> None:
        target = tier.tensor(slot, len(data))
        target.copy_(tensor_of(data))
        if target.is_cuda:
            torch.cuda.synchronize(target.device)

    def map(self, tier: HbmTier, arena: int) -> Mapped:
        descriptor = os.dup(tier.descriptor(arena))
        try:
            return MappedSlab(Slab.open(self.memory, tier.ticket(arena), descriptor))
        finally:
            os.close(descriptor)

    def refuse(self, tier: HbmTier) -> None:
        tier.add_arena("huge", self.memory, 1 << 60)


class TestPlaces:
    @pytest.fixture
    def tier(self) -> Iterator[HbmTier]:
        """Two trust domains on two GPUs."""
        machine = Machine()
        vmm = Vmm(FakeDriver(machine))
        self.zero, self.one = machine.uuids
        tier = HbmTier(UNIT)
        for name in ("alice", "bob"):
            for uuid in machine.uuids:
                tier.add_arena(name, CudaMemory(vmm, uuid, over=over_double), 2 * UNIT)
        yield tier
        tier.close()
        machine.close()

    def test_an_engine_gets_the_slab_of_its_gpu(self, tier: HbmTier) -> None:
        assert tier.on(self.zero, "alice") == 0
        assert tier.on(self.one, "alice") == 1
        assert tier.on(self.one, "bob") == 3
        assert tier.capacity_bytes == 8 * UNIT

    def test_else_none(self, tier: HbmTier) -> None:
        assert tier.on(b"another", "alice") is None
        assert tier.on(self.zero, "carol") is None

    def test_what_is_lost_is_a_miss_and_nobody_gets_it(self, tier: HbmTier) -> None:
        space = Space(8 * UNIT, UNIT, HBM_LAYOUT)
        slot = space.allocate(space.add_arena(2 * UNIT), 4096)
        assert slot is not None
        tier.apply(space.take_moves())
        tier.tensor(slot, 4096)
        tier.lose(0, "it fell off the bus")
        tier.lose(0, "later, something else")
        with pytest.raises(Unavailable, match="fell off the bus"):
            tier.tensor(slot, 4096)
        assert tier.on(self.zero, "alice") is None
        assert tier.on(self.one, "alice") == 1
        assert tier.troubles() == ["HBM arena alice: it fell off the bus"]

    def test_a_slot_that_was_not_granted_is_a_bug(self, tier: HbmTier) -> None:
        with pytest.raises(AssertionError):
            tier.tensor(make_slot(0, 0), 4096)


def test_what_one_arena_frees_is_no_help_to_another() -> None:
    tier, space = HbmTier(UNIT), Space(4 * UNIT, UNIT, HBM_LAYOUT)
    for name in ("one", "two"):
        assert tier.add_arena(name, CpuMemory(), 2 * UNIT) == space.add_arena(2 * UNIT)
    assert len(space.allocate_many(0, UNIT, 9)) == 2
    assert len(space.allocate_many(1, 2 * UNIT, 9)) == 1
    tier.apply(space.take_moves())
    tier.check()
    assert tier.resident_units() == 4
    tier.close()


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
