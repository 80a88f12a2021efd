"""One policy takes over from another while a node serves: it is told what is held, a little at a time.

    look (which blocks, last used when) ──► tell, oldest first ──► tell what happened meanwhile ──► it decides

The new policy hears a history that is in order of time: of each branch its last use, as if that request
came again (it found what was told before, and stored the rest), then, as it was, what requests have found
and stored since the change was begun. Until it has heard all of it, the old one decides, and the new one is
asked nothing. So recency is kept, and how often a beginning is shared is about kept; what the old policy
had learned beside is handed on as bytes, by who begins the change (``guard``).

Invariants: what was told is committed, and so is what was told before it, as far as it is; a block is told
once. What leaves is told of, whether it was told or not. At the end all that is committed was told.

The sum: a block costs 2 us and what the policy takes, 0.5 us of it to be looked at; 40 bytes a block while it
lasts, and 200 bytes a request that comes meanwhile. An idle node changes 300,000 blocks in 2 s.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, merge

from kvcache.policy import EvictionPolicy, RequestContext, TreeView
from kvcache.recency import Recency

NONE = -1
LOOK_BLOCKS = 2_048
_LOOK_COST = 4  # So many blocks are looked at in the time that one is told.


_Old = tuple[int, ...]  # When it was last used, minus its depth, and its number.


@dataclass(slots=True)
class _News:
    """A request found a path that ends in ``found`` (NONE: nothing), or stored these. Some may have left."""

    stamp: int
    context: RequestContext
    found: int
    stored: Sequence[int]


class Handover:
    """REQUIRES: ``recency`` is kept up to date, and hears of everything before this does."""

    def __init__(self, tree: TreeView, recency: Recency, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.told_count = 0
        self._tree = tree
        self._recency = recency
        self._since = recency.newest
        self._told = array("q", bytes(8 * len(recency)))  # When, as the new one was told; 0: not yet.
        self._old = self._telling_old()
        self._news: deque[_News] = deque()
        self._latest: dict[int, _News] = {}  # Of a block; it is in the queue still.
        self._born: dict[int, int] = {}  # When blocks came that came meanwhile.
        self._is_old_told = False
        self._arrived = 0
        self._risen: list[_Old] = []  # To be told of, or again.
        self._told_stamp = 0  # Up to here the past was told.

    # --- what happens meanwhile -------------------------------------------------------------------

    def used(self, context: RequestContext, block: int, stamp: int) -> None:
        """A path was found that ends here."""
        self._news.append(_News(stamp, context, block, ()))
        self._arrived += 1 + self._tree.depth[block]
        self._latest[block] = self._news[-1]

    def entered(self, context: RequestContext, blocks: Sequence[int], stamp: int) -> None:
        self._news.append(_News(stamp, context, NONE, tuple(blocks)))
        self._arrived += 1 + len(blocks)
        self._latest.update(dict.fromkeys(blocks, self._news[-1]))
        self._born.update(dict.fromkeys(blocks, stamp))

    def left(self, blocks: Sequence[int], reason: str, risen: Sequence[int]) -> None:
        """``risen``: blocks that have got the stamp of what continued them. RAISES what the policy raises."""
        for block in blocks:
            self._born.pop(block, None)
            if self._is_told(block):
                self._told[block] = 0
            if (news := self._latest.pop(block, None)) is not None:
                self._pass_on(news, block)
        for block in risen:
            stamp = self._recency.of(block)
            if self._told_stamp < stamp <= self._since:
                heappush(self._risen, (stamp, -self._tree.depth[block], block))
        self.policy.on_evicted(blocks, reason)

    def _pass_on(self, news: _News, block: int) -> None:
        """The block of which there is news has left: the block before it was used then, too."""
        parent = self._tree.parent[block]
        if parent < 0 or not self._recency.of(parent) or parent in news.stored:
            return
        latest = self._latest.get(parent)
        if latest is None or latest.stamp < news.stamp:
            news.found = parent
            self._latest[parent] = news

    # --- telling ----------------------------------------------------------------------------------

    def step(self, count: int) -> bool:
        """Tell of ``count`` blocks or a branch more, and in the end of what has come since the last step; has
        all been told? RAISES what the policy raises."""
        left = count
        while left > 0 and not self._is_old_told:
            cost = next(self._old, None)
            self._is_old_told = cost is None
            left -= cost or 0
        if self._is_old_told and left > 0:
            left += 2 * self._arrived  # However much comes, the end is nearer after each step.
            self._arrived = 0
        while left > 0 and self._is_old_told and self._news:
            left -= self._tell_news(self._news.popleft())
        return self._is_old_told and not self._news

    def _telling_old(self) -> Iterator[int]:
        """Tells of what was held when the change was begun. Each step is what it cost, in blocks."""
        count, of, depth = len(self._recency), self._recency.of, self._tree.depth
        runs: list[Iterator[_Old]] = []
        for start in range(0, count, LOOK_BLOCKS):
            # Of what was stored at once the deepest first: it tells of all before it.
            there = sorted(
                (of(block), -depth[block], block)
                for block in self._recency.committed(start, start + LOOK_BLOCKS)
                if of(block) <= self._since
            )
            runs.append(zip(*(array("q", column) for column in zip(*there, strict=True)), strict=True))
            yield LOOK_BLOCKS // _LOOK_COST
        for each in merge(*runs):
            while self._risen and self._risen[0] < each:
                yield self._tell_old(*heappop(self._risen))
            yield self._tell_old(*each)
        while self._risen:
            yield self._tell_old(*heappop(self._risen))

    def _tell_old(self, stamp: int, _: int, block: int) -> int:
        """As if the request that used this last came again, if that was then and it was not told of."""
        if self._recency.of(block) != stamp or block in self._born:
            return 1
        self._told_stamp = stamp
        if self._is_told(block) and self._told[block] >= stamp:
            return 1
        return 1 + self._tell_branch(RequestContext(now_ns=self._recency.time_of(stamp)), block, stamp)

    def _tell_branch(self, context: RequestContext, end: int, stamp: int) -> int:
        """A request that ends so found what was told of it, and stored the rest."""
        fresh, found = self._untold(end)
        return self._tell_found(context, found, stamp) + self._tell_stored(context, fresh, stamp)

    def _tell_news(self, news: _News) -> int:
        """What is still so of it. A number may be another block's now."""
        of, born, cost = self._recency.of, self._born, 1
        for block in (news.found, *news.stored):
            if self._latest.get(block) is news:
                del self._latest[block]
        if news.found != NONE and of(news.found) and born.get(news.found, 0) <= news.stamp:
            cost += self._tell_branch(news.context, news.found, news.stamp)
        for block in reversed(news.stored):  # The last of a path tells of those before it, too.
            if born.get(block) == news.stamp and not self._is_told(block):
                cost += self._tell_stored(news.context, self._untold(block)[0], news.stamp)
        return cost

    def _untold(self, end: int) -> tuple[list[int], int]:
        """Of the path that ends so: its blocks that were not told of, and the one before them."""
        parents, committed_at = self._tree.parent, self._recency.of
        fresh: list[int] = []
        block = end
        while block >= 0 and committed_at(block) and not self._is_told(block):
            fresh.append(block)
            block = parents[block]
        return fresh[::-1], block

    def _tell_found(self, context: RequestContext, end: int, stamp: int) -> int:
        parents = self._tree.parent
        found: list[int] = []
        block = end
        while block >= 0 and self._is_told(block):
            found.append(block)
            block = parents[block]
        if found:
            self._told[end] = stamp
            self.policy.on_request(context, found[::-1])
        return len(found) // 2

    def _tell_stored(self, context: RequestContext, blocks: Sequence[int], stamp: int) -> int:
        if not blocks:
            return 0
        missing = max(blocks) + 1 - len(self._told)
        if missing > 0:
            self._told.frombytes(bytes(8 * missing))
        for block in blocks:
            self._told[block] = stamp
        self.told_count += len(blocks)
        self.policy.on_admitted(context, blocks)
        return len(blocks)

    def _is_told(self, block: int) -> bool:
        return block < len(self._told) and bool(self._told[block])

    def check(self) -> None:
        assert all(self._recency.of(block) for block, told in enumerate(self._told) if told)
        if self.step(0):
            committed = self._recency.committed(0, len(self._recency))
            assert all(self._is_told(block) for block in committed)
