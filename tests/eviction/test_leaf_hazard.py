"""Leaf-hazard: the contract, what it learns, what it declines, what it remembers."""

from __future__ import annotations

import pytest

from kvcache.eviction.leaf_hazard import LeafHazard
from kvcache.policy import RequestContext
from kvcache.prefix import NONE
from kvcache.testing.policies import BLOCK_BYTES, Grove, PolicyContract, path_keys

S = 1_000_000_000


def at(now_s: float, hint: str = "unknown", priority: int = 50) -> RequestContext:
    return RequestContext(now_ns=round(now_s * S), hint=hint, priority=priority)


class Shop:
    """A cache of so many blocks, driven as the store drives one."""

    def __init__(self, capacity: int, **settings: float) -> None:
        def make(tree: object, capacity_bytes: int) -> LeafHazard:
            return LeafHazard(tree, capacity_bytes, **settings)  # type: ignore[arg-type]

        self.grove = Grove(make)  # type: ignore[arg-type]
        assert isinstance(self.grove.policy, LeafHazard)
        self.policy = self.grove.policy
        self.capacity = capacity

    def ask(self, path: str, context: RequestContext) -> int:
        """One request. How many of its blocks were found."""
        tree = self.grove.tree
        keys = path_keys(path)
        found = [block for key in keys if (block := tree.find(key)) != NONE]
        self.policy.on_request(context, found)
        tree.hold(found)
        fresh = keys[len(found) :]
        before = found[-1] if found else NONE
        fresh = fresh[: self.policy.admit_keys(context, before, fresh)] if fresh else []
        while len(tree) + len(fresh) > self.capacity:
            self.grove.evict(len(tree) + len(fresh) - self.capacity, context)
        blocks = []
        for key in fresh:
            before = tree.insert(key, before, BLOCK_BYTES)
            blocks.append(before)
        tree.unhold(found + blocks)
        if blocks:
            self.policy.on_admitted(context, blocks)
        return len(found)


class TestLeafHazard(PolicyContract):
    make = LeafHazard

    def test_with_nothing_learned_the_oldest_use_goes_first(self) -> None:
        grove = self.grove("a", "b", "c")
        grove.request("a", at(1))
        assert grove.evict(3) == ["b", "c", "a"]


def test_what_comes_back_is_kept_before_what_does_not() -> None:
    """Every other prompt is asked again after a while, and engines say so; the others never are."""
    shop = Shop(40)
    hits = 0
    for turn in range(600):
        shop.ask(f"once{turn}/x/y", at(turn, "final"))
        shop.ask(f"twice{turn}/x/y", at(turn + 0.3, "tool_call"))
        if turn >= 11:
            hits += shop.ask(f"twice{turn - 11}/x/y", at(turn + 0.6, "final"))
    # 11 turns bring 66 blocks or more, so that the longest unused 40 hold none of what comes back.
    assert hits > 0.8 * 3 * 589


def test_where_too_many_share_the_room_some_are_kept_whole() -> None:
    """Twenty sessions of four blocks take turns in room for ten: leaf-LRU would never hit."""
    shop = Shop(40)
    hits = sum(shop.ask(f"s{turn % 20}/a/b/c", at(turn)) for turn in range(800))
    assert hits > 0.4 * 4 * 800
    unwilling = Shop(40, decline=0)
    for turn in range(800):
        unwilling.ask(f"s{turn % 20}/a/b/c", at(turn))
        assert len(unwilling.grove.tree) <= 40
    assert unwilling.grove.policy.admit_keys(at(800), NONE, path_keys("n/a/b")) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("context", [at(800.1, "prefill_only"), at(800.1, priority=51)])
def test_what_others_wait_for_is_never_declined(context: RequestContext) -> None:
    shop = Shop(40)
    for turn in range(800):
        shop.ask(f"s{turn % 20}/a/b/c", at(turn))
    fresh = path_keys("new/a/b/c")
    assert shop.policy.admit_keys(at(800.1), NONE, fresh) < 4
    assert shop.policy.admit_keys(context, NONE, fresh) == 4


