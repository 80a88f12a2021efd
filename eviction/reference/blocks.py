"""Caches that know blocks and no prefixes, under replay: each block of a prompt is a use of its own.

A name alone touches a prompt from its beginning to its end; with ``-rev`` from its end to its
beginning, so that ends grow old first. What a request finds is looked up before anything is touched.
"""

from __future__ import annotations

from typing import Protocol

from kvcache.eviction.reference.arc import Arc
from kvcache.eviction.reference.queues import Fifo, Lru
from kvcache.eviction.reference.s3fifo import S3Fifo
from kvcache.eviction.reference.sieve import Sieve
from kvcache.eviction.reference.tinylfu import WTinyLfu
from kvcache.eviction.simulate.tree import NONE, Forest


class BlockPolicy(Protocol):
    """A cache of blocks. Never more than ``capacity`` of them."""

    def __init__(self, capacity: int) -> None: ...

    def __contains__(self, block: int) -> bool: ...

    def __len__(self) -> int: ...

    def use(self, block: int) -> bool:
        """Somebody wants this block. Whether it is there; if not, it may be stored now."""


REVERSED = "-rev"

_FORWARD: dict[str, type[BlockPolicy]] = {
    "fifo": Fifo,
    "lru": Lru,
    "s3-fifo": S3Fifo,
    "arc": Arc,
    "sieve": Sieve,
    "w-tinylfu": WTinyLfu,
}
BLOCK_POLICIES = {**_FORWARD, **{name + REVERSED: found for name, found in _FORWARD.items()}}


class BlockCache:
    """One cache that a trace is replayed over."""

    def __init__(self, forest: Forest, name: str, capacity: int) -> None:
        self._trace = forest.trace
        self._policy = BLOCK_POLICIES[name](capacity)
        self._reversed = name.endswith(REVERSED)
        self.admitted = 0
        self.fault = ""

    @property
    def evicted(self) -> int:
        return self.admitted - len(self._policy)

    def serve(self, index: int, leaf: int) -> tuple[int, int]:
        """What was found of the prompt: the end of its leading part (or NONE), and how many blocks in all."""
        path, policy = self._trace.chain(leaf), self._policy
        found = list(map(policy.__contains__, path))
        leading = found.index(False) if False in found else len(path)
        stored = sum(map(policy.use, reversed(path) if self._reversed else path))
        self.admitted += len(path) - stored
        return path[leading - 1] if leading else NONE, sum(found)
