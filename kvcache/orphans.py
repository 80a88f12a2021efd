"""Blocks whose parent is missing, and the keys they wait for.

Invariants (``check``): each orphan waits for one key, and is filed under it and no other.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView

from kvcache.block import StorageKey


class Orphans:
    def __init__(self) -> None:
        self._misses: dict[int, StorageKey] = {}
        self._waiting: dict[StorageKey, set[int]] = {}

    def __len__(self) -> int:
        return len(self._misses)

    def __iter__(self) -> Iterator[int]:
        return iter(self._misses)

    def __contains__(self, block: int) -> bool:
        return block in self._misses

    def awaited(self) -> KeysView[StorageKey]:
        return self._waiting.keys()

    def add(self, block: int, key: StorageKey) -> None:
        """It waits for ``key``. REQUIRES: it is none yet."""
        self._misses[block] = key
        self._waiting.setdefault(key, set()).add(block)

    def discard(self, block: int) -> None:
        """Nothing happens when it is none."""
        key = self._misses.pop(block, None)
        if key is None:
            return
        self._waiting[key].remove(block)
        if not self._waiting[key]:
            del self._waiting[key]

    def take(self, key: StorageKey) -> list[int]:
        """Those that wait for ``key`` wait no longer."""
        blocks = sorted(self._waiting.pop(key, ()))
        for block in blocks:
            del self._misses[block]
        return blocks

    def check(self) -> None:
        assert all(block in self._waiting[key] for block, key in self._misses.items())
        assert sum(map(len, self._waiting.values())) == len(self._misses)
