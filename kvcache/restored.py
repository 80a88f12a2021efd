"""A block that a device still holds, as its index says it."""

from __future__ import annotations

from typing import NamedTuple

from kvcache.block import Slot, StorageKey


class Restored(NamedTuple):
    """Where a block lies. (No dataclass: there are hundreds of thousands, and this is half the time.)"""

    key: StorageKey
    parent: StorageKey | None  # None for a first block
    slot: Slot
    block_bytes: int
    checksum: bytes
