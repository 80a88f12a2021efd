"""The prefix tree of one replayed cache: a ``TreeView`` over a trace's own block numbers.

Only leaves go, so what is cached is closed under prefixes: whoever holds a block holds all before it.
Three things follow, and make a replay fast:

* how much of a prompt is found is seen from its end: only what is missing is walked (``find``);
* a request holds its path by holding the deepest block that it found, as no parent is a leaf;
* the path that a policy is told of is a ``Path``: its end, and the rest only if somebody looks.

Blocks cost 1 byte, so that capacities are counts of blocks.

Invariants (``check``): ``children`` is -1 exactly for what is not cached, and else counts what continues
the block; every parent of what is cached is cached; the leaves are those without children and holds.

The sum: a block costs 0.2 us when it comes and when it goes, what is found costs nothing; a trace of
170,000 blocks takes 10 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import overload

from kvcache.eviction.traces.trace import Trace
from kvcache.leaf_set import LeafSet

NONE = -1


class Forest:
    """What does not change while a trace is replayed, for all replays of it."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.parent = trace.parents.tolist()
        self.depth = depth = [1] * len(self.parent)
        for block, parent in enumerate(self.parent):
            if parent >= 0:
                depth[block] = depth[parent] + 1

    def tokens(self, block: int) -> int:
        """Of a prompt from its first block to this one; 0 for NONE. All but the last are full."""
        if block == NONE:
            return 0
        return (self.depth[block] - 1) * self.trace.block_tokens + self.trace.tokens[block]

    def continued(self) -> list[list[int]]:
        """Of each block, those that continue it."""
        found: list[list[int]] = [[] for _ in self.parent]
        for block, parent in enumerate(self.parent):
            if parent >= 0:
                found[parent].append(block)
        return found


class Path(Sequence[int]):
    """The blocks from the first of a prompt to ``end``, or from the first of which ``parents`` knows; none
    for NONE. It is walked when somebody looks at more than its end."""

    __slots__ = ("_blocks", "_end", "_parents")

    def __init__(self, parents: Sequence[int], end: int) -> None:
        self._parents = parents
        self._end = end
        self._blocks: list[int] | None = None

    def __len__(self) -> int:
        return len(self._walked())

    def __bool__(self) -> bool:
        return self._end >= 0

    def __iter__(self) -> Iterator[int]:
        return iter(self._walked())

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> list[int]: ...

    def __getitem__(self, at: int | slice) -> int | list[int]:
        if self._blocks is None:
            if at == _LAST:
                return [self._end] if self._end >= 0 else []
            if at == -1 and self._end >= 0:
                return self._end
        return self._walked()[at]

    def _walked(self) -> list[int]:
        if self._blocks is None:
            self._blocks = []
            block = self._end
            while block >= 0:
                self._blocks.append(block)
                block = self._parents[block]
            self._blocks.reverse()
        return self._blocks


_LAST = slice(-1, None)


class ReplayTree:
    """One owner. Blocks are the trace's."""

    def __init__(self, forest: Forest) -> None:
        count = len(forest.parent)
        self.parent: Sequence[int] = forest.parent
        self.depth: Sequence[int] = forest.depth
        self.key = range(count)
        self.children = [NONE] * count
        self.holds = [0] * count
        self.block_bytes: Sequence[int] = b"\1" * count
        self.device: Sequence[int] = bytes(count)
        self.count = 0
        self._leaves = LeafSet()

    # --- as a policy sees it ----------------------------------------------------------------------

    def is_evictable(self, block: int) -> bool:
        return not self.children[block] and not self.holds[block]

    def evictable_count(self) -> int:
        return len(self._leaves)

    def sample_leaves(self, count: int, random: Random) -> list[int]:
        return self._leaves.sample(count, random)

    # --- as the replay drives it ------------------------------------------------------------------

    def find(self, leaf: int) -> tuple[int, list[int]]:
        """The deepest cached block on the way to ``leaf`` (or NONE), and what is missing behind it."""
        parent, children = self.parent, self.children
        missing = []
        block = leaf
        while block >= 0 and children[block] < 0:
            missing.append(block)
            block = parent[block]
        missing.reverse()
        return block, missing

    def cached(self) -> list[int]:
        """All of it, parents before children."""
        return [block for block, children in enumerate(self.children) if children >= 0]

    def hold(self, block: int) -> None:
        """It stays, with all before it, until ``unhold``."""
        self.holds[block] += 1
        self._leaves.discard(block)

    def unhold(self, block: int) -> None:
        self.holds[block] -= 1
        if not self.children[block] and not self.holds[block]:
            self._leaves.add(block)

    def enter(self, blocks: Sequence[int]) -> None:
        """These are cached now: a path. REQUIRES: not empty; what is before the first is cached, and held."""
        children = self.children
        before = self.parent[blocks[0]]
        if before >= 0:
            children[before] += 1
            self._leaves.discard(before)
        for block in blocks:
            children[block] = 1
        children[blocks[-1]] = 0
        self.count += len(blocks)
        if not self.holds[blocks[-1]]:
            self._leaves.add(blocks[-1])

    def leave(self, blocks: Iterable[int]) -> None:
        """REQUIRES: each is an evictable leaf once those before it have left."""
        parents, children, leaves = self.parent, self.children, self._leaves
        bare = NONE  # Has just lost its last child, and goes next, as a rule: so it is in no set yet.
        for block in blocks:
            if block != bare:
                self._settle(bare)
                leaves.discard(block)
            bare = NONE
            children[block] = NONE
            self.count -= 1
            parent = parents[block]
            if parent >= 0:
                left = children[parent] - 1
                children[parent] = left
                if not left:
                    bare = parent
        self._settle(bare)

    def _settle(self, bare: int) -> None:
        if bare >= 0 and not self.holds[bare]:
            self._leaves.add(bare)

    def check(self) -> None:
        counted = [0] * len(self.children)
        for block in self.cached():
            if (parent := self.parent[block]) >= 0:
                assert self.children[parent] >= 0
                counted[parent] += 1
        self._leaves.check()
        assert self.count == len(self.cached())
        for block, children in enumerate(self.children):
            assert children in (NONE, counted[block])
            assert (block in self._leaves) == (not children and not self.holds[block])
