"""An engine's side by itself: slabs by their incarnation, and where blocks lie."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from kvcache.device.engine import EngineDevice, PagedBlocks, TensorBlocks
from kvcache.device.slab import CpuMemory, Slab
from kvcache.errors import BadInput, Unavailable
from kvcache.sums import sum_chunks
from kvcache.testing.stores import SIZE, SPEC
from kvcache.wire_hbm import HbmSlab
from tests.device.engine_cache import Shape, engine, slab_bytes
from tests.device.hbm_rig import PATIENCE_S, POISON
from tests.device.rigs import written

SLOTS = 8


class Owner:
    """A node's slab, full of poison, as an engine is told of it."""

    def __init__(self) -> None:
        self.slab = Slab.create(CpuMemory(), "owner", SLOTS * SIZE)
        self.memory = self.slab.tensor(0, SLOTS * SIZE)
        self.memory.fill_(POISON)
        ticket = self.slab.ticket
        self.told = HbmSlab(ticket.kind, ticket.size_bytes, ticket.uuid, ticket.incarnation)

    @property
    def name(self) -> bytes:
        return self.told.incarnation

    def give(self, device: EngineDevice) -> None:
        descriptor = os.dup(self.slab.descriptor)
        try:
            device.open(self.told, descriptor)
        finally:
            os.close(descriptor)


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.slab.close()


@pytest.fixture
def device(owner: Owner) -> EngineDevice:
    made = EngineDevice.of(torch.device("cpu"))
    owner.give(made)
    return made


def content(count: int) -> torch.Tensor:
    return (
        torch.arange(count * SIZE, dtype=torch.int64).mul(31).remainder(251).to(torch.uint8).view(count, SIZE)
    )


class Elsewhere(torch.Tensor):
    """Memory of the CPU that says it is another GPU's."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 1)


def rows(tensor: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in tensor]


class TestSlabs:
    def test_a_stale_incarnation_is_a_miss(self, owner: Owner, device: EngineDevice) -> None:
        blocks = TensorBlocks(device, content(2), SPEC)
        with pytest.raises(Unavailable, match="not mapped any more"):
            blocks.load(b"another", [0, SIZE], 0)
        device.close(owner.name)
        with pytest.raises(Unavailable, match="not mapped any more"):
            blocks.load(owner.name, [0, SIZE], 0)

    def test_it_is_mapped_until_the_last_store_lets_go(self, owner: Owner, device: EngineDevice) -> None:
        owner.give(device)
        device.close(owner.name)
        assert device.whole(owner.name).numel() == SLOTS * SIZE
        device.close(owner.name)
        with pytest.raises(Unavailable):
            device.whole(owner.name)

    def test_nobody_waits_for_one_that_is_being_unmapped(
        self, owner: Owner, device: EngineDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The driver waits for the GPU there, perhaps for ever, and others ask what they may still use."""
        begun, answered, gate = threading.Event(), threading.Event(), threading.Event()
        close = Slab.close

        def slow(slab: Slab) -> None:
            begun.set()
            gate.wait(3 * PATIENCE_S)
            close(slab)

        def ask() -> None:
            device.give_up("it hangs")
            assert device.is_lost(owner.name)
            answered.set()

        monkeypatch.setattr(Slab, "close", slow)
        closing = threading.Thread(target=device.close, args=(owner.name,))
        asking = threading.Thread(target=ask)
        closing.start()
        assert begun.wait(PATIENCE_S)
        asking.start()
        try:
            assert answered.wait(PATIENCE_S)
        finally:
            gate.set()
            closing.join(PATIENCE_S)
            asking.join(PATIENCE_S)

    def test_the_next_nodes_slab_is_another(self, owner: Owner, device: EngineDevice) -> None:
        after = Owner()
        after.give(device)
        after.memory.fill_(1)
        assert int(device.whole(owner.name)[0]) == POISON
        assert int(device.whole(after.name)[0]) == 1
        after.slab.close()

    def test_memory_of_a_gpu_that_was_not_asked_for_is_not_mapped(self, owner: Owner) -> None:
        told = HbmSlab("cuda", SLOTS * SIZE, b"another", b"i" * 16)
        with pytest.raises(BadInput, match="not asked for"):
            EngineDevice.of(torch.device("cpu")).open(told, owner.slab.descriptor)

    def test_cuda_without_a_number_is_the_current_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpus = [b"gpu-0", b"gpu-1", b"gpu-2"]
        monkeypatch.setattr(
            "kvcache.device.engine.Vmm", lambda: SimpleNamespace(uuid=gpus.__getitem__, ordinal=gpus.index)
        )
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, other: (here, other) == (1, 2))
        made = EngineDevice.of(torch.device("cuda"))
        assert (made.gpu, made.joined) == (b"gpu-1", [b"gpu-2"])
        assert {memory.device for memory in made._memories.values()} == {torch.device("cuda", 1)}

    def test_a_lost_gpu_is_a_miss(self, owner: Owner, device: EngineDevice) -> None:
        device.lose("it was reset")
        with pytest.raises(Unavailable, match="cannot be used"):
            device.whole(owner.name)


