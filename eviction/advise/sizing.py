"""What to buy: the least memory, or the least NVMe below so much memory, that finds enough and does not wear.

Hit ratio and wear are asked together, as what is written depends on what is held: a drive has to be large
enough to find enough, and to bear what is written to it, that is, at most so many writes of its whole size
a day on average. Where everything that falls is written, and it bears one a day, that is a drive for a day of
what has to be computed, whatever the model. A smaller one may do with a write budget: then what would wear it
out is not written, and found less often. A budget is a matter of the minute, so where work comes in bursts it
costs more than it saves.

Sizes are sought on a sample (``curves``): up or down by halves of the logarithm, to 3 %; then the answer is
replayed on the whole, and grown until it holds there.

The sum: ten trials an option, each a replay of the sample; and one replay of the whole, or a few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvcache.errors import BadInput
from kvcache.eviction.admission import DAY_S, Admission
from kvcache.eviction.simulate.curves import LEAF_LRU, Estimator, Watch, unwatched
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.spill import Below
from kvcache.eviction.simulate.tiers import replay_tiers
from kvcache.eviction.simulate.tree import Forest

_BUDGET_SHARE = 0.95
_FINE = 1.03
_GROW = 1.06
_GROWN_MAX = 6
_MS_PER_S = 1_000


@dataclass(frozen=True, slots=True)
class Goal:
    """Of what prompts bring, this share is to be found; no drive writes itself over more often a day."""

    ratio: float
    drive_writes_a_day: float = 1.0

    def reached(self, option: Option) -> bool:
        return option.ratio >= self.ratio and option.drive_writes_a_day <= self.drive_writes_a_day


@dataclass(frozen=True, slots=True)
class Option:
    """Something to buy. ``confirmed``: it was replayed on the whole trace, and that is enough; else ``ratio``
    is from a sample. Without NVMe there is no ``admission``, and nothing is written.
    ``budget_blocks_a_second`` 0: no write budget."""

    policy: str
    memory_blocks: int
    nvme_blocks: int = 0
    admission: Admission | None = None
    budget_blocks_a_second: float = 0.0
    ratio: float = 0.0
    drive_writes_a_day: float = 0.0
    confirmed: bool = False

    @property
    def written_blocks_a_second(self) -> float:
        return self.drive_writes_a_day * self.nvme_blocks / DAY_S

    def cost(self, memory_price: float) -> float:
        """In blocks of NVMe, of which a block of memory costs so many."""
        return self.memory_blocks * memory_price + self.nvme_blocks


class Sizer:
    """Looks for what reaches ``goal`` on one trace. RAISES BadInput where nothing can: more than all that was
    asked for before cannot be found again."""

    def __init__(
        self, estimator: Estimator, goal: Goal, *, hints: bool = True, watch: Watch = unwatched
    ) -> None:
        self._estimator = estimator
        self.goal = goal
        self._hints = hints
        self._watch = watch
        best = estimator.most
        if not 0 < goal.ratio <= 1:
            raise BadInput(
                "bad_config", f"a hit ratio of {goal.ratio:.1%}", "more than 0, and at most 100%, is one"
            )
        if goal.ratio > best:
            raise BadInput(
                "bad_config",
                f"a hit ratio of {goal.ratio:.1%} cannot be had at any size",
                f"of this trace's tokens {best:.1%} were asked for before; the others nobody can have kept",
                f"ask for less than {best:.1%}, or record for longer: the first uses count as misses",
            )

    @property
    def _forest(self) -> Forest:
        return self._estimator.forest

    def memory(self, policy: str) -> Option:
        """The least memory without anything below it."""
        estimator, ratio = self._estimator, self.goal.ratio
        blocks = estimator.exact.least_blocks(ratio)
        if policy != LEAF_LRU:
            most = self._forest.trace.block_count
            blocks = _least(
                1, most, lambda blocks: estimator.estimate(policy, blocks).prefix_token_hit_ratio >= ratio
            )
        found = estimator.estimate(policy, blocks)
        exact = policy == LEAF_LRU or estimator.sample.whole
        return Option(policy, blocks, ratio=found.prefix_token_hit_ratio, confirmed=exact)

    def nvme(self, policy: str, memory_blocks: int, admission: Admission, *, budget: bool) -> Option | None:
        """The least NVMe below so much memory; None where no drive of any size is enough. With ``budget``,
        what it does not bear is not written."""
        trial = Option(policy, memory_blocks, 1, admission)

        def sized(blocks: int) -> Option:
            share = _BUDGET_SHARE * self.goal.drive_writes_a_day if budget else 0.0
            return replace(trial, nvme_blocks=blocks, budget_blocks_a_second=share * blocks / DAY_S)

        def enough(blocks: int) -> bool:
            return self.goal.reached(self._sampled(sized(blocks)))

        most = max(self._forest.trace.block_count, self._day_blocks())
        if not enough(most):
            return None
        found = self._sampled(sized(_least(1, most, enough)))
        return replace(found, confirmed=self._estimator.sample.whole)

    def confirm(self, option: Option) -> Option:
        """Replayed on the whole; what is bought last is grown until that is enough, or too much."""
        for _ in range(_GROWN_MAX):
            option = self._whole(option)
            if option.confirmed:
                break
            if option.nvme_blocks:
                more = int(option.nvme_blocks * _GROW) + 1
                budget = option.budget_blocks_a_second * more / option.nvme_blocks
                option = replace(option, nvme_blocks=more, budget_blocks_a_second=budget)
            else:
                option = replace(option, memory_blocks=int(option.memory_blocks * _GROW) + 1)
        return option

    def _day_blocks(self) -> int:
        """A drive that bears it if all that is computed is written."""
        arrivals = self._forest.trace.arrivals_ms
        span_s = max((arrivals[-1] - arrivals[0]) / _MS_PER_S, 1.0)
        exact = self._estimator.exact
        computed = exact.blocks - exact.hit_blocks[1]
        return min(1 << 40, int(computed * DAY_S / span_s / self.goal.drive_writes_a_day) + 1)

    def _sampled(self, option: Option) -> Option:
        small = self._estimator.sample
        if small.whole:
            return self._tiers(self._forest, option, option)
        scaled = replace(
            option,
            memory_blocks=small.capacity(option.memory_blocks),
            nvme_blocks=max(1, round(option.nvme_blocks * small.rate)),
            budget_blocks_a_second=option.budget_blocks_a_second * small.rate,
        )
        found = self._tiers(small.forest, scaled, option)
        ratio = self._estimator.corrected(found.ratio, option.memory_blocks + option.nvme_blocks)
        return replace(found, ratio=ratio)

    def _whole(self, option: Option) -> Option:
        if option.admission is not None:
            found = self._tiers(self._forest, option, option)
            return replace(found, confirmed=self.goal.reached(found))
        label = f"{option.policy}, {option.memory_blocks:,} blocks, all requests"
        progress = self._watch(label, self._forest.trace.request_count)
        ratio = replay(
            self._forest, option.policy, option.memory_blocks, hints=self._hints, progress=progress
        ).prefix_token_hit_ratio
        return replace(option, ratio=ratio, confirmed=ratio >= self.goal.ratio)

    def _tiers(self, forest: Forest, scaled: Option, option: Option) -> Option:
        """``option``, with what ``scaled`` gives on ``forest``."""
        assert scaled.admission is not None
        below = Below(
            scaled.nvme_blocks,
            admission=scaled.admission,
            blocks_a_second=scaled.budget_blocks_a_second,
        )
        label = f"{option.memory_blocks:,} + {option.nvme_blocks:,} blocks, {scaled.admission.name}"
        result = replay_tiers(
            forest,
            scaled.policy,
            scaled.memory_blocks,
            below,
            hints=self._hints,
            progress=self._watch(label, forest.trace.request_count),
        )
        return replace(
            option,
            ratio=result.whole.prefix_token_hit_ratio,
            drive_writes_a_day=result.drive_writes_a_day,
        )


def _least(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """About the least size that is enough. REQUIRES: ``high`` is."""
    while low < high and high / low > _FINE:
        middle = max(low, min(high - 1, round((low * high) ** 0.5)))
        if enough(middle):
            high = middle
        elif middle == low:
            low = middle + 1
        else:
            low = middle
    return high
