"""The short form: a class with one method is a whole policy."""

from __future__ import annotations

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.registry import load_class, policy_class
from kvcache.eviction.score import BlockMeta, is_score, scored
from kvcache.policy import RequestContext
from kvcache.testing.policies import PolicyContract

NS = 1_000_000_000


class MostUsed:
    def score(self, block: int, meta: BlockMeta, now: float) -> float:
        return meta.touches / (1 + now - meta.last_s)


class Deepest:
    """What is deep goes last: parents would go first, if they could."""

    def score(self, block: int, meta: BlockMeta, now: float) -> float:
        return meta.depth


class TestMostUsed(PolicyContract):
    make = scored(MostUsed)

    def test_the_least_used_goes_first(self) -> None:
        grove = self.grove("a", "b", "c")
        for path in ("a", "a", "c"):
            grove.request(path)
        assert grove.evict(3) == ["b", "c", "a"]


class TestDeepest(PolicyContract):
    make = scored(Deepest)


def test_a_score_is_told_what_is_known() -> None:
    grove = TestMostUsed().grove()
    grove.store("a/b", RequestContext(now_ns=1 * NS, tenant="t", hint="tool_call", expected_gap_ms=1_500))
    grove.request("a", RequestContext(now_ns=3 * NS, session=4, prompt_tokens=9, priority=7))
    meta = grove.policy.meta(grove.block("a"))  # type: ignore[attr-defined]
    assert meta == BlockMeta(1, 64, 2, 1.0, 3.0, "", 4, 9, "unknown", 7, None)
    assert grove.policy.meta(grove.block("a/b")) == BlockMeta(  # type: ignore[attr-defined]
        2, 64, 1, 1.0, 1.0, "t", -1, 0, "tool_call", 50, 1.5
    )


def test_the_short_form_is_known_by_its_method() -> None:
    assert is_score(MostUsed)
    assert not is_score(scored(MostUsed))
    assert not is_score(policy_class("leaf-lru"))
    assert not is_score(MostUsed())


def test_a_class_is_found_by_module() -> None:
    assert load_class("kvcache.eviction.leaf_lru:LeafLru") is policy_class("leaf-lru")
    for target in ("nowhere:Policy", "kvcache.eviction.leaf_lru:Nothing", "leaf-lru", ":X"):
        with pytest.raises(BadInput):
            load_class(target)


def test_an_entry_point_may_offer_the_short_form(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value = "most-used", "their.package:MostUsed"

        def load(self) -> type[MostUsed]:
            return MostUsed

    monkeypatch.setattr("kvcache.eviction.registry.entry_points", lambda **_: [Entry()])
    assert policy_class("most-used").__name__ == "ScoredMostUsed"
    assert policy_class("most-used+keep").__name__ == "KeepScoredMostUsed"
