"""When each committed block was last used: what a policy that takes over is told, oldest first.

A use stamps the last block of its path only; what comes before was used as late as the latest of what
continues it, and gets that stamp when the last of these has gone (``left``). Stamps are times, made to
grow, so that of two uses at one time the later is the later.

Invariant: exactly the committed blocks have a stamp over 0.

The sum: 40 ns a block that comes, 100 ns a block that goes, 8 bytes a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kvcache.policy import TreeView

_NONE = 0


class Recency:
    def __init__(self, tree: TreeView) -> None:
        self._tree = tree
        self._stamps = array("q")
        self.newest = _NONE
        """The last stamp that was given."""
        self._first_ns = _NONE  # Stamps before this are no times: what a device held from an earlier life.

    def __len__(self) -> int:
        """One more than the largest number that a committed block may have."""
        return len(self._stamps)

    def of(self, block: int) -> int:
        """0 for one that is not committed."""
        return self._stamps[block] if block < len(self._stamps) else _NONE

    def time_of(self, stamp: int) -> int:
        """In ns; 0 where nobody knows when it was."""
        return stamp if _NONE < self._first_ns <= stamp else 0

    def committed(self, start: int, end: int) -> list[int]:
        """Those whose numbers are in this range."""
        return [block for block, stamp in enumerate(self._stamps[start:end], start) if stamp]

    def used(self, block: int, now_ns: int) -> int:
        """A request's path ends here. The stamp; 0 if the block is not committed."""
        if not self.of(block):
            return _NONE
        self._stamps[block] = stamp = self._next(now_ns)
        return stamp

    def entered(self, blocks: Sequence[int], now_ns: int) -> int:
        """These were committed. REQUIRES: there is one."""
        stamp, stamps = self._next(now_ns), self._stamps
        missing = max(blocks) + 1 - len(stamps)
        if missing > 0:
            stamps.frombytes(bytes(missing * stamps.itemsize))
        for block in blocks:
            stamps[block] = stamp
        return stamp

    def left(self, blocks: Sequence[int]) -> list[int]:
        """These have left the tree, leaves first; some may never have been committed. Those that have got
        a stamp of theirs, in this order."""
        stamps, parents, count = self._stamps, self._tree.parent, len(self._stamps)
        risen: list[int] = []
        for block in blocks:
            if block >= count:
                continue
            stamp, parent = stamps[block], parents[block]
            stamps[block] = _NONE
            if 0 <= parent < count and _NONE < stamps[parent] < stamp:
                stamps[parent] = stamp
                risen.append(parent)
        return risen

    def oldest_first(self, blocks: Sequence[int]) -> list[int]:
        return sorted(blocks, key=self.of)

    def check(self, committed: Sequence[int]) -> None:
        assert {block for block, stamp in enumerate(self._stamps) if stamp} == set(committed)

    def _next(self, now_ns: int) -> int:
        self.newest = max(self.newest + 1, now_ns)
        self._first_ns = self._first_ns or (self.newest if now_ns else _NONE)
        return self.newest
