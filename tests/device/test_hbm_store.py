"""Blocks through a node's HBM: saved, found, verified where they arrive, had from below when they are not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvcache import wire
from kvcache.client import connect_device
from kvcache.client.blocking_store import BlockingNodeStore
from kvcache.client.link import Options
from kvcache.clock import SystemClock
from kvcache.device.engine import EngineDevice, PagedBlocks, TensorBlocks
from kvcache.device.slab import CpuMemory
from kvcache.errors import BadInput
from kvcache.memfd import unsafe
from kvcache.metrics import unknown_names
from kvcache.metrics_stats import STATS
from kvcache.testing.stores import EXAMPLE, SIZE, SPEC
from tests.device.engine_cache import Engine as Cache
from tests.device.engine_cache import Shape
from tests.device.engine_cache import engine as cache_of
from tests.device.hbm_rig import HBM_BLOCKS, POISON, TIMEOUT_MS, Engine, Failing, World, hold, lose
from tests.server.peer import credentials
from tests.server.talk import connected, deadline


def paged(seed: int = 1) -> Cache:
    """A cache one page of which is a block."""
    shape = Shape(layers=1, pages=7, heads=SPEC.head_count, tokens=SPEC.block_tokens, row=256)
    return cache_of("flash_attention_nhd", shape, seed=seed)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.check()
    made.close()


class TestThereAndBack:
    def test_what_was_saved_is_loaded_from_hbm(self, world: World) -> None:
        path = world.engine.path(9)
        assert world.engine.save(path) == 9
        assert world.engine.store.match_device(world.engine.handle, path) == 9
        assert world.engine.load(path) == (9, frozenset())
        assert world.engine.counted("hbm_loaded_blocks") == 9
        stats = world.stats()
        assert (stats["hbm_saved_blocks"], stats["hbm_hit_blocks"], stats["blocks:hbm"]) == (9, 9, 9)
        assert not stats["hbm_leases"]

    def test_the_rest_comes_from_host_memory(self, world: World) -> None:
        path = world.engine.path(9)
        assert world.engine.save(path[:4]) == 4
        assert world.engine.save_below(path) == 9
        assert world.engine.load(path) == (9, frozenset())
        assert world.engine.counted("hbm_loaded_blocks") == 4
        assert world.engine.counted("loaded_blocks") == 9

    def test_the_rest_comes_from_nvme(self, tmp_path: Path) -> None:
        """With what stands before it, as host memory lacks that too."""
        places = {"nvme": f"{tmp_path / 'nvme'}:16MiB", "nvme_segment": "1MiB"}
        world = World(tmp_path, capacity="256KiB", **places)
        engine, path = world.engine, world.engine.path(9)
        engine.save_below(path)
        assert engine.store.persist(engine.handle, path, 20_000) == 9
        for seed in (1, 2):
            engine.save_below(engine.path(60, seed))
        assert world.in_host(path) == 0
        hold(world)
        assert engine.save(path[:4]) == 4
        assert engine.load(path) == (9, frozenset())
        assert engine.counted("hbm_loaded_blocks") == 4
        world.close()

    def test_what_came_from_host_memory_is_promoted_by_saving_it(self, world: World) -> None:
        engine, path = world.engine, world.engine.path(9)
        engine.save(path[:4])
        engine.save_below(path)
        lease = engine.store.lease_device(engine.handle, path)
        memory = torch.full((9, SIZE), POISON, dtype=torch.uint8)
        assert not engine.store.load_device(lease, engine.blocks(memory))
        engine.store.release(lease)
        rest = engine.blocks(memory[4:])
        assert engine.store.save_device(engine.handle, path[4:], rest, parent=path[3]) == 5
        assert world.stats()["hbm_promoted_blocks"] == 5
        assert engine.load(path) == (9, frozenset())
        assert engine.counted("hbm_loaded_blocks") == 4 + 9

    def test_a_part_of_a_lease(self, world: World) -> None:
        engine, path = world.engine, world.engine.path(9)
        engine.save(path[:4])
        engine.save_below(path)
        lease = engine.store.lease_device(engine.handle, path)
        memory = torch.full((4, SIZE), POISON, dtype=torch.uint8)
        assert engine.store.load_device(lease, engine.blocks(memory), start=2) == frozenset()
        assert memory.equal(engine.memory(path[2:6]))
        engine.store.release(lease)

    def test_into_pages_of_an_engine(self, world: World) -> None:
        """A page is a block's tokens, in no order."""
        engine, path = world.engine, world.engine.path(5)
        other = paged()
        saved = PagedBlocks(engine.device, other.cache, [[6], [1], [4], [0], [2]])
        assert engine.store.save_device(engine.handle, path, saved) == 5
        into = paged(seed=2)
        lease = engine.store.lease_device(engine.handle, path)
        pages = [[3], [5], [0], [6], [2]]
        assert not engine.store.load_device(lease, PagedBlocks(engine.device, into.cache, pages))
        into.put(pages, other.blocks([[6], [1], [4], [0], [2]]), 0, SPEC.plane_count)
        into.check_memory()
        engine.store.release(lease)

    def test_from_host_memory_into_pages(self, world: World) -> None:
        engine, path = world.engine, world.engine.path(3)
        engine.save_below(path)
        into = paged()
        lease = engine.store.lease_device(engine.handle, path)
        assert not engine.store.load_device(lease, PagedBlocks(engine.device, into.cache, [[3], [5], [0]]))
        into.put([[3], [5], [0]], [engine.content(block) for block in path], 0, SPEC.plane_count)
        into.check_memory()
        engine.store.release(lease)

    def test_hbm_continues_only_what_it_holds(self, world: World) -> None:
        """The rest goes to where the blocks before it are."""
        path = world.engine.path(6)
        world.engine.save_below(path[:3])
        assert world.engine.save(path[3:], parent=path[2]) == 3
        assert world.engine.counted("hbm_unsaved_blocks:parent") == 3
        assert (world.in_hbm(path), world.in_host(path)) == (0, 6)
        assert world.engine.save(path) == 6
        assert world.in_hbm(path) == 6
        assert world.engine.load(path) == (6, frozenset())

    def test_what_does_not_fit_hbm_goes_to_host_memory(self, tmp_path: Path) -> None:
        """With what stands before it: both hold whole prefixes."""
        world = World(tmp_path, capacity="4MiB")
        path = world.engine.path(HBM_BLOCKS + 20)
        hold(world)
        assert world.engine.save(path) == len(path)
        assert world.in_host(path) == len(path)
        assert world.engine.load(path) == (len(path), frozenset())
        world.close()

    @pytest.mark.parametrize("mapped", [True, False], ids=["map", "wire"])
    def test_from_pages_of_an_engine_to_host_memory(self, world: World, mapped: bool) -> None:
        options = Options(world.node.node.address, "", TIMEOUT_MS, mapped=mapped)
        store = BlockingNodeStore(options, SystemClock())
        engine, path, cache = world.engine, world.engine.path(4), paged()
        pages = [[6], [1], [4], [0]]
        saved = PagedBlocks(engine.device, cache.cache, pages)
        assert store.save_device(store.open(EXAMPLE, SPEC), path, saved) == 4
        assert (world.in_hbm(path), world.in_host(path)) == (0, 4)
        lease, into = engine.store.lease(engine.handle, path), [bytearray(SIZE) for _ in path]
        assert not engine.store.load(lease, [[each] for each in into])
        assert [bytes(each) for each in into] == cache.blocks(pages)
        engine.store.release(lease)
        store.close()

    def test_blocks_of_another_shape_are_refused(self, world: World) -> None:
        engine, path = world.engine, world.engine.path(2)
        with pytest.raises(BadInput, match="bytes"):
            TensorBlocks(engine.device, torch.zeros(2, 100, dtype=torch.uint8), SPEC)
        engine.save(path)
        lease = engine.store.lease_device(engine.handle, path)
        with pytest.raises(BadInput, match="not in it"):
            engine.store.load_device(lease, engine.blocks(engine.memory([*path, path[0]])))
        with pytest.raises(BadInput, match="do not go to host memory"):
            engine.store.load(lease, [[bytearray(SIZE)]])
        engine.store.release(lease)


