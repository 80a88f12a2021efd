"""The policy of a running node, changed: nothing is lost, and what is wrong with a wish is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.eviction.choice import Choice, parse_choice
from kvcache.eviction.leaf_hazard import LeafHazard
from kvcache.eviction.registry import POLICIES
from kvcache.leaf_lru import LeafLru
from kvcache.server import tuning
from kvcache.server.node import Node
from kvcache.wire_tuning import InForce
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.talk import HASHES, connected, deadline, held, lease, opened, refused, save, stats

PATIENCE_NS = 20 * NS_PER_S


def tune(
    channel: BlockingChannel, policy: str, params: Mapping[str, float] | None = None, tier: str = "host"
) -> wire.Tuned:
    return told(channel, wire.Tune("set", tier, policy, dict(params or {})))


def told(channel: BlockingChannel, request: wire.Tune) -> wire.Tuned:
    reply = channel.call(request, deadline())
    assert isinstance(reply, wire.Tuned)
    return reply


def settled(channel: BlockingChannel, tier: str = "host") -> InForce:
    """Once no change is under way any more."""
    end_ns = SystemClock().now_ns() + PATIENCE_NS
    while SystemClock().now_ns() < end_ns:
        now = told(channel, wire.Tune("tell")).tiers[tier]
        if not now.coming:
            return now
    raise AssertionError(now)


def policy_of(node: EmbeddedNode) -> object:
    return node.node.core.ledger.policy._policy


def test_a_node_says_what_decides(serve: Serve) -> None:
    node = serve(policy="leaf-hazard", policy_params="samples=16, decline=0")
    with connected(node.node.address) as channel:
        now = told(channel, wire.Tune("tell"))
        assert list(now.tiers) == ["host"]
        assert (now.tiers["host"].policy, now.tiers["host"].params) == (
            "leaf-hazard",
            {"samples": 16, "decline": 0},
        )
        policy = policy_of(node)
        assert isinstance(policy, LeafHazard)
        assert (policy._samples, policy._decline) == (16, 0)


def test_another_policy_takes_over_and_nothing_is_lost(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEP_BLOCKS", 3)
    node = serve()
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:20])
        save(channel, namespace, HASHES[20:30])
        lease(channel, namespace, HASHES[:12])
        asked = tune(channel, "leaf-hazard", {"samples": 4}).tiers["host"]
        assert (asked.policy, asked.coming) == ("leaf-lru", "leaf-hazard (samples=4)")
        now = settled(channel)
        assert (now.policy, now.params, now.blocks) == ("leaf-hazard", {"samples": 4}, 30)
        assert "took over from leaf-lru" in now.said
        assert isinstance(policy_of(node), LeafHazard)
        assert held(channel, namespace, HASHES[:20]) == 20
        assert held(channel, namespace, HASHES[20:30]) == 10
        assert stats(channel)["policy_changes"] == 1
        assert save(channel, namespace, HASHES[40:64]) == 24


def test_what_was_learned_goes_along(serve: Serve) -> None:
    node = serve(policy="leaf-hazard")
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        for end in range(2, 40):
            save(channel, namespace, HASHES[:end])
            lease(channel, namespace, HASHES[:end])
        tune(channel, "leaf-hazard+keep", {"samples": 2})
        assert "what was learned was handed over" in settled(channel).said
        tune(channel, "leaf-lru")
        assert "learns from now on" in settled(channel).said


def test_the_lower_tier_has_its_own(serve: Serve, tmp_path: object) -> None:
    node = serve(nvme=f"{tmp_path}/nvme:64MiB", nvme_segment="16MiB")
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:2])
        tune(channel, "leaf-arc", tier="nvme")
        assert settled(channel, "nvme").policy == "leaf-arc"
        now = told(channel, wire.Tune("tell")).tiers
        assert (now["host"].policy, now["nvme"].policy) == ("leaf-lru", "leaf-arc")
        tune(channel, "leaf-hazard")
        assert settled(channel).policy == "leaf-hazard"
        policy = policy_of(node)
        assert isinstance(policy, LeafHazard)
        assert policy._decline == 0, "what it declined would never get to NVMe"


@pytest.mark.parametrize(
    ("request_of", "words"),
    [
        (lambda: wire.Tune("set", policy="leaf_lru"), "did you mean 'leaf-lru'"),
        (lambda: wire.Tune("set", policy=""), "no policy is called"),
        (lambda: wire.Tune("set", policy="belady"), "no policy is called"),
        (lambda: wire.Tune("set", policy="leaf-lru+keep+keep"), "each once"),
        (lambda: wire.Tune("set", policy="leaf-hazard", params={"sample": 4.0}), "did you mean 'samples'"),
        (lambda: wire.Tune("set", policy="leaf-hazard", params={"samples": 1e9}), "0 to 256 is possible"),
        (lambda: wire.Tune("set", policy="leaf-hazard", params={"decay": float("nan")}), "is possible"),
        (lambda: wire.Tune("set", policy="leaf-lru", params={"x": 1.0}), "it has none"),
        (lambda: wire.Tune("set", "nvme", "leaf-lru"), "this node has host"),
        (lambda: wire.Tune("set", policy="x" * 1_000), "too_large"),
    ],
)
def test_a_wish_that_cannot_be_met_changes_nothing(
    serve: Serve, request_of: Callable[[], wire.Tune], words: str
) -> None:
    node = serve()
    before = policy_of(node)
    with connected(node.node.address) as channel:
        code = "too_large" if words == "too_large" else "bad_config"
        assert words in refused(code, channel, request_of())
        refused("bad_message", channel, wire.Tune("make it better"))
        now = told(channel, wire.Tune("tell")).tiers["host"]
        assert (now.policy, now.coming) == ("leaf-lru", "")
    assert policy_of(node) is before


class Broken(LeafLru):
    """Offered under a name of its own in the tests below."""


def offer(monkeypatch: pytest.MonkeyPatch, **hooks: Callable[..., object]) -> None:
    monkeypatch.setitem(POLICIES, "broken", type("Broken", (LeafLru,), dict(hooks)))


def fail(*_: object) -> None:
    raise RuntimeError("it cannot")


def test_in_memory_above_nvme_and_there_nothing_is_declined(serve: Serve, tmp_path: Path) -> None:
    node = serve(nvme=f"{tmp_path}/nvme:64MiB", nvme_segment="16MiB", policy="leaf-hazard")
    core = node.node.core
    assert core.stack is not None

    def declines() -> list[float]:
        assert core.stack is not None
        found = [ledger.policy._policy for ledger in (core.ledger, core.stack.ledger)]
        return [policy._decline for policy in found if isinstance(policy, LeafHazard)]

    assert declines() == [0, 0]
    with connected(node.node.address) as channel:
        for params, expected in (({"samples": 4.0}, 0), ({"decline": 2.0}, 2)):
            for tier in ("host", "nvme"):
                tune(channel, "leaf-hazard", params, tier)
                settled(channel, tier)
            assert declines() == [expected, expected]


def test_one_that_cannot_start_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, __init__=fail)
    node = serve()
    with connected(node.node.address) as channel:
        assert "cannot start" in refused("bad_config", channel, wire.Tune("set", policy="broken"))
        assert settled(channel).policy == "leaf-lru"


def test_one_that_fails_while_it_is_told_does_not_take_over(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, on_admitted=fail)
    node = serve()
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:9])
        tune(channel, "broken")
        now = settled(channel)
        assert now.policy == "leaf-lru"
        assert "leaf-lru goes on, as broken could not take over" in now.said
        assert held(channel, namespace, HASHES[:9]) == 9


def test_one_that_fails_later_is_replaced_and_it_is_said(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, victims=fail)
    node = serve(capacity="8MiB")
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        tune(channel, "broken")
        assert settled(channel).policy == "broken"
        names = [bytes([number % 251, number // 251]) * 8 for number in range(1, 300)]
        for name in names:
            save(channel, namespace, [name])
        now = settled(channel)
        assert "it cannot" in now.fault
        reply = channel.call(wire.Stats(), deadline())
        assert isinstance(reply, wire.StatsReply)
        assert any("leaf-lru decides in tier host, as broken" in text for text in reply.troubles)
        assert held(channel, namespace, names[-1:]) == 1
        tune(channel, "leaf-hazard")
        assert settled(channel).fault == ""
        assert node.node.core.tuning.troubles() == []


def for_ever(*_: object) -> None:
    while True:
        pass


def test_one_that_never_comes_back_is_replaced_and_it_is_said(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, on_request=for_ever)
    monkeypatch.setattr(tuning, "LIMIT_NS", 50_000_000)
    monkeypatch.setattr(tuning, "LOOK_S", 0.01)
    node = serve()
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        tune(channel, "broken")
        assert settled(channel).policy == "broken"
        save(channel, namespace, HASHES[:4])
        assert lease(channel, namespace, HASHES[:4]).count == 4
        assert "TooSlow" in settled(channel).fault
        assert held(channel, namespace, HASHES[:4]) == 4


def test_a_node_that_ends_meanwhile_just_ends(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEP_BLOCKS", 0)  # It never gets anywhere.
    node = serve()
    with connected(node.node.address) as channel:
        save(channel, opened(channel), HASHES[:4])
        assert tune(channel, "leaf-arc").tiers["host"].coming == "leaf-arc"


def test_settings_that_no_policy_has_are_refused_at_the_start() -> None:
    for policy, params, words in (
        ("leaf-lruu", "", "did you mean"),
        ("leaf-hazard", "samples", "name=number"),
        ("leaf-hazard", "samples=4,samples=5", "twice"),
        ("leaf-hazard", "samples=-1", "is possible"),
        ("leaf-hazard", "samples=16.5", "a whole number is"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            Node(NodeConfig(policy=policy, policy_params=params, http="none"))
        assert caught.value.code == "bad_config"


def test_a_choice_says_what_it_is() -> None:
    assert (
        parse_choice("leaf-hazard", "samples=16, decay=0.95").said == "leaf-hazard (samples=16, decay=0.95)"
    )
    assert Choice("leaf-lru").said == "leaf-lru"
    assert Choice("leaf-hazard").understands(Choice("leaf-hazard+keep"))
    assert not Choice("leaf-hazard").understands(Choice("leaf-arc"))
