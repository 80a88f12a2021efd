"""Leaf-first LRU: the leaf whose last use is longest ago goes, then its parent if that has become the
oldest leaf, and so on. Exact: a block's last use is the last use of anything that continues it.

It stands here, and not with the other policies, because it is also what the ledger falls back to when
another policy breaks its contract. ``kvcache.eviction.leaf_lru`` is this class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvcache.leaf_order import LeafOrder
from kvcache.policy import Param, RequestContext, TreeView


class LeafLru:
    """The default ``EvictionPolicy``, and a ``DevicePolicy``. Learns nothing, has no settings."""

    _RISE = True

    def __init__(self, tree: TreeView, capacity_bytes: int) -> None:
        self._order = LeafOrder(tree, rise=self._RISE)
        self._uses = 0

    @classmethod
    def params(cls) -> Mapping[str, Param]:
        return {}

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self._uses += 1
        self._order.stamp(path[-1:], self._uses)

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        return count

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self._uses += 1
        self._order.stamp(blocks, self._uses)

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return self._order.lowest(count)

    def victims_on(self, context: RequestContext, count: int, device: int) -> Sequence[int]:
        return self._order.lowest_on(device, count)

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        self._order.remove(blocks)

    def state(self) -> bytes:
        return b""

    def load_state(self, data: bytes) -> None:
        if data:
            raise ValueError(f"{len(data)} bytes of state, but this policy learns nothing")
