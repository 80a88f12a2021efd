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

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from kvcache.errors import BadInput
from kvcache.eviction.reference.belady import Belady, next_uses
from kvcache.eviction.reference.blocks import BLOCK_POLICIES, BlockCache
from kvcache.eviction.registry import policy_class, policy_names
from kvcache.eviction.simulate.result import Counts, ReplayResult, Tally
from kvcache.eviction.simulate.tree import NONE, Forest, Path, ReplayTree
from kvcache.eviction.traces.trace import Trace
from kvcache.guard import PolicyGuard
from kvcache.policy import HINTS, EvictionPolicy, MakePolicy, RequestContext

BELADY = "belady"
REPLAY_ONLY = frozenset({BELADY, *BLOCK_POLICIES})
_NS_PER_MS = 1_000_000
_HINTS = {**{hint: hint for hint in HINTS}, "tool_use": "tool_call", "end_turn": "turn_end"}

Progress = Callable[[int], None]


class LeafCache:
    """One cache that evicts leaves, as the store does, under a policy of the store's."""

    def __init__(
        self,
        forest: Forest,
        make: MakePolicy,
        capacity: int,
        below: Callable[[RequestContext, Sequence[int]], None] | None = None,
    ) -> None:
        """``below`` is told of what goes, before it goes."""
        self.capacity = capacity
        self._below = below
        self.tree = ReplayTree(forest)
        self.guard = PolicyGuard(self.tree, capacity, make, self.tree.cached)
        self.admitted = self.evicted = 0

    def serve(self, context: RequestContext, leaf: int) -> int:
        """One request whose prompt ends in ``leaf``. The last block of it that was found, or NONE."""
        end, missing = self.look(context, leaf)
        if missing:
            self.store(context, end, missing)
        return end

    def look(self, context: RequestContext, leaf: int) -> tuple[int, list[int]]:
        """The last block of the prompt that is here, or NONE, and what is missing behind it."""
        end, missing = self.tree.find(leaf)
        self.guard.on_request(context, Path(self.tree.parent, end))
        return end, missing

    def store(self, context: RequestContext, end: int, missing: Sequence[int]) -> int:
        """What is ``missing`` behind ``end`` has come. So many leading blocks of it were kept."""
        tree = self.tree
        if end >= 0:
            tree.hold(end)
        new = missing[: self._room(context, end, missing)]
        if new:
            tree.enter(new)
            self.guard.on_admitted(context, new)
            self.admitted += len(new)
        if end >= 0:
            tree.unhold(end)
        return len(new)

    def _room(self, context: RequestContext, parent: int, missing: Sequence[int]) -> int:
        """For how many of the blocks behind ``parent`` there is room, once some have gone."""
        tree, guard = self.tree, self.guard
        wanted = guard.admit(context, parent, missing)
        over = tree.count + wanted - self.capacity
        while over > 0:
            named = guard.victims(context, over)
            if not named:
                return wanted - over
            if self._below is not None:
                self._below(context, named)
            tree.leave(named)
            guard.on_evicted(context, named, "evicted")
            self.evicted += len(named)
            over -= len(named)
        return wanted


class Served(Protocol):
    """A cache that a trace is replayed over."""

    @property
    def admitted(self) -> int: ...

    @property
    def evicted(self) -> int: ...

    @property
    def fault(self) -> str:
        """How a policy broke its contract, if it did."""

    def serve(self, index: int, leaf: int) -> tuple[int, int]:
        """What was found of a request's prompt: the end of its leading part (or NONE), how many blocks."""


class _Leaves:
    """The requests of a trace for one ``LeafCache``."""

    def __init__(self, forest: Forest, cache: LeafCache, hints: bool) -> None:
        self._cache = cache
        self._depth = forest.depth
        self._contexts = Contexts(forest.trace, hints)

    @property
    def admitted(self) -> int:
        return self._cache.admitted

    @property
    def evicted(self) -> int:
        return self._cache.evicted

    @property
    def fault(self) -> str:
        return self._cache.guard.last_fault

    def serve(self, index: int, leaf: int) -> tuple[int, int]:
        end = self._cache.serve(self._contexts.of(index), leaf)
        return end, self._depth[end] if end != NONE else 0


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
    start = time.perf_counter()
    name, cache = _cache(forest, policy, capacity_blocks, settings or {}, hints)
    tally = Tally(forest)
    for index, leaf in enumerate(forest.trace.leaves):
        if leaf >= 0:
            tally.found(*cache.serve(index, leaf))
        if progress is not None:
            progress(index + 1)
    counts = Counts(cache.admitted, cache.evicted, time.perf_counter() - start, cache.fault)
    return tally.result(name, capacity_blocks, counts)


def _cache(
    forest: Forest, policy: str | MakePolicy, capacity: int, settings: Mapping[str, float], hints: bool
) -> tuple[str, Served]:
    if not isinstance(policy, str):
        name = getattr(policy, "__name__", type(policy).__name__)
        return name, _Leaves(forest, LeafCache(forest, policy, capacity), hints)
    if policy not in REPLAY_ONLY:
        make = named_policy(policy, settings)
        return policy, _Leaves(forest, LeafCache(forest, make, capacity), hints)
    if settings:
        raise BadInput("bad_config", f"{policy} has no setting {next(iter(settings))!r}", "it has none")
    if policy == BELADY:
        return policy, Belady(forest, next_uses(forest), capacity)
    return policy, BlockCache(forest, policy, capacity)


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


def replay_names() -> list[str]:
    """Every policy that can be replayed: the store's first."""
    return [*policy_names(), *BLOCK_POLICIES, BELADY]


def named_policy(name: str, settings: Mapping[str, float]) -> MakePolicy:
    """RAISES BadInput for a name that nobody offers, a setting that it has not or that is out of range."""
    if name.partition("+")[0] not in policy_names():
        near = difflib.get_close_matches(name, replay_names(), 1)
        raise BadInput(
            "bad_config",
            f"no policy is called {name!r}",
            f"there are {', '.join(replay_names())}",
            f"did you mean {near[0]!r}?" if near else "choose one of these",
        )
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
