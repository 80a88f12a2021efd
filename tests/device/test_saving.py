"""Saves beside the engine: planes as they are ready, the cap, staging memory, what fails, and the end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from kvcache.block import BlockSpec
from kvcache.clock import SystemClock
from kvcache.device import link, saving
from kvcache.device.cap import Cap
from kvcache.device.engine import EngineDevice
from kvcache.device.saving import Paged, Rows, Saves, Staged, Way, Writing
from kvcache.device.slab import CpuMemory
from kvcache.device.streams import CpuStreams, Event, Stream
from kvcache.device.waits import Waits
from kvcache.errors import BadInput, Unavailable
from kvcache.sums import sum_chunks
from kvcache.testing.clock import FakeClock
from tests.device.engine_cache import Engine, Shape, engine
from tests.device.rigs import PATIENCE_S, Refusing, seeded

POISON = 0xA5
A_WHILE_S = 0.2
"""What must not happen has so long to happen; it never does, however slow the machine."""
SHAPE = Shape(layers=4, pages=9, heads=2, tokens=4, row=64)
PLANES = 2 * SHAPE.layers
PAGES = [[6], [1], [4], [0], [2]]
COUNT = len(PAGES)


class Engines(CpuStreams):
    """As on a GPU: what the engine computes is queued too."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.new("engine", urgent=False)

    def current(self) -> Stream:
        return self.engine


class Rig:
    """An engine's cache, and memory full of poison with a place for each of its blocks."""

    def __init__(self, cap_bytes_s: float = 0.0) -> None:
        self.clock = FakeClock()
        cap = Cap(cap_bytes_s, self.clock.now_ns()) if cap_bytes_s else None
        self.streams = Engines()
        self.lost: list[str] = []
        self.saves = Saves(self.streams, self.clock, cap, self.lost.append)
        self.cache: Engine = engine("flashinfer_hnd", SHAPE)
        self.spec: BlockSpec = self.cache.cache.spec(1)
        self.slab = torch.full((2 * COUNT * self.spec.block_bytes,), POISON, dtype=torch.uint8)
        self.gates: list[threading.Event] = []

    def targets(self) -> list[list[torch.Tensor]]:
        """Every other block of the slab, in two pieces that part a plane."""
        size = self.spec.block_bytes
        cut = self.spec.plane_bytes + 24
        slots = [self.slab[at : at + size] for at in range(0, len(self.slab), 2 * size)]
        return [[slot[:cut], slot[cut:]] for slot in slots]

    def way(self, kind: str) -> Way:
        size = self.spec.block_bytes
        moves = self.cache.cache.moves(range(0, 2 * COUNT * size, 2 * size), PAGES)
        if kind == "rows":
            rows = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in self.content()]
            return Rows(self.spec, torch.stack(rows), self.targets(), "host")
        return Paged(moves, self.slab) if kind == "slab" else Staged(moves, self.targets(), "host")

    def content(self) -> list[bytes]:
        return self.cache.blocks(PAGES)

    def writing(self, kind: str = "staged") -> Writing:
        waits = Waits(EngineDevice(CpuMemory()))
        return Writing(self.saves, self.way(kind), [self.streams.engine.mark()], waits)

    def planes(self, first: int, last: int) -> list[bytes]:
        """Of each place."""
        size, plane = self.spec.block_bytes, self.spec.plane_bytes
        starts = range(0, 2 * COUNT * size, 2 * size)
        return [self.slab[at + first * plane : at + last * plane].numpy().tobytes() for at in starts]

    def gaps(self) -> bool:
        """Nothing was written beside the places."""
        return bool((self.slab.view(COUNT, 2, -1)[:, 1] == POISON).all())

    def free_parts(self) -> int:
        """Of staging memory."""
        staging, taken = self.saves.staging(), []
        with contextlib.suppress(Unavailable):
            while True:
                taken.append(staging.take())
        for part in reversed(taken):
            staging.give(part)
        return len(taken)

    def gate(self, stream: Stream) -> threading.Event:
        gate = threading.Event()
        self.gates.append(gate)
        stream.run(lambda: _pass(gate))
        return gate

    def close(self) -> None:
        for gate in self.gates:
            gate.set()
        self.saves.close(PATIENCE_S)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _pass(gate: threading.Event) -> None:
    assert gate.wait(PATIENCE_S)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def one(**given: float) -> Rig:
        made.append(Rig(**given))
        return made[-1]

    monkeypatch.setattr(saving, "PART_BYTES", 3 * SHAPE.plane_bytes)
    yield one
    for rig in made:
        rig.saves.copies.check()
        rig.close()


def done(writing: Writing) -> bytes:
    while not writing.is_done:
        assert not writing.delay_ns()
        writing.go_on()
    return writing.sums()