class TestTensors:
    def test_only_what_is_named_is_written(self, owner: Owner, device: EngineDevice) -> None:
        blocks = TensorBlocks(device, content(4), SPEC)
        sums = written(blocks.into_slab(owner.name, [5 * SIZE, SIZE], 2))
        assert sums == sum_chunks(rows(content(4)[2:]), SPEC.chunk_bytes)
        whole = slab_bytes(SLOTS * SIZE, [5 * SIZE, SIZE], rows(content(4)[2:]))
        assert owner.memory.numpy().tobytes() == whole
        into = torch.full((4, SIZE), POISON, dtype=torch.uint8)
        assert TensorBlocks(device, into, SPEC).load(owner.name, [SIZE, 5 * SIZE], 1) == sum_chunks(
            rows(content(4)[[3, 2]]), SPEC.chunk_bytes
        )
        assert rows(into) == [bytes([POISON]) * SIZE, *rows(content(4)[[3, 2]]), bytes([POISON]) * SIZE]

    def test_from_host_memory(self, device: EngineDevice) -> None:
        into = torch.full((3, SIZE), POISON, dtype=torch.uint8)
        views = [memoryview(bytearray(row)) for row in rows(content(2))]
        assert TensorBlocks(device, into, SPEC).put(views, 1) == sum_chunks(views, SPEC.chunk_bytes)
        assert rows(into) == [bytes([POISON]) * SIZE, *rows(content(2))]

    @pytest.mark.parametrize("offset", [-1, (SLOTS - 1) * SIZE + 1, 1 << 40])
    def test_a_slot_outside_of_the_slab(self, owner: Owner, device: EngineDevice, offset: int) -> None:
        blocks = TensorBlocks(device, content(1), SPEC)
        for do in (blocks.load, blocks.into_slab):
            with pytest.raises(Unavailable, match="not in it"):
                do(owner.name, [offset], 0)
        assert rows(content(1)) == rows(blocks._memory)

    def test_two_blocks_at_one_place_are_a_miss(self, owner: Owner, device: EngineDevice) -> None:
        """So are pages: whatever a node says, it is no mistake of who loads."""
        pages = engine("flashinfer_hnd", TestPages.SHAPE)
        for blocks in (
            TensorBlocks(device, content(2), SPEC),
            PagedBlocks(device, pages.cache, [[6], [1]]),
        ):
            for offsets in ([SIZE, SIZE], [SIZE, 2 * SIZE - 64]):
                with pytest.raises(Unavailable, match="overlap"):
                    blocks.load(owner.name, offsets, 0)
        pages.check_memory()

    def test_memory_that_was_made_in_inference_mode(self, owner: Owner, device: EngineDevice) -> None:
        """As engines make theirs; who copies need not be in it."""
        with torch.inference_mode():
            blocks = TensorBlocks(device, content(2), SPEC)
            into = TensorBlocks(device, torch.zeros(2, SIZE, dtype=torch.uint8), SPEC)
        sums = written(blocks.into_slab(owner.name, [0, SIZE], 0))
        assert into.load(owner.name, [0, SIZE], 0) == sums
        assert into.put([memoryview(bytearray(row)) for row in rows(content(2))], 0) == sums

    def test_nothing_runs_on_behind_an_error(
        self, owner: Owner, device: EngineDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else a late copy would overwrite what is computed into the same place in its stead."""
        done: list[str] = []
        event = SimpleNamespace(wait=lambda timeout_s: not done.append("waited"))
        stream = SimpleNamespace(after=lambda event: None, mark=lambda: event)
        blocks = TensorBlocks(device, content(2), SPEC)
        monkeypatch.setattr(blocks._line, "_streams", SimpleNamespace(current=lambda: stream))

        def refuse(first: int, count: int) -> bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(blocks, "_sums", refuse)
        with pytest.raises(Unavailable, match="failed under a copy"):
            blocks.load(owner.name, [0, SIZE], 0)
        assert done == ["waited"]

    @pytest.mark.parametrize(
        "memory",
        [
            torch.zeros(2, SIZE),
            torch.zeros(SIZE, dtype=torch.uint8),
            torch.zeros(2, 2 * SIZE, dtype=torch.uint8)[:, :SIZE],
            torch.zeros(0, SIZE, dtype=torch.uint8),
        ],
        ids=["numbers", "flat", "apart", "none"],
    )
    def test_memory_that_is_none(self, device: EngineDevice, memory: torch.Tensor) -> None:
        with pytest.raises(BadInput):
            TensorBlocks(device, memory, SPEC)


class TestPages:
    SHAPE = Shape(layers=1, pages=7, heads=SPEC.head_count, tokens=SPEC.block_tokens, row=256)

    def test_more_than_staging_memory_takes_at_once(
        self, device: EngineDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvcache.device.engine.STAGING_BYTES", 2 * SIZE)
        cache = engine("flashinfer_hnd", self.SHAPE)
        pages = [[6], [1], [4], [0], [2]]
        views = [memoryview(bytearray(row)) for row in rows(content(5))]
        blocks = PagedBlocks(device, cache.cache, pages)
        assert blocks.put(views, 0) == sum_chunks(views, SPEC.chunk_bytes)
        cache.put(pages, rows(content(5)), 0, SPEC.plane_count)
        cache.check_memory()

    def test_a_slab_on_a_gpu_that_is_joined(
        self, owner: Owner, device: EngineDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A launch moves within one device, so its blocks go by way of memory of this one."""
        whole = device.whole

        def joined(incarnation: bytes) -> torch.Tensor:
            return whole(incarnation).as_subclass(Elsewhere)

        monkeypatch.setattr(device, "whole", joined)
        monkeypatch.setattr("kvcache.device.engine.STAGING_BYTES", 2 * SIZE)
        cache, pages = engine("flashinfer_hnd", self.SHAPE), [[6], [1], [4]]
        offsets, saved = [0, 3 * SIZE, SIZE], cache.blocks([[6], [1], [4]])
        sums = written(PagedBlocks(device, cache.cache, pages).into_slab(owner.name, offsets, 0))
        assert sums == sum_chunks(saved, SPEC.chunk_bytes)
        assert owner.memory.numpy().tobytes() == slab_bytes(SLOTS * SIZE, offsets, saved)
        cache.check_memory()
        others = [[0], [3], [5]]
        assert PagedBlocks(device, cache.cache, others).load(owner.name, offsets, 0) == sums
        cache.put(others, saved, 0, SPEC.plane_count)
        cache.check_memory()

    def test_pages_that_were_made_in_inference_mode(self, owner: Owner, device: EngineDevice) -> None:
        with torch.inference_mode():
            cache = engine("flashinfer_hnd", self.SHAPE)
        sums = written(PagedBlocks(device, cache.cache, [[6], [1]]).into_slab(owner.name, [0, SIZE], 0))
        moved = cache.blocks([[6], [1]])
        assert PagedBlocks(device, cache.cache, [[2], [3]]).load(owner.name, [0, SIZE], 0) == sums
        cache.put([[2], [3]], moved, 0, SPEC.plane_count)
        assert (
            PagedBlocks(device, cache.cache, [[4]]).put([memoryview(bytearray(moved[0]))], 0)
            == sums[: len(sums) // 2]
        )
        cache.put([[4]], moved[:1], 0, SPEC.plane_count)
        cache.check_memory()

    def test_some_of_the_blocks(self, owner: Owner, device: EngineDevice) -> None:
        cache = engine("flashinfer_hnd", self.SHAPE)
        blocks = PagedBlocks(device, cache.cache, [[6], [1], [4]])
        written(blocks.into_slab(owner.name, [0, 3 * SIZE], 1))
        assert owner.memory.numpy().tobytes() == slab_bytes(
            SLOTS * SIZE, [0, 3 * SIZE], cache.blocks([[1], [4]])
        )
        cache.check_memory()

    def test_what_is_no_block_of_the_namespace(self, device: EngineDevice) -> None:
        cache = engine("flashinfer_hnd", self.SHAPE).cache
        with pytest.raises(BadInput, match="named twice"):
            PagedBlocks(device, cache, [[1], [1]])
        with pytest.raises(BadInput, match="page 7"):
            PagedBlocks(device, cache, [[7]])
        with pytest.raises(BadInput, match="a block is"):
            PagedBlocks(device, cache, [[1, 2]]).check(SPEC)
