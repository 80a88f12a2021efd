"""The lower tier of a replay: takes what falls out of memory, and gives what memory lacks.

What falls is looked at branch by branch. What has a copy here already is not written again, and counts as
used; of the rest, admission (``kvcache.eviction.admission``) and budget say how many leading blocks are
written. A block that something here continues is written whatever they say, so that no hole comes
to be; where there is no room even for that, what continues it goes instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.eviction.admission import ALL, Admission, leading
from kvcache.eviction.simulate.spill_tree import SpillTree
from kvcache.eviction.simulate.tree import NONE, Forest, Path
from kvcache.guard import PolicyGuard
from kvcache.policy import MakePolicy, RequestContext
from kvcache.tiers.admission import WriteRate
from kvcache.tiers.admission_learned import LearnedAdmission


@dataclass(frozen=True, slots=True)
class Below:
    """The lower tier. ``blocks_a_second``: how much may be written; 0: any amount. ``partial``: also blocks
    that are not full, though a longer prompt never finds them."""

    capacity_blocks: int
    policy: str = "leaf-lru"
    admission: Admission = ALL
    partial: bool = False
    blocks_a_second: float = 0.0


class Spill:
    """The lower tier: takes what falls out of memory, and gives what memory lacks."""

    def __init__(self, forest: Forest, below: Below, make: MakePolicy, start_ns: int) -> None:
        self._forest = forest
        self._below = below
        self.tree = SpillTree(forest)
        self.guard = PolicyGuard(self.tree, below.capacity_blocks, make, self.tree.cached)
        self.touches = [0] * len(forest.parent)
        self._budget = WriteRate(below.blocks_a_second, start_ns)
        self._children = [0] * len(forest.parent)  # Seen so far.
        share = below.admission.share
        self._learned = LearnedAdmission(len(forest.parent), share, below.capacity_blocks) if share else None
        self.written = self.declined = self.written_tokens = 0

    def seen(self, leaf: int) -> None:
        """A request has the blocks up to this one."""
        touches, parent = self.touches, self._forest.parent
        block = leaf
        while block >= 0:
            touches[block] += 1
            before = parent[block]
            if touches[block] == 1 and before >= 0:
                self._children[before] += 1
            block = before

    def find(self, context: RequestContext, missing: Sequence[int]) -> int:
        """How many leading blocks of ``missing`` are here. The last of them is held until ``release``."""
        children = self.tree.children
        count = 0
        while count < len(missing) and children[missing[count]] >= 0:
            count += 1
        if self._learned is not None:
            self._learned.wanted(missing)
            self._learned.computed(missing[count:], self._forest.depth[missing[0]] - 1 + count)
        if count:
            self.tree.hold(missing[count - 1])
            self.guard.on_request(context, Path(self.tree.parent, missing[count - 1]))
        return count

    def release(self, block: int) -> None:
        self.tree.unhold(block)

    def fall(self, context: RequestContext, named: Sequence[int]) -> None:
        """These are about to leave memory, leaves first: branch by branch they are kept here or not."""
        parent = self._forest.parent
        start = 0
        for at in range(1, len(named) + 1):
            if at == len(named) or parent[named[at - 1]] != named[at]:
                self.take(context, named[start:at][::-1])
                start = at

    def take(self, context: RequestContext, branch: Sequence[int]) -> None:
        """One chain, first to last, that memory does not keep. What is here of it already counts as used."""
        children = self.tree.children
        new = [block for block in branch if children[block] < 0]
        last_kept = next((block for block in reversed(branch) if children[block] >= 0), NONE)
        if last_kept != NONE:
            self.guard.on_request(context, Path(self.tree.parent, last_kept))
        if not new:
            return
        least = next((at for at in range(len(new), 0, -1) if self.tree.is_continued(new[at - 1])), 0)
        wanted = max(least, min(self._worth(context, new), self._budget.left(context.now_ns)))
        taken = self._room(context, wanted, branch)
        self.declined += len(new) - taken
        if taken:
            self._write(context, new[:taken])
        if taken < least:
            self._give_up(context, branch)

    def _worth(self, context: RequestContext, new: Sequence[int]) -> int:
        below, tokens = self._below, self._forest.trace.tokens
        if not below.partial and tokens[new[-1]] < self._forest.trace.block_tokens:
            new = new[:-1]
        if not new:
            return 0
        if self._learned is not None:
            return self._learned.fell(new, self.touches.__getitem__)
        if below.admission.asks_policy:
            return self.guard.admit(context, self._parent(new[0]), new)
        return leading(below.admission, new, self.touches, lambda: self._reused(new[0]))

    def _parent(self, block: int) -> int:
        before = self._forest.parent[block]
        return before if before >= 0 and self.tree.children[before] >= 0 else NONE

    def _reused(self, block: int) -> bool:
        """Was some block touched twice before this, on the way up to the last fork?"""
        parent = self._forest.parent
        before = parent[block]
        while before >= 0 and self._children[before] == 1 and self.touches[before] == 1:
            before = parent[before]
        return before >= 0 and self._children[before] == 1

    def _give_up(self, context: RequestContext, branch: Sequence[int]) -> None:
        """There is not even room for what something here continues: let that go."""
        tree = self.tree
        while any(tree.children[block] < 0 and tree.is_continued(block) for block in branch):
            named = self.guard.victims(context, 1)
            if not named:
                return
            self._evict(context, named)

    def _evict(self, context: RequestContext, named: Sequence[int]) -> None:
        self.tree.leave(named)
        self.guard.on_evicted(context, named, "evicted")
        self.tree.forget(named)

    def _room(self, context: RequestContext, wanted: int, branch: Sequence[int]) -> int:
        """For how many there is room, once some have gone."""
        tree, guard = self.tree, self.guard
        kept = [block for block in branch if tree.children[block] >= 0]
        for block in kept:
            tree.hold(block)
        over = tree.count + wanted - self._below.capacity_blocks
        while over > 0:
            named = guard.victims(context, over)
            if not named:
                wanted -= over
                break
            self._evict(context, named)
            over -= len(named)
        for block in kept:
            tree.unhold(block)
        return wanted

    def _write(self, context: RequestContext, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.tree.add(block)
            self.written_tokens += self._forest.trace.tokens[block]
        self.written += len(blocks)
        self._budget.spend(len(blocks))
        if self._learned is not None:
            self._learned.wrote(len(blocks))
        self.guard.on_admitted(context, blocks)
