"""What a node does with GPUs: take slabs of their memory, and copy blocks out of those into host memory.

Engines copy for themselves; the node only what nobody asks for: blocks that leave a GPU and are nowhere else.

Invariants: when ``copy`` has returned or raised, nothing is written to its targets any more, unless
``is_stuck``: then they must not be used again.

The sum: one copy at a time and slab, in a thread of its own, at the link's speed or a third of it (the node's
side of host memory is not registered, ``kvcache.device.pinned`` says why).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcache.clock import SystemClock
from kvcache.device.copies import Copies, Step, copying
from kvcache.device.pinned import flat
from kvcache.device.slab import CpuMemory, CudaMemory, Memory
from kvcache.device.streams import Streams, streams_of
from kvcache.device.vmm import Vmm
from kvcache.errors import Unavailable
from kvcache.sums import sum_chunks
from kvcache.tiers.hbm import HbmTier

COPY_S = 20.0


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


class Outlet:
    """Of one slab. One caller at a time, in any thread; waits."""

    def __init__(self, streams: Streams) -> None:
        """RAISES Unavailable."""
        self._streams = streams
        self._copies = Copies(streams, SystemClock())
        self.is_stuck = False
        """A copy has not ended in time, and may still write."""

    def copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[memoryview], chunk_bytes: int
    ) -> list[bytes]:
        """Fill the targets; of each, the sums of its chunks as they arrived. RAISES Unavailable when the
        device failed, or did not do it in time."""
        pairs = [(flat(target), source) for target, source in zip(targets, sources, strict=True)]
        self._run([Step(source.numel(), copying(target, source)) for target, source in pairs])
        return [sum_chunks([target], chunk_bytes) for target in targets]

    def probe(self, source: torch.Tensor) -> None:
        """Does the device still answer? RAISES Unavailable."""
        found = torch.empty(1, dtype=torch.uint8)
        self._run([Step(1, copying(found, source[:1]))])

    def close(self) -> None:
        """May be called twice."""
        self._copies.close(COPY_S)

    def _run(self, steps: Sequence[Step]) -> None:
        failures: list[Unavailable | None] = []
        copy = self._copies.save("host", steps, self._streams.current(), failures.append)
        if not self._copies.wait([copy], COPY_S):
            self.is_stuck = True
            raise Unavailable("unavailable", "a copy out of the device's memory", f"it took over {COPY_S} s")
        if failures[0] is not None:
            raise failures[0]
