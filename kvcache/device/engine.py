"""An engine's side of the HBM tier: the node's slab mapped on its GPU, and where its blocks lie there.

    EngineDevice ── open ──► a slab by its incarnation ── close ──► unmapped, with the last tensor over it
    TensorBlocks   flat memory, a block a row         ┐  load: from slots of the slab
    PagedBlocks    pages of the engine's paged cache  ┘  put: from host memory
                   into_slab, into_host: planes as they are ready (``kvcache.device.saving``)

What ``kvcache.client.hbm`` calls ``Device`` and ``DeviceBlocks``. Work begins behind what the engine had
queued, on its current stream, when it made the blocks, and each call returns when it is done: the sums that
the store verifies by are of bytes that have arrived.

Invariants: a slot is reached only through a slab of the incarnation that its lease names; an error of the
device is ``Unavailable``, after which nothing of the call runs on.

The sum: a call is one launch to move and sum, one copy of 8 bytes a chunk to the host, and one wait: 60 us on
top of the bytes. Host memory comes through staging memory of ``STAGING_BYTES``, in ``PARTS`` that take turns:
a part of 32 MiB takes 0.6 ms on the link, and 30 us to scatter and sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from kvcache.block import BlockSpec
from kvcache.clock import Clock, SystemClock
from kvcache.device.cap import Cap
from kvcache.device.gather import scatter_and_sum
from kvcache.device.line import Line, silent
from kvcache.device.link import save_share_bytes_s
from kvcache.device.pages import Moves, PagedCache
from kvcache.device.pinned import Count, HostMap, Pins, along
from kvcache.device.saving import Paged, Rows, Saves, Staged, Way, Writing
from kvcache.device.slab import CpuMemory, CudaMemory, Memory, Slab, SlabTicket
from kvcache.device.streams import Event, streams_of
from kvcache.device.sums import sum_chunks
from kvcache.device.vmm import Vmm
from kvcache.errors import BadInput, Unavailable
from kvcache.memfd import unsafe

if TYPE_CHECKING:
    from kvcache.wire_hbm import HbmSlab

STAGING_BYTES = 64 << 20
PARTS = 2


class EngineDevice:
    """One GPU of this process. Any thread; one for all stores of the process."""

    def __init__(
        self,
        memory: Memory,
        joined: Sequence[Memory] = (),
        pinned: Pins | None = None,
        save_bytes_s: float = 0.0,
    ) -> None:
        """``joined``: that of GPUs whose memory this one can use, best first. ``pinned``: what of host memory
        is registered with this one. ``save_bytes_s``: what saves may take of the link to the host; 0: all."""
        self._device = memory.device
        self._save_bytes_s = save_bytes_s
        self._saves: Saves | None = None
        self._pinned = pinned or Pins()
        self.pins = self._pinned.possible
        self.gpu = memory.uuid
        self.joined: Sequence[bytes] = [other.uuid for other in joined]
        self._memories = {each.uuid: each for each in (memory, *joined)}
        self._lock = threading.Lock()
        self._slabs: dict[bytes, tuple[Slab, int]] = {}
        self.clock: Clock = SystemClock()
        self.is_stuck = False
        """The GPU answers nothing, and may still read and write what it was told to."""

    @classmethod
    def of(cls, device: torch.device, save_share: float = 1.0) -> EngineDevice:
        """``save_share``: of what the link to the host carries (measured now, unless it is 1), so much is for
        saves at most. RAISES BadInput when it is none, Unavailable when its memory cannot be shared between
        processes."""
        save_bytes_s = save_share_bytes_s(streams_of(device), SystemClock(), save_share)
        if device.type == "cpu":
            return cls(CpuMemory(), save_bytes_s=save_bytes_s)
        vmm = Vmm()
        here = torch.cuda.current_device() if device.index is None else device.index
        mine = torch.device("cuda", here)  # With its number: what is joined is mapped for it.
        others = [
            CudaMemory(vmm, vmm.uuid(other), mine)
            for other in range(torch.cuda.device_count())
            if other != here and torch.cuda.can_device_access_peer(here, other)
        ]
        return cls(CudaMemory(vmm, vmm.uuid(here), mine), others, Pins(vmm, here), save_bytes_s)

    @property
    def has_slab(self) -> bool:
        """Memory of a node is mapped here, and not known to be lost."""
        with self._lock:
            return any(not slab.trouble for slab, _ in self._slabs.values())

    def open(self, slab: HbmSlab, descriptor: int) -> None:
        """As ``client.hbm.Device``. RAISES BadInput, Unavailable."""
        ticket = SlabTicket(slab.kind, slab.size_bytes, slab.gpu, slab.incarnation)
        with self._lock:
            known, count = self._slabs.get(slab.incarnation, (None, 0))
            memory = self._memories.get(slab.gpu)
            if memory is None:
                raise unsafe(f"it is memory of the GPU {slab.gpu.hex()}, which was not asked for")
            opened = known or Slab.open(memory, ticket, descriptor)
            self._slabs[slab.incarnation] = opened, count + 1

    def close(self, incarnation: bytes) -> None:
        with self._lock:
            slab, count = self._slabs.pop(incarnation)
            if count > 1 or self.is_stuck:  # Unmapping would wait for it.
                self._slabs[incarnation] = slab, count - 1
                return
        slab.close()  # Without the lock: who asks meanwhile does not wait for the GPU.

    def pin(self, memory: memoryview, descriptor: int, unit_bytes: int, count: Count) -> HostMap:
        """As ``client.hbm.Device``."""
        return self._pinned.pin(memory, descriptor, unit_bytes, count)

    def host(
        self, blocks: Sequence[memoryview], is_over: Callable[[], bool]
    ) -> AbstractContextManager[list[list[torch.Tensor]]]:
        """Of host memory, each in the pieces that it has to be copied in. As ``Pins.used``."""
        return self._pinned.used(blocks, is_over)

    def saves(self) -> Saves:
        """Those of this device. RAISES Unavailable."""
        if self.is_stuck:
            raise silent()
        with self._lock:
            if self._saves is None:
                cap = Cap(self._save_bytes_s, self.clock.now_ns()) if self._save_bytes_s else None
                self._saves = Saves(streams_of(self._device), self.clock, cap, self.lose)
            return self._saves

    def whole(self, incarnation: bytes) -> torch.Tensor:
        """All of the slab, uint8 [bytes]. RAISES Unavailable when it is not mapped, or lost."""
        with self._lock:
            slab, _ = self._slabs.get(incarnation, (None, 0))
        if slab is None:
            raise Unavailable(
                "unavailable", "the slab is not mapped any more", "the connection ended", "recompute"
            )
        return slab.whole(incarnation)

    def is_lost(self, incarnation: bytes) -> bool:
        with self._lock:
            slab, _ = self._slabs.get(incarnation, (None, 0))
        return slab is None or bool(slab.trouble)

    def lose(self, why: str) -> None:
        """The GPU failed: nothing in the slabs counts any more."""
        with self._lock:
            for slab, _ in self._slabs.values():
                slab.lose(why)

    def give_up(self, why: str) -> None:
        """The GPU answers nothing: as ``lose``, and nothing that it may use is unmapped any more."""
        self.is_stuck = True
        self.lose(why)


class TensorBlocks:
    """Blocks in ``memory``, uint8 [block, block_bytes], each row in one piece."""

    def __init__(self, device: EngineDevice, memory: torch.Tensor, spec: BlockSpec) -> None:
        """RAISES BadInput when it is no such tensor."""
        if memory.dtype != torch.uint8 or memory.ndim != 2 or not memory.is_contiguous() or not len(memory):
            raise _unfit(
                f"a tensor of {memory.dtype} {tuple(memory.shape)}", "it is contiguous uint8 [n, bytes]"
            )
        self._device = device
        self._line = Line(device, memory.device)
        self._memory = memory
        self._spec = spec
        self.check(spec)

    def __len__(self) -> int:
        return len(self._memory)

    def check(self, spec: BlockSpec) -> None:
        """RAISES BadInput."""
        if spec != self._spec or self._memory.shape[1] != spec.block_bytes:
            raise _unfit(f"rows of {self._memory.shape[1]} bytes", f"a block has {spec.block_bytes}")

    def follow(self) -> None:
        """RAISES Unavailable."""
        self._line.follow()

    def load(self, incarnation: bytes, offsets: Sequence[int], first: int) -> bytes:
        """RAISES Unavailable, BadInput."""
        slots = _slots(self._device.whole(incarnation), offsets, self._spec.block_bytes)
        with self._line.told():
            for row, slot in zip(self._rows(first, len(offsets)), slots, strict=True):
                row.copy_(slot, non_blocking=True)
            return self._sums(first, len(offsets))

    def put(self, blocks: Sequence[memoryview], first: int) -> bytes:
        """RAISES Unavailable."""
        with self._device.host(blocks, self._line.is_over) as cut, self._line.told():
            for row, pieces in zip(self._rows(first, len(blocks)), cut, strict=True):
                for part, piece in along(row, pieces):
                    part.copy_(piece, non_blocking=True)
            return self._sums(first, len(blocks))

    def into_slab(self, incarnation: bytes, offsets: Sequence[int], first: int) -> Writing:
        """RAISES Unavailable."""
        slots = _slots(self._device.whole(incarnation), offsets, self._spec.block_bytes)
        way = Rows(self._spec, self._rows(first, len(offsets)), [[slot] for slot in slots], "device")
        return Writing(self._device.saves(), way, [self._line.ready], self._line.waits)

    def into_host(self, blocks: Sequence[memoryview], first: int) -> Writing:
        """RAISES Unavailable."""
        with ExitStack() as using:
            cut = using.enter_context(self._device.host(blocks, lambda: True))
            way = Rows(self._spec, self._rows(first, len(blocks)), cut, "host")
            made = Writing(self._device.saves(), way, [self._line.ready], self._line.waits)
            made.closing = using.pop_all().close
            return made

    def _rows(self, first: int, count: int) -> torch.Tensor:
        assert 0 <= first <= len(self._memory) - count
        return self._memory[first : first + count]

    def _sums(self, first: int, count: int) -> bytes:
        size = self._spec.block_bytes
        offsets = range(first * size, (first + count) * size, size)
        return self._line.joined(sum_chunks(self._memory.view(-1), offsets, self._spec))


class PagedBlocks:
    """Blocks that are pages of an engine's cache: block i is the pages ``pages[i]``, in order."""

    def __init__(self, device: EngineDevice, cache: PagedCache, pages: Sequence[Sequence[int]]) -> None:
        """RAISES BadInput when they are no blocks of one size (``PagedCache.moves``), or a page is named
        twice."""
        self._device = device
        self._line = Line(device, cache.device)
        self._cache = cache
        self._pages = pages
        self._spec = cache.spec(len(pages[0]) if pages else 1)
        named = [page for of_block in pages for page in of_block]
        if len(set(named)) < len(named):
            raise _unfit("a page that is named twice", "two blocks would be written to it")
        if pages:
            cache.moves(range(0, len(pages) * self._spec.block_bytes, self._spec.block_bytes), pages)

    def __len__(self) -> int:
        return len(self._pages)

    def check(self, spec: BlockSpec) -> None:
        """RAISES BadInput."""
        if spec != self._spec:
            raise _unfit(f"pages that make up {self._spec}", f"a block is {spec}")

    def follow(self) -> None:
        """RAISES Unavailable."""
        self._line.follow()

    def load(self, incarnation: bytes, offsets: Sequence[int], first: int) -> bytes:
        """RAISES Unavailable. What is in a slot goes to the pages before anybody knows whether it is right:
        they are a miss until the sums are."""
        slab = self._device.whole(incarnation)
        slots = _slots(slab, offsets, self._spec.block_bytes)
        with self._line.told():
            if slab.device != self._cache.device:
                return self._loaded([[slot] for slot in slots], first)
            moves = self._cache.moves(offsets, self._some(first, len(offsets)))
            return self._line.joined(scatter_and_sum(moves, slab))

    def put(self, blocks: Sequence[memoryview], first: int) -> bytes:
        """RAISES Unavailable."""
        with self._device.host(blocks, self._line.is_over) as cut, self._line.told():
            return self._loaded(cut, first)

    def into_slab(self, incarnation: bytes, offsets: Sequence[int], first: int) -> Writing:
        """RAISES Unavailable."""
        slab = self._device.whole(incarnation)
        slots = [[slot] for slot in _slots(slab, offsets, self._spec.block_bytes)]
        if slab.device != self._cache.device:
            return self._writing(offsets, first, lambda moves: Staged(moves, slots, "device"))
        return self._writing(offsets, first, lambda moves: Paged(moves, slab))

    def into_host(self, blocks: Sequence[memoryview], first: int) -> Writing:
        """RAISES Unavailable."""
        with ExitStack() as using:
            cut = using.enter_context(self._device.host(blocks, lambda: True))
            ends = range(0, len(blocks) * self._spec.block_bytes, self._spec.block_bytes)
            made = self._writing(ends, first, lambda moves: Staged(moves, cut, "host"))
            made.closing = using.pop_all().close
            return made

    def _writing(self, offsets: Sequence[int], first: int, by: Callable[[Moves], Way]) -> Writing:
        with self._line.told():
            moves = self._cache.moves(offsets, self._some(first, len(offsets)))
        behind = [self._line.ready, self._line.here.mark()]
        return Writing(self._device.saves(), by(moves), behind, self._line.waits)

    def _loaded(self, blocks: Sequence[Sequence[torch.Tensor]], first: int) -> bytes:
        """From memory elsewhere, each uint8 [block_bytes] in pieces: of the host, or of a GPU joined to this
        one. While one part is scattered and summed, the next comes over the link."""
        size = self._spec.block_bytes
        step = max(1, min(len(blocks), STAGING_BYTES // PARTS // size))
        starts = range(0, len(blocks), step)
        shape = (min(PARTS, len(starts)), step, size)
        halves = list(torch.empty(shape, dtype=torch.uint8, device=self._cache.device))
        here = self._line.here
        link = self._line.beside() if len(starts) > 1 else here
        free = [here.mark()] * len(halves)
        moves: list[Moves] = []
        found: list[torch.Tensor] = []

        def bring(number: int) -> Event:
            half, part = number % len(halves), blocks[starts[number] : starts[number] + step]
            pages = self._some(first + starts[number], len(part))

            def work() -> None:
                # The table of pages goes before its part: by itself it would wait behind the next one.
                moves.append(self._cache.moves(range(0, len(part) * size, size), pages))
                _fill(halves[half], part)

            link.after(free[half])
            link.run(work)
            return link.mark()

        arrived = bring(0)
        for number in range(len(starts)):
            half, behind = number % len(halves), arrived
            if number + 1 < len(starts):
                arrived = bring(number + 1)
            here.after(behind)
            found.append(scatter_and_sum(moves[number], halves[half].view(-1)))
            free[half] = here.mark()
        return self._line.joined(torch.cat(found))

    def _some(self, first: int, count: int) -> Sequence[Sequence[int]]:
        assert 0 <= first <= len(self._pages) - count
        return self._pages[first : first + count]


def _slots(slab: torch.Tensor, offsets: Sequence[int], block_bytes: int) -> list[torch.Tensor]:
    """RAISES Unavailable when the node names a place that is not in its slab, or one for two blocks."""
    for offset in offsets:
        if not 0 <= offset <= len(slab) - block_bytes:
            raise Unavailable(
                "unavailable", f"a slot at {offset} of a slab of {len(slab)} bytes", "it is not in it"
            )
    if any(later - sooner < block_bytes for sooner, later in pairwise(sorted(offsets))):
        raise Unavailable("unavailable", "slots that overlap", "the node named one place for two blocks")
    return [slab[offset : offset + block_bytes] for offset in offsets]


def _fill(staging: torch.Tensor, blocks: Sequence[Sequence[torch.Tensor]]) -> None:
    for slot, pieces in zip(staging, blocks, strict=False):
        for target, piece in along(slot, pieces):
            target.copy_(piece, non_blocking=True)


def _unfit(what: str, why: str) -> BadInput:
    return BadInput("bad_block", what, why, "pass blocks of the namespace that was opened")
