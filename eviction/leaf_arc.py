"""Leaf-first ARC: scan-resistant, for traffic where many prompts are asked once (retrieval, batch jobs).

As in ARC (Megiddo and Modha, FAST 03), what was used once and what was used again are kept apart, and a
target for the size of the first part follows what is regretted: a block that comes back soon after it
left the first part raises it, one from the second part lowers it. Names of blocks that have left are
remembered, as many of each part as are held in both, at most.

Unlike ARC it lets go leaves only, and whole branches: what one request used goes from its end, so that no
block is kept that cannot be reached. Branches that are asked for once are gone soon; where nearly all
are asked for again (agents), leaf-lru is better, and leaf-hazard is better on all traces but the smallest
(docs/eviction.md has the figures).

The sum: 50 us a request of 24 blocks; 200 bytes a held block, with the names that are remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby

from kvcache.eviction.class_leaves import ClassLeaves
from kvcache.eviction.reuse_times import ReuseClass, Use
from kvcache.policy import Param, RequestContext, TreeView

_ONCE, _AGAIN = ReuseClass((0,), None), ReuseClass((1,), None)


class LeafArc:
    """An ``EvictionPolicy`` and a ``DevicePolicy``. Has no settings, and hands nothing on."""

    def __init__(self, tree: TreeView, capacity_bytes: int) -> None:
        self._tree = tree
        self._runs: dict[int, Use] = {}
        self._leaves = ClassLeaves(tree, self._runs)
        self._held = {_ONCE: 0, _AGAIN: 0}
        self._left: dict[ReuseClass, OrderedDict[Hashable, None]] = {
            _ONCE: OrderedDict(),
            _AGAIN: OrderedDict(),
        }
        self._target = 0.0  # blocks that were used once are worth keeping
        self._uses = 0

    @classmethod
    def params(cls) -> Mapping[str, Param]:
        return {}

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        known = [block for block in path[:] if block in self._runs]
        self._uses += 1
        self._put(known, _AGAIN)
        self._leaves.add(known[-1] if known else -1)

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        return count

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self._uses += 1
        for returned, same in groupby(blocks, self._returned):
            self._put(list(same), _AGAIN if returned else _ONCE)
        self._leaves.add(blocks[-1])

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return self._choose(count, None)

    def victims_on(self, context: RequestContext, count: int, device: int) -> Sequence[int]:
        return self._choose(count, device)

    def _choose(self, count: int, device: int | None) -> list[int]:
        first = _ONCE if self._held[_ONCE] > self._target else _AGAIN
        return self._leaves.choose(count, device, lambda block: self._runs[block].kind is not first)

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        parents, children, key = self._tree.parent, self._tree.children, self._tree.key
        for block in blocks:
            run = self._runs.pop(block, None)
            if run is not None:
                self._held[run.kind] -= 1
                self._left[run.kind][key[block]] = None
            parent = parents[block]
            if parent >= 0 and not children[parent]:
                self._leaves.add(parent)
        for left in self._left.values():
            while len(left) > len(self._runs) + len(blocks):
                left.popitem(last=False)

    def state(self) -> bytes:
        return b""

    def load_state(self, data: bytes) -> None:
        if data:
            raise ValueError(f"{len(data)} bytes of state, but this policy hands nothing on")

    def _put(self, blocks: Sequence[int], kind: ReuseClass) -> None:
        run = Use(kind, len(blocks), self._uses, 0, 0.0)
        for block in blocks:
            last = self._runs.get(block)
            if last is not None:
                self._held[last.kind] -= 1
            self._runs[block] = run
        self._held[kind] += len(blocks)

    def _returned(self, block: int) -> bool:
        """Has this block left a while ago? Then its part was too small."""
        name = self._tree.key[block]
        for kind, other, sign in ((_ONCE, _AGAIN, 1), (_AGAIN, _ONCE, -1)):
            left = self._left[kind]
            if name in left:
                step = max(1.0, len(self._left[other]) / len(left))
                self._target = min(max(0.0, self._target + sign * step), float(len(self._runs)))
                del left[name]
                return True
        return False