class TestWhatGoesWrong:
    def test_a_flipped_byte_is_had_from_below(self, world: World) -> None:
        path = world.engine.path(6)
        world.engine.save(path)
        world.engine.save_below(path)
        world.flip(path[2])
        assert world.engine.load(path) == (6, frozenset())
        assert world.engine.counted("failed_blocks:checksum") == 1
        assert world.engine.counted("fallback_blocks") == 1
        assert world.stats()["hbm_rejected_blocks:reader"] == 1
        assert world.in_hbm(path) == 2, "it left HBM, and with it what it was found by"
        assert world.in_host(path) == 6
        assert world.stats()["quarantined_blocks"] == 0

    def test_a_flipped_byte_that_is_nowhere_else_is_a_miss(self, world: World) -> None:
        path = world.engine.path(6)
        hold(world)
        world.engine.save(path)
        world.flip(path[2])
        assert world.engine.load(path) == (6, {2})
        assert world.engine.load(path) == (2, frozenset())

    def test_a_reader_takes_no_memory_away_from_others(self, world: World) -> None:
        """Whatever it reports: once nobody holds it, its slot is used again."""
        path = world.engine.path(HBM_BLOCKS)
        hold(world)
        world.engine.save(path)
        world.flip(path[0])
        assert world.engine.load(path)[1] == {0}
        world.eventually(lambda: world.engine.save(path) == HBM_BLOCKS)

    def test_it_can_be_saved_anew(self, world: World) -> None:
        path = world.engine.path(6)
        hold(world)
        world.engine.save(path)
        world.flip(path[2])
        world.engine.load(path)
        assert world.engine.save(path) == 6
        assert world.in_hbm(path) == 6, "what continues it is found again"
        assert world.in_host(path) == 0
        assert world.engine.load(path) == (6, frozenset())

    def test_other_bytes_than_below_are_refused(self, world: World) -> None:
        engine, path = world.engine, world.engine.path(3)
        engine.save_below(path)
        wrong = engine.memory(path)
        wrong[1, 7] ^= 1
        assert engine.store.save_device(engine.handle, path, engine.blocks(wrong)) == 3, "as they are below"
        assert engine.counted("hbm_unsaved_blocks:refused") == 3
        stats = world.stats()
        assert (stats["hbm_rejected_blocks:differs"], stats["blocks:hbm"]) == (3, 0)
        assert engine.load(path) == (3, frozenset())

    def test_a_gpu_that_the_node_lost(self, world: World) -> None:
        path = world.engine.path(6)
        world.engine.save(path)
        world.engine.save_below(path)
        lease = world.engine.store.lease_device(world.engine.handle, path)
        lose(world)
        world.engine.store.release(lease)
        before = world.engine.counted("hbm_loaded_blocks")
        assert world.engine.load(path) == (6, frozenset())
        assert world.engine.counted("hbm_loaded_blocks") == before
        fresh = world.engine.path(2, seed=5)
        assert world.engine.save(fresh) == world.in_host(fresh) == 2
        assert any("it was reset" in text for text in world.node.call(world.node.node.core.troubles))
        stats = world.stats()
        assert (stats["hbm_lost"], stats["hbm_removed_blocks:fenced"]) == (1, 6)

    def test_a_gpu_that_the_engine_lost(self, world: World) -> None:
        path = world.engine.path(6)
        world.engine.save(path)
        world.engine.save_below(path)
        world.engine.device.lose("it was reset")
        assert world.engine.load(path) == (6, frozenset())
        assert world.engine.counted("fallback_blocks") == 6
        fresh = world.engine.path(2, seed=5)
        assert world.engine.save(fresh) == world.in_host(fresh) == 2
        assert not world.in_hbm(fresh)
        assert not world.stats()["hbm_reservations"], "given back, as the node lives"

    def test_a_gpu_that_fails_while_nobody_asks(self, world: World) -> None:
        world.engine.save(world.engine.path(6))
        hold(world)
        demoter = world.demoter()
        demoter._outlet = Failing()
        demoter._probe_ns = 0
        world.eventually(lambda: world.stats()["hbm_lost"] == 1)
        assert world.engine.load(world.engine.path(6))[0] == world.in_host(world.engine.path(6))

    def test_a_copy_that_does_not_end_keeps_its_slots(self, world: World) -> None:
        """Whatever it writes later, it writes to what is nobody's."""
        path = world.engine.path(6)
        release = hold(world)
        world.engine.save(path)
        world.demoter()._outlet = Failing(is_stuck=True)
        release()
        world.eventually(lambda: world.stats()["hbm_lost"] == 1)
        assert world.stats()["reservations"] == 1
        assert world.in_host(path) == 0
        assert world.engine.save_below(path) == 0, "they are being written, for all that is known"

    def test_a_lease_that_has_ended(self, world: World) -> None:
        engine, path = world.engine, world.engine.path(3)
        engine.save(path)
        lease = engine.store.lease_device(engine.handle, path, duration_ms=1)
        world.eventually(lambda: engine.store._clock.now_ns() > lease.grants[0].expires_ns)
        memory = torch.full((3, SIZE), POISON, dtype=torch.uint8)
        hold(world)
        assert engine.store.load_device(lease, engine.blocks(memory)) == {0, 1, 2}
        assert engine.counted("failed_blocks:expired") == 3
        engine.store.release(lease)