@pytest.mark.parametrize("kind", ["rows", "slab", "staged"])
@pytest.mark.parametrize("steps", [[PLANES], [1, 2, PLANES], [3, 3, 7, PLANES], range(1, PLANES + 1)])
def test_blocks_arrive_however_their_planes_come(
    make: Callable[..., Rig], kind: str, steps: Sequence[int]
) -> None:
    rig = make()
    writing = rig.writing(kind)
    for planes in steps:
        writing.advance(planes)
    assert done(writing) == sum_chunks(rig.content(), rig.spec.chunk_bytes)
    writing.end()
    assert rig.planes(0, PLANES) == rig.content()
    assert rig.gaps()
    assert rig.free_parts() == saving.PARTS
    rig.cache.check_memory()


@pytest.mark.parametrize("kind", ["slab", "staged"])
def test_a_plane_is_copied_behind_what_the_engine_computes_it_with(
    make: Callable[..., Rig], kind: str
) -> None:
    rig = make()
    writing, content = rig.writing(kind), rig.content()
    planes = rig.cache.cache.planes
    right = [plane.clone() for plane in planes]
    for plane in planes:
        plane.zero_()
    gates = []
    for at, plane in enumerate(planes):
        gates.append(rig.gate(rig.streams.engine))
        rig.streams.engine.run(lambda to=plane, by=right[at]: to.copy_(by))  # type: ignore[misc]
        writing.advance(at + 1)
    lane = rig.saves.copies.lane("device" if kind == "slab" else "host")
    assert not lane.mark().wait(A_WHILE_S)
    assert not writing.is_done
    assert rig.planes(0, PLANES) == [bytes([POISON]) * rig.spec.block_bytes] * COUNT
    for gate in gates:
        gate.set()
    assert done(writing) == sum_chunks(content, rig.spec.chunk_bytes)
    writing.end()


