"""Blocks saved through a node while they are computed: into HBM or host memory, by both stores."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.client import connect_device
from kvcache.client.blocking_store import BlockingNodeStore
from kvcache.client.link import Options, Outage
from kvcache.clock import SystemClock
from kvcache.device import engine as engine_of_devices
from kvcache.device import line
from kvcache.device.engine import EngineDevice, PagedBlocks
from kvcache.device.saving import Writing
from kvcache.device.slab import CpuMemory
from kvcache.device.streams import CpuStreams, Stream
from kvcache.errors import BadInput
from kvcache.testing.stores import EXAMPLE, SIZE, SPEC
from tests.device.engine_cache import Engine as Cache
from tests.device.engine_cache import Shape
from tests.device.engine_cache import engine as cache_of
from tests.device.hbm_rig import HBM_BLOCKS, PATIENCE_S, TIMEOUT_MS, World, hold

A_WHILE_S = 0.2
"""What must not happen has so long to happen."""
PAGES = [[6], [1], [4], [0]]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, capacity="4MiB")
    yield made
    made.check()
    made.close()


def paged() -> Cache:
    """A cache one page of which is a block, full of nothing yet."""
    shape = Shape(layers=1, pages=7, heads=SPEC.head_count, tokens=SPEC.block_tokens, row=256)
    made = cache_of("flash_attention_nhd", shape)
    for plane in made.cache.planes:
        plane.zero_()
    return made


def compute(cache: Cache, plane: int) -> None:
    right = cache_of("flash_attention_nhd", Shape(1, 7, SPEC.head_count, SPEC.block_tokens, 256))
    cache.cache.planes[plane].copy_(right.cache.planes[plane])


@pytest.mark.parametrize("tier", ["hbm", "host"])
def test_planes_are_saved_as_they_are_computed(world: World, tier: str) -> None:
    engine, path = world.engine, world.engine.path(4)
    store = engine.store
    if tier == "host":
        store = BlockingNodeStore(Options(world.node.node.address, "", TIMEOUT_MS), SystemClock())
    handle, cache = store.open(EXAMPLE, SPEC), paged()
    writing = store.begin_save_device(handle, path, PagedBlocks(engine.device, cache.cache, PAGES))
    for plane in range(SPEC.plane_count):
        compute(cache, plane)
        assert engine.store.match_device(handle, path) == 0, "nothing is published before the end"
        writing.advance(plane + 1)
    assert writing.finish() == 4
    assert store.counters["streamed_blocks"] == 4
    assert (world.in_hbm(path), world.in_host(path)) == ((4, 0) if tier == "hbm" else (0, 4))
    into = paged()
    lease = engine.store.lease_device(engine.handle, path)
    assert not engine.store.load_device(lease, PagedBlocks(engine.device, into.cache, PAGES))
    engine.store.release(lease)
    for have, want in zip(into.cache.planes, cache.cache.planes, strict=True):
        for [page] in PAGES:
            assert have[page].equal(want[page])
    if tier == "host":
        store.close()


class Queued(CpuStreams):
    """As on a GPU: what an engine computes is queued, and each thread may have a stream of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.new("engine", urgent=False)

    def current(self) -> Stream:
        return self.engine


