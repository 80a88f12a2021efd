"""Our policies: the contract, and what each one promises beyond it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.choice import Choice
from kvcache.eviction.fifo import Fifo
from kvcache.eviction.leaf_hazard import LeafHazard
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.eviction.registry import POLICIES, policy_class, policy_names, willing
from kvcache.eviction.wrapper import Wrapper
from kvcache.policy import Param, RequestContext
from kvcache.prefix import PrefixTree
from kvcache.testing.policies import CONTEXT, PolicyContract


class TestLeafLru(PolicyContract):
    make = LeafLru

    def test_oldest_use_goes_first(self) -> None:
        grove = self.grove("a", "b", "c")
        grove.request("a")
        assert grove.evict(3) == ["b", "c", "a"]

    def test_a_use_counts_for_all_before_it(self) -> None:
        grove = self.grove("s/a", "s/b", "t/c")
        grove.request("s/a")
        assert grove.evict(5) == ["s/b", "t/c", "t", "s/a", "s"]

    def test_the_last_use_is_remembered_after_what_was_used_has_gone(self) -> None:
        grove = self.grove("s/a", "t")
        grove.request("s/a")
        grove.drop(["s/a"], "quarantined")
        assert grove.evict(2) == ["t", "s"]

    def test_a_request_that_stops_in_the_middle_uses_what_it_found(self) -> None:
        grove = self.grove("s/a", "t")
        grove.request("s/other")
        assert grove.evict(3) == ["s/a", "t", "s"]

    def test_it_forgets_what_it_would_never_look_at_again(self) -> None:
        grove = self.grove("a", "b")
        for _ in range(10_000):
            grove.request("a")
        assert isinstance(grove.policy, LeafLru)
        assert grove.policy._order.entry_count() < 200
        assert grove.evict(2) == ["b", "a"]

    def test_nor_is_it_kept_for_a_device_that_nobody_uses(self) -> None:
        grove = self.grove("a")
        for _ in range(3_000):
            grove.store("a/b", device=1)
            assert isinstance(grove.policy, LeafLru)
            assert [*grove.policy.victims_on(CONTEXT, 2, 1)] == [grove.block("a/b")]
            grove.drop(["a/b"], "evicted")
        assert grove.policy._order.entry_count() < 200


class TestFifo(PolicyContract):
    make = Fifo

    def test_uses_do_not_count(self) -> None:
        grove = self.grove("a", "b", "c")
        grove.request("a")
        assert grove.evict(3) == ["a", "b", "c"]

    def test_of_the_leaves_the_oldest_goes_first(self) -> None:
        grove = self.grove("s", "t", "s/a")
        assert grove.evict(3) == ["t", "s/a", "s"]


def test_a_policy_is_found_by_name() -> None:
    assert policy_class("leaf-lru") is LeafLru
    assert policy_class("leaf-fifo") is Fifo
    assert set(policy_names()) >= set(POLICIES)


def test_an_unknown_policy_is_refused_with_a_suggestion() -> None:
    with pytest.raises(BadInput, match="did you mean 'leaf-lru'") as refused:
        policy_class("leaf_lru")
    assert refused.value.code == "bad_config"


def test_others_policies_come_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value = "theirs", "their.package:Policy"

        def load(self) -> type[Fifo]:
            return Fifo

    class Broken(Entry):
        def load(self) -> type[Fifo]:
            raise ImportError("no module named their")

    entry: Entry = Entry()
    monkeypatch.setattr("kvcache.eviction.registry.entry_points", lambda **_: [entry])
    assert policy_names()[-1] == "theirs"
    assert policy_class("theirs") is Fifo
    entry = Broken()
    with pytest.raises(BadInput, match="no module named their"):
        policy_class("theirs")


class Vague(Fifo):
    """What it takes is no mapping of parameters."""

    @classmethod
    def params(cls) -> Mapping[str, Param]:
        return {"samples": 3}  # type: ignore[dict-item]


class Clashing(Fifo):
    @classmethod
    def params(cls) -> Mapping[str, Param]:
        return {"retain_ms": Param(0, 0, 1, "it has another meaning here")}


def leave() -> type[Fifo]:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("name", "load", "why"),
    [
        ("theirs", leave, "SystemExit"),
        ("theirs", lambda: Vague, "AttributeError"),
        ("theirs+keep", lambda: Vague, "AttributeError"),
        ("theirs+keep", lambda: Clashing, "'retain_ms' of its own"),
        ("theirs", lambda: print, "AttributeError"),
        ("theirs+cost", lambda: print, "AttributeError"),
    ],
)
def test_others_policies_are_refused_whatever_they_do(
    name: str, load: Callable[[], type[Fifo]], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Entry:
        name, value = "theirs", "their.package:Policy"

        def load(self) -> type[Fifo]:
            return load()

    monkeypatch.setattr("kvcache.eviction.registry.entry_points", lambda **_: [Entry()])
    with pytest.raises(BadInput, match=why) as refused:
        Choice(name)
    assert refused.value.code == "bad_config"


def test_a_context_is_checked() -> None:
    with pytest.raises(BadInput, match="hints are unknown, tool_call"):
        RequestContext(now_ns=1, hint="soon")
    with pytest.raises(BadInput, match="priority 101"):
        RequestContext(now_ns=1, priority=101)


def test_above_another_tier_nothing_is_declined() -> None:
    tree = PrefixTree()
    made = willing(policy_class("leaf-hazard+keep"))(tree, 64)
    assert isinstance(made, Wrapper)
    assert isinstance(made.base, LeafHazard)
    assert made.base._decline == 0
    assert isinstance(willing(LeafLru)(tree, 64), LeafLru)
