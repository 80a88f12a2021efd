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

from collections import defaultdict
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from kvcache.policy import TreeView

_SPARE_ENTRIES = 64
NONE = -1

_Heap = list[tuple[int, int]]  # stamp, block


class LeafOrder:
    def __init__(self, tree: TreeView, *, rise: bool) -> None:
        self._tree = tree
        self._rise = rise
        self._stamps: dict[int, int] = {}
        self._heaps: defaultdict[int, _Heap] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._stamps)

    def entry_count(self) -> int:
        """Entries in the heaps, stale ones included."""
        return sum(map(len, self._heaps.values()))

    def stamp(self, path: Sequence[int], stamp: int) -> None:
        """Track these blocks, or move them, to this stamp. REQUIRES: each but the last has children."""
        self._stamps.update(dict.fromkeys(path, stamp))
        if path and not self._tree.children[path[-1]]:
            heappush(self._heaps[self._tree.device[path[-1]]], (stamp, path[-1]))
            self._sweep()

    def remove(self, blocks: Iterable[int]) -> None:
        """They have left the tree, leaves first. Their parents may be leaves now."""
        parents, rise, pop = self._tree.parent, self._rise, self._stamps.pop
        before, risen = NONE, None  # The parent of the block before, and that block's stamp.
        for block in blocks:
            stamp = pop(block, None)
            if block == before:
                if rise and stamp is not None and risen is not None and risen > stamp:
                    stamp = risen
            elif before != NONE:
                self._uncover(before, risen)
            before, risen = parents[block], stamp
        if before != NONE:
            self._uncover(before, risen)
        self._sweep()

    def _uncover(self, block: int, stamp: int | None) -> None:
        """A child of this block, with this stamp, has gone."""
        own = self._stamps.get(block)
        if own is None:
            return
        if self._rise and stamp is not None and stamp > own:
            own = self._stamps[block] = stamp
        if not self._tree.children[block]:
            heappush(self._heaps[self._tree.device[block]], (own, block))

    def lowest(self, count: int) -> list[int]:
        """At most ``count`` blocks, each an evictable leaf once those before it have gone."""
        return self._choose(None, count)

    def lowest_on(self, device: int, count: int) -> list[int]:
        """As ``lowest``, of one device: what is covered by leaves of others is passed over."""
        return self._choose(self._heaps[device], count)

    def _choose(self, only: _Heap | None, count: int) -> list[int]:
        tree, stamps, heaps = self._tree, self._stamps, self._heaps
        parents, children, holds, devices = tree.parent, tree.children, tree.holds, tree.device
        get = stamps.get
        chosen: dict[int, None] = {}
        gone: dict[int, int] = {}  # parent -> how many of its children are chosen
        put_back: _Heap = []
        heap = only if only is not None else self._lowest_heap()
        many = only is None and len(heaps) > 1
        while len(chosen) < count:
            if many:
                heap = self._lowest_heap()
            if not heap:
                break
            entry = heappop(heap)
            stamp, block = entry
            if stamp != get(block) or block in chosen or children[block] != gone.get(block, 0):
                continue
            put_back.append(entry)
            if holds[block]:
                continue
            while True:
                chosen[block] = None
                parent = parents[block]
                own = get(parent)
                if own is None:
                    break
                if children[parent] != 1:
                    gone[parent] = gone.get(parent, 0) + 1
                    if gone[parent] != children[parent]:
                        break
                elsewhere = only is not None and heaps[devices[parent]] is not only
                if own > stamp:
                    gone[parent] = children[parent]
                    if not elsewhere:
                        heappush(heaps[devices[parent]], (own, parent))
                        many = only is None and len(heaps) > 1
                    break
                # It need not rise here: it is next either way, as all that is left is younger.
                if holds[parent] or len(chosen) == count or elsewhere:
                    break
                block = parent
        for entry in put_back:
            heappush(heaps[devices[entry[1]]], entry)
        return list(chosen)

    def _lowest_heap(self) -> _Heap:
        """The one whose first entry is lowest; an empty one when all are."""
        return min(filter(None, self._heaps.values()), default=[])

    def _sweep(self) -> None:
        """If a heap has grown too large, leave one entry of each leaf."""
        limit = 2 * len(self._stamps) + _SPARE_ENTRIES
        for heap in self._heaps.values():
            if len(heap) > limit:
                break
        else:
            return
        self._heaps.clear()
        for block, stamp in self._stamps.items():
            if not self._tree.children[block]:
                heappush(self._heaps[self._tree.device[block]], (stamp, block))