def test_what_left_is_remembered_by_name_and_forgotten_in_the_end() -> None:
    shop = Shop(4)
    for turn in range(70_000):
        shop.policy._remember(None, [turn], 0)
        shop.policy._forget()
    assert len(shop.policy._names) == 65_536
    assert min(name for name in shop.policy._names if isinstance(name, int)) == 70_000 - 65_536


def test_what_was_learned_is_handed_on() -> None:
    shop = Shop(40)
    for turn in range(800):
        shop.ask(f"s{turn % 20}/a/b/c", at(turn, "tool_call"))
    fresh = Shop(40)
    fresh.policy.load_state(shop.policy.state())
    kinds = [(shop.policy._times.kind(name), fresh.policy._times.kind(name)) for name in ((), (4,), (4, 1))]
    assert all(max(old.worth) > 0 for old, _ in kinds)
    assert all(young.worth == pytest.approx(old.worth, rel=0.2) for old, young in kinds)
    assert len(shop.policy.state()) < 64_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1,2]",
        b"[1,2,[3]]",
        b"[-1,2,[]]",
        b"[1,NaN,[]]",
        b'[1,2,[[["x"],[],[]]]]',
        b"[1,2,[[[1],[1],[1]]]]",
        b"[" * (1 << 20),
        b"[" * (2 << 20),
    ],
)
def test_learned_state_of_others_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        Shop(4).policy.load_state(data)


def test_time_may_stand_still_or_run_back() -> None:
    shop = Shop(8)
    for now_s in (5, 5, 1, 0, 7, 3):
        shop.ask("a/b/c", at(now_s))
        shop.ask(f"x{now_s}/b/c", at(now_s))
        shop.policy._times.check()
    assert len(shop.grove.tree) <= 8


def test_a_number_that_another_device_uses_now_is_not_taken_for_the_old_one() -> None:
    grove = Shop(9).grove
    grove.store("a", at(1))
    grove.drop(["a"], "evicted")
    grove.store("b", at(1), device=1)
    assert isinstance(grove.policy, LeafHazard)
    assert grove.policy.victims_on(at(1), 3, 0) == []
    assert grove.policy.victims_on(at(1), 3, 1) == [grove.block("b")]


def test_what_comes_before_a_fork_teaches_nothing() -> None:
    """A system prompt is used all the time; that says nothing about the tails that use it once."""
    grove = Shop(99).grove
    for turn in range(60):
        grove.request(f"s/p/x{turn}", at(turn))
        grove.store(f"s/p/x{turn}", at(turn))
    assert isinstance(grove.policy, LeafHazard)
    grove.policy._times.rebuild(1.0)
    reused = [kind for kind in grove.policy._times._classes.values() if max(kind.hazard) > 0.2]
    assert [kind.name for kind in reused if kind.name[:1] == (4,)] == []


def test_what_went_for_another_reason_than_room_is_not_missed() -> None:
    """Leaf-LRU would have lost it too, so that it is not found says nothing against the policy."""
    shop = Shop(8)
    shop.ask("a/b", at(1))
    shop.ask("c/d", at(2))
    shop.grove.drop(["a/b"], "quarantined")
    shop.grove.drop(["c/d"], "evicted")
    assert shop.policy._in_lru(path_keys("c/d")[1:]) == 1
    assert shop.policy._in_lru(path_keys("a/b")[1:]) == 0
    shop.policy._lru.check()


def test_what_was_found_long_ago_counts_little() -> None:
    shop = Shop(8)
    asked = sum(4 for turn in range(2_000) if shop.ask(f"s{turn % 3}/a/b/c", at(turn)) >= 0)
    assert 0.85 * asked < shop.policy._lru._asked < 0.95 * asked
