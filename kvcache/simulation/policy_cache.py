"""A worker's cache whose victims an eviction policy of the registry chooses, as in the store.

What is computed is always cached: a policy's ``admit`` is not asked.

The trace's blocks are the policy's block numbers, so the tree it sees needs no renumbering: parents, depths
and sizes are the trace's, shared by all workers; each worker has its own counts of children and users.

The sum: 8 bytes a block of the trace and worker, 1 us a block that comes or goes, and what the policy takes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from random import Random

from kvcache.eviction.registry import policy_class
from kvcache.leaf_set import LeafSet
from kvcache.policy import RequestContext
from kvcache.simulation.cache import leading

_NS_PER_S = 1_000_000_000


class Tree:
    """A ``TreeView`` of one worker's blocks."""

    def __init__(self, parent: Sequence[int], depth: Sequence[int]) -> None:
        self.parent = parent
        self.key = range(len(parent))
        self.depth = depth
        self.block_bytes: Sequence[int] = b"\1" * len(parent)
        self.device: Sequence[int] = bytes(len(parent))
        self.children = array("i", [-1]) * len(parent)
        self.holds = array("i", [0]) * len(parent)
        self.leaves = LeafSet()

    def is_evictable(self, block: int) -> bool:
        return block in self.leaves

    def sample_leaves(self, count: int, random: Random) -> list[int]:
        return self.leaves.sample(count, random)

    def evictable_count(self) -> int:
        return len(self.leaves)

    def enter(self, blocks: Sequence[int]) -> None:
        """These are being computed, by one who holds them."""
        for block in blocks:
            self.children[block] = 0
            self.holds[block] = 1
            parent = self.parent[block]
            if parent >= 0:
                self.children[parent] += 1
                self.leaves.discard(parent)

    def leave(self, block: int) -> None:
        """REQUIRES: it is an evictable leaf."""
        self.leaves.discard(block)
        self.children[block] = -1
        parent = self.parent[block]
        if parent >= 0:
            self.children[parent] -= 1
            self.settle(parent)

    def settle(self, block: int) -> None:
        """Its users or children have become fewer, or it has just been cached."""
        if not self.children[block] and not self.holds[block] and block not in self.leaves:
            self.leaves.add(block)


def depths(parents: Sequence[int]) -> array[int]:
    """Of every block of a trace: 1 for a first one."""
    depth = array("i", bytes(4 * len(parents)))
    for block, parent in enumerate(parents):
        depth[block] = depth[parent] + 1 if parent >= 0 else 1
    return depth


class PolicyCache:
    """A ``BlockCache``. RAISES BadInput for a policy that nobody offers."""

    def __init__(self, capacity: int, policy: str, parents: Sequence[int], depth: Sequence[int]) -> None:
        self.capacity = capacity
        self._make = policy_class(policy)
        self._parents = parents
        self._depth = depth
        self.clear()

    def clear(self) -> None:
        self._tree = Tree(self._parents, self._depth)
        self._policy = self._make(self._tree, self.capacity)
        self._cached: dict[int, int] = {}
        self._held = 0  # Of these, in use.
        self._taken = 0

    def match(self, path: Sequence[int]) -> int:
        return leading(self._cached, path)

    def begin(self, path: Sequence[int], hit: int, answer_blocks: int, now_s: float) -> list[int] | None:
        tree = self._tree
        context = RequestContext(int(now_s * _NS_PER_S))
        self._hold(path[:hit])
        wanted = len(path) - hit + answer_blocks
        gone = self._make_room(context, self.used() + wanted - self.capacity)
        if gone is None:
            self._let_go(path[:hit])
            return None
        self._taken += wanted
        tree.enter(path[hit:])
        if hit:
            self._policy.on_request(context, path[:hit])
        return gone

    def _make_room(self, context: RequestContext, over: int) -> list[int] | None:
        """What had to go; None, and nothing goes, where too much is in use."""
        if over > len(self._cached) - self._held:
            return None
        gone: list[int] = []
        while len(gone) < over:
            named = list(self._policy.victims(context, over - len(gone)))[: over - len(gone)]
            assert named, "the policy names no victim though there are evictable leaves"
            for block in named:
                assert self._tree.is_evictable(block), "the policy names what cannot go"
                self._tree.leave(block)
                del self._cached[block]
            self._policy.on_evicted(named, "evicted")
            gone += named
        return gone

    def commit(self, path: Sequence[int], hit: int, now_s: float) -> Sequence[int]:
        new = path[hit:]
        self._cached.update(dict.fromkeys(new, 1))
        self._held += len(new)
        self._taken -= len(new)
        if new:
            self._policy.on_admitted(RequestContext(int(now_s * _NS_PER_S)), new)
        return new

    def finish(self, path: Sequence[int], answer_blocks: int) -> None:
        self._taken -= answer_blocks
        self._let_go(path)

    def _hold(self, blocks: Sequence[int]) -> None:
        holds, leaves = self._tree.holds, self._tree.leaves
        for block in blocks:
            self._held += not holds[block]
            holds[block] += 1
            leaves.discard(block)

    def _let_go(self, blocks: Sequence[int]) -> None:
        tree = self._tree
        for block in blocks:
            tree.holds[block] -= 1
            self._held -= not tree.holds[block]
            tree.settle(block)

    def content(self) -> Sequence[int]:
        return list(self._cached)

    def used(self) -> int:
        return len(self._cached) + self._taken

    def check(self) -> None:
        tree = self._tree
        assert 0 <= self._taken <= self.used() <= self.capacity
        tree.leaves.check()
        assert self._held == sum(1 for block in self._cached if tree.holds[block])
        for block in self._cached:
            assert tree.parent[block] < 0 or tree.parent[block] in self._cached
            assert tree.is_evictable(block) == (not tree.children[block] and not tree.holds[block])
