"""Pages to host slots and back through staging memory: every byte, none other, and parts that come back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from kvcache.device.slab import CpuMemory
from kvcache.device.staging import Path, Staging
from kvcache.errors import BadInput, Unavailable
from tests.device.engine_cache import POISON, Engine, Shape, chunk_sums, engine, slab_bytes, slab_of
from tests.device.rigs import DEVICES, PATIENCE_S, Refusing, Rig, seeded

SHAPE = Shape(layers=3, pages=16, heads=2, tokens=4, row=64)
BLOCK = 2 * 3 * 2 * SHAPE.plane_bytes  # Two pages a block: parts, layers, pages.
PART = 3 * BLOCK + 100
HOST = 8 * BLOCK


class World:
    """An engine with known pages, poisoned host and staging memory, and the way between."""

    def __init__(self, kind: str, layout: str = "flash_attention_nhd", seed: int = 0) -> None:
        self.rig = Rig(kind)
        self.engine: Engine = engine(layout, SHAPE, kind, seed)
        self.staging = Staging(slab_of(2 * PART + 50, kind), PART)
        self.host = slab_of(HOST)
        self.path = Path(self.rig.copies, self.engine.cache, self.staging, self.host)
        self.stream = self.rig.streams.current()

    def close(self) -> None:
        self.rig.close()


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.rig.copies.check()
        world.close()


def test_a_part_holds_so_many_blocks(worlds: list[World]) -> None:
    worlds.append(world := World("cpu"))
    assert world.engine.cache.spec(2).block_bytes == BLOCK
    assert world.path.blocks_max(2) == 3
    assert world.staging.free_count == 2


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("layout", ["flash_attention_nhd", "flash_attention_hnd", "flashinfer_nhd"])
def test_what_is_saved_is_loaded_elsewhere(worlds: list[World], kind: str, layout: str) -> None:
    worlds.append(world := World(kind, layout))
    pages, offsets = [[3, 5], [0, 9], [2, 1]], [2 * BLOCK, 0, 5 * BLOCK]
    blocks = world.engine.blocks(pages)
    saved = world.path.save(offsets, pages, world.stream, world.rig.then("save"))
    world.rig.until([saved.copy])
    assert bytes(world.host.numpy()) == slab_bytes(HOST, offsets, blocks), "and nothing beside it"
    others = [[10, 11], [4, 6], [15, 14]]
    loaded = world.path.load(offsets, others, world.stream, world.rig.then("load"))
    world.rig.copies.hold(loaded.copy, world.stream)
    world.rig.until([loaded.copy])
    world.engine.put(others, blocks, 0, len(world.engine.content))
    world.engine.check_memory()
    chunk_bytes = world.engine.cache.spec(2).chunk_bytes
    wanted = [chunk_sums(block, chunk_bytes) for block in blocks]
    assert saved.sums.tolist() == wanted, "as commit wants them"
    assert loaded.sums.tolist() == wanted
    assert world.rig.ended == [("save", None), ("load", None)]
    assert world.staging.free_count == 2


@pytest.mark.parametrize("kind", DEVICES)
def test_layer_by_layer_is_the_same_as_at_once(worlds: list[World], kind: str) -> None:
    worlds.append(world := World(kind))
    pages, offsets = [[3, 5], [0, 9]], [BLOCK, 3 * BLOCK]
    for layer in range(SHAPE.layers):
        first, last = 2 * layer, 2 * layer + 2
        copy = world.path.save(offsets, pages, world.stream, world.rig.then(f"layer {layer}"), first, last)
        world.rig.until([copy.copy])
        if not layer:
            half = slab_bytes(HOST, offsets, world.engine.blocks(pages, 0, 2))
            assert bytes(world.host.numpy()) == half
    assert bytes(world.host.numpy()) == slab_bytes(HOST, offsets, world.engine.blocks(pages))


@pytest.mark.parametrize("kind", DEVICES)
def test_only_the_planes_that_are_copied_take_staging_memory(worlds: list[World], kind: str) -> None:
    """Of one layer of three, thrice the blocks; poison around them stays."""
    worlds.append(world := World(kind))
    assert world.path.blocks_max(2, 2, 4) == 9
    pages, offsets = [[2 * at, 2 * at + 1] for at in range(8)], [at * BLOCK for at in range(7, -1, -1)]
    saved = world.path.save(offsets, pages, world.stream, world.rig.then("save"), 2, 4)
    world.rig.until([saved.copy])
    pieces = world.engine.blocks(pages, 2, 4)
    assert bytes(world.host.numpy()) == slab_bytes(HOST, offsets, pieces, at=BLOCK // 3)
    turned = [*pages[1:], pages[0]]
    loaded = world.path.load(offsets, turned, world.stream, world.rig.then("load"), 2, 4)
    world.rig.copies.hold(loaded.copy, world.stream)
    world.rig.until([loaded.copy])
    world.engine.put(turned, pieces, 2, 4)
    world.engine.check_memory()
    chunk_bytes = world.engine.cache.spec(2).chunk_bytes
    assert saved.sums.tolist() == loaded.sums.tolist() == [chunk_sums(piece, chunk_bytes) for piece in pieces]
    with pytest.raises(BadInput, match="planes 4 to 9"):
        world.path.blocks_max(2, 4, 9)


def test_a_part_comes_back_when_there_is_no_memory_for_its_sums(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds.append(world := World("cpu"))

    def refuse(*given: object, **named: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kvcache.device.staging.torch.empty", refuse)
    with pytest.raises(Unavailable, match="failed under a copy"):
        world.path.save([0], [[0, 1]], world.stream, world.rig.then("a"))
    assert world.staging.free_count == 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", DEVICES)
def test_a_random_caller_gets_its_bytes_and_all_parts_back(worlds: list[World], kind: str, seed: int) -> None:
    worlds.append(world := World(kind, seed=seed))
    chance, host = seeded(seed), [bytes([POISON]) * BLOCK] * 8
    for number in range(60):
        count = chance.randrange(1, 4)
        used = chance.sample(range(SHAPE.pages), 2 * count)
        pages = [used[2 * at : 2 * at + 2] for at in range(count)]
        slots = chance.sample(range(8), count)
        offsets = [slot * BLOCK for slot in slots]
        if chance.random() < 0.5:
            copy = world.path.save(offsets, pages, world.stream, world.rig.then(str(number))).copy
            for slot, block in zip(slots, world.engine.blocks(pages), strict=True):
                host[slot] = block
        else:
            copy = world.path.load(offsets, pages, world.stream, world.rig.then(str(number))).copy
            world.rig.copies.hold(copy, world.stream)
            world.engine.put(pages, [host[slot] for slot in slots], 0, len(world.engine.content))
        world.rig.until([copy])
    assert bytes(world.host.numpy()) == b"".join(host)
    world.engine.check_memory()
    assert world.staging.free_count == 2


@pytest.mark.parametrize("kind", DEVICES)
def test_bytes_that_changed_in_the_host_slab_are_seen_by_their_sums(worlds: list[World], kind: str) -> None:
    worlds.append(world := World(kind))
    saved = world.path.save([0, BLOCK], [[0, 1], [2, 3]], world.stream, world.rig.then("save"), 2, 4)
    world.rig.until([saved.copy])
    world.host[BLOCK + 2 * (BLOCK // 6) + 5] ^= 1
    loaded = world.path.load([0, BLOCK], [[4, 5], [6, 7]], world.stream, world.rig.then("load"), 2, 4)
    world.rig.until([loaded.copy])
    assert torch.equal(loaded.sums[0], saved.sums[0])
    assert not torch.equal(loaded.sums[1], saved.sums[1])


def test_a_part_is_not_given_again_before_its_copy_has_ended(worlds: list[World]) -> None:
    worlds.append(world := World("cpu"))
    gate = world.rig.gate(world.rig.lane("save host"))
    for at in range(2):
        world.path.save([at * BLOCK], [[0, 1]], world.stream, world.rig.then(str(at)))
    with pytest.raises(Unavailable, match="all 2 parts are in copies"):
        world.path.save([2 * BLOCK], [[0, 1]], world.stream, world.rig.then("late"))
    gate.set()
    assert world.rig.engine.mark().wait(PATIENCE_S)
    world.rig.until(list(world.rig.copies._running))
    assert world.staging.free_count == 2
    assert sorted(name for name, _ in world.rig.ended) == ["0", "1"]


@pytest.mark.parametrize(
    ("offsets", "pages", "planes"),
    [
        ([0], [[0, 1]], (0, 7)),
        ([0], [[0, 1]], (3, 3)),
        ([HOST - BLOCK + 1], [[0, 1]], (0, 6)),
        ([-1], [[0, 1]], (0, 6)),
        ([0], [[0, 99]], (0, 6)),
        ([0], [], (0, 6)),
        ([], [], (0, 6)),
        ([0, BLOCK, 2 * BLOCK, 3 * BLOCK], [[0, 1], [2, 3], [4, 5], [6, 7]], (0, 6)),
    ],
)
@pytest.mark.parametrize("way", ["save", "load"])
def test_what_does_not_fit_is_refused_before_anything_moves(
    worlds: list[World], way: str, offsets: list[int], pages: list[list[int]], planes: tuple[int, int]
) -> None:
    worlds.append(world := World("cpu"))
    ask = world.path.save if way == "save" else world.path.load
    with pytest.raises(BadInput):
        ask(offsets, pages, world.stream, world.rig.then("a"), *planes)
    assert world.staging.free_count == 2
    assert world.rig.ended == []
    assert bytes(world.host.numpy()) == bytes([POISON]) * HOST


def test_a_page_may_be_saved_twice_and_not_loaded_twice(worlds: list[World]) -> None:
    worlds.append(world := World("cpu"))
    pages = [[0, 1], [1, 2]]
    world.rig.until([world.path.save([0, BLOCK], pages, world.stream, world.rig.then("a")).copy])
    assert bytes(world.host.numpy()) == slab_bytes(HOST, [0, BLOCK], world.engine.blocks(pages))
    with pytest.raises(BadInput, match="named twice"):
        world.path.load([0, BLOCK], pages, world.stream, world.rig.then("b"))
    assert world.staging.free_count == 2


@pytest.mark.parametrize("dead", [False, True])
def test_a_part_comes_back_when_the_device_refuses(worlds: list[World], dead: bool) -> None:
    worlds.append(world := World("cpu"))
    world.rig.copies._lanes["save", "host"] = Refusing(world.rig.lane("save host"), 1, dead=dead)
    copy = world.path.save([0], [[0, 1]], world.stream, world.rig.then("a")).copy
    world.rig.copies.wait([copy], PATIENCE_S)
    assert [(name, failure is None) for name, failure in world.rig.ended] == [("a", False)]
    assert world.staging.free_count == 2
    if dead:
        with pytest.raises(Unavailable):
            world.path.save([0], [[0, 1]], world.stream, world.rig.then("b"))
    assert world.staging.free_count == 2


def test_another_map_of_the_host_slab_sees_what_was_saved(worlds: list[World]) -> None:
    worlds.append(world := World("cpu"))
    memory = CpuMemory()
    host, descriptor = memory.create("host", HOST)
    again = memory.open(descriptor, HOST)
    os.close(descriptor)
    path = Path(world.rig.copies, world.engine.cache, world.staging, host)
    world.rig.until([path.save([BLOCK], [[7, 8]], world.stream, world.rig.then("a")).copy])
    assert torch.equal(again, host)
    assert bytes(again[BLOCK : 2 * BLOCK].numpy()) == world.engine.blocks([[7, 8]])[0]
    torch.testing.assert_close(again[:BLOCK], torch.zeros(BLOCK, dtype=torch.uint8))
