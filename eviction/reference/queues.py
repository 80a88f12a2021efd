"""FIFO and LRU over single blocks: which was stored, or used, longest ago goes.

What an engine gets that treats its cache as a plain set of blocks. Touched from a prompt's end to its
beginning (``lru-rev``), LRU keeps beginnings longest and equals leaf-first LRU. R. L. Mattson et al.,
"Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970.
"""

from __future__ import annotations

from collections import OrderedDict


class Fifo:
    """A ``BlockPolicy``."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._queue: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._queue

    def __len__(self) -> int:
        return len(self._queue)

    def use(self, block: int) -> bool:
        if block in self._queue:
            self._found(block)
            return True
        if len(self._queue) >= self._capacity:
            self._queue.popitem(last=False)
        self._queue[block] = None
        return False

    def _found(self, block: int) -> None:
        """FIFO does not care."""


class Lru(Fifo):
    """A ``BlockPolicy``."""

    def _found(self, block: int) -> None:
        self._queue.move_to_end(block)
