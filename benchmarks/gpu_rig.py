"""What ``bench_gpu.py`` measures on: one GPU, or the CPU with everything tiny, which proves the code paths.

On a GPU seconds are between CUDA events on the engine's stream (torch's current one), so what a copy's own
stream does is counted by waiting for it, as a store does. Host memory is as in use: a memfd, registered
for the GPU; the slab is memory of ``kvcache.device.vmm``. Where one of these cannot be had, plain memory of
torch takes its place and a line of the output says so.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from statistics import median
from typing import Protocol

import harness
import torch
from harness import GIB, MIB, Figure

from kvcache.clock import NS_PER_S
from kvcache.device.engine import EngineDevice, PagedBlocks
from kvcache.device.pages import PagedCache
from kvcache.device.pinned import Pinned
from kvcache.device.saving import Writing
from kvcache.device.slab import CpuMemory, CudaMemory, Memory, Slab
from kvcache.device.streams import streams_of
from kvcache.device.vmm import Vmm
from kvcache.errors import Unavailable

PATIENCE_S = 60.0
GB = 1e9
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Case:
    """``count`` blocks of ``pages_per_block`` pages in one request."""

    pages_per_block: int
    count: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the engine's cache, and of what is moved. A page of all layers is a block of one page."""

    layers: int
    heads: int
    page_tokens: int
    head_dim: int
    dtype: torch.dtype
    pages: int
    cases: Sequence[Case]
    save_bytes: int
    rounds: int
    repeats: int
    races: int
    spread_bytes: int
    """Several times what the GPU caches: what is moved in a turn is no less."""

    @property
    def page_bytes(self) -> int:
        """Of all layers, K and V."""
        item = torch.empty((), dtype=self.dtype).element_size()
        return 2 * self.layers * self.heads * self.page_tokens * self.head_dim * item

    @property
    def batch_bytes_max(self) -> int:
        return max(case.count * case.pages_per_block for case in self.cases) * self.page_bytes


# An 8B model's (128 KiB a token): a page of 16 tokens is 2 MiB, 16 of them 32 MiB; 4 GiB of pages.
GPU = Sizes(
    32, 8, 16, 128, torch.bfloat16, 2048, (Case(1, 8), Case(1, 64), Case(16, 8)), 32 * MIB, 15, 10, 150,
    256 * MIB,
)  # fmt: skip
TINY = Sizes(2, 2, 4, 16, torch.float16, 64, (Case(1, 8), Case(4, 2)), 4096, 2, 1, 150, 16384)


class Place(Protocol):
    """What a ``Mover`` moves between."""

    @property
    def memory(self) -> Memory | None: ...

    @property
    def cache(self) -> PagedCache: ...

    @property
    def host(self) -> torch.Tensor: ...


