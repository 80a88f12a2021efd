"""An engine's GPU that fails or answers nothing: it is given up once, and what it still does harms nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvcache.client.async_store import AsyncNodeStore
from kvcache.client.link import Options
from kvcache.client.writing import AsyncWriting
from kvcache.clock import SystemClock
from kvcache.device.engine import TensorBlocks
from kvcache.device.saving import Writing
from kvcache.device.streams import CpuEvent, CpuStreams, Event, Stream
from kvcache.device.waits import Waits
from kvcache.errors import Unavailable
from kvcache.testing.stores import EXAMPLE, SIZE, SPEC
from tests.device.hbm_rig import PATIENCE_S, POISON, TIMEOUT_MS, World, hold

ANSWER_S = 0.05


class Asked(CpuEvent):
    """The GPU knows how long it was waited for."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def wait(self, timeout_s: float) -> bool:
        self._gpu.waited_s += timeout_s
        return super().wait(timeout_s)


class Marked:
    """The caller's stream, whose marks are as ``Gpu`` says. ``behind``: what it was told to come after."""

    def __init__(self, gpu: Gpu, stream: Stream) -> None:
        self._gpu = gpu
        self._stream = stream
        self.behind: list[object] = []

    def run(self, work: object) -> None:
        self._stream.run(work)  # type: ignore[arg-type]

    def after(self, event: object) -> None:
        self.behind.append(event)

    def mark(self) -> CpuEvent:
        event = Asked(self._gpu)
        if not self._gpu.hangs.is_set():
            event.settle(self._gpu.failure)
        return event


class Gpu(CpuStreams):
    """Whose events come when it does not hang, and raise once it has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs = threading.Event()
        self.failure: RuntimeError | None = None
        self.waited_s = 0.0
        self.stream = Marked(self, super().current())

    def current(self) -> Marked:
        return self.stream


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr("kvcache.device.line.streams_of", lambda device: made)
    monkeypatch.setattr("kvcache.device.waits.ANSWER_S", ANSWER_S)
    return made


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Six blocks are in HBM, and below."""
    made = World(tmp_path)
    path = made.engine.path(6)
    made.engine.save(path)
    made.engine.save_below(path)
    hold(made)
    yield made
    made.check()
    made.close()


def loaded(world: World) -> tuple[frozenset[int], TensorBlocks]:
    """What of the six could not be had."""
    engine = world.engine
    lease = engine.store.lease_device(engine.handle, engine.path(6))
    blocks = engine.blocks(torch.full((6, SIZE), POISON, dtype=torch.uint8))
    failed = engine.store.load_device(lease, blocks)
    engine.store.release(lease)
    return failed, blocks


def test_one_that_hangs_is_given_up(world: World, gpu: Gpu) -> None:
    device = world.engine.device
    gpu.hangs.set()
    failed, blocks = loaded(world)
    assert failed == frozenset(range(6))
    assert device.is_stuck
    assert not device.has_slab
    assert gpu.stream.behind, "what the engine computes comes after what is under way"
    assert not blocks._line.is_over()
    gpu.hangs.clear()
    assert loaded(world)[0] == frozenset(range(6)), "nobody tries it again"


def test_a_request_waits_once_and_no_other_does(world: World, gpu: Gpu) -> None:
    engine = world.engine
    blocks = engine.blocks(engine.memory(engine.path(5, seed=1)))
    gpu.hangs.set()
    loaded(world)
    assert 0 < gpu.waited_s < 1.5 * ANSWER_S
    gpu.waited_s = 0
    loaded(world)
    assert engine.store.save_device(engine.handle, engine.path(5, seed=1), blocks) == 0
    assert gpu.waited_s == 0


def test_what_it_may_still_write_to_is_not_said_to_be_free(world: World, gpu: Gpu) -> None:
    device = world.engine.device
    options = Options(world.node.node.address, device=device)
    assert options.hello("me", again=True).writes_ended
    gpu.hangs.set()
    loaded(world)
    assert not options.hello("me", again=True).writes_ended


def test_its_map_stays(world: World, gpu: Gpu) -> None:
    """To undo it would wait for it."""
    device = world.engine.device
    [(slab, _)] = device._slabs.values()
    gpu.hangs.set()
    loaded(world)
    world.engine.close()
    assert slab._memory is not None


def test_one_that_failed_is_lost(world: World, gpu: Gpu) -> None:
    """To all who use it, and to none it is asked again."""
    device = world.engine.device
    lease = world.engine.store.lease_device(world.engine.handle, world.engine.path(6))
    blocks = world.engine.blocks(torch.full((6, SIZE), POISON, dtype=torch.uint8))
    gpu.failure = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert world.engine.store.load_device(lease, blocks) == frozenset(range(6))
    world.engine.store.release(lease)
    assert not device.has_slab
    assert not device.is_stuck
    with pytest.raises(Unavailable, match="illegal memory access"):
        device.whole(lease.grants[0].incarnation)


