"""One setting of a cache, tried on a trace: what each request found, so that times can be compared.

A replay of a trace begins like one of its first part, so one pass gives both: what a setting found in the
time it was chosen on, and what it found, warm, in the time after that.

The difference of two settings is taken over equal stretches of requests; how much it differs from stretch to
stretch says how much of it is chance (a jackknife: Tukey 1958, Miller, "The jackknife - a review", 1974).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvcache.eviction.admission import ALL, Admission
from kvcache.eviction.registry import policy_class
from kvcache.eviction.simulate.replay import Contexts, LeafCache, Progress, named_policy
from kvcache.eviction.simulate.spill import Below
from kvcache.eviction.simulate.tiers import TwoTiers
from kvcache.eviction.simulate.tree import Forest

_STRETCHES = 20
_TWO_SIDED = 2.0  # Standard errors: 19 times of 20.


@dataclass(frozen=True, slots=True)
class Setting:
    """What an operator may set. ``admission`` matters only where there is NVMe."""

    policy: str
    settings: tuple[tuple[str, float], ...] = ()
    admission: Admission = ALL

    def __str__(self) -> str:
        own = ", ".join(f"{name}={value:g}" for name, value in self.settings)
        return f"{self.policy} ({own})" if own else self.policy

    def with_(self, name: str, value: float) -> Setting:
        changed = {**dict(self.settings), name: value}
        return Setting(self.policy, tuple(sorted(changed.items())), self.admission)


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is. ``nvme_blocks`` 0: no NVMe; it bears ``nvme_writes_a_day`` of its size (0: any)."""

    memory_blocks: int
    nvme_blocks: int = 0
    nvme_writes_a_day: float = 0.0
    hints: bool = True


@dataclass(frozen=True, slots=True)
class Trial:
    """``hits`` and ``wanted`` are tokens, of each request."""

    hits: array[int]
    wanted: array[int]
    written_blocks: int = 0

    def ratio(self, start: int = 0, end: int | None = None) -> float:
        wanted = sum(self.wanted[start:end])
        return sum(self.hits[start:end]) / wanted if wanted else 0.0


def try_setting(
    forest: Forest, machine: Machine, setting: Setting, progress: Progress | None = None
) -> Trial:
    """RAISES BadInput as ``replay``."""
    trace = forest.trace
    hits = array("q", bytes(8 * trace.request_count))
    wanted = array("q", trace.input_tokens)
    written = 0
    if machine.nvme_blocks:
        below = Below(machine.nvme_blocks, admission=setting.admission)
        own = _settings_over_nvme(setting)
        tiers = TwoTiers(
            forest, setting.policy, machine.memory_blocks, below, settings=own, hints=machine.hints
        )
        for index, leaf in enumerate(trace.leaves):
            if leaf >= 0:
                hits[index] = forest.tokens(tiers.serve(index, leaf))
            if progress is not None:
                progress(index + 1)
        written = tiers.spill.written
    else:
        make = named_policy(setting.policy, dict(setting.settings))
        cache = LeafCache(forest, make, machine.memory_blocks)
        contexts = Contexts(trace, machine.hints)
        for index, leaf in enumerate(trace.leaves):
            if leaf >= 0:
                hits[index] = forest.tokens(cache.serve(contexts.of(index), leaf))
            if progress is not None:
                progress(index + 1)
    return Trial(hits, wanted, written)


def _settings_over_nvme(setting: Setting) -> dict[str, float]:
    """A node with NVMe lets its memory decline nothing: what is declined would be lost to both."""
    own = dict(setting.settings)
    if "decline" in policy_class(setting.policy).params():
        own["decline"] = 0.0
    return own


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two hit ratios: 19 times of 20 the truth lies within ``doubt`` of ``gain``, if the stretches stand
    for what is to come."""

    gain: float
    doubt: float

    @property
    def clear(self) -> bool:
        return abs(self.gain) > self.doubt


def difference(ours: Trial, theirs: Trial, start: int, end: int) -> Difference:
    """By how much more ``ours`` found than ``theirs`` in the requests from ``start`` to ``end``."""
    count = min(_STRETCHES, end - start)
    edges = [start + (end - start) * at // count for at in range(count + 1)] if count > 0 else [start]
    more, wanted = [], []
    for first, last in pairwise(edges):
        more.append(sum(ours.hits[first:last]) - sum(theirs.hits[first:last]))
        wanted.append(sum(ours.wanted[first:last]))
    whole = sum(wanted)
    if not whole:
        return Difference(0.0, 0.0)
    return Difference(sum(more) / whole, _TWO_SIDED * _jackknife(more, wanted))


def _jackknife(more: Sequence[int], wanted: Sequence[int]) -> float:
    """The standard error of sum(more) / sum(wanted)."""
    count = len(more)
    if count < 2:
        return 1.0
    all_more, all_wanted = sum(more), sum(wanted)
    without = [
        (all_more - one) / (all_wanted - of) for one, of in zip(more, wanted, strict=True) if all_wanted > of
    ]
    mean = sum(without) / len(without)
    return float(((count - 1) / count * sum((each - mean) ** 2 for each in without)) ** 0.5)
