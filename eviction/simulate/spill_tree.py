"""The blocks of one replayed lower tier, as a ``TreeView``: a block's parent may lie in the tier above only.

Blocks come from above leaf by leaf, so a child may be here before its parent; when that comes, it adopts
what continues it.

Invariants (``check``): ``parent`` is a block that is here, or NONE; ``children`` is NONE exactly for what is
not here, and else counts the blocks here that continue it; the leaves are those without children and
holds.

The sum: 1 us a block that comes or goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvcache.eviction.simulate.tree import NONE, Forest
from kvcache.leaf_set import LeafSet


class SpillTree:
    """One owner. Blocks are the trace's, and of 1 byte."""

    def __init__(self, forest: Forest) -> None:
        count = len(forest.parent)
        self._above = forest.parent
        self._continued = forest.continued()
        self.key = range(count)
        self.depth: Sequence[int] = forest.depth
        self.parent = [NONE] * count
        self.children = [NONE] * count
        self.holds = [0] * count
        self.block_bytes: Sequence[int] = b"\1" * count
        self.device: Sequence[int] = bytes(count)
        self.count = 0
        self._leaves = LeafSet()

    def is_evictable(self, block: int) -> bool:
        return not self.children[block] and not self.holds[block]

    def evictable_count(self) -> int:
        return len(self._leaves)

    def sample_leaves(self, count: int, random: Random) -> list[int]:
        return self._leaves.sample(count, random)

    def cached(self) -> list[int]:
        return [block for block, children in enumerate(self.children) if children >= 0]

    def is_continued(self, block: int) -> bool:
        """Something here continues it, wherever it is itself."""
        return any(self.children[each] >= 0 for each in self._continued[block])

    def hold(self, block: int) -> None:
        self.holds[block] += 1
        self._leaves.discard(block)

    def unhold(self, block: int) -> None:
        self.holds[block] -= 1
        self._settle(block)

    def add(self, block: int) -> None:
        """REQUIRES: it is not here."""
        assert self.children[block] == NONE
        children = [each for each in self._continued[block] if self.children[each] >= 0]
        for child in children:
            self.parent[child] = block
        self.children[block] = len(children)
        self.count += 1
        before = self._above[block]
        if before >= 0 and self.children[before] >= 0:
            self.parent[block] = before
            self.children[before] += 1
            self._leaves.discard(before)
        self._settle(block)

    def leave(self, blocks: Sequence[int]) -> None:
        """REQUIRES: each is an evictable leaf once those before it have left. Parents can be read until
        ``forget``."""
        for block in blocks:
            self._leaves.discard(block)
            self.children[block] = NONE
            self.count -= 1
            before = self.parent[block]
            if before >= 0:
                self.children[before] -= 1
                self._settle(before)

    def forget(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.parent[block] = NONE

    def _settle(self, block: int) -> None:
        if not self.children[block] and not self.holds[block] and block not in self._leaves:
            self._leaves.add(block)

    def check(self) -> None:
        here = set(self.cached())
        assert self.count == len(here)
        self._leaves.check()
        for block, children in enumerate(self.children):
            before = self._above[block]
            assert self.parent[block] == (before if block in here and before in here else NONE)
            assert children == (
                sum(each in here for each in self._continued[block]) if block in here else NONE
            )
            assert (block in self._leaves) == (not children and not self.holds[block])
