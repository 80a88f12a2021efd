"""Replays a trace over one cache: what a policy and a size would have been worth.

What is counted, the same for all (so that figures can be set side by side):

* a request is served at once, in the trace's order; what its prompt finds is looked up when it arrives;
* the *prefix* hit is what counts for an engine: tokens of the leading blocks that are cached, of all
  tokens that came in, partial blocks and the cold start included;
* what it found stays while room is made; what was missing is stored, first to last, as far as there
  is room; a block takes one place, full or not;
* answers are not stored: they come back in the next prompt, or not at all.

The policies are the store's own objects, behind the store's own guard. ``belady`` is the bound that
nobody can beat, and ``kvcache.eviction.reference`` has the policies of the literature that know blocks and
no prefixes; both only here.

The sum: a request costs 10 us, a block that is found nothing, one that is missing 0.8 us with ``leaf-lru``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kvcache.errors import BadInput
from kvcache.eviction.registry import policy_class
from kvcache.eviction.replay_tree import NONE, Forest, Path, ReplayTree
from kvcache.eviction.trace import Trace
from kvcache.guard import PolicyGuard
from kvcache.policy import EvictionPolicy, MakePolicy, RequestContext

POSITION_TOKENS = 30_000
_NS_PER_MS = 1_000_000
_HINTS = {"tool_use": "tool_call", "tool_call": "tool_call", "end_turn": "turn_end", "turn_end": "turn_end"}

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What came of it. Costs are of prefill, in tokens: one at position ``p`` costs 1 + p / 30,000."""

    policy: str
    capacity_blocks: int
    requests: int
    blocks: int
    hit_blocks: int
    prompt_tokens: int
    hit_tokens: int
    prompt_cost: float
    hit_cost: float
    admitted_blocks: int
    evicted_blocks: int
    seconds: float
    policy_fault: str = ""

    @property
    def block_hit_ratio(self) -> float:
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def prefix_token_hit_ratio(self) -> float:
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def flops_saved_ratio(self) -> float:
        return self.hit_cost / self.prompt_cost if self.prompt_cost else 0.0


def prefill_cost(tokens: int) -> float:
    """Of the leading ``tokens`` of a prompt: attention grows with the position, all else does not."""
    return tokens + tokens * tokens / (2 * POSITION_TOKENS)


class Tally:
    """Adds up what requests found."""

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._ends: dict[int, int] = {}
        self.hit_tokens = self.hit_blocks = 0
        self.hit_cost = 0.0

    def found(self, end: int, blocks: int) -> None:
        """A request found its prompt up to ``end``, and ``blocks`` blocks of it in all."""
        tokens = self._forest.tokens(end)
        self.hit_tokens += tokens
        self.hit_blocks += blocks
        self.hit_cost += prefill_cost(tokens)

    def result(self, policy: str, capacity_blocks: int, counts: Counts) -> ReplayResult:
        trace, depth = self._forest.trace, self._forest.depth
        return ReplayResult(
            policy=policy,
            capacity_blocks=capacity_blocks,
            requests=trace.request_count,
            blocks=sum(depth[leaf] for leaf in trace.leaves if leaf >= 0),
            hit_blocks=self.hit_blocks,
            prompt_tokens=sum(trace.input_tokens),
            hit_tokens=self.hit_tokens,
            prompt_cost=sum(map(prefill_cost, trace.input_tokens)),
            hit_cost=self.hit_cost,
            admitted_blocks=counts.admitted,
            evicted_blocks=counts.evicted,
            seconds=counts.seconds,
            policy_fault=counts.fault,
        )


@dataclass(frozen=True, slots=True)
class Counts:
    admitted: int
    evicted: int
    seconds: float
    fault: str = ""


