"""Leases in HBM by who maps no memory: an engine's scheduler, for the worker of its user, tenant and GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from kvcache import wire
from kvcache.block import BlockHash
from kvcache.client.blocking_store import BlockingNodeStore
from kvcache.client.link import Options
from kvcache.client.store import SaveHints
from kvcache.clock import SystemClock
from kvcache.errors import BadInput
from kvcache.server.hbm import NO_HBM
from kvcache.server.identity import Identity, Peer, planning
from kvcache.testing.stores import EXAMPLE, SIZE, SPEC
from tests.device.hbm_rig import HBM_BLOCKS, POISON, TIMEOUT_MS, Engine, World, hold, lose, settings
from tests.server.conftest import EmbeddedNode
from tests.server.peer import credentials
from tests.server.talk import connected, deadline

NAME = "engine/request"
UID = os.getuid()


class Planner:
    """It has no device. REQUIRES of all blocks: they are ``EXAMPLE``'s."""

    def __init__(self, address: str, gpu: bytes = b"", token: str = "") -> None:
        options = Options(address, token, TIMEOUT_MS, mapped=False, plans_for=gpu)
        self.store = BlockingNodeStore(options, SystemClock())
        self.handle = self.store.open(EXAMPLE, SPEC)

    def lease(self, path: Sequence[BlockHash], request: str = NAME) -> tuple[int, ...]:
        """How many blocks, and in which tiers."""
        self.held = self.store.lease_device(self.handle, path, request, wait_ms=0)
        return self.held.count, *(grant.count for grant in self.held.grants if grant.tier == wire.HBM)

    def match(self, path: Sequence[BlockHash]) -> int:
        return self.store.match_device(self.handle, path)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    hold(made)
    yield made
    made.check()
    made.close()


@pytest.fixture
def planner(world: World) -> Iterator[Planner]:
    made = Planner(world.node.node.address)
    yield made
    made.store.close()


def test_it_finds_what_hbm_alone_holds(world: World, planner: Planner) -> None:
    path = world.engine.path(9)
    world.engine.save(path)
    assert world.in_host(path) == 0
    assert planner.match(path) == 9
    assert planner.lease(path) == (9, 9)
    planner.store.release(planner.held)
    assert world.stats()["hbm_leases"] == 0


def test_the_tiers_below_come_behind_it(world: World, planner: Planner) -> None:
    path = world.engine.path(9)
    world.engine.save(path[:4])
    world.engine.save_below(path)
    assert planner.match(path) == 9
    assert planner.lease(path) == (9, 4)


def test_an_engine_may_come_later(tmp_path: Path) -> None:
    """Until one has mapped the slab there is none: for who maps nothing, none is made."""
    node = EmbeddedNode(settings(tmp_path))
    planner = Planner(node.node.address)
    path = planner.handle.hashes(list(range(4 * SPEC.block_tokens)))
    assert planner.lease(path) == (0,)
    assert node.call(node.node.core.stats)["capacity_bytes:hbm"] == 0
    engine = Engine(node.node.address)
    assert engine.save(path) == 4
    assert planner.lease(path) == (4, 4)
    planner.store.close()
    engine.close()
    node.close()


def test_its_lease_is_the_engines(world: World, planner: Planner) -> None:
    """What is leased stays until both have let go, whatever else is saved meanwhile."""
    path = world.engine.path(9)
    world.engine.save(path)
    assert planner.lease(path) == (9, 9)
    assert world.engine.save(world.engine.path(HBM_BLOCKS, seed=1)) >= HBM_BLOCKS - 9
    assert world.in_hbm(path) == 9
    store = world.engine.store
    held = store.lease_device(world.engine.handle, path, NAME, wait_ms=0)
    found = world.stats()
    assert found["hbm_leases"] == 1
    assert found["hbm_hit_blocks"] == 9, "counted once, as the tokens are"
    assert found["hit_tokens"] == found["lookup_tokens"] == 9 * SPEC.block_tokens
    planner.store.release(planner.held)
    world.engine.save(world.engine.path(HBM_BLOCKS, seed=2))
    memory = torch.full((9, SIZE), POISON, dtype=torch.uint8)
    assert not store.load_device(held, world.engine.blocks(memory))
    assert memory.equal(world.engine.memory(path))
    store.release(held)
    world.engine.save(world.engine.path(HBM_BLOCKS, seed=3))
    assert world.in_hbm(path) == 0, "nobody holds it"


