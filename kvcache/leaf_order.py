"""Leaves by stamp, lowest first: what recency-like policies stand on.

Each tracked block has a stamp, a number; only leaves can go, so only leaves are kept in order. When the
last child of a block goes, the block comes into the order itself, at its own stamp or (``rise``) at the
highest stamp that its children had. With ``rise`` a request stamps the last block of its path only:
those before it inherit the stamp by the time it matters. So a request costs one heap entry, however
long its prompt.

Invariants: every tracked block without children has an entry in the heap that carries its stamp;
other entries are stale, and skipped; there are at most twice as many entries as tracked blocks, plus
a few.

The sum: a stamp or a victim costs 1 to 3 us. Held leaves met on the way are put back at each call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from kvcache.policy import TreeView

_SPARE_ENTRIES = 64


class LeafOrder:
    def __init__(self, tree: TreeView, *, rise: bool) -> None:
        self._tree = tree
        self._rise = rise
        self._stamps: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._stamps)

    def entry_count(self) -> int:
        """Entries in the heap, stale ones included."""
        return len(self._heap)

    def stamp(self, path: Sequence[int], stamp: int) -> None:
        """Track these blocks, or move them, to this stamp. REQUIRES: each but the last has children."""
        children = self._tree.children
        self._stamps.update(dict.fromkeys(path, stamp))
        if path and not children[path[-1]]:
            heappush(self._heap, (stamp, path[-1]))
        if len(self._heap) > 2 * len(self._stamps) + _SPARE_ENTRIES:
            self._heap = [(stamp, block) for block, stamp in self._stamps.items() if not children[block]]
            heapify(self._heap)

    def remove(self, blocks: Iterable[int]) -> None:
        """They have left the tree, leaves first. Their parents may be leaves now."""
        parents, children = self._tree.parent, self._tree.children
        for block in blocks:
            stamp = self._stamps.pop(block, None)
            parent = parents[block]
            own = self._stamps.get(parent)
            if own is None:
                continue
            if self._rise and stamp is not None and stamp > own:
                own = self._stamps[parent] = stamp
            if not children[parent]:
                heappush(self._heap, (own, parent))

    def lowest(self, count: int) -> list[int]:
        """At most ``count`` blocks, each an evictable leaf once those before it have gone."""
        tree, stamps, heap = self._tree, self._stamps, self._heap
        parents, children, holds = tree.parent, tree.children, tree.holds
        chosen: dict[int, None] = {}
        gone: dict[int, int] = {}  # parent -> how many of its children are chosen
        put_back: list[tuple[int, int]] = []
        while heap and len(chosen) < count:
            entry = heappop(heap)
            stamp, block = entry
            if stamp != stamps.get(block) or block in chosen or children[block] != gone.get(block, 0):
                continue
            put_back.append(entry)
            if holds[block]:
                continue
            chosen[block] = None
            parent = parents[block]
            own = stamps.get(parent)
            if own is None:
                continue
            gone[parent] = gone.get(parent, 0) + 1
            if gone[parent] == children[parent]:
                # It need not rise here: it is next either way, as all that is left is younger.
                heappush(heap, (own, parent))
        for entry in put_back:
            heappush(heap, entry)
        return list(chosen)