def test_one_that_only_lacks_memory_is_not(world: World, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as short:
        short.setattr(TensorBlocks, "_sums", refuse)
        assert loaded(world)[0] == frozenset(range(6))
    assert world.engine.device.has_slab
    assert loaded(world)[0] == frozenset()


def test_a_save_that_hangs_keeps_its_slots(world: World, gpu: Gpu) -> None:
    """The node is not told that they may be used again, by whatever ends the save."""
    engine, path = world.engine, world.engine.path(5, seed=1)
    gpu.hangs.set()
    blocks = engine.blocks(engine.memory(path))
    assert engine.store.save_device(engine.handle, path, blocks) == 0
    assert engine.device.is_stuck
    assert world.stats()["hbm_reservations"] == 1
    assert engine.store.save_device(engine.handle, path, blocks) == 0
    assert engine.save_below(path) == 5, "from host memory all goes on"
    engine.close()
    world.eventually(lambda: world.stats()["hbm_limbo_blocks"] == 5)
    ready = blocks._line.ready
    assert isinstance(ready, CpuEvent)
    ready.settle(None)


def test_a_save_by_planes_that_hangs(world: World, gpu: Gpu) -> None:
    engine, path = world.engine, world.engine.path(5, seed=1)
    gpu.hangs.set()
    blocks = engine.blocks(engine.memory(path))
    draft = engine.store.begin_save_device(engine.handle, path, blocks)
    draft.advance(1)
    draft.advance(2)
    draft.abort()
    assert engine.device.is_stuck
    assert world.stats()["hbm_reservations"] == 1
    ready = blocks._line.ready
    assert isinstance(ready, CpuEvent)
    ready.settle(None)


# --- the asynchronous store ------------------------------------------------------------------------------


async def _aborted(store: AsyncNodeStore, writing: AsyncWriting) -> None:
    await writing.abort()


async def _finished(store: AsyncNodeStore, writing: AsyncWriting) -> None:
    await writing.finish()


async def _left(store: AsyncNodeStore, writing: AsyncWriting) -> None:
    assert store._attached is not None
    store._attached.link.broken = "bad_reply"
    await writing.advance(SPEC.plane_count)


async def _closed(store: AsyncNodeStore, writing: AsyncWriting) -> None:
    await store.close()


@pytest.mark.parametrize("act", [_aborted, _finished, _left, _closed])
def test_the_loop_goes_on_while_a_device_is_waited_for(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[AsyncNodeStore, AsyncWriting], Awaitable[None]],
) -> None:
    """What runs on the loop is what lets the device go on: else the device is given up."""
    monkeypatch.setattr("kvcache.device.waits.ANSWER_S", float(PATIENCE_S))
    gate, waited = threading.Event(), threading.Event()
    has_ended = Waits.has_ended

    def told(waits: Waits, event: Event) -> bool:
        waited.set()
        return has_ended(waits, event)

    async def main() -> None:
        device = world.engine.device
        store = AsyncNodeStore(Options(world.node.node.address, "", TIMEOUT_MS, device=device), SystemClock())
        handle, path = await store.open(EXAMPLE, SPEC), world.engine.path(5, seed=1)
        device.saves().copies.lane("device").run(lambda: _pass(gate))
        blocks = world.engine.blocks(world.engine.memory(path))
        writing = await store.begin_save_device(handle, path, blocks)
        await writing.advance(SPEC.plane_count)
        monkeypatch.setattr(Waits, "has_ended", told)
        acting = asyncio.ensure_future(act(store, writing))
        await asyncio.to_thread(waited.wait, PATIENCE_S)
        gate.set()
        await acting
        assert not device.is_stuck
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("stepwise", [True, False])
def test_nothing_of_a_device_is_begun_on_the_loop(
    world: World, monkeypatch: pytest.MonkeyPatch, stepwise: bool
) -> None:
    """To fail there, it waits for what it queued."""
    threads = []
    into_slab = TensorBlocks.into_slab

    def noted(blocks: TensorBlocks, incarnation: bytes, offsets: Sequence[int], first: int) -> Writing:
        threads.append(threading.get_ident())
        return into_slab(blocks, incarnation, offsets, first)

    monkeypatch.setattr(TensorBlocks, "into_slab", noted)

    async def main() -> None:
        device = world.engine.device
        store = AsyncNodeStore(Options(world.node.node.address, "", TIMEOUT_MS, device=device), SystemClock())
        handle, path = await store.open(EXAMPLE, SPEC), world.engine.path(5, seed=1)
        blocks = world.engine.blocks(world.engine.memory(path))
        if stepwise:
            writing = await store.begin_save_device(handle, path, blocks)
            assert await writing.finish() == 5
        else:
            assert await store.save_device(handle, path, blocks) == 5
        await store.close()

    asyncio.run(main())
    assert threads
    assert threading.get_ident() not in threads


def _pass(gate: threading.Event) -> None:
    assert gate.wait(3 * PATIENCE_S)
