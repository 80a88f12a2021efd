"""Leaf-first FIFO: of the leaves, the one that was stored first goes; hits do not count.

The baseline that any other policy has to beat, and the cheapest: a hit costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvcache.leaf_order import LeafOrder
from kvcache.policy import Param, RequestContext, TreeView


class Fifo:
    """An ``EvictionPolicy``. Learns nothing, has no settings."""

    def __init__(self, tree: TreeView, capacity_bytes: int) -> None:
        self._order = LeafOrder(tree, rise=False)
        self._stored = 0

    @classmethod
    def params(cls) -> Mapping[str, Param]:
        return {}

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        pass

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        return count

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self._stored += 1
        self._order.stamp(blocks, self._stored)

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return self._order.lowest(count)

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        self._order.remove(blocks)

    def state(self) -> bytes:
        return b""

    def load_state(self, data: bytes) -> None:
        if data:
            raise ValueError(f"{len(data)} bytes of state, but this policy learns nothing")
