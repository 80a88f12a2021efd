"""Advice in plain words: what to change, what it buys, how sure that is, and what else would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcache.eviction.advise.advice import Advice, Finalist
from kvcache.eviction.amounts import gib_text, number_text
from kvcache.eviction.simulate.curves import Watch, unwatched
from kvcache.eviction.simulate.models import Model
from kvcache.eviction.simulate.replay import BELADY, replay
from kvcache.eviction.simulate.stack_curve import StackCurve, stack_curve
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.simulate.trial import Machine, Setting

_WIDE = 96
_HOUR_MS = 3_600_000
_MORE_MEMORY = (2, 4)
_NODE_RULES = ("all", "touched>=2", "branch-reused", "hazard")
_NO_RULE = " No setting of a node writes by {}: it was replayed only."


@dataclass(frozen=True, slots=True)
class Situation:
    """What else is known. ``optimum`` is what nobody can beat over the whole time; None with NVMe."""

    forest: Forest
    machine: Machine
    model: Model | None
    curve: StackCurve
    optimum: float | None

    @property
    def block_bytes(self) -> int:
        return self.forest.trace.block_tokens * self.model.token_bytes if self.model else 0

    def amount(self, blocks: int) -> str:
        if not self.model:
            return f"{blocks:,} blocks"
        return f"{blocks:,} blocks ({gib_text(blocks * self.block_bytes)})"


def situation(forest: Forest, machine: Machine, model: Model | None, watch: Watch = unwatched) -> Situation:
    optimum = None
    if not machine.nvme_blocks:
        progress = watch("the optimum", forest.trace.request_count)
        optimum = replay(forest, BELADY, machine.memory_blocks, progress=progress).prefix_token_hit_ratio
    return Situation(forest, machine, model, stack_curve(forest), optimum)


@dataclass(frozen=True, slots=True)
class Words:
    """``headline`` is one sentence; ``notes`` are (what it is about, sentences)."""

    headline: str
    notes: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max(len(about) for about, _ in self.notes)
        lines = [self.headline, ""]
        for about, text in self.notes:
            first, *rest = wrapped(text, _WIDE - width)
            lines.append(f"  {about.ljust(width)}  {first}")
            lines += [f"  {' ' * width}  {line}" for line in rest]
        return "\n".join(lines)


def words(advice: Advice, at: Situation) -> Words:
    if advice.change:
        return Words(_headline(advice), tuple(_change(advice, at)))
    return Words(_keep(advice), tuple(_kept(advice, at)))


def _headline(advice: Advice) -> str:
    now, named = advice.now.setting, advice.named.setting
    changes = []
    if named.policy != now.policy:
        changes.append(f"the policy from {now.policy} to {named.policy}")
    for name, value in named.settings:
        if dict(now.settings).get(name) != value or named.policy != now.policy:
            changes.append(f"its setting {name} to {value:g}")
    if named.admission != now.admission:
        changes.append(f"what is written to NVMe from {now.admission.name} to {named.admission.name}")
    sure = advice.difference.clear or advice.difference.gain <= 0
    return f"{'Change' if sure else 'Consider changing'} {', and '.join(changes)}."


def _change(advice: Advice, at: Situation) -> Iterator[tuple[str, str]]:
    now, named, rest = advice.now, advice.named, advice.requests - advice.first_requests
    gain, doubt = advice.difference.gain * 100, advice.difference.doubt * 100
    yield (
        "it buys",
        f"{gain:+.1f} points of prompt tokens found: {named.rest_ratio:.1%} instead of {now.rest_ratio:.1%}, "
        f"in the {rest:,} requests after those it was sought on.{_an_hour(advice, at)}",
    )
    if at.machine.nvme_blocks:
        less, more = number_text(named.writes_a_day), number_text(now.writes_a_day)
        yield "wear", f"{less} drive writes a day instead of {more}.{_too_much(named, at)}"
    yield "the doubt", _doubt(gain, doubt, rest)
    if at.optimum is not None:
        yield from _in_memory(advice, at, at.optimum)
    yield "to set it", to_set(named.setting, now.setting, bool(at.machine.nvme_blocks))


def _an_hour(advice: Advice, at: Situation) -> str:
    arrivals = at.forest.trace.arrivals_ms
    span_ms = arrivals[-1] - arrivals[advice.first_requests]
    if span_ms <= 0 or advice.difference.gain <= 0:
        return ""
    more = advice.difference.gain * sum(advice.named.trial.wanted[advice.first_requests :])
    hourly = more * _HOUR_MS / span_ms
    text = f" That is {hourly:,.0f} tokens an hour that need no prefill"
    if at.model is not None:
        text += f", {at.model.flops(int(hourly), 0) / 1e15:,.0f} PFLOP on {at.model.name} before attention"
    return text + "."


def _doubt(gain: float, doubt: float, rest: int) -> str:
    low, high = f"{gain - doubt:+.1f}", f"{gain + doubt:+.1f} points"
    if abs(gain) > doubt:
        return f"19 times of 20 between {low} and {high}, if what comes is like these {rest:,} requests."
    return (
        f"large: {low} to {high}. From one stretch of requests to the next it varies by more than it buys; "
        "a longer trace would tell."
    )


def _too_much(each: Finalist, at: Situation) -> str:
    limit = at.machine.nvme_writes_a_day
    if not limit or each.writes_a_day <= limit:
        return ""
    todo = "buy more NVMe, or set a write limit"
    return f" The drives bear {limit:g}, and nothing that was tried writes less: {todo}."


def _in_memory(advice: Advice, at: Situation, optimum: float) -> Iterator[tuple[str, str]]:
    now, named = advice.now.trial.ratio(), advice.named.trial.ratio()
    blocks = at.curve.least_blocks(named)
    if blocks > at.machine.memory_blocks:
        more = blocks / at.machine.memory_blocks - 1
        yield "as good as", f"{at.amount(blocks)} of memory under leaf-lru, {more:.0%} more than there is."
    if optimum > now:
        share = (named - now) / (optimum - now)
        yield (
            "what is left",
            f"over the whole time {named:.1%} are found, {now:.1%} before; somebody who knew the future "
            f"would find {optimum:.1%}, so this is {share:.0%} of what any policy could add.",
        )


def _keep(advice: Advice) -> str:
    return f"Keep {advice.now.setting}: nothing that was tried is clearly better."


def _kept(advice: Advice, at: Situation) -> Iterator[tuple[str, str]]:
    now, rest = advice.now, advice.requests - advice.first_requests
    yield (
        "it finds",
        f"{now.rest_ratio:.1%} of the tokens of the last {rest:,} prompts, {now.trial.ratio():.1%} of all.",
    )
    if at.machine.nvme_blocks:
        yield "wear", f"{number_text(now.writes_a_day)} drive writes a day.{_too_much(now, at)}"
    others = [each for each in advice.finalists if each is not now]
    if others:
        best = max(others, key=lambda each: each.trial.ratio())
        yield "the next", f"{best.setting} finds {best.rest_ratio:.1%} and {best.trial.ratio():.1%} of them."
    if at.optimum is not None:
        yield (
            "what is left",
            f"somebody who knew the future would find {at.optimum:.1%}, and a cache without end "
            f"{at.curve.prefix_token_hit_ratio(len(at.curve.hit_tokens)):.1%}.",
        )
        yield "memory", _more_memory(at)


def _more_memory(at: Situation) -> str:
    parts = [
        f"{at.curve.prefix_token_hit_ratio(times * at.machine.memory_blocks):.1%} with {times} times as much"
        for times in _MORE_MEMORY
    ]
    here = at.curve.prefix_token_hit_ratio(at.machine.memory_blocks)
    return f"leaf-lru finds {here:.1%} in {at.amount(at.machine.memory_blocks)}, {', '.join(parts)}."


def to_set(setting: Setting, now: Setting, nvme: bool) -> str:
    """Commands and settings of a node."""
    params = "".join(f" --param {name}={value:g}" for name, value in setting.settings)
    text = ""
    if (setting.policy, setting.settings) != (now.policy, now.settings):
        text = f"kvcache tune set --policy {setting.policy}{params}"
        kept = f'policy = "{setting.policy}"'
        if setting.settings:
            kept += f', policy_params = "{",".join(f"{name}={value:g}" for name, value in setting.settings)}"'
        text += f" changes a running node; {kept} in its settings keeps it so."
    if nvme and setting.admission != now.admission:
        rule = setting.admission.name
        text += f' nvme_admission = "{rule}" is a setting.' if rule in _NODE_RULES else _NO_RULE.format(rule)
    return text.strip()


def wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def finalist_dict(each: Finalist) -> dict[str, object]:
    return {
        "policy": each.setting.policy,
        "settings": dict(each.setting.settings),
        "admit": each.setting.admission.name,
        "prefix_token_hit_ratio": each.trial.ratio(),
        "first_part": each.first_ratio,
        "second_part": each.rest_ratio,
        "drive_writes_a_day": each.writes_a_day,
    }
