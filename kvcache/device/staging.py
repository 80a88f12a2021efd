"""Device memory in which blocks lie for the time of a copy, between an engine's pages and host memory.

Pages of a block are scattered over the device, and the link is fast only for long runs: so what is saved goes
through a *part* of staging memory, in which the planes of a block are one run (``kvcache.device.saving``).

Invariant: a part is in one copy at a time, and is free again when the copy has ended, never before.
"""

from __future__ import annotations

import torch

from kvcache.errors import Unavailable


class Staging:
    """Device memory in equal parts. One owner; ``take`` and ``give`` decide only."""

    def __init__(self, memory: torch.Tensor, part_bytes: int) -> None:
        """``memory``: uint8 [bytes], of the cache's device. REQUIRES: at least one part."""
        assert 0 < part_bytes <= len(memory)
        self.memory = memory
        self.part_bytes = part_bytes
        self._count = len(memory) // part_bytes
        self._free = list(range(self._count - 1, -1, -1))

    def take(self) -> int:
        """The offset of a part, the taker's until ``give``.

        RAISES Unavailable when all are in copies: pump them, or do without."""
        if not self._free:
            raise Unavailable(
                "unavailable",
                "no memory of the device is free to copy through",
                f"all {self._count} parts are in copies",
                "wait for one of them, or recompute",
            )
        return self._free.pop() * self.part_bytes

    def give(self, offset: int) -> None:
        """REQUIRES: taken, and no copy over it is under way."""
        part = offset // self.part_bytes
        assert part not in self._free
        self._free.append(part)
