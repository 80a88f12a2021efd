"""What stands around a policy: the contract around several, and what each wrapper keeps."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.keep import Keep
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.eviction.registry import policy_class
from kvcache.eviction.wrapper import ask_more, wrapped
from kvcache.policy import RequestContext
from kvcache.testing.policies import Grove, PolicyContract

MS = 1_000_000


def said(now_ms: int = 1, **more: object) -> RequestContext:
    return RequestContext(now_ns=now_ms * MS, **more)  # type: ignore[arg-type]


class TestKeep(PolicyContract):
    make = policy_class("leaf-lru+keep")

    def test_the_higher_priority_stays(self) -> None:
        grove = self.grove()
        grove.store("a/b", said(priority=80))
        grove.store("c/d", said(priority=60))
        grove.store("e/f")
        assert grove.evict(6) == ["e/f", "e", "c/d", "c", "a/b", "a"]

    def test_the_lower_priority_goes_before_all_else(self) -> None:
        grove = self.grove("a", "b")
        grove.store("c/d", said(priority=20))
        grove.store("e", said(priority=10))
        assert grove.evict(5) == ["e", "c/d", "c", "a", "b"]

    def test_a_low_request_lowers_nothing_that_others_use(self) -> None:
        grove = self.grove("s/a", "t")
        grove.request("s/a", said(priority=10))
        assert grove.evict(3) == ["t", "s/a", "s"]

    def test_what_was_low_rises_when_it_is_used(self) -> None:
        grove = self.grove("t")
        grove.store("a", said(priority=10))
        grove.request("a")
        assert grove.evict(2) == ["t", "a"]

    def test_what_is_low_stays_low_beyond_its_duration(self) -> None:
        grove = self.grove()
        grove.store("a", said(0, priority=10, keep_ms=100))
        grove.request("a", said(200, priority=20))
        grove.store("b", said(200, priority=30))
        assert grove.evict(2, said(300)) == ["a", "b"]

    def test_a_duration_ends(self) -> None:
        grove = self.grove()
        grove.store("a", said(0, priority=90, keep_ms=100))
        grove.store("b")
        assert grove.victims(1, said(99)) == ["b"]
        assert grove.victims(1, said(101)) == ["a"]

    def test_a_session_that_waits_for_a_tool_stays(self) -> None:
        grove = self.grove()
        grove.store("a", said(0, hint="tool_call"))
        grove.store("b", said(0, hint="turn_end"))
        assert grove.victims(1, said(119_000)) == ["b"]
        assert grove.victims(1, said(121_000)) == ["a"]

    def test_it_stays_as_long_as_the_engine_expects_and_a_half_more(self) -> None:
        grove = self.grove()
        grove.store("a", said(0, hint="tool_call", expected_gap_ms=1_000))
        grove.store("b")
        assert grove.victims(1, said(1_400)) == ["b"]
        assert grove.victims(1, said(1_600)) == ["a"]

    def test_what_ranks_high_goes_when_nothing_else_can(self) -> None:
        grove = self.grove()
        grove.store("a/b/c", said(priority=100))
        assert grove.victims(1) == ["a/b/c"]
        assert grove.evict(3) == ["a/b/c", "a/b", "a"]

    def test_a_shared_block_keeps_its_highest_rank(self) -> None:
        grove = self.grove()
        grove.store("s/a", said(priority=90))
        grove.store("t")
        grove.request("s/a", said(priority=50))
        assert grove.evict(3) == ["t", "s/a", "s"]

    def test_rank_holds_however_many_rank_high(self) -> None:
        grove = self.grove()
        for at in range(5_000):
            grove.store(f"{at}", said(priority=100))
        grove.store("a/b")
        assert grove.evict(2) == ["a/b", "a"]
        assert grove.evict(1) == ["0"]

    def test_what_ends_counts_for_blocks_that_are_leaves_by_then_only(self) -> None:
        grove = self.grove()
        grove.store("a/b/c", said(0, priority=90, keep_ms=100))
        grove.drop(["a/b/c"], "quarantined")
        for at in range(100):
            grove.store(f"{at}", said(1, priority=80))
        assert grove.victims(1, said(99)) == ["0"]
        assert grove.evict(3, said(101)) == ["a/b", "a", "0"]

    def test_what_has_ended_ranks_no_higher_than_what_is_said_then(self) -> None:
        grove = self.grove()
        grove.store("a", said(0, priority=90, keep_ms=100))
        grove.request("a", said(200, priority=40))
        grove.store("b", said(200, priority=60))
        assert grove.evict(2, said(201)) == ["a", "b"]

    @pytest.mark.parametrize("name", ["leaf-lru+keep", "leaf-hazard+keep", "leaf-arc+keep"])
    def test_nothing_goes_that_outranks_a_leaf_that_stays(self, name: str) -> None:
        random = Random(11)
        grove = make(name, retain_ms=30)
        policy = grove.policy
        assert isinstance(policy, Keep)
        for now_ms in range(1, 500):
            context = said(
                now_ms,
                priority=random.choice((10, 50, 50, 80, 100)),
                hint=random.choice(("unknown", "tool_call")),
                expected_gap_ms=random.choice((None, 20)),
                keep_ms=random.choice((None, 5, 50)),
            )
            path = "/".join(random.choice("abc") for _ in range(random.randint(1, 5)))
            grove.request(path, context)
            grove.store(path, context)
            if random.random() < 0.4:
                (named,) = grove.victims(1, context)
                leaves = [block for block in grove.tree.linked() if grove.tree.is_evictable(block)]
                ranks = [max(50, policy._rank(block)) for block in leaves]
                assert max(50, policy._rank(grove.block(named))) == min(ranks)
                grove.evict(random.randint(1, 4), context)
        assert len(policy._ending) < 1_000

    def test_the_base_is_asked_for_no_more_however_many_rank_high(self) -> None:
        class Counting(LeafLru):
            asked = 0

            def victims(self, context: RequestContext, count: int) -> Sequence[int]:
                Counting.asked = max(Counting.asked, count)
                return super().victims(context, count)

        grove = Grove(wrapped(Keep, Counting))
        for at in range(1_000):
            grove.store(f"{at}/x", said(hint="tool_call"))
        grove.evict(2)
        assert Counting.asked == ask_more(2)


def make(name: str, **settings: float) -> Grove:
    found = policy_class(name)
    return Grove(lambda tree, capacity: found(tree, capacity, **settings))  # type: ignore[arg-type]


def test_what_was_just_stored_is_retained() -> None:
    grove = make("leaf-lru+keep", retain_ms=1_000)
    grove.store("x", said(0))
    grove.store("y", said(2_000))
    grove.request("x", said(2_100))
    assert grove.evict(2, said(2_500)) == ["x", "y"], "x was only found lately"
    grove.store("a", said(0))
    grove.request("a", said(2_900))
    grove.store("b", said(2_000))
    grove.store("c", said(2_500))
    assert grove.evict(3, said(3_200)) == ["a", "b", "c"]
    grove.store("d", said(5_000))
    grove.store("e", said(3_000))
    assert grove.victims(1, said(5_500)) == ["d"]


def test_a_tenant_beyond_its_share_gives_first() -> None:
    grove = make("leaf-lru+keep", tenant_share=0.5)
    grove.store("a/b", said(tenant="small"))
    for name in ("u/v", "w/x", "y/z"):
        grove.store(name, said(tenant="large"))
    assert grove.evict(2) == ["u/v", "u"]
    assert grove.evict(1) == ["w/x"]
    assert grove.evict(2) == ["a/b", "a"]


def test_tenants_that_have_gone_are_forgotten() -> None:
    grove = make("leaf-lru+keep", tenant_share=0.5)
    for turn in range(2_000):
        grove.store("a", said(tenant=f"t{turn}"))
        grove.drain()
    policy = grove.policy
    assert not policy._counts and not policy._kinds  # type: ignore[attr-defined]
    assert len(policy._leaves._piles) < 1_000  # type: ignore[attr-defined]


class TestKeepAroundHazard(PolicyContract):
    make = policy_class("leaf-hazard+keep")


class TestKeepAroundFifo(PolicyContract):
    make = policy_class("leaf-fifo+keep")


class TestCost(PolicyContract):
    make = policy_class("leaf-lru+cost")

    def test_without_weight_the_order_is_the_bases(self) -> None:
        assert self.grove("a/b/c", "d", "e").evict(5) == ["a/b/c", "a/b", "a", "d", "e"]


class TestAllAroundArc(PolicyContract):
    make = policy_class("leaf-arc+keep+cost")


def test_with_weight_shallow_branches_go_before_deep_ones() -> None:
    grove = make("leaf-lru+cost", cost_weight=2)
    for path in ("a/b/c/d", "e", "f"):
        grove.store(path)
    assert grove.evict(2) == ["e", "f"]
    assert grove.evict(9) == ["a/b/c/d", "a/b/c", "a/b", "a"]


def test_settings_of_both_are_taken_and_others_refused() -> None:
    found = policy_class("leaf-hazard+keep")
    assert {"decline", "tool_call_ms"} <= found.params().keys()
    with pytest.raises(TypeError):
        make("leaf-hazard+keep", colour=1.0)


@pytest.mark.parametrize("name", ["leaf-lru+", "leaf-lru+wrap", "leaf-lru+keep+keep", "+keep"])
def test_wrappers_that_nobody_knows_are_refused(name: str) -> None:
    with pytest.raises(BadInput) as refused:
        policy_class(name)
    assert refused.value.code == "bad_config"
