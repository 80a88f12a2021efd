"""What operators and engines want kept, around any policy: priorities, tool calls, tenants.

Every block has a rank, 50 unless something says otherwise; of what the base policy would let go, what ranks
higher stays as long as something lower can go:

* *priority and duration* (as in TensorRT-LLM): the rank is the request's ``priority``, for ``keep_ms`` if it
  says so, else as long as the block is held. Of several, the highest holds. What ranks lower than 50
  goes before all else, lowest first, and stays low until a request of a higher priority uses it.
* *soft pin* (as in Mooncake): priority 100. It goes only when nothing else can. A hard pin is
  ``Ledger.pin``: then the block cannot go at all, and no policy is asked.
* *tool call*: the blocks of a request that ended in one rank 75 for ``tool_call_ms``, or one and a half
  times the gap that the engine expects: until then the session waits for a tool, and comes back.
* *minimum retention*: what was just stored ranks 60 for ``retain_ms``.
* *tenant quota*: while one tenant's blocks are more than ``tenant_share`` of all, its own go first, the
  longest unused before others, whatever their rank. A shared block is its first writer's.

Of blocks that rank alike the base says which goes, as far as it names one among the first few that it would
let go; beyond these the longest unused goes. So a request costs the same however many blocks rank high.
Nothing is ever refused for a rank: blocks that all rank high go by rank.

The sum: 0.3 us a block of a path; for what goes, four times the base's choice and 2 us a block; 200 bytes a
held block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import ClassVar

from kvcache.eviction.class_leaves import ClassLeaves
from kvcache.eviction.reuse_times import ReuseClass, Use
from kvcache.eviction.wrapper import Going, Wrapper, ask_more
from kvcache.policy import PRIORITY_MAX, Param, RequestContext, TreeView

ORDINARY, RETAINED, TOOL_CALL = 50, 60, 75
_NS_PER_MS = 1_000_000
_GAP_SLACK = 1.5
_FOREVER_NS = 1 << 63
_SPARE_MARKS = 256


class _Mark(Use):
    """What was said of some blocks at once; of ``count`` of them nothing else was said since."""

    __slots__ = ("blocks", "rank", "tenant", "until_ns")

    def __init__(self, kind: ReuseClass, at: int, tenant: str, rank: int, until_ns: int) -> None:
        super().__init__(kind, 0, at, 0, 0.0)
        self.blocks: list[int] = []
        self.tenant = tenant
        self.rank = rank
        self.until_ns = until_ns

    def __lt__(self, other: _Mark) -> bool:
        return self.until_ns < other.until_ns

    def rank_at(self, now_ns: int) -> int:
        """What is low stays low."""
        return self.rank if now_ns < self.until_ns or self.rank < ORDINARY else ORDINARY


class Keep(Wrapper):
    OWN: ClassVar[Mapping[str, Param]] = {
        "tool_call_ms": Param(120_000, 0, 3_600_000, "how long a session that waits for a tool is kept"),
        "retain_ms": Param(0, 0, 3_600_000, "how long what was just stored is kept"),
        "tenant_share": Param(1.0, 0.01, 1.0, "above this share of all blocks, a tenant's own go first"),
    }

    def __init__(self, tree: TreeView, capacity_bytes: int, **settings: float) -> None:
        super().__init__(tree, capacity_bytes, **settings)
        self._marks: dict[int, Use] = {}
        self._leaves = ClassLeaves(tree, self._marks)
        self._kinds: dict[tuple[str, int], ReuseClass] = {}  # tenant, rank
        self._ending: list[_Mark] = []  # A heap of those that end, and of some that nothing bears any more.
        self._tenant: dict[int, str] = {}
        self._counts: dict[str, int] = {}
        self._uses = 0
        self._now_ns = 0

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        path = path[:]
        self.base.on_request(context, path)
        self._mark(context, [block for block in path if block in self._marks], fresh=False)

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self.base.on_admitted(context, blocks)
        tenant = context.tenant
        self._tenant.update(dict.fromkeys(blocks, tenant))
        self._counts[tenant] = self._counts.get(tenant, 0) + len(blocks)
        self._mark(context, blocks, fresh=True)

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        self.base.on_evicted(blocks, reason)
        parents = self._tree.parent
        for block in blocks:
            if (mark := self._marks.pop(block, None)) is not None:
                _left(mark)
                tenant = self._tenant.pop(block)
                self._counts[tenant] -= 1
                if not self._counts[tenant]:
                    self._drop_tenant(tenant)
            if parents[block] >= 0:
                self._leaves.add(parents[block])

    # --- what goes --------------------------------------------------------------------------------

    def _choose(self, context: RequestContext, count: int, device: int | None) -> Sequence[int]:
        now_ns = max(self._now_ns, context.now_ns)
        self._end(now_ns)
        going = Going(self._tree)
        for block in self._expendable(count, device):
            going.take(block)
        named: Sequence[int] = ()
        for ask in (count, ask_more(count)):
            if len(going.blocks) < count:
                named = self._of_base(context, ask, device)
                for block in named:
                    if len(going.blocks) < count and self._rank(block) <= ORDINARY:
                        going.take(block)
        if len(going.blocks) < count:
            self._by_rank(going, named, count, device)
        return going.blocks

    def _by_rank(self, going: Going, named: Sequence[int], count: int, device: int | None) -> None:
        """What the base has not named goes, and what should stay where nothing else is left."""
        others = self._leaves.choose(count + len(going.blocks), device, self._rank)
        left = sorted((*named, *others), key=self._rank)
        taken = True
        while taken and len(going.blocks) < count:
            taken = False
            for block in left:
                if len(going.blocks) < count and going.take(block):
                    taken = True

    def _expendable(self, count: int, device: int | None) -> list[int]:
        """What ranks low, and what is a tenant's beyond its share."""
        low = {kind for (_, rank), kind in self._kinds.items() if rank < ORDINARY}
        going = self._leaves.choose(count, device, self._rank, only=low) if low else []
        share = self._own["tenant_share"] * len(self._marks)
        for tenant, held in sorted(self._counts.items(), key=lambda item: -item[1]):
            most = min(count - len(going), int(held - share))
            if most <= 0 or self._own["tenant_share"] == 1.0:
                break
            kinds = {kind for (name, _), kind in self._kinds.items() if name == tenant}
            going += self._leaves.choose(most, device, lambda _: 0.0, only=kinds)
        return going

    def _rank(self, block: int) -> int:
        """REQUIRES: what has ended was ended."""
        mark = self._marks.get(block)
        return mark.rank if isinstance(mark, _Mark) else ORDINARY

    def _end(self, now_ns: int) -> None:
        """What was said until now holds no longer."""
        ending = self._ending
        while ending and ending[0].until_ns <= now_ns:
            mark = heappop(ending)
            mark.rank, mark.until_ns = ORDINARY, _FOREVER_NS
            if mark.count:
                mark.kind = self._kind(mark.tenant, ORDINARY)
                for block in mark.blocks:
                    if self._marks.get(block) is mark:
                        self._leaves.add(block)

    # --- what is said -----------------------------------------------------------------------------

    def _mark(self, context: RequestContext, blocks: Sequence[int], *, fresh: bool) -> None:
        self._now_ns = now_ns = max(self._now_ns, context.now_ns)
        self._uses += 1
        rank, until_ns = self._said(context, fresh=fresh)
        made: dict[tuple[str, int, int], _Mark] = {}
        for block in blocks:
            mine = rank, until_ns
            last = self._marks.get(block)
            if isinstance(last, _Mark):
                _left(last)
                if (held := last.rank_at(now_ns)) > rank:
                    mine = held, last.until_ns if held == last.rank else _FOREVER_NS
            tenant = self._tenant[block]
            mark = made.get((tenant, *mine))
            if mark is None:
                kind = self._kind(tenant, mine[0])
                mark = made[tenant, *mine] = _Mark(kind, self._uses, tenant, *mine)
            mark.count += 1
            if mark.until_ns < _FOREVER_NS:
                mark.blocks.append(block)
            self._marks[block] = mark
        for mark in made.values():
            if mark.rank > ORDINARY and mark.until_ns < _FOREVER_NS:
                heappush(self._ending, mark)
        if len(self._ending) > 2 * len(self._marks) + _SPARE_MARKS:
            self._ending = [mark for mark in self._ending if mark.count]
            heapify(self._ending)
        if blocks:
            self._leaves.add(blocks[-1])

    def _said(self, context: RequestContext, *, fresh: bool) -> tuple[int, int]:
        """The rank of what this request uses, and until when."""
        now_ns = self._now_ns
        rank = context.priority
        until_ns = _FOREVER_NS if context.keep_ms is None else now_ns + context.keep_ms * _NS_PER_MS
        if context.hint == "tool_call" and self._own["tool_call_ms"] and ORDINARY <= rank < TOOL_CALL:
            gap_ms = self._own["tool_call_ms"]
            if context.expected_gap_ms is not None:
                gap_ms = context.expected_gap_ms * _GAP_SLACK
            return TOOL_CALL, now_ns + int(gap_ms) * _NS_PER_MS
        if fresh and self._own["retain_ms"] and ORDINARY <= rank < RETAINED:
            return RETAINED, now_ns + int(self._own["retain_ms"]) * _NS_PER_MS
        return rank, until_ns

    def _kind(self, tenant: str, rank: int) -> ReuseClass:
        kind = self._kinds.get((tenant, rank))
        if kind is None:
            kind = self._kinds[tenant, rank] = ReuseClass((rank,), None)
        return kind

    def _drop_tenant(self, tenant: str) -> None:
        del self._counts[tenant]
        for rank in range(PRIORITY_MAX + 1):
            self._kinds.pop((tenant, rank), None)


def _left(mark: Use) -> None:
    """A block has gone, or something else is said of it."""
    assert isinstance(mark, _Mark)
    mark.count -= 1
    if not mark.count:
        mark.blocks.clear()
