"""Which setting to run: sought on a sample of the first part of a trace, confirmed on all of the rest.

    first part, a sample of its blocks   every policy; then the settings of the two best, one by one;
                                         with NVMe, what may be written to it
    the whole trace, all blocks          the best, its and other policies as they come, what runs now
    the part after the first             what the best of these is worth: it was not sought on that

What was chosen on some requests is best on them, partly by chance; so what is told is what it found in the
others, and how much that differs from one stretch of them to the next. A change must be worth it: 0.2
points over what runs now, over all and in the second part alone (0.5 where that may be chance; it is enough
to be no worse there, if the gain over all is no chance). What has to be set by hand must be worth as much
in either part, over the same policy without.

The sum: some 30 replays of a sample, and four of the whole: a minute for 4.5 M blocks of prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from kvcache.errors import BadInput
from kvcache.eviction.admission import DAY_S, parse_admission
from kvcache.eviction.registry import policy_class, policy_names
from kvcache.eviction.simulate.curves import Watch, unwatched
from kvcache.eviction.simulate.sample import Sample, enough, sample
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.simulate.trial import Difference, Machine, Setting, Trial, difference, try_setting
from kvcache.eviction.traces.trace import Trace
from kvcache.policy import Param

WORTH, _WORTH_UNCLEAR = 0.002, 0.005
_TIE = 0.003
REQUESTS_MIN = 100
RULES = ("touched>=2",)  # What a node can be told to write to NVMe, beside all.
_OTHERS, _FAR = 3, 0.05
_FREE_WRITES = 0.005  # So much of the hits may be given for fewer writes, where no limit was named ...
_SPARING = 0.8  # ... if at most this share of them is left.
_UNSET = frozenset({"tenant_share", "retain_ms", "cost_weight"})  # What a trace cannot tell.
_TOOL_CALLS = ("tool_use", "tool_call")
_MS_PER_S = 1_000


@dataclass(frozen=True, slots=True)
class Tried:
    """On the sample of the first part. ``writes_a_day``: of the whole NVMe."""

    setting: Setting
    ratio: float
    writes_a_day: float = 0.0


@dataclass(frozen=True, slots=True)
class Finalist:
    """On all blocks; ``writes_a_day`` over the whole time."""

    setting: Setting
    trial: Trial
    first_ratio: float
    rest_ratio: float
    writes_a_day: float


@dataclass(frozen=True, slots=True)
class Advice:
    """``change``: ``named`` is not what runs now. ``first_requests`` were used to choose."""

    now: Finalist
    named: Finalist
    change: bool
    difference: Difference
    finalists: Sequence[Finalist]
    tried: Sequence[Tried]
    first_requests: int
    requests: int
    sample_rate: float


class Adviser:
    """For one trace and machine; ``share`` of the requests is the first part. RAISES BadInput where there is
    too little of either part."""

    def __init__(
        self,
        forest: Forest,
        machine: Machine,
        *,
        share: float = 0.5,
        rate: float = 0.0,
        policies: Sequence[str] = (),
        rules: Sequence[str] = RULES,
        watch: Watch = unwatched,
    ) -> None:
        self._forest = forest
        self._machine = machine
        self._policies = list(policies) or policy_names()
        self._rules = [parse_admission(rule) for rule in rules]
        self._watch = watch
        self.first_requests = first_requests(forest.trace, share)
        first = forest.trace.head(self.first_requests)
        self._sample: Sample = sample(Forest(first), rate or enough(first.block_count))

    def advise(self, now: Setting) -> Advice:
        """RAISES BadInput for what cannot run."""
        current = self._whole(now)
        tried = list(self._search())
        best = self._best(tried)
        plain = Setting(best.setting.policy, (), best.setting.admission)
        wanted = [best.setting, plain, *self._others(tried, best, now)]
        finalists = [self._whole(setting) for setting in dict.fromkeys(wanted) if setting != now]
        named = self._choose([current, *finalists])
        found = difference(named.trial, current.trial, self.first_requests, self._forest.trace.request_count)
        in_all = difference(named.trial, current.trial, 0, self._forest.trace.request_count)
        change = named is not current and self._worth(named, current, found, in_all)
        if not change:
            named, found = current, Difference(0.0, 0.0)
        return Advice(
            now=current,
            named=named,
            change=change,
            difference=found,
            finalists=[current, *finalists],
            tried=sorted(tried, key=lambda each: -each.ratio),
            first_requests=self.first_requests,
            requests=self._forest.trace.request_count,
            sample_rate=self._sample.rate,
        )

    def _label(self, doing: str, setting: Setting) -> str:
        return f"{doing} {setting}" + (f", {setting.admission.name}" if self._machine.nvme_blocks else "")

    # --- on the sample ------------------------------------------------------------------------------

    def _search(self) -> Iterator[Tried]:
        every = [self._try(Setting(name)) for name in self._policies]
        every += [self._try(Setting(name)) for name in self._keeping(every)]
        yield from every
        best = sorted(every, key=lambda each: -each.ratio)[:2]
        for each in best:
            unset = _UNSET | {"decline"} if self._machine.nvme_blocks else _UNSET
            tuned = [self._try(setting) for setting in one_by_one(each.setting, unset)]
            yield from tuned
            both = together(each, tuned)
            if both is not None:
                yield self._try(both)
        if self._machine.nvme_blocks:
            for rule in self._rules:
                yield self._try(replace(best[0].setting, admission=rule))

    def _keeping(self, every: Sequence[Tried]) -> list[str]:
        """Where sessions wait for tools, the best and leaf-lru with what is kept for them."""
        if not self._machine.hints or not set(_TOOL_CALLS) & set(self._forest.trace.kinds):
            return []
        best = max(every, key=lambda each: each.ratio).setting.policy
        return [f"{name}+keep" for name in dict.fromkeys((best, "leaf-lru"))]

    def _try(self, setting: Setting) -> Tried:
        small, machine = self._sample, self._machine
        scaled = replace(
            machine,
            memory_blocks=small.capacity(machine.memory_blocks),
            nvme_blocks=max(1, round(machine.nvme_blocks * small.rate)) if machine.nvme_blocks else 0,
        )
        progress = self._watch(
            f"trying {setting}, {setting.admission.name}", small.forest.trace.request_count
        )
        trial = try_setting(small.forest, scaled, setting, progress)
        return Tried(setting, small.ratio(trial.ratio()), writes_a_day(small.forest.trace, scaled, trial))

    def _best(self, tried: Sequence[Tried]) -> Tried:
        """The most hits, of those that the drives bear; without a limit, few writes for nearly as many."""
        limit = self._machine.nvme_writes_a_day
        if not self._machine.nvme_blocks:
            return max(tried, key=lambda each: each.ratio)
        borne = [each for each in tried if not limit or each.writes_a_day <= limit]
        if not borne:
            return min(tried, key=lambda each: each.writes_a_day)
        most = max(each.ratio for each in borne)
        near = [each for each in borne if each.ratio >= most - (0.0 if limit else _FREE_WRITES)]
        return min(near, key=lambda each: each.writes_a_day)

    def _others(self, tried: Sequence[Tried], best: Tried, now: Setting) -> list[Setting]:
        """The other policies as they come, the best first, in case the sample misled; not by far, though."""
        base = best.setting.policy.partition("+")[0]
        plain = [
            Setting(name, (), best.setting.admission)
            for name in self._policies
            if name not in (base, now.policy)
        ]
        ratios = {each.setting.policy: each.ratio for each in reversed(tried) if not each.setting.settings}
        near = [setting for setting in plain if ratios[setting.policy] > best.ratio - _FAR]
        return sorted(near, key=lambda setting: -ratios[setting.policy])[:_OTHERS]

    # --- on the whole -------------------------------------------------------------------------------

    def _whole(self, setting: Setting) -> Finalist:
        trace, edge = self._forest.trace, self.first_requests
        progress = self._watch(self._label("confirming", setting), trace.request_count)
        trial = try_setting(self._forest, self._machine, setting, progress)
        return Finalist(
            setting,
            trial,
            trial.ratio(0, edge),
            trial.ratio(edge),
            writes_a_day(trace, self._machine, trial),
        )

    def _choose(self, finalists: Sequence[Finalist]) -> Finalist:
        """The most hits over all; of those about as good, the most in the part after. What is set by hand has
        to be better in both parts than its policy is without; what is not better by ``WORTH`` than what runs
        now, is not better."""
        limit = self._machine.nvme_writes_a_day
        borne = [each for each in finalists if not limit or each.writes_a_day <= limit]
        if not borne:
            return min(finalists, key=lambda each: each.writes_a_day)
        plain = {each.setting.policy: each for each in borne if not each.setting.settings}
        fit = [
            each
            for each in borne
            if not each.setting.settings or _beats(each, plain.get(each.setting.policy))
        ]
        now = finalists[0]
        most = max(each.trial.ratio() for each in fit or borne)
        near = [each for each in fit or borne if each.trial.ratio() >= most - _TIE]
        best = max(near, key=lambda each: each.rest_ratio)
        if now in borne and best.trial.ratio() <= now.trial.ratio() + WORTH and not self._spares(best, now):
            return now
        return best

    def _spares(self, named: Finalist, now: Finalist) -> bool:
        return named.writes_a_day < _SPARING * now.writes_a_day

    def _worth(self, named: Finalist, now: Finalist, found: Difference, in_all: Difference) -> bool:
        """In the part after, too; or clearly in all, and no less there (it may be a quiet time); or it spares
        the drives what they do not bear."""
        limit = self._machine.nvme_writes_a_day
        if limit and now.writes_a_day > limit >= named.writes_a_day:
            return True
        if self._spares(named, now):
            return named.rest_ratio > now.rest_ratio - _FREE_WRITES
        if in_all.clear and in_all.gain > WORTH and found.gain >= 0.0:
            return True
        return found.gain > (WORTH if found.clear else _WORTH_UNCLEAR)


def _beats(tuned: Finalist, plain: Finalist | None) -> bool:
    if plain is None:
        return True
    return tuned.first_ratio > plain.first_ratio + WORTH and tuned.rest_ratio > plain.rest_ratio + WORTH


def first_requests(trace: Trace, share: float) -> int:
    """How many requests the first ``share`` of them are. RAISES BadInput."""
    if not 0 < share < 1:
        raise BadInput("bad_config", f"a first part of {share:.0%}", "both parts must have some requests")
    whole = trace.request_count
    count = int(whole * share)
    if min(count, whole - count) < REQUESTS_MIN:
        raise BadInput(
            "too_small",
            f"{count:,} requests to choose on, and {whole - count:,} to confirm on",
            f"with fewer than {REQUESTS_MIN} of each, what is found is chance",
            "record for longer, or move --split",
        )
    return count


def writes_a_day(trace: Trace, machine: Machine, trial: Trial) -> float:
    """How often the NVMe is written over."""
    span_s = (trace.arrivals_ms[-1] - trace.arrivals_ms[0]) / _MS_PER_S
    if not machine.nvme_blocks or not span_s:
        return 0.0
    return trial.written_blocks / machine.nvme_blocks * DAY_S / span_s


def one_by_one(setting: Setting, unset: Collection[str] = _UNSET) -> Iterator[Setting]:
    """Each of its settings but ``unset`` at its ends, and half-way there, the others as they are."""
    for name, param in policy_class(setting.policy).params().items():
        if name not in unset:
            yield from (setting.with_(name, value) for value in values(param))


def values(param: Param) -> list[float]:
    default, low, high = param.default, param.low, param.high
    wanted = (low, (low + default) / 2, (default + high) / 2, high)
    possible = [float(int(value)) if param.whole else value for value in wanted]
    return [value for value in dict.fromkeys(possible) if value != default]


def together(plain: Tried, tuned: Sequence[Tried]) -> Setting | None:
    """The best value of each setting that was worth it, at once; None for fewer than two."""
    best: dict[str, Tried] = {}
    for each in tuned:
        name = each.setting.settings[0][0]
        if each.ratio > plain.ratio + WORTH / 2 and (name not in best or each.ratio > best[name].ratio):
            best[name] = each
    if len(best) < 2:
        return None
    setting = plain.setting
    for name, each in best.items():
        setting = setting.with_(name, dict(each.setting.settings)[name])
    return setting