def test_its_lease_ends_with_its_connection(world: World, planner: Planner) -> None:
    path = world.engine.path(9)
    world.engine.save(path)
    planner.lease(path)
    planner.store.close()
    world.eventually(lambda: world.stats()["hbm_leases"] == 0)


def test_what_others_want_too_goes_below_where_it_is_found(world: World, planner: Planner) -> None:
    engine, path = world.engine, world.engine.path(9)
    blocks = engine.blocks(engine.memory(path))
    assert engine.store.save_device(engine.handle, path, blocks, hints=SaveHints(below=True)) == 9
    assert (world.in_hbm(path), world.in_host(path)) == (0, 9)
    assert planner.lease(path) == (9,)


def test_another_gpu_has_nothing(world: World) -> None:
    path = world.engine.path(9)
    world.engine.save(path)
    other = Planner(world.node.node.address, b"another")
    assert other.match(path) == 0
    assert other.lease(path) == (0,)
    other.store.close()


def test_another_trust_domain_has_nothing(tmp_path: Path) -> None:
    file = credentials(tmp_path, a=("alice", ["reader", "writer"]), b=("bob", ["reader", "writer"]))
    world = World(tmp_path, token="a" * 16, credentials=file)
    world.engine.save(world.engine.path(4))
    hbm = world.node.node.core.hbm
    assert hbm is not None
    found = [
        hbm.find(f"{uid}-{tenant}", b"") for uid, tenant in [(UID, "alice"), (UID, "bob"), (-1, "alice")]
    ]
    assert found == [0, NO_HBM, NO_HBM]
    world.close()


def test_it_is_of_the_user_that_asks() -> None:
    """The kernel says who that is; nobody can be asked over TCP."""
    hello = wire.Hello(wire.PROTOCOL_VERSION, hbm=True, gpu=b"g")
    for uid, expected in ((7, ("7-t", b"g")), (-1, None)):
        identity = Identity(1, "t", frozenset({"reader"}), 0, False, Peer(0, uid))
        assert planning(identity, hello).plans_for == expected
        assert planning(identity, replace(hello, map=True)).plans_for is None
        assert planning(identity, replace(hello, hbm=False)).plans_for is None


def test_a_lost_gpu_is_a_miss(world: World, planner: Planner) -> None:
    path = world.engine.path(9)
    world.engine.save(path)
    assert planner.lease(path) == (9, 9)
    lose(world)
    planner.store.release(planner.held)
    assert planner.lease(path) == (0,)
    assert planner.match(path) == 0


def test_it_neither_writes_nor_reports(world: World) -> None:
    path = world.engine.path(2)
    world.engine.save(path)
    prefix, namespace = b"".join(path), world.engine.handle.namespace_id
    with connected(world.node.node.address, hbm=True) as channel:
        assert channel.welcome.hbm == wire.NO_SLAB
        assert channel.hbm_fd is None
        shape = (SPEC.plane_count, SPEC.head_count, SPEC.head_bytes)
        channel.call(wire.Open(world.engine.handle.namespace.to_map(), *shape), deadline())
        leased = channel.call(wire.TakeLease(namespace, prefix, hbm=True), deadline())
        assert isinstance(leased, wire.Leased)
        assert leased.hbm.count == 2
        for request in (
            wire.Reserve(namespace, b"", prefix, tier=wire.HBM),
            wire.Commit(1, b"", wire.HBM),
            wire.Abort(1, wire.HBM),
            wire.Release(leased.hbm.lease, [0], wire.HBM),
        ):
            with pytest.raises(BadInput, match="no memory of a GPU"):
                channel.call(request, deadline())
        assert channel.call(wire.Release(leased.hbm.lease, tier=wire.HBM), deadline()) == wire.Released(True)
    assert world.in_hbm(path) == 2