class LeafCache:
    """One cache that evicts leaves, as the store does, under a policy of the store's."""

    def __init__(self, forest: Forest, make: MakePolicy, capacity: int) -> None:
        self._forest = forest
        self.capacity = capacity
        self.tree = ReplayTree(forest)
        self.guard = PolicyGuard(self.tree, capacity, make, self.tree.cached)
        self.admitted = self.evicted = 0

    def serve(self, context: RequestContext, leaf: int) -> int:
        """One request whose prompt ends in ``leaf``. The last block of it that was found, or NONE."""
        tree, guard = self.tree, self.guard
        end, missing = tree.find(leaf)
        guard.on_request(context, Path(self._forest, end))
        if missing:
            if end >= 0:
                tree.hold(end)
            new = missing[: self._room(context, end, missing)]
            if new:
                tree.enter(new)
                guard.on_admitted(context, new)
                self.admitted += len(new)
            if end >= 0:
                tree.unhold(end)
        return end

    def _room(self, context: RequestContext, parent: int, missing: Sequence[int]) -> int:
        """For how many of the blocks behind ``parent`` there is room, once some have gone."""
        tree, guard = self.tree, self.guard
        wanted = guard.admit(context, parent, missing)
        over = tree.count + wanted - self.capacity
        while over > 0:
            named = guard.victims(context, over)
            if not named:
                return wanted - over
            tree.leave(named)
            guard.on_evicted(context, named, "evicted")
            self.evicted += len(named)
            over -= len(named)
        return wanted


def replay(
    trace: Trace | Forest,
    policy: str | MakePolicy,
    capacity_blocks: int,
    *,
    settings: Mapping[str, float] | None = None,
    hints: bool = True,
    progress: Progress | None = None,
) -> ReplayResult:
    """The whole trace over a cache of ``capacity_blocks``, empty at first.

    ``hints``: tell the policy how the trace says that requests ended. ``progress`` is called with the number
    of requests served. RAISES BadInput for an unknown policy, a setting it has not, no room for a block.
    """
    check_capacity(capacity_blocks)
    forest = trace if isinstance(trace, Forest) else Forest(trace)
    make = named_policy(policy, settings or {}) if isinstance(policy, str) else policy
    name = policy if isinstance(policy, str) else getattr(policy, "__name__", "policy")
    start = time.perf_counter()
    cache = LeafCache(forest, make, capacity_blocks)
    tally = Tally(forest)
    contexts = Contexts(forest.trace, hints)
    for index, leaf in enumerate(forest.trace.leaves):
        if leaf >= 0:
            end = cache.serve(contexts.of(index), leaf)
            tally.found(end, forest.depth[end] if end != NONE else 0)
        if progress is not None:
            progress(index + 1)
    counts = Counts(cache.admitted, cache.evicted, time.perf_counter() - start, cache.guard.last_fault)
    return tally.result(name, capacity_blocks, counts)


class Contexts:
    """What a policy is told of each request."""

    def __init__(self, trace: Trace, hints: bool) -> None:
        self._trace = trace
        self._hints = [_HINTS.get(kind, "unknown") if hints else "unknown" for kind in trace.kinds]

    def of(self, index: int) -> RequestContext:
        trace, kind = self._trace, self._trace.kind_indexes[index]
        return RequestContext(
            now_ns=trace.arrivals_ms[index] * _NS_PER_MS,
            session=trace.sessions[index],
            prompt_tokens=trace.input_tokens[index],
            hint=self._hints[kind] if kind < len(self._hints) else "unknown",
        )


def check_capacity(capacity_blocks: int) -> None:
    if capacity_blocks < 1:
        raise BadInput("too_small", f"a cache of {capacity_blocks} blocks", "one block is the least")


def named_policy(name: str, settings: Mapping[str, float]) -> MakePolicy:
    """RAISES BadInput for a name that nobody offers, a setting that it has not or that is out of range."""
    found: type[EvictionPolicy] = policy_class(name)
    params = found.params()
    for key, value in settings.items():
        if key not in params:
            known = ", ".join(params) or "none"
            raise BadInput("bad_config", f"{name} has no setting {key!r}", f"it has {known}")
        if not params[key].low <= value <= params[key].high:
            raise BadInput(
                "bad_config",
                f"{key} of {name} is {value}",
                f"{params[key].low} to {params[key].high} is possible",
            )
    made: MakePolicy = partial(found, **settings)  # type: ignore[arg-type]  # Only its own params say which.
    return made