def test_planes_that_were_kept_are_copied_behind_their_own_place(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the rest is said to be ready by a thread with another stream."""
    monkeypatch.setattr(saving, "STEPS_MIN", 1)
    rig = make()
    writing, content, plane = rig.writing("slab"), rig.content(), rig.cache.cache.planes[0]
    right = plane.clone()
    plane.zero_()
    gate = rig.gate(rig.streams.engine)
    rig.streams.engine.run(lambda: _copy(plane, right))
    writing.advance(1)
    assert rig.saves.copies.inflight_bytes == 0, "it is kept"
    rig.streams.engine = rig.streams.new("other", urgent=False)
    writing.advance(PLANES)
    assert not rig.saves.copies.lane("device").mark().wait(A_WHILE_S)
    gate.set()
    assert done(writing) == sum_chunks(content, rig.spec.chunk_bytes)
    writing.end()


@pytest.mark.parametrize("seed", range(150))
def test_compute_and_save_and_overwrite(make: Callable[..., Rig], seed: int) -> None:
    """Pages are written again as soon as the save has ended, and hold other bytes then."""
    rig, chance = make(), seeded(seed)
    for turn in range(3):
        writing = rig.writing(chance.choice(["slab", "staged"]))
        values = [chance.randrange(256) for _ in range(PLANES)]
        for at, plane in enumerate(rig.cache.cache.planes):
            rig.streams.engine.run(lambda to=plane, value=values[at]: to.fill_(value))  # type: ignore[misc]
            if chance.random() < 0.6:
                writing.advance(at + 1)
        if turn == 1 and chance.random() < 0.5:
            writing.end()
            rig.slab.fill_(POISON)
            continue
        writing.advance(PLANES)
        sums = done(writing)
        writing.end()
        for plane in rig.cache.cache.planes:
            rig.streams.engine.run(lambda to=plane, by=1 + turn: to.fill_(by))  # type: ignore[misc]
        whole = b"".join(bytes([value]) * rig.spec.plane_bytes for value in values)
        assert rig.planes(0, PLANES) == [whole] * COUNT
        assert sums == sum_chunks([whole] * COUNT, rig.spec.chunk_bytes)
    assert rig.gaps()
    assert rig.free_parts() == saving.PARTS


def test_after_the_end_nothing_is_written(make: Callable[..., Rig]) -> None:
    """Of what was queued, nothing is; of what runs, all has ended."""
    rig = make()
    closed: list[bool] = []
    writing = rig.writing()
    writing.closing = lambda: closed.append(True)
    gate = rig.gate(rig.saves.copies.lane("host"))
    writing.advance(PLANES)
    ending = threading.Thread(target=writing.end)
    ending.start()
    while writing._failure is None:
        assert ending.is_alive()
    assert not closed
    gate.set()
    ending.join(PATIENCE_S)
    assert closed == [True]
    rig.slab.fill_(POISON)
    other = rig.writing("slab")
    assert not other.is_done
    assert bool((rig.slab == POISON).all())
    assert rig.free_parts() == saving.PARTS
    with pytest.raises(Unavailable, match="given up"):
        writing.advance(PLANES)
    writing.end()
    assert closed == [True]


def test_the_cap_holds_what_crosses_the_link_and_nothing_else(make: Callable[..., Rig]) -> None:
    rig = make(cap_bytes_s=1.0)
    far, near = rig.writing(), rig.writing("slab")
    far.advance(PLANES)
    near.advance(PLANES)
    assert done(near) == sum_chunks(rig.content(), rig.spec.chunk_bytes)
    while not (wait_ns := far.delay_ns()):
        far.go_on()
    assert wait_ns > 10**9
    assert not far.is_done
    turns = 0
    while not far.is_done:
        rig.clock.advance_ms(far.delay_ns() // 10**6 + 1)
        far.go_on()
        turns += 1
    assert turns >= COUNT
    assert far.sums() == near.sums()


def test_a_plane_that_is_too_large_for_staging_memory(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    monkeypatch.setattr(saving, "PART_BYTES", SHAPE.plane_bytes - 1)
    with pytest.raises(Unavailable, match="larger than"):
        rig.writing().advance(1)


def test_no_memory_for_staging_is_a_miss(make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make()

    def refuse(*given: object, **more: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    writing = rig.writing()
    monkeypatch.setattr("kvcache.device.saving.torch.empty", refuse)
    with pytest.raises(Unavailable, match="not saved"):
        writing.advance(PLANES)
    writing.end()


@pytest.mark.parametrize("dead", [False, True])
def test_a_device_that_fails_is_a_miss(make: Callable[..., Rig], dead: bool) -> None:
    rig = make()
    copies = rig.saves.copies
    copies._lanes["host"] = Refusing(copies.lane("host"), 3, dead=dead)
    writing = rig.writing()
    with pytest.raises(Unavailable):
        writing.advance(PLANES)
        done(writing)
    with pytest.raises(Unavailable):
        writing.sums()
    writing.end()
    assert bool(rig.lost) is dead
    assert rig.free_parts() == saving.PARTS


def test_an_end_that_was_interrupted_waits_when_it_is_asked_again(make: Callable[..., Rig]) -> None:
    rig = make()
    gate = rig.gate(rig.saves.copies.lane("host"))
    writing = rig.writing()
    waits, has_ended = writing._waits, writing._waits.has_ended
    writing.advance(PLANES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waits, "has_ended", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            writing.end()
    waits.has_ended = lambda event: gate.set() or has_ended(event)  # type: ignore[method-assign, func-returns-value]
    writing.end()
    assert gate.is_set(), "it waited"
    assert rig.free_parts() == saving.PARTS


def test_what_another_thread_is_ending_is_not_done_yet(make: Callable[..., Rig]) -> None:
    """It may be about to say that it failed."""
    rig, is_done = make(), []
    writing, staging = rig.writing(), rig.saves.staging()
    asking = threading.Thread(target=lambda: is_done.append(writing.is_done))
    give = staging.give

    def given(part: int) -> None:
        if not asking.ident:
            asking.start()
            asking.join(A_WHILE_S)
            assert not is_done
        give(part)

    staging.give = given  # type: ignore[method-assign]
    writing.advance(PLANES)
    done(writing)
    asking.join(PATIENCE_S)
    assert is_done


def _interrupted(event: Event) -> bool:
    raise KeyboardInterrupt


def test_others_that_hold_all_staging_memory_are_waited_for(make: Callable[..., Rig]) -> None:
    rig = make()
    gate = rig.gate(rig.saves.copies.lane("host"))
    first, second = rig.writing(), rig.writing()
    first.advance(PLANES)
    second.advance(PLANES)
    assert rig.free_parts() == 0
    gate.set()
    sums = sum_chunks(rig.content(), rig.spec.chunk_bytes)
    assert done(second) == sums
    assert done(first) == sums


def test_a_share_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = CpuStreams()
    assert link.save_share_bytes_s(streams, SystemClock(), 1.0) == 0, "no cap, and nothing is measured"
    assert link.link_bytes_s(streams, SystemClock()) > 1e6
    monkeypatch.setattr(link, "link_bytes_s", lambda streams, clock: 1e9)
    assert link.save_share_bytes_s(streams, SystemClock(), 0.25) == 0.25e9
    with pytest.raises(BadInput, match="share"):
        link.save_share_bytes_s(streams, SystemClock(), 1.5)
