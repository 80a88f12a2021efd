"""The optimum: keeps what is wanted again soonest, and stores nothing that is wanted later than all it has.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2),
1966 (MIN), with bypass: a block need not be stored at all. A block's first next use is never later than that
of what continues it; so of blocks wanted equally late, the deepest goes, and then MIN never takes a parent
before its children: it is the optimum of prefix hits too, as long as blocks are of equal size.

The sum: 0.2 us a block of a request to learn its next use, 1 us one that is stored.
"""

from __future__ import annotations

from array import array
from heapq import heappop, heappush

from kvcache.eviction.simulate.tree import NONE, Forest

_NEVER = 1 << 31

_Spans = list[tuple[int, int]]
"""Of a request's path: (blocks from the first, when these are wanted next), and so on to its end."""


def next_uses(forest: Forest) -> list[_Spans]:
    """Of each request: when the blocks of its path are wanted next. Along a path it is never sooner."""
    trace = forest.trace
    wanted = [_NEVER] * len(forest.parent)
    spans: list[_Spans] = []
    for index in range(trace.request_count - 1, -1, -1):
        path = trace.chain(trace.leaves[index])
        found: _Spans = []
        nexts = [wanted[block] for block in path]
        at = 0
        while at < len(path):
            end = _end_of(nexts, at)
            found.append((end, nexts[at]))
            at = end
        spans.append(found)
        for block in path:
            wanted[block] = index
    spans.reverse()
    return spans


def _end_of(nexts: list[int], at: int) -> int:
    """Behind the last that is as the one ``at``. REQUIRES: sorted."""
    if nexts[-1] == nexts[at]:
        return len(nexts)
    low, high = at, len(nexts) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if nexts[middle] == nexts[at]:
            low = middle
        else:
            high = middle
    return high


class Belady:
    """One cache that knows what will be asked for. ``serve`` is called for every request, in order."""

    def __init__(self, forest: Forest, spans: list[_Spans], capacity: int) -> None:
        self._forest = forest
        self._spans = spans
        self._capacity = capacity
        self._wanted = array("q", bytes(8 * len(forest.parent)))
        self._children = [NONE] * len(forest.parent)  # NONE: not cached.
        self._leaves: list[tuple[int, int, int]] = []  # What is wanted last first: -when, -depth, block.
        self._count = 0
        self.admitted = self.evicted = 0
        self.fault = ""

    def serve(self, index: int, leaf: int) -> tuple[int, int]:
        """What was found of the prompt: its last block (or NONE), and how many."""
        path = self._forest.trace.chain(leaf)
        wanted = self._wanted
        at = 0
        for end, when in self._spans[index]:
            for block in path[at:end]:
                wanted[block] = when
            at = end
        hit = self._leading(path)
        if hit:
            self._file(path[hit - 1])
        self._store(path[hit:])
        return path[hit - 1] if hit else NONE, hit

    def _leading(self, path: list[int]) -> int:
        """How many leading blocks are cached."""
        low, high = 0, len(path)
        while low < high:
            middle = (low + high) // 2
            if self._children[path[middle]] >= 0:
                low = middle + 1
            else:
                high = middle
        return low

    def _store(self, blocks: list[int]) -> None:
        """As many of these as are wanted sooner than something that is cached."""
        parent, depth = self._forest.parent, self._forest.depth
        stored = 0
        for block in blocks:
            when = self._wanted[block]
            if when == _NEVER:
                break
            if self._count == self._capacity and not self._evict_later(when, depth[block]):
                break
            self._children[block] = 0
            if (before := parent[block]) >= 0:
                self._children[before] += 1
            stored += 1
            self._count += 1
        self.admitted += stored
        if stored:
            self._file(blocks[stored - 1])

    def _file(self, block: int) -> None:
        if not self._children[block]:
            heappush(self._leaves, (-self._wanted[block], -self._forest.depth[block], block))

    def _evict_later(self, when: int, depth: int) -> bool:
        """One has gone that is wanted later than ``when``, or as late and is deeper; or False."""
        leaves, children = self._leaves, self._children
        while leaves:
            minus_when, minus_depth, block = leaves[0]
            if children[block] or -minus_when != self._wanted[block]:
                heappop(leaves)  # It has gone, has been continued, or was asked for since.
                continue
            if (-minus_when, -minus_depth) <= (when, depth):
                return False
            heappop(leaves)
            children[block] = NONE
            self._count -= 1
            self.evicted += 1
            parent = self._forest.parent[block]
            if parent >= 0:
                children[parent] -= 1
                self._file(parent)
            return True
        return False