def test_what_began_nowhere_is_saved_behind_what_computes_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room, no map, another connection: whoever finishes, on whatever stream, saves what was computed."""
    streams, gate, saved = Queued(), threading.Event(), []
    for module in (line, engine_of_devices):
        monkeypatch.setattr(module, "streams_of", lambda device: streams)
    store = BlockingNodeStore(Options(world.node.node.address, "", TIMEOUT_MS, mapped=False), SystemClock())
    handle, cache, path = store.open(EXAMPLE, SPEC), paged(), world.engine.path(4)
    blocks = PagedBlocks(EngineDevice(CpuMemory()), cache.cache, PAGES)
    writing = store.begin_save_device(handle, path, blocks)
    streams.engine.run(lambda: _pass(gate))
    for plane in range(SPEC.plane_count):
        streams.engine.run(lambda at=plane: compute(cache, at))  # type: ignore[misc]
        writing.advance(plane + 1)
    streams.engine = streams.new("other", urgent=False)
    finishing = threading.Thread(target=lambda: saved.append(writing.finish()))
    finishing.start()
    finishing.join(A_WHILE_S)
    assert finishing.is_alive(), "it was not computed yet"
    gate.set()
    finishing.join(PATIENCE_S)
    assert saved == [4]
    monkeypatch.undo()
    into, lease = paged(), world.engine.store.lease_device(world.engine.handle, path)
    assert not world.engine.store.load_device(lease, PagedBlocks(world.engine.device, into.cache, PAGES))
    world.engine.store.release(lease)
    for have, want in zip(into.cache.planes, cache.cache.planes, strict=True):
        assert all(have[page].equal(want[page]) for [page] in PAGES)
    store.close()


def test_flat_blocks(world: World) -> None:
    path = world.engine.path(5)
    blocks = world.engine.blocks(world.engine.memory(path))
    writing = world.engine.store.begin_save_device(world.engine.handle, path, blocks)
    writing.advance(1)
    assert writing.finish() == 5
    assert world.engine.load(path) == (5, frozenset())
    assert world.engine.counted("hbm_loaded_blocks") == 5


def test_what_was_given_up_leaves_room(world: World) -> None:
    engine, path = world.engine, world.engine.path(HBM_BLOCKS)
    for _ in range(3):
        writing = engine.store.begin_save_device(engine.handle, path, engine.blocks(engine.memory(path)))
        writing.advance(1)
        writing.abort()
        with pytest.raises(BadInput, match="has ended"):
            writing.finish()
    assert not world.stats()["hbm_reservations"]
    assert engine.save(path) == HBM_BLOCKS


def test_more_than_hbm_takes_goes_to_host_memory(world: World) -> None:
    engine, path = world.engine, world.engine.path(HBM_BLOCKS + 20)
    hold(world)
    writing = engine.store.begin_save_device(engine.handle, path, engine.blocks(engine.memory(path)))
    writing.advance(1)
    assert writing.finish() == len(path)
    assert world.in_host(path) == len(path)
    assert engine.load(path) == (len(path), frozenset())


def test_through_the_asynchronous_store(world: World) -> None:
    async def run() -> None:
        store = connect_device(world.engine.device, world.node.node.address)
        handle, path = await store.open(EXAMPLE, SPEC), world.engine.path(6)
        blocks = world.engine.blocks(world.engine.memory(path))
        writing = await store.begin_save_device(handle, path, blocks)
        await writing.advance(1)
        assert await writing.finish() == 6
        other = await store.begin_save_device(handle, world.engine.path(6, seed=1), blocks)
        await other.abort()
        await store.close()

    asyncio.run(run())
    assert world.engine.load(world.engine.path(6)) == (6, frozenset())
    assert not world.stats()["hbm_reservations"]


def test_no_connection_says_that_writes_have_ended_before_they_have(world: World) -> None:
    """A slot that a copy may still write to would be given to another block."""
    engine, path = world.engine, world.engine.path(4)
    store = engine.store
    gate = threading.Event()
    engine.device.saves().copies.lane("device").run(lambda: _pass(gate))
    writing = store.begin_save_device(engine.handle, path, engine.blocks(engine.memory(path)))
    writing.advance(1)
    assert store._attached is not None
    [running] = store._attached.link._writings
    store._attached.link.broken = "bad_reply"
    leaving = threading.Thread(target=store.match, args=(engine.handle, path))
    leaving.start()
    world.eventually(lambda: vars(running)["_failure"] is not None)
    for _ in range(5):
        store._outage = Outage()  # Else it would only not be tried yet.
        store.match(engine.handle, path)
        assert (store._connections, store._connecting) == (1, False)
    gate.set()
    leaving.join(PATIENCE_S)
    world.eventually(lambda: engine.save(path) == 4 and world.in_hbm(path) == 4)
    assert store._connections == 2
    assert writing.finish() == 4
    assert engine.load(path) == (4, frozenset())


def test_a_store_whose_connection_ends_under_an_interrupt_connects_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, path, end = world.engine, world.engine.path(4), Writing.end
    writing = engine.store.begin_save_device(engine.handle, path, engine.blocks(engine.memory(path)))
    interrupts = [KeyboardInterrupt(), KeyboardInterrupt()]

    def interrupted(writing: Writing) -> None:
        if interrupts:
            raise interrupts.pop()
        end(writing)

    monkeypatch.setattr(Writing, "end", interrupted)
    assert engine.store._attached is not None
    engine.store._attached.link.broken = "bad_reply"
    with pytest.raises(KeyboardInterrupt):
        engine.store.match(engine.handle, path)
    assert not interrupts
    assert engine.store._running == 0
    world.eventually(lambda: engine.save(path) == 4)
    assert writing.finish() == 4


def test_a_capped_save_arrives_whole(world: World) -> None:
    device = EngineDevice(CpuMemory(), save_bytes_s=100 * SIZE)
    options = Options(world.node.node.address, "", TIMEOUT_MS)
    store, clock = BlockingNodeStore(options, SystemClock()), SystemClock()
    handle, path = store.open(EXAMPLE, SPEC), world.engine.path(20)
    blocks = world.engine.blocks(world.engine.memory(path))
    blocks._device = device
    begun_ns = clock.now_ns()
    assert store.save_device(handle, path, blocks) == 20
    assert clock.now_ns() - begun_ns >= 150_000_000, "but for the first, a block in ten milliseconds"
    assert world.in_host(path) == 20
    assert world.engine.load(path) == (20, frozenset())
    store.close()


def _pass(gate: threading.Event) -> None:
    assert gate.wait(PATIENCE_S)
