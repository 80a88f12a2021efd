"""Replays a trace over two tiers: memory, and below it a larger one that wears out (NVMe).

    prompt ──► memory ──(what is missing)──► below ──(the rest)──► computed
                 ▲ │                         │ ▲
                 │ └─ what falls out ────────┼─┘ unless a copy is there, or admission or budget say no
                 └─── promoted ──────────────┘ the copy stays

As ``kvcache.eviction.simulate.replay`` counts, for the two together. What memory has no room for goes below
at once. Keeping the copy is what saves writes: a block that goes up and comes down again costs nothing. What
is in memory is closed under prefixes, and so is what both hold together
(``kvcache.eviction.simulate.spill``).

The sum: 20 us a request, 0.1 us a block of its prompt, and 3 us a block that falls out of memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from kvcache.errors import BadInput
from kvcache.eviction.admission import DAY_S
from kvcache.eviction.simulate.replay import (
    REPLAY_ONLY,
    Contexts,
    LeafCache,
    Progress,
    check_capacity,
    named_policy,
)
from kvcache.eviction.simulate.result import Counts, ReplayResult, Tally
from kvcache.eviction.simulate.spill import Below, Spill
from kvcache.eviction.simulate.tree import NONE, Forest
from kvcache.eviction.traces.trace import Trace

_MS_PER_S = 1_000
_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class TiersResult:
    """``whole`` is what both found together; ``memory_hit_tokens`` of it lay in memory."""

    whole: ReplayResult
    memory_hit_tokens: int
    promoted_blocks: int
    written_blocks: int
    declined_blocks: int
    written_tokens: int
    span_s: float
    below: Below

    @property
    def written_ratio(self) -> float:
        """Tokens written a token that had to be computed."""
        computed = self.whole.prompt_tokens - self.whole.hit_tokens
        return self.written_tokens / computed if computed else 0.0

    @property
    def drive_writes_a_day(self) -> float:
        """How often the lower tier would be written over in a day at this pace."""
        if not self.span_s:
            return 0.0
        return self.written_blocks / self.below.capacity_blocks * DAY_S / self.span_s


class TwoTiers:
    """What a trace is replayed over."""

    def __init__(
        self,
        forest: Forest,
        policy: str,
        capacity_blocks: int,
        below: Below,
        *,
        settings: Mapping[str, float],
        hints: bool,
    ) -> None:
        trace = forest.trace
        start_ns = trace.arrivals_ms[0] * _NS_PER_MS if trace.request_count else 0
        self._forest = forest
        self._contexts = Contexts(trace, hints)
        self.spill = Spill(forest, below, named_policy(below.policy, {}), start_ns)
        self.memory = LeafCache(forest, named_policy(policy, settings), capacity_blocks, self.spill.fall)
        self.promoted = self.memory_hit_tokens = 0

    def serve(self, index: int, leaf: int) -> int:
        """The end of what was found of a request's prompt, or NONE."""
        context = self._contexts.of(index)
        self.spill.seen(leaf)
        end, missing = self.memory.look(context, leaf)
        self.memory_hit_tokens += self._forest.tokens(end)
        count = self.spill.find(context, missing) if missing else 0
        if missing:
            kept = self.memory.store(context, end, missing)
            if kept < len(missing):
                self.spill.take(context, missing[kept:])
        if count:
            self.promoted += count
            end = missing[count - 1]
            self.spill.release(end)
        return end

    def check(self) -> None:
        """Asserts that nothing is out of reach: what is below has its parent below or in memory."""
        self.memory.tree.check()
        self.spill.tree.check()
        for block in self.spill.tree.cached():
            before = self._forest.parent[block]
            assert (
                before < 0 or self.spill.tree.children[before] >= 0 or self.memory.tree.children[before] >= 0
            )


def replay_tiers(
    trace: Trace | Forest,
    policy: str,
    capacity_blocks: int,
    below: Below,
    *,
    settings: Mapping[str, float] | None = None,
    hints: bool = True,
    progress: Progress | None = None,
) -> TiersResult:
    """The whole trace over memory of ``capacity_blocks`` under ``policy``, and what is ``below``; both empty
    at first; ``settings`` are of the policy in memory. RAISES BadInput as ``replay``, and for policies that
    are there in one tier only."""
    check_capacity(capacity_blocks)
    check_capacity(below.capacity_blocks)
    for name in (policy, below.policy):
        if name in REPLAY_ONLY:
            raise BadInput("bad_config", f"{name} over two tiers", "it can be replayed over one only")
    forest = trace if isinstance(trace, Forest) else Forest(trace)
    start = time.perf_counter()
    tiers = TwoTiers(forest, policy, capacity_blocks, below, settings=settings or {}, hints=hints)
    tally = Tally(forest)
    for index, leaf in enumerate(forest.trace.leaves):
        if leaf >= 0:
            end = tiers.serve(index, leaf)
            tally.found(end, forest.depth[end] if end != NONE else 0)
        if progress is not None:
            progress(index + 1)
    memory, spill, arrivals = tiers.memory, tiers.spill, forest.trace.arrivals_ms
    fault = memory.guard.last_fault or spill.guard.last_fault
    counts = Counts(memory.admitted, memory.evicted, time.perf_counter() - start, fault)
    return TiersResult(
        whole=tally.result(policy, capacity_blocks, counts),
        memory_hit_tokens=tiers.memory_hit_tokens,
        promoted_blocks=tiers.promoted,
        written_blocks=spill.written,
        declined_blocks=spill.declined,
        written_tokens=spill.written_tokens,
        span_s=(arrivals[-1] - arrivals[0]) / _MS_PER_S if arrivals else 0.0,
        below=below,
    )
