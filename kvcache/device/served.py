"""What a node does with GPUs: take slabs of their memory, and copy blocks out of those into host memory.

Engines copy for themselves; the node only what nobody asks for: blocks that leave a GPU and are nowhere else.

    slab ─ the link ─► one half of locked memory, while the other ─ copied and summed ─► host slots

The node moves memory between its arenas, so it registers none of them (``kvcache.device.pinned`` says why).
Blocks come by way of locked memory of its own, which is never a target: what a GPU does late hurts nobody.

Invariants: when ``copy`` has returned or raised, nothing is written to its targets any more, unless its
thread has not come back; once ``is_stuck``, locked memory may still be written, and nothing is copied again.

The sum: one copy at a time and slab, in a thread of its own: a half of 16 MiB takes 0.3 ms on the link and 1
to 2 ms to copy and sum, as fast as a core copies (10 GB/s).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcache.clock import SystemClock
from kvcache.device.copies import Copies, Copy, Step, copying, void
from kvcache.device.slab import CpuMemory, CudaMemory, Memory
from kvcache.device.streams import Streams, failed, streams_of
from kvcache.device.vmm import Vmm
from kvcache.errors import Unavailable
from kvcache.sums import SUM_BYTES, copy_and_sum
from kvcache.tiers.hbm import HbmTier

COPY_S = 20.0
HALF_BYTES = 16 << 20


class Devices:
    """Those of this host, of one kind: cuda or cpu."""

    def __init__(self, kind: str) -> None:
        """RAISES Unavailable when CUDA cannot be used here."""
        self._vmm = Vmm() if kind == "cuda" else None

    def arena(self, name: str, gpu: bytes, size_bytes: int, unit_bytes: int) -> HbmTier:
        """A slab on this GPU, the one arena of a tier.

        RAISES Unavailable when there is no such GPU here, or it has not so much memory."""
        made = HbmTier(unit_bytes)
        made.add_arena(name, self._memory(gpu), size_bytes)
        return made

    def outlet(self, memory: HbmTier) -> Outlet:
        """What copies out of it. RAISES Unavailable."""
        return Outlet(streams_of(memory.device(0)))

    def _memory(self, gpu: bytes) -> Memory:
        if self._vmm is not None:
            return CudaMemory(self._vmm, gpu)
        if gpu:
            raise Unavailable(
                "unavailable", f"no slab on GPU {gpu.hex()}", "this node serves memory of the CPU only"
            )
        return CpuMemory()


@dataclass(frozen=True, slots=True)
class _Part:
    """What goes by way of one half: pieces of blocks, whole chunks."""

    sources: list[torch.Tensor]
    targets: list[memoryview]


class Outlet:
    """Of one slab. One caller at a time, in any thread; waits."""

    def __init__(self, streams: Streams) -> None:
        """RAISES Unavailable."""
        self._streams = streams
        self._copies = Copies(streams, SystemClock())
        self._copies.lane("host")  # What cannot be copied from is found out before it is used.
        self._halves: list[torch.Tensor] = []
        self.is_stuck = False
        """A copy has not ended in time, and may still write."""

    def copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[memoryview], chunk_bytes: int
    ) -> list[bytes]:
        """Fill the targets; of each, the sums of its chunks as they arrived. RAISES Unavailable when the
        device failed, or did not do it in time."""
        parts = _parts(sources, targets, chunk_bytes)
        sums = b""
        coming = self._begin(parts[0], 0)
        for number, part in enumerate(parts):
            arrived = coming
            if number + 1 < len(parts):
                coming = self._begin(parts[number + 1], number + 1)
            self._end(arrived)
            pieces = self._pieces(part, number)
            sums += copy_and_sum([piece.numpy() for piece in pieces], part.targets, chunk_bytes)
        width = len(targets[0]) // chunk_bytes * SUM_BYTES
        return [sums[at : at + width] for at in range(0, len(sums), width)]

    def probe(self, source: torch.Tensor) -> None:
        """Does the device still answer? RAISES Unavailable."""
        found = torch.empty(1, dtype=torch.uint8)
        self._end(self._save([Step(1, copying(found, source[:1]))]))

    def close(self) -> None:
        """May be called twice."""
        self._copies.close(COPY_S)

    def _begin(self, part: _Part, number: int) -> Copy:
        """Bring it over the link, into its half. REQUIRES: nobody needs what is there any more."""
        pairs = zip(self._pieces(part, number), part.sources, strict=True)
        return self._save([Step(source.numel(), copying(piece, source)) for piece, source in pairs])

    def _pieces(self, part: _Part, number: int) -> list[torch.Tensor]:
        """Of locked memory, as long as those of the part. RAISES Unavailable."""
        if not self._halves:
            locks = self._streams.device.type == "cuda"
            try:
                both = torch.empty((2, HALF_BYTES), dtype=torch.uint8, pin_memory=locks)
            except RuntimeError as error:
                raise failed(error) from error
            self._halves = list(both)
        lengths = [len(target) for target in part.targets]
        return list(self._halves[number % 2][: sum(lengths)].split(lengths))

    def _save(self, steps: Sequence[Step]) -> Copy:
        """RAISES Unavailable."""
        if self.is_stuck:
            raise Unavailable("unavailable", "a copy out of the device's memory", "one before has not ended")
        return self._copies.save("host", steps, self._streams.current(), void)

    def _end(self, copy: Copy) -> None:
        """RAISES Unavailable."""
        if not self._copies.wait([copy], COPY_S):
            self.is_stuck = True
            raise Unavailable("unavailable", "a copy out of the device's memory", f"it took over {COPY_S} s")
        if copy.failure is not None:
            raise copy.failure


def _parts(sources: Sequence[torch.Tensor], targets: Sequence[memoryview], chunk_bytes: int) -> list[_Part]:
    """Each as much as a half takes."""
    most = HALF_BYTES // chunk_bytes * chunk_bytes
    parts: list[_Part] = []
    room = 0
    for source, target in zip(sources, targets, strict=True):
        at = 0
        while at < len(target):
            if not room:
                parts.append(_Part([], []))
                room = most
            size = min(room, len(target) - at)
            parts[-1].sources.append(source[at : at + size])
            parts[-1].targets.append(target[at : at + size])
            at, room = at + size, room - size
    return parts