class Rig:
    """A device with an engine's cache, a host slab and copies. ``close`` ends."""

    def __init__(self, device: torch.device, *, quick: bool) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        sizes = GPU if self.is_cuda else TINY
        self.sizes = replace(sizes, rounds=5) if quick and self.is_cuda else sizes
        self.quick = quick
        self.machine = machine(device)
        self.notes: list[Figure] = []
        self.random = Random(7)
        self.memory = self._memory()
        self.streams = streams_of(device)
        self.tensors = self._tensors()
        self.cache = PagedCache(self.tensors, "flash_attention_nhd")
        self.host = self._host(max(self.sizes.batch_bytes_max, MIB))

    # --- memory -----------------------------------------------------------------------------------

    def slab(self, size_bytes: int) -> Slab | None:
        """As the node's, shared by descriptors; None where that cannot be had, which is then noted."""
        if self.memory is None:
            return None
        try:
            return Slab.create(self.memory, "bench", size_bytes)
        except Unavailable as error:
            self.note("slab", str(error))
            return None

    def device_bytes(self, size_bytes: int) -> torch.Tensor:
        """A slab's bytes, or the next best thing."""
        made = self.slab(size_bytes)
        if made is None:
            return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
        tensor = made.whole(made.ticket.incarnation)
        made.close()  # The tensor keeps the memory.
        return tensor

    def pinned(self, size_bytes: int) -> torch.Tensor:
        """Host memory of torch's own, for the ceilings and the rivals."""
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self.is_cuda)

    def _memory(self) -> Memory | None:
        if not self.is_cuda:
            return CpuMemory()
        try:
            vmm = Vmm()
            return CudaMemory(vmm, vmm.uuid(self.device.index or 0))
        except Unavailable as error:
            self.note("slab", f"{error}; memory of torch takes its place")
            return None

    def _host(self, size_bytes: int) -> torch.Tensor:
        size_bytes = -(-size_bytes // 4096) * 4096
        memory, descriptor = CpuMemory().create("bench-host", size_bytes)
        os.close(descriptor)
        memory.zero_()
        if self.is_cuda:
            try:
                self._registered = Pinned(Vmm(), self.device.index or 0, memory)
            except Unavailable as error:
                self.note("host_slab", f"{error}; pinned memory of torch takes its place")
                return self.pinned(size_bytes)
        return memory

    def _tensors(self) -> list[torch.Tensor]:
        """An engine's, with random content: [2, page, token, head, number] a layer."""
        sizes, made = self.sizes, []
        generator = torch.Generator(self.device).manual_seed(1)
        item = torch.empty((), dtype=sizes.dtype).element_size()
        shape = (2, sizes.pages, sizes.page_tokens, sizes.heads, sizes.head_dim * item)
        for _ in range(sizes.layers):
            content = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=generator)
            made.append(content.view(sizes.dtype))
        return made

    # --- what is moved ----------------------------------------------------------------------------

    def pages(self, case: Case) -> list[list[int]]:
        """Shuffled, as an engine's are: block by block."""
        chosen = self.random.sample(range(self.sizes.pages), case.count * case.pages_per_block)
        step = case.pages_per_block
        return [chosen[at : at + step] for at in range(0, len(chosen), step)]

    def offsets(self, case: Case, start: int = 0) -> list[int]:
        return [start + at * case.pages_per_block * self.sizes.page_bytes for at in range(case.count)]

    def sets(self, case: Case) -> int:
        """So many of it lie in no cache together."""
        return max(1, self.sizes.spread_bytes // self.case_bytes(case))

    def case_bytes(self, case: Case) -> int:
        return case.count * case.pages_per_block * self.sizes.page_bytes

    def case_name(self, case: Case) -> str:
        return f"{harness.size_name(case.pages_per_block * self.sizes.page_bytes)}.batch{case.count}"

    # --- time and figures -------------------------------------------------------------------------

    def seconds(self, work: Callable[[], object]) -> float:
        if not self.is_cuda:
            return harness.seconds(work)
        torch.cuda.synchronize(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def replayed(self, work: Callable[[int], object], count: int) -> Callable[[], object]:
        """``work(0)`` to ``work(count - 1)``, as one graph: launches without the Python between them.
        REQUIRES: it waits for nothing. On the CPU the calls themselves."""

        def all_of_it() -> None:
            for at in range(count):
                work(at)

        if not self.is_cuda:
            return all_of_it
        all_of_it()  # Compiled and allocated before, as neither can be captured.
        self.finish()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_it()
        return graph.replay

    def finish(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def finish_engine(self) -> None:
        """As sampling does: wait for what computes, not for copies."""
        if self.is_cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def figure(
        self, name: str, value: float, unit: str, ratio: float | None = None, against: str = "", n: int = 0
    ) -> Figure:
        n = n or self.sizes.rounds
        return Figure(
            f"gpu.{name}", round(value, 4), unit, None if ratio is None else round(ratio, 3), against, n,
            self.machine,
        )  # fmt: skip

    def speeds(
        self, name: str, results: dict[str, list[float]], mine: str, others: Sequence[str]
    ) -> list[Figure]:
        """GB/s of ``mine``, once against each of the others, and theirs in the words."""
        value = median(results[mine])
        return [
            self.figure(
                name, value, "GB/s", harness.compare(results, mine, other),
                f"{other} ({median(results[other]):.1f} GB/s)",
            )
            for other in others
        ]  # fmt: skip

    def missing(self, name: str, unit: str, why: str) -> Figure:
        return missing(name, unit, why, self.machine)

    def note(self, name: str, why: str) -> None:
        self.notes.append(self.missing(name, "", why))

    def close(self) -> None:
        self.finish()
        self.streams.close()
        with suppress(AttributeError):
            self._registered.close()


class Mover:
    """What a store has done between an engine's pages and its slots in host memory (``kvcache.device``)."""

    def __init__(self, place: Place, save_bytes_s: float = 0.0) -> None:
        """``save_bytes_s``: as of ``EngineDevice``. RAISES Unavailable."""
        if place.memory is None:
            raise Unavailable("unavailable", "no engine's device", "memory of this GPU cannot be shared here")
        self._device = EngineDevice(place.memory, save_bytes_s=save_bytes_s)
        self._place = place

    def begin(self, offsets: Sequence[int], pages: Sequence[Sequence[int]]) -> Writing:
        """A save of which nothing is ready yet. To be given to ``end``."""
        return self._blocks(pages).into_host(self._slots(offsets, pages), 0)

    def end(self, writing: Writing) -> bytes:
        """All of it is ready: wait until it has arrived. The chunk sums of its blocks. RAISES Unavailable."""
        pause = threading.Event()
        try:
            writing.advance(len(self._place.cache.planes))
            while not writing.is_done:
                if delay_ns := writing.delay_ns():
                    pause.wait(delay_ns / NS_PER_S)
                writing.go_on()
            return writing.sums()
        finally:
            writing.end()

    def save(self, offsets: Sequence[int], pages: Sequence[Sequence[int]]) -> list[bytes]:
        """The chunk sums of each block. RAISES Unavailable."""
        return _each(self.end(self.begin(offsets, pages)), len(offsets))

    def load(self, offsets: Sequence[int], pages: Sequence[Sequence[int]]) -> list[bytes]:
        """The chunk sums of each block, as it arrived. RAISES Unavailable."""
        return _each(self._blocks(pages).put(self._slots(offsets, pages), 0), len(offsets))

    def close(self) -> None:
        self._device.saves().close(PATIENCE_S)

    def _blocks(self, pages: Sequence[Sequence[int]]) -> PagedBlocks:
        return PagedBlocks(self._device, self._place.cache, pages)

    def _slots(self, offsets: Sequence[int], pages: Sequence[Sequence[int]]) -> list[memoryview]:
        size = self._place.cache.spec(len(pages[0])).block_bytes
        return [memoryview(self._place.host[at : at + size].numpy()) for at in offsets]


def _each(sums: bytes, count: int) -> list[bytes]:
    width = len(sums) // count
    return [sums[at : at + width] for at in range(0, len(sums), width)]


def missing(name: str, unit: str, why: str, machine: str) -> Figure:
    """A line for what was not measured."""
    reason = " ".join(why.split())[:300]
    return Figure(f"gpu.{name}", None, unit, None, f"{NOT_MEASURED}: {reason}", 0, machine)


def machine(device: torch.device) -> str:
    parts = [harness.machine(), f"torch {torch.__version__}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / GIB
        parts.insert(0, f"{properties.name} ({memory:.0f} GiB), CUDA {torch.version.cuda}")
    else:
        parts.insert(0, "no GPU (tiny sizes: proves the paths, not the speed)")
    return ", ".join(parts)


def slug(device: torch.device) -> str:
    """Of the file that results go to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"none-{platform.machine()}"
    return "-".join("".join(char if char.isalnum() else " " for char in name.lower()).split())
