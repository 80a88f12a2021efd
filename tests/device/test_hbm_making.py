"""A GPU's memory is taken by a thread: nobody else waits, and who asked waits so long and no longer."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.device.engine import EngineDevice
from kvcache.errors import Unavailable
from kvcache.server import hbm_opening
from kvcache.server.hbm import MAKINGS_MAX, NO_HBM, REFUSALS_MAX
from kvcache.testing.stores import SIZE
from kvcache.tiers.hbm import HbmTier
from tests.device.hbm_rig import HBM_BLOCKS, PATIENCE_S, Engine, World
from tests.device.test_hbm_gpus import FOUR, ONE, TWO, Gpu, Gpus
from tests.server.talk import connected


class Slow(Gpus):
    """Whose ``FOUR`` answers when it is let. ``taken``: how often each was asked for memory."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.taken: Counter[bytes] = Counter()

    def arena(self, name: str, gpu: bytes, size_bytes: int, unit_bytes: int) -> HbmTier:
        self.taken[gpu] += 1
        if gpu not in (ONE, TWO):
            assert self.answers.wait(PATIENCE_S * 3)
        return super().arena(name, gpu, size_bytes, unit_bytes)


class Map:
    """Memory of a GPU that hangs: who lets it go waits."""


class Hung(Gpus):
    """``let_go``: the threads in which maps were."""

    def __init__(self) -> None:
        self.let_go: list[str] = []

    def arena(self, name: str, gpu: bytes, size_bytes: int, unit_bytes: int) -> HbmTier:
        made = Map()
        weakref.finalize(made, lambda: self.let_go.append(threading.current_thread().name))
        try:
            raise RuntimeError(f"{made} was not cleared in time")
        except RuntimeError as error:
            raise Unavailable("unavailable", "no slab", "it took too long") from error


@pytest.fixture
def gpus() -> Slow:
    return Slow()


@pytest.fixture
def world(tmp_path: Path, gpus: Slow) -> Iterator[World]:
    """Its engine is on GPU ``ONE``."""
    made = World(tmp_path, on=EngineDevice(Gpu(ONE)), devices=gpus)
    yield made
    gpus.answers.set()
    made.check()
    made.close()


def engine(world: World, gpu: bytes = FOUR) -> Engine:
    return Engine(world.node.node.address, gpu.decode(), EngineDevice(Gpu(gpu)))


def waiting(world: World) -> int:
    """Connections that were not answered yet."""
    return world.node.call(lambda: len(world.node.node._greeting))


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("kvcache.server.hbm.WAIT_S", seconds)


def test_others_go_on_meanwhile(world: World, gpus: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        four = pool.submit(engine, world)
        world.eventually(lambda: gpus.taken[FOUR] == 1)
        path = world.engine.path(5)
        assert world.engine.save(path) == 5
        assert world.engine.load(path) == (5, frozenset())
        two = engine(world, TWO)
        assert two.save(path) == 5
        two.close()
        assert not four.done()
        gpus.answers.set()
        made = four.result()
    assert made.save(path) == 5
    made.close()


def test_two_who_ask_at_once_share_one(world: World, gpus: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, PATIENCE_S)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(engine, world) for _ in range(2)]
        world.eventually(lambda: waiting(world) == 2)
        gpus.answers.set()
        first, second = (each.result() for each in both)
    assert gpus.taken[FOUR] == 1
    assert first.save(first.path(4)) == 4
    assert second.load(second.path(4)) == (4, frozenset())
    assert second.counted("hbm_loaded_blocks") == 4
    first.close()
    second.close()


def test_who_waited_too_long_has_host_memory_now_and_hbm_next_time(
    world: World, gpus: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 0.01)
    early = engine(world)
    path = early.path(4)
    assert early.save(path) == world.in_host(path) == 4
    assert not early.counted("hbm_saved_blocks")
    [trouble] = world.node.call(world.node.node.core.troubles)
    assert "does not answer" in trouble
    assert FOUR.hex() in trouble
    patience(monkeypatch, 10 * PATIENCE_S)
    with connected(world.node.node.address, map=True, hbm=True, gpu=FOUR) as channel:
        assert channel.hbm_fd is None, "and nobody waits for it a second time"
    gpus.answers.set()
    world.eventually(lambda: world.stats()["capacity_bytes:hbm"] > HBM_BLOCKS * SIZE)
    assert world.node.call(world.node.node.core.troubles) == []
    late = engine(world)
    assert late.save(path) == late.counted("hbm_saved_blocks") == 4
    assert gpus.taken[FOUR] == 1
    early.close()
    late.close()


