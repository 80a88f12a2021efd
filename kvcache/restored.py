"""Many blocks at once: what a device holds still, what a tree made of it, and how lists take it.

The sum: ``holdings`` states it. Most of it is spent on waiting for memory, as keys are in no order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from kvcache.block import Slot, StorageKey

Entry = TypeVar("Entry")


class Restored(NamedTuple):
    """Where a block lies. (No dataclass: there are hundreds of thousands, and this is half the time.)"""

    key: StorageKey
    parent: StorageKey | None  # None for a first block
    slot: Slot
    block_bytes: int
    checksum: bytes


class Graft(NamedTuple):
    """What became of keys that were inserted together. ``blocks`` has one a key, in rising order; those at
    the places ``left_out`` are unlinked. ``paths``: the others, each path behind its parent's."""

    blocks: list[int]
    left_out: list[int]
    paths: list[list[int]]
    adopted: list[int]


def put(entries: list[Entry], blocks: Sequence[int], values: Sequence[Entry]) -> None:
    """Set the entry of each block. REQUIRES: ``blocks`` rise, and those that have no entry yet are the
    next ones."""
    there = bisect_left(blocks, len(entries))
    for block, value in zip(blocks[:there], values[:there], strict=True):
        entries[block] = value
    entries += values[there:]
