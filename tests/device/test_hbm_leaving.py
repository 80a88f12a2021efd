"""What is about to leave HBM: it goes to host memory first, verified, or is a miss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvcache.testing.stores import SIZE
from tests.device.hbm_rig import HBM_BLOCKS, Failing, World, hold


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.check()
    made.close()


def test_it_goes_to_host_memory_first(world: World) -> None:
    path = world.engine.path(HBM_BLOCKS)
    assert world.engine.save(path) == HBM_BLOCKS
    world.eventually(lambda: world.in_host(path) == HBM_BLOCKS)
    other = world.engine.path(HBM_BLOCKS, seed=1)
    assert world.engine.save(other) == HBM_BLOCKS
    assert world.in_hbm(path) == 0
    assert world.engine.load(path) == (HBM_BLOCKS, frozenset())
    assert world.stats().get("hbm_dropped_blocks", 0) == 0


def test_a_node_that_ends_copies_no_more_than_it_has_begun(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path may be all of a GPU's memory."""
    monkeypatch.setattr("kvcache.tiers.hbm_demote.BATCH_BYTES_MAX", SIZE)
    path = world.engine.path(HBM_BLOCKS)
    release = hold(world)
    world.engine.save(path)
    demoter = world.demoter()
    copy = demoter._outlet.copy

    def closing(
        sources: Sequence[torch.Tensor], targets: Sequence[memoryview], chunk_bytes: int
    ) -> list[bytes]:
        world.node.call(lambda: setattr(demoter, "_is_closed", True))
        return copy(sources, targets, chunk_bytes)

    monkeypatch.setattr(demoter._outlet, "copy", closing)
    release()
    world.eventually(lambda: not demoter.is_busy)
    assert world.in_host(path) == 1


def test_it_is_held_to_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch goes ahead, and the next when so much time has passed; a node that ends does not wait."""
    monkeypatch.setattr("kvcache.tiers.hbm_demote.BATCH_BYTES_MAX", SIZE)
    world = World(tmp_path, hbm_demote_rate="1")
    path = world.engine.path(HBM_BLOCKS)
    world.engine.save(path)
    world.eventually(lambda: world.in_host(path) == 1)
    for _ in range(20):
        world.engine.save(path)
    assert world.demoter().is_busy
    assert world.in_host(path) == 1
    world.close()
    assert not world.demoter().is_busy


def test_what_could_not_is_a_miss_and_counted(world: World) -> None:
    path = world.engine.path(HBM_BLOCKS)
    hold(world)
    world.engine.save(path)
    world.engine.save(world.engine.path(HBM_BLOCKS, seed=1))
    assert world.engine.load(path) == (0, frozenset())
    assert world.stats()["hbm_dropped_blocks"] == HBM_BLOCKS


def test_wrong_bytes_never_go_below(world: World) -> None:
    path = world.engine.path(6)
    release = hold(world)
    world.engine.save(path)
    world.flip(path[3])
    release()
    world.eventually(lambda: world.stats().get("hbm_rejected_blocks:checksum", 0) == 1)
    world.eventually(lambda: not world.stats()["reservations"])
    assert world.in_host(path) == 3
    assert world.in_hbm(path) == 3
    assert world.engine.load(path) == (3, frozenset())


def test_a_gpu_that_fails_while_it_is_copied_from(world: World) -> None:
    path = world.engine.path(6)
    release = hold(world)
    world.engine.save(path)
    world.demoter()._outlet = Failing()
    release()
    world.eventually(lambda: world.stats()["hbm_lost"] == 1)
    world.eventually(lambda: not world.stats()["reservations"])
    assert world.in_host(path) == 0
    assert world.engine.load(path) == (0, frozenset())


def test_host_memory_overrules_hbm(world: World) -> None:
    """Whoever is right: one name has one content, and it is the one that all engines can read."""
    engine, path = world.engine, world.engine.path(5)
    hold(world)
    changed = engine.memory(path)
    changed[2, 7] ^= 1
    assert engine.store.save_device(engine.handle, path, engine.blocks(changed)) == 5
    assert engine.save_below(path) == 5
    world.eventually(lambda: world.in_hbm(path) == 2)
    assert world.stats()["hbm_rejected_blocks:overruled"] == 1
    assert engine.load(path) == (5, frozenset())
    assert engine.counted("failed_blocks:checksum") == 0
    world.eventually(lambda: engine.save(path) == 5)  # What continues it is found again: the same as below.
    assert world.stats()["hbm_promoted_blocks"] == 1
    assert world.stats()["hbm_rejected_blocks:overruled"] == 1
