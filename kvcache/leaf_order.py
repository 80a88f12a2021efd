"""Leaves by stamp, lowest first: what recency-like policies stand on.

Each tracked block has a stamp, a number; only leaves can go, so only leaves are kept in order. When the
last child of a block goes, the block comes into the order itself, at its own stamp or (``rise``) at the
highest stamp that its children had. With ``rise`` a request stamps the last block of its path only:
those before it inherit the stamp by the time it matters. So a request costs one heap entry, however
long its prompt.

Each device has a heap of its own, so that finding what is coldest on one does not take a walk past all
that is colder on others.

Invariants: every tracked block without children has an entry in its device's heap that carries its
stamp; other entries are stale, and skipped; a heap that has twice as many entries as there are tracked
blocks, and a few, is swept.

The sum: a stamp or a victim costs 1 to 3 us. Held leaves met on the way are put back at each call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from kvcache.policy import TreeView

_SPARE_ENTRIES = 64


class LeafOrder:
    def __init__(self, tree: TreeView, *, rise: bool) -> None:
        self._tree = tree
        self._rise = rise
        self._stamps: dict[int, int] = {}
        self._heaps: list[list[tuple[int, int]]] = [[]]  # one a device

    def __len__(self) -> int:
        return len(self._stamps)

    def entry_count(self) -> int:
        """Entries in the heaps, stale ones included."""
        return sum(map(len, self._heaps))

    def stamp(self, path: Sequence[int], stamp: int) -> None:
        """Track these blocks, or move them, to this stamp. REQUIRES: each but the last has children."""
        children = self._tree.children
        self._stamps.update(dict.fromkeys(path, stamp))
        if path and not children[path[-1]]:
            self._enter(stamp, path[-1])

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
                self._enter(own, parent)

    def lowest(self, count: int) -> list[int]:
        """At most ``count`` blocks, each an evictable leaf once those before it have gone."""
        return self._choose(self._heaps, count)

    def lowest_on(self, device: int, count: int) -> list[int]:
        """As ``lowest``, of one device: what is covered by leaves of others is passed over."""
        return self._choose(self._heaps[device : device + 1], count)

    def _choose(self, heaps: list[list[tuple[int, int]]], count: int) -> list[int]:
        """``heaps``: all, or one."""
        tree, stamps = self._tree, self._stamps
        parents, children, holds = tree.parent, tree.children, tree.holds
        chosen: dict[int, None] = {}
        gone: dict[int, int] = {}  # parent -> how many of its children are chosen
        put_back: list[tuple[int, int]] = []
        while len(chosen) < count:
            heap = heaps[0] if len(heaps) == 1 else min(filter(None, heaps), default=[])
            if not heap:
                break
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
                target = self._heap_of(parent)
                if len(heaps) > 1 or target is heap:
                    # It need not rise here: it is next either way, as all that is left is younger.
                    heappush(target, (own, parent))
        for entry in put_back:
            heappush(self._heap_of(entry[1]), entry)
        return list(chosen)

    def _heap_of(self, block: int) -> list[tuple[int, int]]:
        device = self._tree.device[block]
        while device >= len(self._heaps):
            self._heaps.append([])
        return self._heaps[device]

    def _enter(self, stamp: int, block: int) -> None:
        heap = self._heap_of(block)
        heappush(heap, (stamp, block))
        if len(heap) > 2 * len(self._stamps) + _SPARE_ENTRIES:
            self._sweep()

    def _sweep(self) -> None:
        """Leave one entry of each leaf."""
        for heap in self._heaps:
            heap.clear()
        for block, stamp in self._stamps.items():
            if not self._tree.children[block]:
                heappush(self._heap_of(block), (stamp, block))
