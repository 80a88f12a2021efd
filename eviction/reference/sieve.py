"""SIEVE over single blocks: a FIFO queue and a hand that passes over what was used since it last came by.

Y. Zhang et al., "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for Web Caches",
NSDI 2024. What was used often keeps its place though it be dead: on agents' traffic, the worst of all.
"""

from __future__ import annotations

NONE = -1


class Sieve:
    """A ``BlockPolicy``. The queue is a linked list, newest at the head; the hand goes to newer ones."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used: dict[int, bool] = {}
        self._newer: dict[int, int] = {}
        self._older: dict[int, int] = {}
        self._newest = self._oldest = self._hand = NONE

    def __contains__(self, block: int) -> bool:
        return block in self._used

    def __len__(self) -> int:
        return len(self._used)

    def use(self, block: int) -> bool:
        if block in self._used:
            self._used[block] = True
            return True
        if len(self._used) >= self._capacity:
            self._evict()
        self._used[block] = False
        self._older[block], self._newer[block] = self._newest, NONE
        if self._newest != NONE:
            self._newer[self._newest] = block
        else:
            self._oldest = block
        self._newest = block
        return False

    def _evict(self) -> None:
        hand = self._hand if self._hand != NONE else self._oldest
        while self._used[hand]:
            self._used[hand] = False
            hand = self._newer[hand]
            if hand == NONE:
                hand = self._oldest
        self._hand = self._newer[hand]
        self._unlink(hand)

    def _unlink(self, block: int) -> None:
        del self._used[block]
        newer, older = self._newer.pop(block), self._older.pop(block)
        if newer != NONE:
            self._older[newer] = older
        else:
            self._newest = older
        if older != NONE:
            self._newer[older] = newer
        else:
            self._oldest = newer
