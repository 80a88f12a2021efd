"""What leaf-first LRU finds at every size at once, exactly, from one pass over a trace.

LRU is a stack algorithm (Mattson, Gecsei, Slutz and Traiger, "Evaluation techniques for storage hierarchies",
1970): what a cache of C blocks holds is the top C of one stack, so a block's place in it, when it is wanted
again, says which sizes find it. Leaf-first LRU puts a whole prompt on top, its first block uppermost.

That makes it possible to go by runs instead of blocks. Those blocks of a request that nobody has used since
are a piece of its path, one below the other in the tree as in the stack; so the blocks of a prompt come
back in a few runs, and the places of a run are consecutive numbers. How many blocks lie above a run is a
sum over the requests that came later (a Fenwick tree over requests). Of the tree only blocks count where
a prompt ends or prompts part.

Invariants: ``_sizes`` sums up to the blocks seen; ``_used`` never falls towards the first block of a path.

The sum: a request costs 4 us, and each run of it as much; a block is touched once, for 0.2 us. Prompts of
242 blocks go at 55 M blocks a second, of 24 at 5 M.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from kvcache.eviction.simulate.tree import NONE, Forest

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class StackCurve:
    """What a cache of each size finds: ``hit_blocks[c]`` and ``hit_tokens[c]`` with room for ``c`` blocks."""

    hit_blocks: array[int]
    hit_tokens: array[int]
    blocks: int
    prompt_tokens: int

    def block_hit_ratio(self, capacity_blocks: int) -> float:
        return self._at(self.hit_blocks, capacity_blocks) / self.blocks if self.blocks else 0.0

    def prefix_token_hit_ratio(self, capacity_blocks: int) -> float:
        found = self._at(self.hit_tokens, capacity_blocks)
        return found / self.prompt_tokens if self.prompt_tokens else 0.0

    def least_blocks(self, ratio: float) -> int:
        """The smallest cache that finds so much of the tokens; 0 where none does."""
        wanted = ratio * self.prompt_tokens
        if not self.hit_tokens or self.hit_tokens[-1] < wanted:
            return 0
        low, high = 1, len(self.hit_tokens) - 1
        while low < high:
            middle = (low + high) // 2
            if self.hit_tokens[middle] < wanted:
                low = middle + 1
            else:
                high = middle
        return low

    @staticmethod
    def _at(found: array[int], capacity_blocks: int) -> int:
        return found[min(max(capacity_blocks, 0), len(found) - 1)]


def stack_curve(forest: Forest, progress: Progress | None = None) -> StackCurve:
    """``progress`` is called with the number of requests seen."""
    stack = _Stack(forest)
    for index, leaf in enumerate(forest.trace.leaves):
        if leaf >= 0:
            stack.use(index, leaf)
        if progress is not None:
            progress(index + 1)
    trace, depth = forest.trace, forest.depth
    blocks = array("q", accumulate(accumulate(stack.steps[:-1])))
    full = trace.block_tokens
    lacking = accumulate(stack.lacking)
    return StackCurve(
        hit_blocks=blocks,
        hit_tokens=array("q", [full * hits - less for hits, less in zip(blocks, lacking, strict=True)]),
        blocks=sum(depth[leaf] for leaf in trace.leaves if leaf >= 0),
        prompt_tokens=sum(trace.input_tokens),
    )


class _Stack:
    """``steps`` and ``lacking`` are by place in the stack: how many more (or fewer) hits were there than one
    place above, and how many tokens of a full block are lacking in those that are partial."""

    def __init__(self, forest: Forest) -> None:
        count = len(forest.parent)
        self.steps = array("q", bytes(8 * (count + 2)))
        self.lacking = array("q", bytes(8 * (count + 1)))
        self._depth = forest.depth
        self._tokens = forest.trace.tokens
        self._full = forest.trace.block_tokens
        self._above = nodes_above(forest)
        self._used = [NONE] * count  # By which request last, of nodes.
        self._sizes = [0] * (forest.trace.request_count + 1)  # A Fenwick tree: blocks last used by each.
        self._seen = 0

    def use(self, index: int, leaf: int) -> None:
        """REQUIRES: indexes rise."""
        used, above, depth, steps = self._used, self._above, self._depth, self.steps
        node = leaf
        while node >= 0 and used[node] < 0:
            used[node] = index
            node = above[node]
        end = depth[node] if node >= 0 else 0
        fresh = depth[leaf] - end
        lacking = 0 if fresh else self._full - self._tokens[leaf]
        moved = 0
        while node >= 0:
            last = used[node]
            while node >= 0 and used[node] == last:
                used[node] = index
                node = above[node]
            top = depth[node] if node >= 0 else 0
            count = end - top
            place = self._seen - self._up_to(last) - moved
            steps[place + 1] += 1
            steps[place + 1 + count] -= 1
            if lacking:
                self.lacking[place + count] += lacking
                lacking = 0
            self._add(last, -count)
            moved += count
            end = top
        self._add(index, fresh + moved)
        self._seen += fresh

    def _up_to(self, index: int) -> int:
        sizes, found, at = self._sizes, 0, index + 1
        while at:
            found += sizes[at]
            at &= at - 1
        return found

    def _add(self, index: int, count: int) -> None:
        sizes, at = self._sizes, index + 1
        end = len(sizes)
        while at < end:
            sizes[at] += count
            at += at & -at


def nodes_above(forest: Forest) -> list[int]:
    """Of each block, the nearest one before it at which a prompt ends or prompts part; NONE for none."""
    parents = forest.parent
    continued = bytearray(len(parents))  # 0, 1, or 2: more than one.
    for parent in parents:
        if parent >= 0 and continued[parent] < 2:
            continued[parent] += 1
    for leaf in forest.trace.leaves:
        if leaf >= 0:
            continued[leaf] = 2
    above = [NONE] * len(parents)
    for block, parent in enumerate(parents):
        if parent >= 0:
            above[block] = parent if continued[parent] == 2 else above[parent]
    return above
