"""Leaf-first FIFO: of the leaves, the one that was stored first goes; hits do not count.

The baseline that any other policy has to beat, and the cheapest: a hit costs nothing. It is leaf-first
LRU that never sees a use after the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.leaf_lru import LeafLru
from kvcache.policy import RequestContext


class Fifo(LeafLru):
    """An ``EvictionPolicy``. Learns nothing, has no settings."""

    _RISE = False

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        """A hit changes nothing."""
