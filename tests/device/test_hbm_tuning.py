"""The policy of HBM in a running node, changed on all GPUs; what recordings and shadow caches hear of HBM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.device.engine import EngineDevice
from kvcache.errors import BadInput
from kvcache.eviction.registry import POLICIES
from kvcache.leaf_lru import LeafLru
from kvcache.wire_tuning import InForce
from tests.device.hbm_rig import Engine, World, hold
from tests.device.test_hbm_gpus import ONE, TWO, Gpu, Gpus, Host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    hold(made.world, 0)
    hold(made.world, 1)
    yield made
    made.world.check()
    made.two.close()
    made.world.close()


def tune(world: World, policy: str) -> InForce:
    """Once no change is under way any more."""
    tuning = world.node.node.core.tuning
    world.node.call(lambda: tuning.set(wire.Tune("set", wire.HBM, policy)))
    world.eventually(lambda: not world.node.call(tuning.tell).tiers[wire.HBM].coming)
    return world.node.call(tuning.tell).tiers[wire.HBM]


def deciding(world: World, number: int) -> str:
    hbm = world.node.node.core.hbm
    assert hbm is not None
    return type(hbm[number].ledger.policy._policy).__name__


def offer(monkeypatch: pytest.MonkeyPatch, **hooks: Callable[..., object]) -> None:
    monkeypatch.setitem(POLICIES, "broken", type("Broken", (LeafLru,), dict(hooks)))


def fail(*_: object) -> None:
    raise RuntimeError("it cannot")


def test_it_changes_on_every_gpu_and_nothing_is_lost(host: Host) -> None:
    path = host.one.path(10)
    host.one.save(path)
    host.two.save(path[:4])
    now = tune(host.world, "leaf-arc")
    assert (now.policy, now.blocks) == ("leaf-arc", 14)
    assert (deciding(host.world, 0), deciding(host.world, 1)) == ("LeafArc", "LeafArc")
    assert host.one.load(path) == (10, frozenset())
    assert host.one.counted("hbm_loaded_blocks") == 10


def test_a_gpu_that_comes_later_has_it_too(tmp_path: Path) -> None:
    world = World(tmp_path, on=EngineDevice(Gpu(ONE)), devices=Gpus())
    assert deciding(world, 0) == "LeafLru"
    tune(world, "leaf-arc")
    two = Engine(world.node.node.address, device=EngineDevice(Gpu(TWO)))
    assert deciding(world, 1) == "LeafArc"
    two.close()
    world.close()


def test_one_that_cannot_take_over_on_a_gpu_does_not(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, on_admitted=fail)
    host.one.save(host.one.path(10))
    now = tune(host.world, "broken")
    assert now.policy == "leaf-lru"
    assert "leaf-lru goes on (1 of 2 GPUs), as broken could not take over" in now.said


def test_one_that_cannot_start_is_refused_though_no_gpu_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first engine of a GPU would find out."""
    offer(monkeypatch, __init__=fail)
    world = World(tmp_path, on=EngineDevice(Gpu(b"none")), devices=Gpus())
    with pytest.raises(BadInput, match="cannot start"):
        tune(world, "broken")
    world.close()


def test_recordings_and_shadow_caches_hear_of_what_only_hbm_has(tmp_path: Path) -> None:
    world = World(tmp_path, record=str(tmp_path / "traces"), shadow="leaf-arc", shadow_sample=1.0)
    hold(world)
    path = world.engine.path(6)
    world.engine.save(path)
    world.engine.load(path)
    assert world.stats()["recorded_requests"] == 1
    shadowing = world.node.node.core.tuning.shadowing
    world.node.call(shadowing.drain_all)
    assert world.stats()["shadow_blocks"] > 0
    world.close()
