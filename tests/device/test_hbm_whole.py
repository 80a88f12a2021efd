"""A node and an engine on every device there is, with nothing stood in for: on a machine with a GPU, on that.

The other tests of the tier are of the CPU, where all of its orders can be made; these show that a GPU keeps
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvcache.block import BlockHash
from kvcache.device.engine import EngineDevice, PagedBlocks, TensorBlocks
from kvcache.testing.stores import SIZE, SPEC
from tests.device.engine_cache import Shape, engine
from tests.device.hbm_rig import HBM_BLOCKS, POISON, WAIT_MS, World, hold
from tests.device.rigs import DEVICES

RACES = {"cpu": 20, "cuda": 150}
SLEEP_CYCLES = 1_000_000

SHAPE = Shape(layers=1, pages=HBM_BLOCKS + 8, heads=SPEC.head_count, tokens=SPEC.block_tokens, row=256)


class Whole:
    """A page of ``cache`` is a block."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self.device = EngineDevice.of(torch.device(kind))
        self.world = World(folder, on=self.device, hbm_device=kind)
        self.store, self.handle = self.world.engine.store, self.world.engine.handle
        self.cache = engine("flash_attention_nhd", SHAPE, kind, seed=1)

    def busy(self) -> None:
        """The engine's stream is, for half a millisecond."""
        if self.kind == "cuda":
            torch.cuda._sleep(SLEEP_CYCLES)

    def at(self, pages: list[int]) -> PagedBlocks:
        return PagedBlocks(self.device, self.cache.cache, [[page] for page in pages])

    def save(self, path: list[BlockHash], pages: list[int]) -> int:
        return self.store.save_device(self.handle, path, self.at(pages))

    def save_below(self, path: list[BlockHash], pages: list[int]) -> int:
        blocks = self.cache.blocks([[page] for page in pages])
        return self.store.save(self.handle, path, [[bytearray(block)] for block in blocks])

    def load(self, path: list[BlockHash], pages: list[int], sources: list[int]) -> int:
        """Into these pages, which are then what ``sources`` were, and no other byte was written. How many of
        the blocks came from HBM."""
        wanted = self.cache.blocks([[page] for page in sources])
        before = self.world.engine.counted("hbm_loaded_blocks")
        lease = self.store.lease_device(self.handle, path, wait_ms=WAIT_MS)
        try:
            assert lease.count == len(path)
            assert self.store.load_device(lease, self.at(pages)) == frozenset()
        finally:
            self.store.release(lease)
        self.cache.put([[page] for page in pages], wanted, 0, SPEC.plane_count)
        self.cache.check_memory()
        return self.world.engine.counted("hbm_loaded_blocks") - before


@pytest.fixture(params=DEVICES)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Whole]:
    made = Whole(tmp_path, request.param)
    yield made
    made.world.check()
    made.world.close()


def test_pages_are_saved_and_loaded_into_others(whole: Whole) -> None:
    path = whole.world.engine.path(6)
    assert whole.save(path, [9, 2, 40, 3, 17, 8]) == 6
    assert whole.world.in_hbm(path) == 6
    assert whole.load(path, [1, 60, 4, 30, 5, 22], [9, 2, 40, 3, 17, 8]) == 6
    assert whole.device.has_slab


def test_a_wrong_byte_is_had_from_host_memory(whole: Whole) -> None:
    path, pages = whole.world.engine.path(6), [9, 2, 40, 3, 17, 8]
    assert whole.save_below(path, pages) == 6
    assert whole.save(path, pages) == 6
    whole.world.flip(path[3])
    assert whole.load(path, [1, 60, 4, 30, 5, 22], pages) == 5


def test_what_leaves_is_had_from_host_memory(whole: Whole) -> None:
    """The node copies it there, in the end by way of the GPU's own copies."""
    path, pages = whole.world.engine.path(HBM_BLOCKS), list(range(HBM_BLOCKS))
    assert whole.save(path, pages) == HBM_BLOCKS
    whole.world.eventually(lambda: whole.world.in_host(path) == HBM_BLOCKS)
    assert whole.save(whole.world.engine.path(HBM_BLOCKS, seed=1), pages) == HBM_BLOCKS
    assert whole.world.in_hbm(path) == 0
    turned = [(page + 5) % SHAPE.pages for page in pages]
    assert whole.load(path, turned, pages) == 0


def test_what_hbm_has_no_room_for_is_in_host_memory(whole: Whole) -> None:
    path, pages = whole.world.engine.path(HBM_BLOCKS + 6), list(range(HBM_BLOCKS + 6))
    hold(whole.world)  # What the node is copying there itself, an engine cannot save meanwhile.
    assert whole.save(path, pages) == whole.world.in_host(path) == len(path)
    assert whole.load(path, pages[::-1], pages) == whole.world.in_hbm(path)


@pytest.mark.slow
def test_compute_save_overwrite_and_wipe_load_use(whole: Whole) -> None:
    """Again and again, with the engine's stream busy before: what does not come behind it is seen. Planes are
    saved as they are computed, and pages written again as soon as the save has ended."""
    saved, loaded = (torch.tensor(pages, device=whole.kind) for pages in ([9, 2, 40, 3], [1, 60, 4, 30]))
    planes = whole.cache.cache.planes
    for number in range(RACES[whole.kind]):
        path = whole.world.engine.path(4, seed=number)
        values = [(31 * number + 7 * at + 1) % 251 for at in range(len(planes))]
        writing = whole.store.begin_save_device(whole.handle, path, whole.at(saved.tolist()))
        whole.busy()
        for at, plane in enumerate(planes):
            plane.index_fill_(0, saved, values[at])
            writing.advance(at + 1)
        assert writing.finish() == 4
        whole.busy()
        for plane in planes:
            plane.index_fill_(0, saved, 255)
            plane.index_fill_(0, loaded, 0)
        lease = whole.store.lease_device(whole.handle, path, wait_ms=WAIT_MS)
        assert lease.count == 4
        assert whole.store.load_device(lease, whole.at(loaded.tolist())) == frozenset()
        whole.store.release(lease)
        for value, plane in zip(values, planes, strict=True):
            assert bool((plane.index_select(0, loaded) == value).all()), number
            assert bool((plane.index_select(0, saved) == 255).all()), number


def test_flat_memory_is_saved_and_loaded(whole: Whole) -> None:
    path = whole.world.engine.path(5)
    memory = whole.world.engine.memory(path).to(whole.kind)
    saved = TensorBlocks(whole.device, memory, SPEC)
    assert whole.store.save_device(whole.handle, path, saved) == 5
    into = torch.full((7, SIZE), POISON, dtype=torch.uint8, device=whole.kind)
    lease = whole.store.lease_device(whole.handle, path, wait_ms=WAIT_MS)
    loaded = TensorBlocks(whole.device, into[1:-1], SPEC)
    assert whole.store.load_device(lease, loaded) == frozenset()
    whole.store.release(lease)
    assert torch.equal(into[1:-1], memory)
    assert bool((into[0] == POISON).all()) and bool((into[-1] == POISON).all())


def test_a_lost_gpu_leaves_what_host_memory_has(whole: Whole) -> None:
    path, pages = whole.world.engine.path(6), [9, 2, 40, 3, 17, 8]
    assert whole.save_below(path, pages) == 6
    assert whole.save(path, pages) == 6
    whole.device.lose("it was reset")
    assert whole.load(path, [1, 60, 4, 30, 5, 22], pages) == 0
