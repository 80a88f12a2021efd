"""What policies find at many sizes: exactly where that is cheap, and else estimated from a sample.

``leaf-lru`` is exact (``stack_curve``). For any other policy the *difference* to leaf-lru is simulated on the
sample, and added to what is known exactly: what the sample has too much or too little of weighs on both
alike, and falls out (a control variate). On the public traces that is within a point of a replay of the whole
from a sample of 3 %, where the simulation alone is off by up to four.

The sum: the exact curve takes 0.1 s for 4.5 M blocks of prompts; a size and policy as long as a
replay of 3 % of the blocks, and all requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvcache.eviction.simulate.replay import REPLAY_ONLY, Progress, replay
from kvcache.eviction.simulate.sample import Sample, enough, sample
from kvcache.eviction.simulate.stack_curve import StackCurve, stack_curve
from kvcache.eviction.simulate.tree import Forest

LEAF_LRU = "leaf-lru"
EXACT, SAMPLED, REPLAYED = "exact", "sampled", "replayed"

Watch = Callable[[str, int], Progress | None]  # A label, and how much there is to do.


def unwatched(label: str, total: int) -> Progress | None:
    return None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a policy finds with room for ``capacity_blocks``, and ``how`` that is known."""

    policy: str
    capacity_blocks: int
    prefix_token_hit_ratio: float
    how: str


class Estimator:
    """Estimates for one trace. ``rate`` 0: as large a sample as is enough."""

    def __init__(
        self,
        forest: Forest,
        rate: float = 0.0,
        *,
        hints: bool = True,
        seed: int = 1,
        watch: Watch = unwatched,
    ) -> None:
        self.forest = forest
        self._rate = rate or enough(forest.trace.block_count)
        self._hints = hints
        self._seed = seed
        self._watch = watch

    @cached_property
    def exact(self) -> StackCurve:
        return stack_curve(self.forest, self._watch("leaf-lru, every size", self.forest.trace.request_count))

    @cached_property
    def sample(self) -> Sample:
        return sample(self.forest, self._rate, self._seed)

    @cached_property
    def _sampled_exact(self) -> StackCurve:
        return self.exact if self.sample.whole else stack_curve(self.sample.forest)

    def curve(
        self, policy: str, capacities: Sequence[int], settings: Mapping[str, float] | None = None
    ) -> Iterator[Estimate]:
        """RAISES BadInput as ``replay``."""
        for blocks in capacities:
            yield self.estimate(policy, blocks, settings)

    def estimate(self, policy: str, blocks: int, settings: Mapping[str, float] | None = None) -> Estimate:
        """RAISES BadInput as ``replay``."""
        if policy == LEAF_LRU and not settings:
            return Estimate(policy, blocks, self.exact.prefix_token_hit_ratio(blocks), EXACT)
        small = self.sample
        capacity = small.capacity(blocks)
        found = replay(
            small.forest,
            policy,
            capacity,
            settings={} if policy in REPLAY_ONLY else settings,
            hints=self._hints,
            progress=self._watch(f"{policy}, {blocks:,} blocks", small.forest.trace.request_count),
        ).prefix_token_hit_ratio
        if small.whole:
            return Estimate(policy, blocks, found, REPLAYED)
        return Estimate(policy, blocks, self.corrected(found, blocks), SAMPLED)

    def corrected(self, sampled_ratio: float, blocks: int) -> float:
        """Of all tokens, if a cache of the sample found this share there, where ``blocks`` would lie in the
        whole: what leaf-lru finds in so many, and what the sample says is more or less than that."""
        at = self.sample.capacity(blocks)
        more = self.sample.cold_share * (sampled_ratio - self._sampled_exact.prefix_token_hit_ratio(at))
        return min(max(self.exact.prefix_token_hit_ratio(blocks) + more, 0.0), self.most)

    @property
    def most(self) -> float:
        """What a cache without end finds."""
        return self.exact.prefix_token_hit_ratio(len(self.exact.hit_tokens))

    def shards(self, blocks: int) -> Estimate:
        """Leaf-lru from the sample alone, as a node could estimate it that sees the sample only."""
        small = self.sample
        found = self._sampled_exact.prefix_token_hit_ratio(small.capacity(blocks))
        return Estimate(LEAF_LRU, blocks, found if small.whole else small.ratio(found), SAMPLED)
