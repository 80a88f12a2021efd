"""What a replay counts, the same for every cache that a trace was replayed over."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.eviction.simulate.tree import Forest

POSITION_TOKENS = 30_000


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What came of it. ``*_squared`` are sums, over requests, of leading tokens squared: what attention over
    them costs grows so."""

    policy: str
    capacity_blocks: int
    requests: int
    blocks: int
    hit_blocks: int
    prompt_tokens: int
    hit_tokens: int
    prompt_squared: int
    hit_squared: int
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
        return self.flops_saved(POSITION_TOKENS)

    def flops_saved(self, position_tokens: float) -> float:
        """Of prefill's work, the share that was found, where attention at position ``position_tokens`` costs
        as much as all else (``kvcache.eviction.simulate.models``)."""
        whole = self.prompt_tokens + self.prompt_squared / (2 * position_tokens)
        return (self.hit_tokens + self.hit_squared / (2 * position_tokens)) / whole if whole else 0.0


class Tally:
    """Adds up what requests found."""

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self.hit_tokens = self.hit_blocks = self.hit_squared = 0

    def found(self, end: int, blocks: int) -> None:
        """A request found its prompt up to ``end``, and ``blocks`` blocks of it in all."""
        tokens = self._forest.tokens(end)
        self.hit_tokens += tokens
        self.hit_blocks += blocks
        self.hit_squared += tokens * tokens

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
            prompt_squared=sum(tokens * tokens for tokens in trace.input_tokens),
            hit_squared=self.hit_squared,
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
