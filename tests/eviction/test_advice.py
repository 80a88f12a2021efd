"""What is advised is better in the time it was not sought on; what is not better is not advised."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.admission import parse_admission
from kvcache.eviction.advise import advice as advice_module
from kvcache.eviction.advise.advice import (
    Adviser,
    Finalist,
    Tried,
    first_requests,
    one_by_one,
    together,
    values,
)
from kvcache.eviction.advise.words import situation, to_set, words, wrapped
from kvcache.eviction.simulate.models import model_named
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.simulate.trial import Difference, Machine, Setting, Trial, try_setting
from kvcache.eviction.traces.edit import split_by_time
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace, read_trace
from kvcache.policy import Param

SHARED = Path(__file__).parents[3] / "shared" / "traces"
POINT = 0.01


def scans(again: int, once: int, rounds: int) -> Trace:
    """``again`` prompts of two blocks come in each round, then ``once`` that never come back: leaf-arc keeps
    the first, leaf-lru neither."""
    parents, leaves = array("i"), array("i")
    for _ in range(again):
        parents.extend((-1, len(parents)))
    for _ in range(rounds):
        leaves.extend(2 * at + 1 for at in range(again))
        for _ in range(once):
            parents.extend((-1, len(parents)))
            leaves.append(len(parents) - 1)
    count = len(leaves)
    return Trace(
        block_tokens=10,
        parents=parents,
        tokens=array("H", [10] * len(parents)),
        leaves=leaves,
        arrivals_ms=array("q", range(0, 1_000 * count, 1_000)),
        input_tokens=array("i", [20] * count),
        output_tokens=array("i", [1] * count),
        sessions=array("i", [-1] * count),
        kind_indexes=array("B", [0] * count),
        kinds=("unknown",),
    )


SCANS = Forest(scans(20, 30, 20))
PLAIN = Forest(generate(Workload(request_count=600, seed=8, block_tokens=64)))
AMONG = ("leaf-lru", "leaf-arc", "leaf-fifo")


def test_what_resists_scans_is_advised_for_scans() -> None:
    found = Adviser(SCANS, Machine(60), policies=AMONG).advise(Setting("leaf-lru"))
    assert found.change and found.named.setting == Setting("leaf-arc")
    assert found.difference.gain > 0.2 and found.difference.clear
    assert found.named.rest_ratio == pytest.approx(
        try_setting(SCANS, Machine(60), Setting("leaf-arc")).ratio(found.first_requests)
    )
    assert found.first_requests == 500
    assert found.tried[0].ratio >= found.tried[-1].ratio


def test_it_is_sought_on_the_first_part_alone() -> None:
    found = Adviser(SCANS, Machine(60), rate=1.0, policies=AMONG).advise(Setting("leaf-lru"))
    tried = {each.setting: each.ratio for each in found.tried}
    assert len(found.finalists) == 2  # leaf-fifo is far behind, and not replayed on everything.
    for each in found.finalists:
        assert each.first_ratio == pytest.approx(tried[each.setting])
    assert any(each.trial.ratio() != pytest.approx(each.first_ratio, abs=1e-3) for each in found.finalists)


def finalist(setting: Setting, first: float, rest: float) -> Finalist:
    wanted = array("q", [1_000, 1_000])
    hits = array("q", [int(1_000 * first), int(1_000 * rest)])
    return Finalist(setting, Trial(hits, wanted), first, rest, 0.0)


def test_what_is_set_by_hand_has_to_be_better_in_both_parts() -> None:
    adviser = Adviser(SCANS, Machine(60), policies=AMONG)
    now, plain = finalist(Setting("leaf-lru"), 0.1, 0.1), finalist(Setting("leaf-hazard"), 0.2, 0.2)
    both = finalist(Setting("leaf-hazard").with_("decline", 2), 0.21, 0.21)
    once = finalist(Setting("leaf-hazard").with_("decline", 4), 0.3, 0.2)
    assert adviser._choose([now, once, plain]) is plain
    assert adviser._choose([now, once, both, plain]) is both
    assert adviser._choose([now, finalist(Setting("leaf-arc"), 0.102, 0.101)]) is now
    later = finalist(Setting("leaf-arc"), 0.18, 0.218)
    assert adviser._choose([now, plain, later]) is later
    assert adviser._choose([now, plain, finalist(Setting("leaf-arc"), 0.17, 0.218)]) is plain


def test_what_already_runs_is_kept() -> None:
    found = Adviser(SCANS, Machine(60), policies=AMONG).advise(Setting("leaf-arc"))
    assert not found.change and found.named is found.now
    assert found.difference.gain == 0.0


def test_where_everything_fits_nothing_is_changed() -> None:
    found = Adviser(PLAIN, Machine(PLAIN.trace.block_count), policies=AMONG).advise(Setting("leaf-lru"))
    assert not found.change


def moving(prompts: int, sets: int) -> list[int]:
    """Each set of prompts comes twice, one after the other, and never again."""
    return [at + prompts * each for each in range(sets) for _ in range(2) for at in range(prompts)]


def test_what_is_good_in_the_first_part_only_is_not_advised() -> None:
    """Scans, then prompts that come back once, soon: what was used twice is of no use any more."""
    first, later = scans(20, 30, 10), moving(29, 9)
    roots = max(later) + 1
    shift, count = first.block_count, first.request_count + len(later)
    mixed = replace(
        first,
        parents=first.parents + array("i", [x for at in range(roots) for x in (-1, shift + 2 * at)]),
        tokens=first.tokens + array("H", [10] * 2 * roots),
        leaves=first.leaves + array("i", [shift + 2 * at + 1 for at in later]),
        arrivals_ms=array("q", range(0, 1_000 * count, 1_000)),
        input_tokens=array("i", [20] * count),
        output_tokens=array("i", [1] * count),
        sessions=array("i", [-1] * count),
        kind_indexes=array("B", [0] * count),
    )
    found = Adviser(Forest(mixed), Machine(60), policies=AMONG).advise(Setting("leaf-lru"))
    arc = next(each for each in found.finalists if each.setting.policy == "leaf-arc")
    assert arc.first_ratio > found.now.first_ratio + 0.2
    assert arc.rest_ratio < found.now.rest_ratio
    assert not found.change


def test_a_quiet_time_after_does_not_speak_against_it() -> None:
    """Scans, then prompts that all fit: there any policy finds the same."""
    first = scans(20, 30, 10)
    leaves = first.leaves + array("i", [at % 20 * 2 + 1 for at in range(500)])
    count = len(leaves)
    quiet = replace(
        first,
        leaves=leaves,
        arrivals_ms=array("q", range(0, 1_000 * count, 1_000)),
        input_tokens=array("i", [20] * count),
        output_tokens=array("i", [1] * count),
        sessions=array("i", [-1] * count),
        kind_indexes=array("B", [0] * count),
    )
    found = Adviser(Forest(quiet), Machine(60), policies=AMONG).advise(Setting("leaf-lru"))
    assert found.named.setting == Setting("leaf-arc") and found.change
    assert found.difference.gain < 0.05


@pytest.mark.slow
def test_with_nvme_what_is_written_is_sought_too() -> None:
    machine = Machine(30, 500, nvme_writes_a_day=1e9)
    wanted = ("touched>=2", "branch-reused", "hazard=30%")
    found = Adviser(PLAIN, machine, policies=("leaf-lru",), rules=wanted).advise(Setting("leaf-lru"))
    rules = {each.setting.admission.name for each in found.tried}
    assert rules >= {"all", *wanted}
    assert found.now.writes_a_day > 0
    limit = found.now.writes_a_day * 0.7
    spared = Adviser(PLAIN, replace(machine, nvme_writes_a_day=limit), policies=("leaf-lru",)).advise(
        Setting("leaf-lru")
    )
    assert spared.change and spared.named.writes_a_day <= limit
    said = str(words(spared, situation(PLAIN, machine, None)))
    assert "Change what is written to NVMe from all to" in said and "drive writes a day instead of" in said


@pytest.mark.slow
def test_a_limit_that_nothing_keeps_is_said() -> None:
    machine = Machine(30, 100, nvme_writes_a_day=1e-6)
    now = Setting("leaf-lru", (), parse_admission("touched>=2"))
    found = Adviser(PLAIN, machine, policies=("leaf-lru",)).advise(now)
    said = " ".join(str(words(found, situation(PLAIN, machine, None))).split())
    assert "The drives bear 1e-06, and nothing that was tried writes less" in said


@pytest.mark.slow
def test_sessions_that_wait_for_tools_are_offered_to_be_kept() -> None:
    tools = Forest(replace(PLAIN.trace, kinds=("tool_use", "end_turn", "x")))
    found = Adviser(tools, Machine(60), policies=("leaf-lru",)).advise(Setting("leaf-lru"))
    assert "leaf-lru+keep" in {each.setting.policy for each in found.tried}
    found = Adviser(tools, Machine(60, hints=False), policies=("leaf-lru",)).advise(Setting("leaf-lru"))
    assert "leaf-lru+keep" not in {each.setting.policy for each in found.tried}


@pytest.mark.slow
def test_the_words() -> None:
    machine = Machine(60)
    adviser = Adviser(SCANS, machine, policies=AMONG)
    said = words(adviser.advise(Setting("leaf-lru")), situation(SCANS, machine, model_named("llama-3.1-8b")))
    assert said.headline == "Change the policy from leaf-lru to leaf-arc."
    notes = dict(said.notes)
    assert notes.keys() == {"it buys", "the doubt", "as good as", "what is left", "to set it"}
    gain = Difference(0.5, 0.1)
    found = replace(adviser.advise(Setting("leaf-lru")), difference=gain)
    rest_tokens, rest_s = 20 * 500, 499  # From the first request of the second part to the last of all.
    expected = f"{0.5 * rest_tokens * 3_600 / rest_s:,.0f} tokens an hour"
    buys = dict(words(found, situation(SCANS, machine, None)).notes)["it buys"]
    assert notes["it buys"].startswith("+") and expected in buys
    assert notes["to set it"].startswith(
        "kvcache tune set --policy leaf-arc changes a running node; policy = "
    )
    kept = words(adviser.advise(Setting("leaf-arc")), situation(SCANS, machine, None))
    assert kept.headline == "Keep leaf-arc: nothing that was tried is clearly better."
    assert "with 2 times as much" in dict(kept.notes)["memory"]
    assert all(len(line) < 110 for line in str(said).splitlines())


def test_what_to_set() -> None:
    now, tuned = Setting("leaf-lru"), Setting("leaf-hazard").with_("decline", 2.5).with_("samples", 32)
    assert to_set(tuned, now, nvme=False) == (
        "kvcache tune set --policy leaf-hazard --param decline=2.5 --param samples=32 changes a running "
        'node; policy = "leaf-hazard", policy_params = "decline=2.5,samples=32" in its settings keeps it so.'
    )
    rule = replace(now, admission=parse_admission("touched>=2"))
    assert to_set(rule, now, nvme=True) == 'nvme_admission = "touched>=2" is a setting.'
    assert "replayed only" in to_set(replace(now, admission=parse_admission("hazard=50%")), now, nvme=True)


def test_values_are_within_what_is_possible() -> None:
    assert values(Param(1.0, 0.0, 4.0, "")) == [0.0, 0.5, 2.5, 4.0]
    assert values(Param(0.0, 0.0, 4.0, "")) == [2.0, 4.0]
    assert values(Param(1, 0, 4, "", whole=True)) == [0.0, 2.0, 4.0]
    names = {name for each in one_by_one(Setting("leaf-hazard+keep")) for name, _ in each.settings}
    assert names == {"samples", "decay", "memory", "decline", "tool_call_ms"}


def test_settings_that_were_worth_it_are_tried_together() -> None:
    base = Setting("leaf-hazard")
    tuned = [
        Tried(base.with_("decline", 2), 0.52),
        Tried(base.with_("decline", 4), 0.53),
        Tried(base.with_("samples", 32), 0.51),
        Tried(base.with_("decay", 1), 0.5),
    ]
    assert together(Tried(base, 0.5), tuned) == base.with_("decline", 4).with_("samples", 32)
    assert together(Tried(base, 0.5), tuned[:2]) is None


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01])
def test_too_little_of_either_part_is_refused(share: float) -> None:
    with pytest.raises(BadInput):
        first_requests(PLAIN.trace, share)


def test_long_lines_are_wrapped() -> None:
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("", 7) == [""]
    assert advice_module.REQUESTS_MIN == 100


EXHAUSTIVE: Mapping[str, tuple[float, ...]] = {
    "samples": (0, 32, 256),
    "decay": (0.5, 0.9, 0.95, 1.0),
    "memory": (0, 1, 64),
    "decline": (0, 0.5, 2, 4),
}


def exhaustive(forest: Forest, blocks: int) -> float:
    base = Setting("leaf-hazard")
    every = [Setting(name) for name in ("leaf-lru", "leaf-hazard", "leaf-arc", "leaf-fifo")]
    every += [base.with_(name, value) for name, wanted in EXHAUSTIVE.items() for value in wanted]
    return max(try_setting(forest, Machine(blocks), each).ratio() for each in every)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["mooncake_conversation_first_half", "mooncake_synthetic", "lmcache_agent_b64"]
)
def test_what_the_first_half_says_is_nearly_the_best_in_the_second(name: str) -> None:
    """Within a point at three of four sizes, and within two at the fourth, of which a first half may say
    nothing: benchmarks/README.md has the figures."""
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} IS NOT THERE")
    first, second = (Forest(part) for part in split_by_time(read_trace(path), 0.5))
    below = []
    for percent in (1, 3, 10, 30):
        machine = Machine(first.trace.block_count * percent // 100)
        named = Adviser(first, machine).advise(Setting("leaf-lru")).named.setting
        blocks = second.trace.block_count * percent // 100
        below.append(exhaustive(second, blocks) - try_setting(second, Machine(blocks), named).ratio())
    assert sorted(below)[-2] <= POINT, below
    assert max(below) <= 2 * POINT, below