def test_through_the_asynchronous_store(world: World) -> None:
    async def run() -> None:
        store = connect_device(world.engine.device, world.node.node.address, timeout_ms=TIMEOUT_MS)
        handle = await store.open(EXAMPLE, SPEC)
        path = world.engine.path(9)
        assert (
            await store.save_device(handle, path[:4], world.engine.blocks(world.engine.memory(path[:4]))) == 4
        )
        world.engine.save_below(path)
        assert await store.match_device(handle, path) == 9
        lease = await store.lease_device(handle, path)
        memory = torch.full((9, SIZE), POISON, dtype=torch.uint8)
        assert not await store.load_device(lease, world.engine.blocks(memory))
        assert memory.equal(world.engine.memory(path))
        assert store.counters["hbm_loaded_blocks"] == 4
        await store.release(lease)
        await store.close()

    asyncio.run(run())


def test_the_node_counts_by_the_table_of_metrics_and_nothing_else(world: World) -> None:
    path = world.engine.path(HBM_BLOCKS)
    world.engine.save(path)
    world.flip(path[5])
    world.engine.load(path)
    world.engine.save(world.engine.path(HBM_BLOCKS, seed=1))
    assert unknown_names(world.stats()) == []
    gauges = {stat.name for stat in STATS if stat.kind == "gauge" and stat.name.startswith("hbm_")}
    assert gauges <= set(world.stats()), "a gauge that nobody fills would always be 0"