def test_gpus_that_hang_take_so_many_threads_and_no_more(
    world: World, gpus: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine may name whatever it likes."""
    patience(monkeypatch, 0.01)
    for number in range(2 * MAKINGS_MAX):
        with connected(world.node.node.address, map=True, hbm=True, gpu=b"hung-%d" % number) as channel:
            assert channel.hbm_fd is None
    assert sum(gpus.taken.values()) - gpus.taken[ONE] == MAKINGS_MAX
    assert world.engine.save(world.engine.path(5)) == 5
    world.check()


def test_who_invents_gpus_hides_no_other_tenants(tmp_path: Path) -> None:
    """What is said of them is bounded, and each tenant has its share of it."""
    world = World(tmp_path, on=EngineDevice(Gpu(ONE)), devices=Hung())
    hbm = world.node.node.core.hbm
    assert hbm is not None

    def troubles() -> list[str]:
        return world.node.call(world.node.node.core.troubles)

    async def ask(name: str, gpu: bytes) -> None:
        hello = wire.Hello(wire.PROTOCOL_VERSION, "", True, "engine", hbm=True, gpu=gpu)
        assert await hbm.admit(name, hello, hbm_opening.below_hbm(world.node.node.core, 0)) == NO_HBM

    for number in range(2 * REFUSALS_MAX):
        world.node.run(ask("inventor", b"none-%d" % number))
    before = len(troubles())
    assert before <= REFUSALS_MAX + 1
    world.node.run(ask("other", FOUR))
    assert len([each for each in troubles() if FOUR.hex() in each]) == 1
    assert len(troubles()) == before + 1
    world.node.run(ask("third", FOUR))
    assert len(troubles()) == before + 1, "of one GPU it is said once"
    world.close()


def test_a_node_ends_although_a_gpu_hangs(world: World, gpus: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 0.01)
    monkeypatch.setattr("kvcache.server.hbm.CLOSE_S", 0.01)
    engine(world).close()
    node = world.node.node
    world.node.run(node.close())
    assert node.is_stuck, "so that the command ends the process"
    gpus.answers.set()
    world.eventually(lambda: not world.node.call(lambda: bool(node.core.hbm and node.core.hbm._making)))
    assert world.stats()["capacity_bytes:hbm"] == HBM_BLOCKS * SIZE, "what came too late was let go"


def test_the_thread_that_failed_lets_go_of_what_it_had_mapped(tmp_path: Path) -> None:
    """And not the event loop's, which would hang with the GPU."""
    gpus = Hung()
    world = World(tmp_path, on=EngineDevice(Gpu(ONE)), devices=gpus)
    world.eventually(lambda: bool(gpus.let_go))
    assert gpus.let_go[0].startswith("kvcache-hbm-open")
    [trouble] = world.node.call(world.node.node.core.troubles)
    assert "it took too long" in trouble
    world.close()


def test_the_event_loop_lets_go_of_nothing_that_came_too_late(
    world: World, gpus: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node has begun to end, and waits for it."""
    patience(monkeypatch, 0.01)
    monkeypatch.setattr("kvcache.server.hbm.CLOSE_S", 3 * PATIENCE_S)
    let_go: list[str] = []
    close = HbmTier.close

    def noted(memory: HbmTier) -> None:
        let_go.append(threading.current_thread().name)
        close(memory)

    monkeypatch.setattr(HbmTier, "close", noted)
    engine(world).close()
    node = world.node.node
    with ThreadPoolExecutor(1) as pool:
        ends = pool.submit(world.node.run, node.close())
        world.eventually(lambda: bool(node.core.hbm and node.core.hbm._is_closed))
        gpus.answers.set()
        ends.result()
    assert not node.is_stuck
    assert len(let_go) == 2
    assert all(each.startswith("kvcache-hbm-open") for each in let_go)
