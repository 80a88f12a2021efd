"""The default policy. It is written in ``kvcache.leaf_lru``, where the ledger's safety net can reach it."""

from kvcache.leaf_lru import LeafLru

__all__ = ["LeafLru"]
