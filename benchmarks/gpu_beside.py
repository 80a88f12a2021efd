"""What copies cost the engine that computes beside them, and what it gains when they hide behind its layers.

The decode loop is memory-bound as a real one is: the feed-forward weights of an 8B model are read once a step
(7.5 GB, 1.9 ms at 4 TB/s), 8 sequences at a time, and the step ends with a wait, as sampling does. Saves are
asked for and pumped while the step runs. On paper: PCIe writes of 50 GB/s take 1 % of the memory's
bandwidth, gathers 2 % more at full speed, and a launch costs the GPU some us; the rest is Python
between steps. So even uncapped the loop should lose a few per cent, and under 3 with a cap of a quarter.

Layer by layer: a request is loaded while the layers before are computed, both some 5 ms here, so hiding
one behind the other should win up to 1.9 x. A copy of one layer is one memcpy a block: small blocks are
bound by Python then (10 us each), so several layers a copy are tried too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import gpu_copies
import harness
import torch
from gpu_rig import GB, Case, Mover, Rig
from harness import Figure

from kvcache.clock import SystemClock
from kvcache.device.cap import Cap
from kvcache.device.staging import Passage

SHARES = (0.1, 0.25, 0.5)
LAYERS_A_COPY = (1, 4, 8)


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
    model, link = Model(rig, width), gpu_copies.host_ceiling(rig)
    steps = width.steps // (2 if rig.quick and rig.is_cuda else 1)
    saved: dict[str, list[float]] = {}

    def turn(name: str, share: float | None) -> float:
        """Steps a second."""
        if name == "alone":
            return steps / rig.seconds(lambda: _loop(rig, model, steps, None))
        cap = Cap.of_share(share, link, SystemClock().now_ns()) if share else None
        mover = Mover(rig, cap)
        saver = Saver(rig, mover)
        seconds = rig.seconds(lambda: _loop(rig, model, steps, saver))
        saved.setdefault(name, []).append(saver.queued_bytes / seconds / GB)
        mover.close()
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
    """Always has something to save: a part of staging memory a time."""

    def __init__(self, rig: Rig, mover: Mover) -> None:
        self._rig, self._mover = rig, mover
        blocks = max(1, rig.sizes.part_bytes // rig.sizes.page_bytes)
        self._case = Case(1, min(blocks, rig.sizes.pages, len(rig.host) // rig.sizes.page_bytes))
        self._passages: list[Passage] = []

    @property
    def queued_bytes(self) -> int:
        """Of copies that have begun, whole or in part."""
        left = sum(step.size_bytes for each in self._passages for step in each.copy.steps)
        return sum(each.copy.size_bytes for each in self._passages) - left

    def __call__(self) -> None:
        self._mover.copies.pump()
        if self._mover.can_take():
            pages, offsets = self._rig.pages(self._case), self._rig.offsets(self._case)
            self._passages.append(self._mover.one(self._mover.path.save, offsets, pages))


def _loop(rig: Rig, model: Model, steps: int, beside: Callable[[], None] | None) -> None:
    for _ in range(steps):
        model.step()
        if beside is not None:
            beside()
        rig.finish_engine()


# --- layer by layer -------------------------------------------------------------------------------


def overlap_figures(rig: Rig) -> Iterator[Figure]:
    """A request is loaded from host memory and its layers computed: all of it first, or layer by layer."""
    model = Model(rig, _width(rig))
    for case in rig.sizes.cases[1:]:
        size, name = rig.case_bytes(case), rig.case_name(case)
        staged = torch.empty(rig.sizes.parts * size, dtype=torch.uint8, device=rig.device)
        mover = Mover(rig, staged=staged)
        request = Request(rig, mover, model, case)
        request.check()
        works: dict[str, Callable[[], object]] = {
            "copy": lambda request=request: request.load(rig.sizes.layers),
            "compute": request.compute,
            "off": lambda request=request: (request.load(rig.sizes.layers), request.compute()),
        }
        chosen = [count for count in LAYERS_A_COPY if rig.sizes.layers % count == 0]
        for count in chosen:
            works[f"on{count}"] = lambda request=request, count=count: request.load_and_compute(count)
        turns = {key: lambda work=work: 1 / rig.seconds(work) for key, work in works.items()}
        results = harness.interleaved(turns, rig.sizes.rounds)
        took = {key: 1e3 / median(values) for key, values in results.items()}
        apart = f"copy {took['copy']:.2f} ms + compute {took['compute']:.2f} ms"
        yield rig.figure(f"overlap.off.{name}", took["off"], "ms", None, apart)
        for count in chosen:
            ratio = harness.compare(results, f"on{count}", "off")
            yield rig.figure(
                f"overlap.layers{count}.{name}", took[f"on{count}"], "ms", ratio,
                f"off ({took['off']:.2f} ms); {apart}",
            )  # fmt: skip
        mover.close()


class Request:
    """One: its blocks are in the host slab."""

    def __init__(self, rig: Rig, mover: Mover, model: Model, case: Case) -> None:
        self._rig, self._mover, self._model = rig, mover, model
        self._pages, self._offsets = rig.pages(case), rig.offsets(case)
        mover.wait(mover.save(self._offsets, self._pages))

    def check(self) -> None:
        """Layer by layer it is the same bytes. RAISES SystemExit."""
        flat = torch.tensor([page for block in self._pages for page in block], device=self._rig.device)
        before = [tensor.index_select(1, flat).view(torch.uint8) for tensor in self._rig.tensors]
        for tensor in self._rig.tensors:
            tensor.view(torch.uint8).index_fill_(1, flat, 0)
        self.load_and_compute(1)
        self._rig.finish()
        for tensor, want in zip(self._rig.tensors, before, strict=True):
            if not torch.equal(tensor.index_select(1, flat).view(torch.uint8), want):
                raise SystemExit("layer by layer: wrong bytes")

    def load(self, layers: int) -> None:
        """All, ``layers`` a copy; the engine waits for it."""
        for passage in [self._ask(first, layers) for first in range(0, self._rig.sizes.layers, layers)]:
            self._mover.copies.hold(passage.copy, self._rig.engine)

    def compute(self) -> None:
        for at in range(self._rig.sizes.layers):
            self._model.layer(at, self._model.many)

    def load_and_compute(self, layers: int) -> None:
        """Copies are asked for as far ahead as there are parts, and each layer waits for its own."""
        firsts = range(0, self._rig.sizes.layers, layers)
        ahead = max(1, self._rig.sizes.parts - 1)
        asked = [self._ask(first, layers) for first in firsts[:ahead]]
        for at, first in enumerate(firsts):
            self._mover.copies.hold(asked[at].copy, self._rig.engine)
            for layer in range(first, first + layers):
                self._model.layer(layer, self._model.many)
            if at + ahead < len(firsts):
                asked.append(self._ask(firsts[at + ahead], layers))

    def _ask(self, first: int, layers: int) -> Passage:
        planes = 2 * first, 2 * (first + layers)
        return self._mover.one(self._mover.path.load, self._offsets, self._pages, *planes)