class TestWhoGetsWhat:
    def test_a_gpu_goes_to_the_first_that_asks(self, world: World) -> None:
        device = EngineDevice(CpuMemory())
        device.gpu = b"another"
        other = Engine(world.node.node.address, device=device)
        assert other.save(other.path(2)) == world.in_host(other.path(2)) == 2
        assert not other.counted("hbm_saved_blocks")
        assert other.load(other.path(2)) == (2, frozenset())
        assert world.stats()["hbm_refused_maps"] == 1
        other.close()

    def test_another_tenants_engine_gets_none(self, tmp_path: Path) -> None:
        """Of the same user, on the same GPU."""
        file = credentials(tmp_path, a=("alice", ["reader", "writer"]), b=("bob", ["reader", "writer"]))
        world = World(tmp_path, token="a" * 16, credentials=file)
        other = Engine(world.node.node.address, token="b" * 16)
        assert world.engine.save(world.engine.path(3)) == 3
        assert other.store._attached is not None
        assert other.store._attached.link.hbm is None
        assert other.save(other.path(3)) == 3
        assert not other.counted("hbm_saved_blocks")
        assert other.load(other.path(3)) == (3, frozenset())
        other.close()
        world.close()

    def test_slots_of_a_writer_that_is_gone_wait_for_its_copies(self, world: World) -> None:
        """Until its process has ended, or says that they have."""
        path = world.engine.path(HBM_BLOCKS)
        namespace = world.engine.handle
        with connected(world.node.node.address, map=True, hbm=True, client="other") as channel:
            shape = (SPEC.plane_count, SPEC.head_count, SPEC.head_bytes)
            channel.call(wire.Open(namespace.namespace.to_map(), *shape), deadline())
            request = wire.Reserve(namespace.namespace_id, b"", b"".join(path), tier=wire.HBM)
            reserved = channel.call(request, deadline())
            assert isinstance(reserved, wire.Reserved)
            assert reserved.count == HBM_BLOCKS
        world.eventually(lambda: world.stats()["hbm_limbo_blocks"] == HBM_BLOCKS)
        assert world.engine.save(world.engine.path(3, seed=1)) == 3, "in host memory"
        assert not world.in_hbm(world.engine.path(3, seed=1))
        with connected(world.node.node.address, map=True, hbm=True, client="other", writes_ended=True):
            world.eventually(lambda: not world.stats()["hbm_limbo_blocks"])
        assert world.engine.save(world.engine.path(3, seed=1)) == 3
        assert world.in_hbm(world.engine.path(3, seed=1)) == 3

    def test_a_slab_that_cannot_be_mapped_costs_hbm_and_no_more(self, world: World) -> None:
        class Unable(EngineDevice):
            def open(self, slab: wire.HbmSlab, descriptor: int) -> None:
                raise unsafe("it is not sealed")

        path = world.engine.path(3)
        world.engine.save(path)
        world.engine.save_below(path)
        other = Engine(world.node.node.address, device=Unable(CpuMemory()))
        assert other.counted("unmapped_hbm") == 1
        assert other.load(path) == (3, frozenset())
        assert other.counted("hbm_loaded_blocks") == 0
        other.close()

    def test_two_engines_share_it(self, world: World) -> None:
        other = Engine(world.node.node.address, "other")
        path = other.path(5)
        assert world.engine.save(path) == 5
        assert other.load(path) == (5, frozenset())
        assert other.save(path) == 5, "it is there"
        other.close()
        assert world.engine.load(path) == (5, frozenset())

    def test_who_did_not_ask_for_hbm_gets_none(self, world: World) -> None:
        path = world.engine.path(5)
        hold(world)
        world.engine.save(path)
        assert world.engine.store.match(world.engine.handle, path) == 0
        assert world.engine.store.lease(world.engine.handle, path).count == 0
