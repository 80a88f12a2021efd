"""A trace cut down to some of its blocks: what a small cache does on it, a large one does on the whole.

A block is in the sample or not by its number alone, so with it come all its uses (SHARDS: Waldspurger, Park,
Garthwaite and Ahmad, FAST 15), and a policy of any kind is simulated by a cache that is smaller by the
same rate (miniature simulation: Waldspurger, Saemundsson, Ahmad and Park, ATC 17). Prefixes stay
prefixes: the parent of a block is the nearest block before it that is in the sample.

Blocks are numbered as they were first used, and the sample takes them as multiples of the golden ratio fall,
not as a hash would: of every stretch of a prompt, and of the trace, it has its share, one block more or less.

What very many requests share, a system prompt say, is *hot*: it is never in the sample, where it would weigh
more than all that was drawn, and counts as always cached.

The sum: 0.5 us a block of the trace, once.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

from kvcache.errors import BadInput
from kvcache.eviction.simulate.tree import NONE, Forest

HOT_SHARE = 0.05
RATE_MIN = 0.03
_BLOCKS_ENOUGH = 8_192
_WHOLE_ABOVE = 0.5
_GOLDEN = 0x9E3779B97F4A7C15
_PHASE = 0x632BE59BD9B4E019
_BITS = 64
_MASK = (1 << _BITS) - 1


@dataclass(frozen=True, slots=True)
class Sample:
    """``forest`` has ``rate`` of the blocks that are not hot. Of what requests brought, ``cold_share`` of the
    tokens lie in those, and ``hot_share`` are hot and were there before."""

    forest: Forest
    rate: float
    hot_blocks: int
    cold_share: float
    hot_share: float

    @property
    def whole(self) -> bool:
        return self.rate == 1.0

    def capacity(self, blocks: int) -> int:
        """What stands for a cache of so many blocks."""
        return max(1, round((blocks - self.hot_blocks) * self.rate))

    def ratio(self, sampled_ratio: float) -> float:
        """Of all tokens, if this share was found of those in the sample."""
        return self.cold_share * sampled_ratio + self.hot_share


def enough(block_count: int) -> float:
    """The rate at which the sample still has some thousand blocks; 1 where that is most of them."""
    rate = max(RATE_MIN, _BLOCKS_ENOUGH / max(block_count, 1))
    return 1.0 if rate > _WHOLE_ABOVE else rate


def sample(forest: Forest, rate: float, seed: int = 1, hot_share: float = HOT_SHARE) -> Sample:
    """What more than ``hot_share`` of the requests have is hot; at rate 1, nothing is. RAISES BadInput for a
    rate that is none, and where nothing is left."""
    if not 0 < rate <= 1:
        raise BadInput(
            "bad_config", f"a sample of {rate:g}", "more than 0, and at most all (100%), is possible"
        )
    if rate == 1:
        return _whole(forest)
    trace, uses = forest.trace, uses_of(forest)
    hot_least = hot_share * trace.request_count
    edge, phase = int(rate * (1 << _BITS)), seed * _PHASE
    numbers = [NONE] * len(uses)  # Of each block, its own in the sample or that of the nearest before it.
    parents, tokens, ends = array("i"), array("H"), array("i")  # Ends: tokens of a prompt up to each.
    cold_blocks = hot_blocks = cold_tokens = hot_tokens = 0
    for block, before in enumerate(forest.parent):
        nearest = numbers[before] if before >= 0 else NONE
        count = uses[block]
        if count > hot_least:
            hot_blocks += 1
            hot_tokens += (count - 1) * trace.tokens[block]
        elif count:
            cold_blocks += 1
            cold_tokens += count * trace.tokens[block]
            if (block * _GOLDEN + phase) & _MASK < edge:
                parents.append(nearest)
                tokens.append(trace.tokens[block])
                ends.append(trace.tokens[block] + (ends[nearest] if nearest >= 0 else 0))
                nearest = len(tokens) - 1
        numbers[block] = nearest
    if not tokens:
        raise BadInput("too_small", f"a sample of {rate:.2%} of {len(uses):,} blocks", "there is none in it")
    leaves = array("i", [numbers[leaf] if leaf >= 0 else NONE for leaf in trace.leaves])
    wanted = array("i", [ends[leaf] if leaf >= 0 else 0 for leaf in leaves])
    small = Forest(replace(trace, parents=parents, tokens=tokens, leaves=leaves, input_tokens=wanted))
    all_tokens = max(sum(trace.input_tokens), 1)
    return Sample(
        small, len(tokens) / cold_blocks, hot_blocks, cold_tokens / all_tokens, hot_tokens / all_tokens
    )


def _whole(forest: Forest) -> Sample:
    return Sample(forest, 1.0, 0, 1.0, 0.0)


def uses_of(forest: Forest) -> list[int]:
    """How many requests have each block."""
    uses = [0] * len(forest.parent)
    for leaf in forest.trace.leaves:
        if leaf >= 0:
            uses[leaf] += 1
    parents = forest.parent
    for block in range(len(uses) - 1, -1, -1):
        if parents[block] >= 0:
            uses[parents[block]] += uses[block]
    return uses
