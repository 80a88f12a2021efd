"""A device's slab, host memory, streams and copies, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from kvcache.device.cap import Cap
from kvcache.device.copies import Copies, Copy, Link, Step, copying
from kvcache.device.pinned import Pinned
from kvcache.device.saving import Writing
from kvcache.device.slab import CpuMemory, CudaMemory, Memory, Slab
from kvcache.device.streams import Event, Stream, streams_of
from kvcache.device.vmm import Vmm
from kvcache.errors import Unavailable
from kvcache.testing.clock import FakeClock

PATIENCE_S = 60.0
BLOCK = 4 << 20 if torch.cuda.is_available() else 64 << 10  # On a GPU long enough for a race to be lost.
SLOTS = 16

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


def memory_of(kind: str) -> Memory:
    if kind == "cpu":
        return CpuMemory()
    torch.zeros(1, device="cuda")
    vmm = Vmm()
    return CudaMemory(vmm, vmm.uuid(torch.cuda.current_device()))


class Rig:
    """``ended`` is what each copy's ``then`` was told, by its name, in order."""

    def __init__(self, kind: str, cap_bytes_s: float = 0.0, inflight_bytes_max: int = 1 << 30) -> None:
        memory = memory_of(kind)
        self.kind = kind
        self.slab = Slab.create(memory, "rig", SLOTS * BLOCK)
        self.host, descriptor = CpuMemory().create("host", SLOTS * BLOCK)
        os.close(descriptor)
        self.pages = torch.zeros(SLOTS * BLOCK, dtype=torch.uint8, device=self.slab.device)
        self.streams = streams_of(self.slab.device)
        self.engine = self.streams.new("engine", urgent=False)
        self.clock = FakeClock()
        self.lost: list[str] = []
        self.copies = Copies(
            self.streams,
            self.clock,
            Cap(cap_bytes_s, self.clock.now_ns()) if cap_bytes_s else None,
            self._lose,
            inflight_bytes_max,
        )
        self.ended: list[tuple[str, Unavailable | None]] = []
        self.gates: list[threading.Event] = []
        self.pinned = Pinned(Vmm(), self.slab.device.index or 0, self.host) if kind == "cuda" else None
        self.settle()

    def _lose(self, why: str) -> None:
        self.lost.append(why)
        self.slab.lose(why)

    def then(self, name: str) -> Callable[[Unavailable | None], None]:
        return lambda failure: self.ended.append((name, failure))

    def save(self, name: str, slot: int, page: int, steps: Sequence[Step] = ()) -> Copy:
        """A page of the engine into a host slot."""
        steps = steps or [Step(BLOCK, copying(self.slot(slot), self.page(page)))]
        return self.copies.save("host", steps, self.engine, self.then(name))

    def compute(self, page: int, value: int) -> None:
        """The engine fills a page, sometime."""
        target = self.page(page)
        self.engine.run(lambda: _fill(target, value))

    def page(self, page: int) -> torch.Tensor:
        return self.pages[page * BLOCK : (page + 1) * BLOCK]

    def slot(self, slot: int) -> torch.Tensor:
        return self.host[slot * BLOCK : (slot + 1) * BLOCK]

    def gate(self, stream: Stream) -> threading.Event:
        """What is queued on the stream from now on waits until this is set. On the CPU only."""
        gate = threading.Event()
        self.gates.append(gate)
        stream.run(lambda: _pass(gate))
        return gate

    def parts(self, count: int) -> list[Step]:
        """The first so many pages into the host slots of the same number, a step each."""
        return [Step(BLOCK, copying(self.slot(at), self.page(at))) for at in range(count)]

    def lane(self, link: Link) -> Stream:
        return self.copies.lane(link)

    def until(self, copies: Sequence[Copy]) -> None:
        """REQUIRES: the cap lets them."""
        self.copies.pump()
        assert self.copies.wait(copies, PATIENCE_S)

    def finish(self) -> None:
        """The engine's stream is done."""
        assert self.engine.mark().wait(PATIENCE_S)

    def settle(self) -> None:
        """What the test itself queued is done: streams of the rig do not wait for the caller's."""
        assert self.streams.current().mark().wait(PATIENCE_S)

    def close(self) -> None:
        for gate in self.gates:
            gate.set()
        self.copies.close(PATIENCE_S)
        if self.pinned is not None:
            self.pinned.close()
        self.slab.close()


class Refusing:
    """A stream that takes ``steps`` more, and then refuses as a device does that has no memory left."""

    def __init__(self, inner: Stream, steps: int, *, dead: bool = False) -> None:
        self._inner = inner
        self._steps = steps
        self._dead = dead

    def run(self, work: Callable[[], None]) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise Unavailable("unavailable", "the device failed under a copy", "out of memory")
        self._inner.run(work)

    def after(self, event: Event) -> None:
        self._inner.after(event)

    def mark(self) -> Event:
        if self._dead:
            raise Unavailable("unavailable", "the device failed under a copy", "it is gone")
        return self._inner.mark()


Make = Callable[..., Rig]


def rigs() -> Iterator[Make]:
    """A fixture: makes rigs as ``Rig`` does, checks and closes them at the end."""
    made: list[Rig] = []

    def make(kind: str = "cpu", **arguments: Any) -> Rig:
        made.append(Rig(kind, **arguments))
        return made[-1]

    yield make
    for rig in made:
        rig.copies.check()
        rig.close()


def value_of(tensor: torch.Tensor) -> int:
    """The one value of every byte; -1 when they differ."""
    first = int(tensor[0])
    return first if bool((tensor == first).all()) else -1


def written(writing: Writing) -> bytes:
    """All of it: the sums."""
    writing.advance(writing._way.spec.plane_count)
    while not writing.is_done:
        assert not writing.delay_ns()
        writing.go_on()
    sums = writing.sums()
    writing.end()
    return sums


def seeded(seed: int) -> random.Random:
    return random.Random(seed)


def _fill(target: torch.Tensor, value: int) -> None:
    target.fill_(value)


def _pass(gate: threading.Event) -> None:
    assert gate.wait(PATIENCE_S)
