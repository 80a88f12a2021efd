"""Host memory, locked for the copies of this process's GPUs.

The host slab is a memfd that the node, and each engine that maps it, registers for itself: a GPU copies from
and to locked memory at the link's speed (50 GB/s), from other memory at a third of it, and not beside others.

What is registered is kept resident as it is. So an arena that somebody has registered must not be punched:
copies would go on into the pages that it had, and nobody would see their bytes. (The checks would turn that
into misses, for good.) A node that moves memory between arenas must not offer them to be registered.

The sum: 0.1 to 0.3 s a GiB, once, in a thread of its own.
"""

from __future__ import annotations

import torch

from kvcache.device.vmm import Vmm


def flat(memory: memoryview) -> torch.Tensor:
    """The same bytes as a tensor, uint8 [len], which keeps the map alive. REQUIRES: writable."""
    return torch.frombuffer(memory, dtype=torch.uint8)


class Pinned:
    """Memory that is registered until ``close``."""

    def __init__(self, vmm: Vmm, ordinal: int, memory: torch.Tensor) -> None:
        """``memory``: on the CPU, uint8 [bytes], whole pages; ``ordinal``: a GPU, for all there are.

        RAISES Unavailable; it can be copied from and to all the same, slower."""
        self._vmm = vmm
        self._ordinal = ordinal
        vmm.register(ordinal, memory.data_ptr(), len(memory))
        self._memory: torch.Tensor | None = memory

    def close(self) -> None:
        """REQUIRES: no copy over it is under way. May be called twice."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._vmm.unregister(self._ordinal, memory.data_ptr())
