"""Trials find what replays find, and the doubt about a difference is as large as chance makes it."""

from __future__ import annotations

from array import array
from random import Random

import pytest

from kvcache.eviction.admission import parse_admission
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.spill import Below
from kvcache.eviction.simulate.tiers import replay_tiers
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.simulate.trial import Difference, Machine, Setting, Trial, difference, try_setting
from kvcache.eviction.traces.generate import Workload, generate

FOREST = Forest(generate(Workload(request_count=300, seed=6, block_tokens=64)))


@pytest.mark.parametrize("policy", ["leaf-lru", "leaf-arc", "leaf-hazard"])
def test_it_is_a_replay(policy: str) -> None:
    trial = try_setting(FOREST, Machine(100), Setting(policy))
    assert trial.ratio() == replay(FOREST, policy, 100).prefix_token_hit_ratio
    assert trial.written_blocks == 0


def test_settings_reach_the_policy() -> None:
    setting = Setting("leaf-hazard").with_("decline", 0.0).with_("samples", 32)
    assert str(setting) == "leaf-hazard (decline=0, samples=32)"
    settings = {"decline": 0.0, "samples": 32.0}
    expected = replay(FOREST, "leaf-hazard", 100, settings=settings).hit_tokens
    assert sum(try_setting(FOREST, Machine(100), setting).hits) == expected
    assert setting.with_("decline", 0.0) == setting


def test_a_replay_begins_like_one_of_its_first_part() -> None:
    first = Forest(FOREST.trace.head(120))
    for setting in (Setting("leaf-lru"), Setting("leaf-hazard")):
        whole = try_setting(FOREST, Machine(100), setting)
        part = try_setting(first, Machine(100), setting)
        assert whole.hits[:120] == part.hits
        assert whole.ratio(0, 120) == part.ratio()


@pytest.mark.slow
def test_nvme_below() -> None:
    rule = parse_admission("touched>=2")
    told: list[int] = []
    trial = try_setting(FOREST, Machine(50, 300), Setting("leaf-lru", (), rule), told.append)
    expected = replay_tiers(FOREST, "leaf-lru", 50, Below(300, admission=rule))
    assert sum(trial.hits) == expected.whole.hit_tokens
    assert trial.written_blocks == expected.written_blocks > 0
    assert told[-1] == 300
    with_nvme = try_setting(FOREST, Machine(50, 300), Setting("leaf-hazard"))
    assert (
        with_nvme.hits
        == try_setting(FOREST, Machine(50, 300), Setting("leaf-hazard").with_("decline", 0)).hits
    )


def made(share: float, noise: float, count: int, random: Random) -> Trial:
    wanted = array("q", [1_000] * count)
    hits = array("q", [int(1_000 * min(1, max(0, share + random.gauss(0, noise)))) for _ in range(count)])
    return Trial(hits, wanted)


@pytest.mark.slow
def test_the_truth_is_within_the_doubt_nearly_always() -> None:
    random = Random(1)
    inside = 0
    for _ in range(200):
        ours, theirs = made(0.52, 0.1, 400, random), made(0.5, 0.1, 400, random)
        found = difference(ours, theirs, 0, 400)
        inside += abs(found.gain - 0.02) <= found.doubt
    assert 175 <= inside <= 199


def test_no_difference_and_few_requests() -> None:
    trial = try_setting(FOREST, Machine(100), Setting("leaf-lru"))
    assert difference(trial, trial, 0, 300) == Difference(0.0, 0.0)
    assert difference(trial, trial, 5, 5) == Difference(0.0, 0.0)
    assert difference(trial, trial, 5, 6).doubt == 2.0
    assert not Difference(0.01, 0.02).clear and Difference(-0.03, 0.02).clear
