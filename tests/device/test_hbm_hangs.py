"""A GPU that answers nobody: the node waits so long, gives it up, serves on, and ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvcache.device import served
from kvcache.device.served import Outlet
from kvcache.device.streams import CpuStreams
from kvcache.errors import Unavailable
from kvcache.testing.stores import SIZE
from tests.device.hbm_rig import PATIENCE_S, POISON, World, hold

CHUNK_BYTES = 64


class Hanging:
    """An outlet whose driver returns from nothing until it is let, and does then what it was asked."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self.is_stuck = False
        self.goes_on = threading.Event()
        self.is_asked = threading.Event()

    def copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[memoryview], chunk_bytes: int
    ) -> list[bytes]:
        self._hang()
        return self._outlet.copy(sources, targets, chunk_bytes)

    def probe(self, source: torch.Tensor) -> None:
        self._hang()

    def close(self) -> None:
        self._outlet.close()

    def _hang(self) -> None:
        self.is_asked.set()
        assert self.goes_on.wait(3 * PATIENCE_S)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.check()
    made.close()


@pytest.fixture
def hanging(world: World) -> Iterator[Hanging]:
    """The outlet of its GPU. Nothing is copied out until ``hold`` ends."""
    demoter = world.demoter()
    made = Hanging(demoter._outlet)
    demoter._outlet = made  # type: ignore[assignment]
    yield made
    made.goes_on.set()


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("kvcache.tiers.hbm_demote.ANSWER_S", seconds)


def test_the_gpu_is_lost_and_the_node_serves_on(
    world: World, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 0.05)
    path, other = world.engine.path(6), world.engine.path(6, seed=1)
    release = hold(world)
    world.engine.save(path)
    release()
    world.eventually(lambda: world.stats()["hbm_lost"] == 1)
    [trouble] = world.node.call(world.node.node.core.troubles)
    assert "has not answered" in trouble
    assert world.engine.save_below(other) == 6
    assert world.engine.load(other) == (6, frozenset())
    assert world.engine.load(path) == (0, frozenset())


def test_what_it_may_still_write_to_is_nobodys(
    world: World, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once it has written, late."""
    patience(monkeypatch, 0.05)
    path = world.engine.path(6)
    release = hold(world)
    world.engine.save(path)
    release()
    world.eventually(lambda: world.stats()["hbm_lost"] == 1)
    assert world.stats()["reservations"] == 1
    assert world.engine.save_below(path) == 0
    hanging.goes_on.set()
    world.eventually(lambda: not world.demoter()._pool._work_queue.qsize())
    assert world.stats()["reservations"] == 1
    assert world.in_host(path) == 0


def test_a_gpu_that_hangs_while_nobody_asks(
    world: World, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 0.05)
    hold(world)
    world.demoter()._probe_ns = 0
    world.eventually(lambda: world.stats()["hbm_lost"] == 1)


def test_a_node_ends_meanwhile(world: World, hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.server.hbm.CLOSE_S", 0.05)
    patience(monkeypatch, 10 * PATIENCE_S)
    release = hold(world)
    world.engine.save(world.engine.path(6))
    release()
    assert hanging.is_asked.wait(PATIENCE_S)
    node = world.node.node
    world.node.run(node.close())
    assert node.is_stuck
    assert node.core.host.resident_units() > 0, "what is written late must not go elsewhere"
    hanging.goes_on.set()
    world.eventually(lambda: not world.demoter().is_busy)


def test_a_node_ends_although_a_gpus_memory_cannot_be_let_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver waits for all work on it."""
    monkeypatch.setattr("kvcache.server.hbm.CLOSE_S", 0.05)
    goes_on = threading.Event()
    hbm = world.node.node.core.hbm
    assert hbm is not None
    close = hbm[0].memory.close

    def hang() -> None:
        assert goes_on.wait(3 * PATIENCE_S)
        close()

    monkeypatch.setattr(hbm[0].memory, "close", hang)
    world.node.run(world.node.node.close())
    assert world.node.node.is_stuck
    goes_on.set()
    world.eventually(lambda: not hbm._threads.is_busy)


def test_a_node_whose_gpus_answer_is_not_stuck(world: World) -> None:
    world.engine.save(world.engine.path(6))
    world.node.run(world.node.node.close())
    assert not world.node.node.is_stuck


def test_a_copy_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver takes it, and the GPU does not do it."""
    monkeypatch.setattr(served, "COPY_S", 0.05)
    goes_on = threading.Event()
    copying = served.copying

    def hanging(target: torch.Tensor, source: torch.Tensor) -> object:
        copy = copying(target, source)
        return lambda: (goes_on.wait(3 * PATIENCE_S), copy())

    monkeypatch.setattr(served, "copying", hanging)
    outlet = Outlet(CpuStreams())
    source = torch.full((SIZE,), POISON, dtype=torch.uint8)
    with pytest.raises(Unavailable, match="over"):
        outlet.copy([source], [memoryview(bytearray(SIZE))], CHUNK_BYTES)
    assert outlet.is_stuck
    goes_on.set()
    outlet.close()
