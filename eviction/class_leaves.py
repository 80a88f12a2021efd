"""Leaves by class, the longest unused of each first: where a policy of classes finds its candidates.

Within a class the leaf that was used first goes first, so that where classes are worth the same, or
nothing is learned yet, what goes is what leaf-first LRU would let go; of equally old ones, the deepest.
Each pile of leaves is a heap, one a class and device.

Invariants: every tracked leaf has an entry in the pile of its class and device that carries its last
use; other entries are stale and dropped when met; when there are more than twice as many entries as
tracked blocks, and a few, all piles are made anew.

The sum: a leaf that comes or goes costs 1 us; looking at the first of a pile 0.5 us.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from heapq import heapify, heappop, heappush

from kvcache.eviction.reuse_times import ReuseClass, Use
from kvcache.policy import TreeView

_SPARE_ENTRIES = 256

Entry = tuple[int, int, int]  # last use, minus the depth, block
_Candidate = tuple[float, int, int, int, int]  # rank, an entry, its pile or -1


class Pile:
    """The leaves of one class on one device."""

    __slots__ = ("device", "heap", "kind")

    def __init__(self, kind: ReuseClass, device: int) -> None:
        self.kind = kind
        self.device = device
        self.heap: list[Entry] = []


class ClassLeaves:
    def __init__(self, tree: TreeView, uses: Mapping[int, Use]) -> None:
        """``uses`` has the last use of every tracked block, and changes."""
        self._tree = tree
        self._uses = uses
        self._piles: dict[tuple[ReuseClass, int], Pile] = {}
        self._piles_max = _SPARE_ENTRIES
        self._entries = 0

    def add(self, block: int) -> None:
        """It is a leaf now, or was used. Nothing happens when it is neither tracked nor a leaf."""
        use = self._uses.get(block)
        if use is not None and not self._tree.children[block]:
            heappush(self._pile(use, block).heap, (use.order, -self._tree.depth[block], block))
            self._entries += 1
            if self._entries > 2 * len(self._uses) + _SPARE_ENTRIES:
                self._make_anew()

    def choose(
        self,
        count: int,
        device: int | None,
        rank: Callable[[int], float],
        drawn: Iterable[int] = (),
        only: Container[ReuseClass] | None = None,
    ) -> list[int]:
        """At most ``count`` blocks of one device, or of all (None), each an evictable leaf once those before
        it have gone: the lowest of the oldest of each class, and of the leaves ``drawn``. After a leaf
        comes the branch that it ends, as far as that was used at once. With ``only``, of these classes."""
        tree, uses = self._tree, self._uses
        parents, children, holds, devices = tree.parent, tree.children, tree.holds, tree.device
        chosen: dict[int, None] = {}
        gone: dict[int, int] = {}
        aside: list[Entry] = []
        piles = [
            pile
            for pile in self._piles.values()
            if pile.heap and device in (None, pile.device) and (only is None or pile.kind in only)
        ]
        found: list[_Candidate] = []
        for at, pile in enumerate(piles):
            if (entry := self._first(pile, chosen, aside)) is not None:
                found.append((rank(entry[2]), *entry, at))
        found += [
            self._candidate(block, rank)
            for block in drawn
            if block in uses and device in (None, devices[block])
        ]
        heapify(found)
        while found and len(chosen) < count:
            block, at = heappop(found)[3:]
            use = uses[block]
            while block not in chosen:
                chosen[block] = None
                block = parents[block]
                gone[block] = gone.get(block, 0) + 1
                if len(chosen) == count or block < 0 or gone[block] != children[block]:
                    break
                if holds[block] or block not in uses or device not in (None, devices[block]):
                    break
                if uses[block] is not use:
                    if only is None or uses[block].kind in only:
                        heappush(found, self._candidate(block, rank))
                    break
            if at >= 0 and (entry := self._first(piles[at], chosen, aside)) is not None:
                heappush(found, (rank(entry[2]), *entry, at))
        for entry in aside:
            heappush(self._pile(uses[entry[2]], entry[2]).heap, entry)
        return list(chosen)

    def _candidate(self, block: int, rank: Callable[[int], float]) -> _Candidate:
        use = self._uses[block]
        return rank(block), use.order, -self._tree.depth[block], block, -1

    def _first(self, pile: Pile, chosen: Container[int], aside: list[Entry]) -> Entry | None:
        """The oldest evictable leaf that is not ``chosen``. Entries that were passed over and must not be
        lost go to ``aside``."""
        heap, uses, tree = pile.heap, self._uses, self._tree
        children, holds, devices = tree.children, tree.holds, tree.device
        while heap:
            entry = heap[0]
            block = entry[2]
            use = uses.get(block)
            stale = use is None or use.kind is not pile.kind or use.order != entry[0]
            if stale or children[block] or devices[block] != pile.device:  # A number may be another's now.
                heappop(heap)
                self._entries -= 1
            elif holds[block] or block in chosen:
                aside.append(heappop(heap))
            else:
                return entry
        return None

    def _pile(self, use: Use, block: int) -> Pile:
        at = use.kind, self._tree.device[block]
        pile = self._piles.get(at)
        if pile is None:
            if len(self._piles) >= self._piles_max:
                self._piles = {at: pile for at, pile in self._piles.items() if pile.heap}
                self._piles_max = 2 * len(self._piles) + _SPARE_ENTRIES
            pile = self._piles[at] = Pile(*at)
        return pile

    def _make_anew(self) -> None:
        self._piles.clear()
        self._entries = 0
        children, depth = self._tree.children, self._tree.depth
        for block, use in self._uses.items():
            if not children[block]:
                self._pile(use, block).heap.append((use.order, -depth[block], block))
                self._entries += 1
        for pile in self._piles.values():
            heapify(pile.heap)
