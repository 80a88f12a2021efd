"""S3-FIFO over single blocks: a small queue lets through only what is used again; a ghost remembers the rest.

J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. A tenth of the room is the
small queue; what leaves it was used at least ``_PROMOTE`` times, or goes, remembered by the ghost as long as
the main queue is; what the ghost knows enters the main queue at once, where a use buys another round.
"""

from __future__ import annotations

from collections import OrderedDict

_SMALL_SHARE = 0.1
_USES_MAX = 3
_PROMOTE = 2


class S3Fifo:
    """A ``BlockPolicy``. Each queue maps a block to how often it was used since it came."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small_max = max(1, int(capacity * _SMALL_SHARE))
        self._ghost_max = max(1, capacity - self._small_max)
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghost: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._small or block in self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def use(self, block: int) -> bool:
        for queue in (self._small, self._main):
            uses = queue.get(block)
            if uses is not None:
                queue[block] = min(_USES_MAX, uses + 1)
                return True
        known = block in self._ghost  # Before what goes now pushes it out of there.
        if known:
            del self._ghost[block]
        while len(self) >= self._capacity:
            if len(self._small) >= self._small_max or not self._main:
                self._evict_small()
            else:
                self._evict_main()
        (self._main if known else self._small)[block] = 0
        return False

    def _evict_small(self) -> None:
        """One leaves the small queue: upward, or out."""
        block, uses = self._small.popitem(last=False)
        if uses >= _PROMOTE:
            self._main[block] = 0
            return
        self._ghost[block] = None
        if len(self._ghost) > self._ghost_max:
            self._ghost.popitem(last=False)

    def _evict_main(self) -> None:
        while True:
            block, uses = self._main.popitem(last=False)
            if not uses:
                return
            self._main[block] = uses - 1
