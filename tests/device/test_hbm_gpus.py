"""Several GPUs at one node: each its own slab, and what followers and routers are told of them together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcache.block import hints
from kvcache.device.engine import EngineDevice
from kvcache.device.served import Outlet
from kvcache.device.slab import CpuMemory
from kvcache.device.streams import streams_of
from kvcache.errors import Unavailable
from kvcache.locality import LocalityIndex
from kvcache.server.hbm import REFUSALS_MAX
from kvcache.testing.stores import EXAMPLE, SPEC
from kvcache.tiers.hbm import HbmTier
from tests.device.hbm_rig import HBM_BLOCKS, Engine, World, hold, lose
from tests.server.talk import connected

ONE, TWO, THREE, FOUR = b"gpu-1", b"gpu-2", b"gpu-3", b"gpu-4"


class Gpu(CpuMemory):
    """Memory of the CPU under the name of a GPU."""

    def __init__(self, uuid: bytes) -> None:
        super().__init__()
        self.uuid = uuid

    def create(self, name: str, size_bytes: int) -> tuple[torch.Tensor, int]:
        return super().create(f"{name}-{self.uuid.decode()}", size_bytes)


class Gpus:
    """A host with four; of any but these, nothing is free."""

    def arena(self, name: str, gpu: bytes, size_bytes: int, unit_bytes: int) -> HbmTier:
        if gpu not in (ONE, TWO, FOUR):
            raise Unavailable("unavailable", "no memory is free", "an engine has it all")
        made = HbmTier(unit_bytes)
        made.add_arena(name, Gpu(gpu), size_bytes)
        return made

    def outlet(self, memory: HbmTier) -> Outlet:
        return Outlet(streams_of(memory.device(0)))


class Deaf(Gpus):
    """Memory can be had of them, and nothing be copied."""

    def outlet(self, memory: HbmTier) -> Outlet:
        raise Unavailable("unavailable", "no stream can be made", "the context is broken")


class Alone:
    """``one`` is an engine on a GPU of a node that has more."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder, on=EngineDevice(Gpu(ONE)), devices=Gpus())
        self.one = self.world.engine

    def engine(self, gpu: bytes, *joined: bytes) -> Engine:
        device = EngineDevice(Gpu(gpu), [Gpu(other) for other in joined])
        return Engine(self.world.node.node.address, gpu.decode(), device)

    def found(self) -> tuple[int, ...]:
        """Of the first ten blocks of a prompt, as a router finds them at this node, by tier."""
        index = LocalityIndex(1 << 20)
        for page in self.world.pages():
            index.apply(page, 0)
        located = index.locate(hints(self.one.path(10)))
        return (located[0].blocks, *located[0].tiers) if located else ()


class Host(Alone):
    """``one`` and ``two`` are engines on two."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.two = self.engine(TWO)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.world.check()
    made.two.close()
    made.world.close()


def test_each_has_what_its_engines_saved(host: Host) -> None:
    path = host.one.path(10)
    assert host.one.save(path) == 10
    assert host.two.save(path[:4]) == 4
    assert host.one.load(path) == (10, frozenset())
    assert host.two.load(path)[0] == 4
    assert host.world.stats()["blocks:hbm"] == 14
    assert host.world.stats()["capacity_bytes:hbm"] == 2 * HBM_BLOCKS * 4096


def test_what_each_asks_is_counted_once(host: Host) -> None:
    """Each GPU numbers its leases: one that has few is not taken for another that has many."""
    path = host.one.path(10)
    host.one.save(path)
    host.two.save(path)
    before = host.world.stats().get("hit_tokens", 0)
    for _ in range(3):
        host.one.load(path)
    host.two.load(path)
    assert host.world.stats()["hit_tokens"] - before == 4 * 10 * SPEC.block_tokens


def test_followers_are_told_of_what_every_replica_has(host: Host) -> None:
    """They know no GPUs: what one has would be taken for the other's, which cannot reach it."""
    path = host.one.path(10)
    hold(host.world, 0)
    hold(host.world, 1)
    host.one.save(path)
    assert host.found() == ()
    host.two.save(path[:4])
    assert host.found() == (4, 4, 0, 0)
    host.one.save_below(path[:6])
    assert host.found() == (6, 4, 6, 0)
    host.one.save(host.one.path(HBM_BLOCKS, seed=1))
    assert host.found() == (6, 0, 6, 0)
    host.one.save(path)
    assert host.found() == (6, 4, 6, 0)


