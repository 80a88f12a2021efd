"""What saves cost the engine that computes beside them, and what it gains when they hide behind its layers.

The decode loop is memory-bound as a real one is: the feed-forward weights of an 8B model are read once a step
(7.5 GB, 1.9 ms at 4 TB/s), 8 sequences at a time, and the step ends with a wait, as sampling does. A thread
saves all the while, as a store has it done (``kvcache.device.saving``). On paper: PCIe writes of 50 GB/s take
1 % of the memory's bandwidth, gathers 2 % more at full speed, and a launch costs the GPU some us; the rest is
Python that two threads take turns at. So even uncapped the loop should lose a few per cent, and under 3 with
a cap of a quarter.

Layer by layer: a request is saved while the layers behind are computed, both some 5 ms here, so hiding
one behind the other should win up to 1.9 x. Planes are kept until a copy is worth its launch; a copy is one
memcpy a block, so small blocks are bound by Python (10 us each).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from statistics import median

import gpu_copies
import harness
import torch
from gpu_rig import GB, Case, Mover, Rig
from harness import Figure

from kvcache.clock import SystemClock
from kvcache.device.link import link_bytes_s
from kvcache.errors import Unavailable

SHARES = (0.1, 0.25, 0.5)


@dataclass(frozen=True, slots=True)
class Width:
    """Of the model that computes: what is multiplied with its weights."""

    model: int
    inner: int
    sequences: int
    prompt: int
    steps: int


GPU_WIDTH = Width(4096, 14336, 8, 512, 100)
TINY_WIDTH = Width(16, 32, 2, 4, 3)


class Model:
    """The feed-forward part of every layer."""

    def __init__(self, rig: Rig, width: Width) -> None:
        kind = {"dtype": torch.bfloat16 if rig.is_cuda else torch.float32, "device": rig.device}
        self._up = [torch.randn(width.model, width.inner, **kind) / 64 for _ in range(rig.sizes.layers)]
        self._down = [torch.randn(width.inner, width.model, **kind) / 64 for _ in range(rig.sizes.layers)]
        self.few = torch.randn(width.sequences, width.model, **kind)
        self.many = torch.randn(width.prompt, width.model, **kind)

    def layer(self, at: int, state: torch.Tensor) -> torch.Tensor:
        return torch.relu(state @ self._up[at]) @ self._down[at]

    def step(self) -> None:
        state = self.few
        for at in range(len(self._up)):
            state = self.layer(at, state)


def _width(rig: Rig) -> Width:
    return GPU_WIDTH if rig.is_cuda else TINY_WIDTH


# --- a decode loop --------------------------------------------------------------------------------


def decode_figures(rig: Rig) -> Iterator[Figure]:
    """Slower by how many per cent: the goal is 3 with the cap."""
    width = _width(rig)
    model, link = Model(rig, width), link_bytes_s(rig.streams, SystemClock())
    steps = width.steps // (2 if rig.quick and rig.is_cuda else 1)
    saved: dict[str, list[float]] = {}

    def turn(name: str, share: float | None) -> float:
        """Steps a second."""
        if name == "alone":
            return steps / rig.seconds(lambda: _loop(rig, model, steps))
        with closing(Saver(rig, Mover(rig, (share or 0.0) * link))) as saver:
            before = saver.saved_bytes
            seconds = rig.seconds(lambda: _loop(rig, model, steps))
            saved.setdefault(name, []).append((saver.saved_bytes - before) / seconds / GB)
        return steps / seconds

    turns: dict[str, Callable[[], float]] = {"alone": functools.partial(turn, "alone", None)}
    for share in (*SHARES, None):
        name = f"share{share * 100:.0f}" if share else "uncapped"
        turns[name] = functools.partial(turn, name, share)
    results = harness.interleaved(turns, rig.sizes.rounds)
    alone = f"the loop alone ({1e3 / median(results['alone']):.2f} ms a step)"
    for name in list(turns)[1:]:
        ratio = harness.compare(results, name, "alone")
        yield rig.figure(f"decode.slowdown.{name}", 100 * (1 / ratio - 1), "%", ratio, alone)
        rate = median(saved[name][1:])
        yield rig.figure(
            f"decode.saved.{name}", rate, "GB/s", rate * GB / link, f"pinned memcpy ({link / GB:.1f} GB/s)"
        )


class Saver:
    """Another thread that always has something to save, as a store's does. ``close`` ends."""

    def __init__(self, rig: Rig, mover: Mover) -> None:
        self._rig, self._mover = rig, mover
        blocks = max(1, rig.sizes.save_bytes // rig.sizes.page_bytes)
        self._case = Case(1, min(blocks, rig.sizes.pages, len(rig.host) // rig.sizes.page_bytes))
        self.saved_bytes = 0
        self._is_over = False
        self._failures: list[Unavailable] = []
        self._save()  # Staging memory is taken, kernels are compiled.
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """RAISES Unavailable when a save failed: there is no figure then."""
        self._is_over = True
        self._thread.join()
        self._mover.close()
        if self._failures:
            raise self._failures[0]

    def _run(self) -> None:
        try:
            while not self._is_over:
                self._save()
        except Unavailable as failure:
            self._failures.append(failure)

    def _save(self) -> None:
        self._mover.save(self._rig.offsets(self._case), self._rig.pages(self._case))
        self.saved_bytes += self._rig.case_bytes(self._case)


def _loop(rig: Rig, model: Model, steps: int) -> None:
    for _ in range(steps):
        model.step()
        rig.finish_engine()


# --- layer by layer -------------------------------------------------------------------------------


def overlap_figures(rig: Rig) -> Iterator[Figure]:
    """A request is computed and saved into host memory: all of it when it is computed, or layer by layer."""
    model = Model(rig, _width(rig))
    for case in rig.sizes.cases[1:]:
        mover, name = Mover(rig), rig.case_name(case)
        request = Request(rig, mover, model, case)
        gpu_copies.check_round_trip(rig, request.pages, "layer by layer", request.on, request.load)
        works: dict[str, Callable[[], object]] = {
            "copy": request.save,
            "compute": request.compute,
            "off": request.off,
            "on": request.on,
        }
        turns = {key: lambda work=work: 1 / rig.seconds(work) for key, work in works.items()}
        results = harness.interleaved(turns, rig.sizes.rounds)
        took = {key: 1e3 / median(values) for key, values in results.items()}
        apart = f"copy {took['copy']:.2f} ms + compute {took['compute']:.2f} ms"
        yield rig.figure(f"overlap.off.{name}", took["off"], "ms", None, apart)
        ratio = harness.compare(results, "on", "off")
        against = f"off ({took['off']:.2f} ms); {apart}"
        yield rig.figure(f"overlap.on.{name}", took["on"], "ms", ratio, against)
        mover.close()


class Request:
    """One: its pages, and its blocks in the host slab."""

    def __init__(self, rig: Rig, mover: Mover, model: Model, case: Case) -> None:
        self._rig, self._mover, self._model = rig, mover, model
        self.pages, self._offsets = rig.pages(case), rig.offsets(case)

    def save(self) -> None:
        self._mover.save(self._offsets, self.pages)

    def load(self) -> None:
        self._mover.load(self._offsets, self.pages)

    def compute(self) -> None:
        for at in range(self._rig.sizes.layers):
            self._model.layer(at, self._model.many)

    def off(self) -> None:
        self.compute()
        self.save()

    def on(self) -> None:
        """Each layer is said to be ready once its work is queued."""
        writing = self._mover.begin(self._offsets, self.pages)
        try:
            for at in range(self._rig.sizes.layers):
                self._model.layer(at, self._model.many)
                writing.advance(2 * (at + 1))
        finally:
            self._mover.end(writing)