def test_a_replica_that_comes_has_none_of_what_was_told(tmp_path: Path) -> None:
    host = Alone(tmp_path)
    hold(host.world)
    path = host.one.path(10)
    host.one.save(path)
    assert host.found() == (10, 10, 0, 0)
    two = host.engine(TWO)
    assert host.found() == ()
    hold(host.world, 1)
    two.save(path[:3])
    assert host.found() == (3, 3, 0, 0)
    two.close()
    host.world.check()
    host.world.close()


def test_ranks_of_one_engine_are_no_replicas(host: Host) -> None:
    """Each has blocks of its own on a GPU of its own."""
    with contextlib.closing(host.engine(FOUR)) as four:
        four.handle = four.store.open(replace(EXAMPLE, weights="another rank's"), SPEC)
        hold(host.world, 2)
        assert four.save(four.path(7)) == 7
        assert host.world.told("hbm") == 7


def test_what_continues_a_block_that_was_not_told_is_not_told(host: Host) -> None:
    """Those that only the lost GPU kept from it."""
    hold(host.world, 0)
    hold(host.world, 1)
    path = host.two.path(10)
    host.two.save(path[:4])
    lose(host.world)
    host.two.save(path)
    assert host.found() == ()
    other = host.two.path(5, seed=1)
    host.two.save(other)
    assert host.world.told("hbm") == 5


def test_one_that_is_lost_leaves_the_other(host: Host) -> None:
    path = host.one.path(10)
    host.one.save(path)
    host.two.save(path[:4])
    hold(host.world, 0)
    hold(host.world, 1)
    lose(host.world)
    assert host.two.load(path)[1] == frozenset()
    assert host.found()[1] == 4
    assert host.two.save(path) == 10
    assert host.found() == (10, 10, 0, 0)
    assert host.one.save(path) == 10, "in host memory"
    assert host.found() == (10, 10, 10, 0)


def test_an_engine_that_is_joined_to_a_gpu_uses_its_slab(host: Host) -> None:
    path = host.one.path(10)
    host.two.save(path)
    three = host.engine(THREE, TWO)
    assert three.load(path) == (10, frozenset())
    assert three.counted("hbm_loaded_blocks") == 10
    [trouble] = host.world.node.call(host.world.node.node.core.troubles)
    assert "an engine has it all" in trouble
    three.close()


def test_of_those_joined_the_best_is_used(host: Host) -> None:
    """The engine names it first, whichever slab was made first."""
    three = host.engine(THREE, TWO, ONE)
    assert three.save(three.path(3)) == 3
    assert host.world.stats()["blocks:hbm"] == 3
    assert host.two.store.match_device(three.handle, three.path(3)) == 3
    three.close()


def test_a_slab_that_nothing_can_be_copied_from_is_let_go(tmp_path: Path) -> None:
    """However often an engine asks: a descriptor that stays open keeps the memory."""
    world = World(tmp_path, on=EngineDevice(Gpu(ONE)), devices=Deaf())
    for _ in range(3):
        Engine(world.node.node.address, device=EngineDevice(Gpu(ONE))).close()
    assert [memory for memory in open_memory() if ONE.decode() in memory] == []
    assert world.stats()["capacity_bytes:hbm"] == 0
    world.close()


def test_gpus_that_are_none_are_told_of_only_so_far(host: Host) -> None:
    """An engine may name whatever it likes."""
    for number in range(3 * REFUSALS_MAX):
        with connected(host.world.node.node.address, map=True, hbm=True, gpu=b"none-%d" % number):
            pass
    assert len(host.world.node.call(host.world.node.node.core.troubles)) == REFUSALS_MAX


def open_memory() -> list[str]:
    """The names of the shared memory that this process has descriptors of."""
    targets = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            targets.append(str(each.readlink()))
    return targets
