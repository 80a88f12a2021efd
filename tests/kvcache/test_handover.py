"""A policy that takes over: told of everything once, in order of time, while others go on; or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest

from kvcache import handover
from kvcache.block import StorageKey
from kvcache.eviction.leaf_hazard import LeafHazard
from kvcache.eviction.registry import policy_class
from kvcache.guard import PolicyGuard
from kvcache.leaf_lru import LeafLru
from kvcache.policy import EvictionPolicy, MakePolicy, RequestContext
from kvcache.prefix import NONE, PrefixTree
from kvcache.recency import Recency
from kvcache.testing.policies import BLOCK_BYTES, path_keys


class Guarded:
    """A tree whose policy can be changed. Blocks are written as paths, as in ``kvcache.testing.policies``."""

    def __init__(self, make: MakePolicy = LeafLru) -> None:
        self.tree = PrefixTree()
        self.recency = Recency(self.tree)
        self.guard = PolicyGuard(self.tree, 1 << 20, make, self.committed, self.recency)
        self.now_ns = 1_000_000_000

    def committed(self) -> list[int]:
        return sorted(self.tree.linked(), key=self.tree.depth.__getitem__)

    def _context(self) -> RequestContext:
        self.now_ns += 1_000_000_000
        return RequestContext(now_ns=self.now_ns)

    def request(self, path: str) -> None:
        """What is found of it is used, and what is not is stored."""
        before, found, fresh = NONE, [], []
        for key in path_keys(path):
            block = self.tree.find(key)
            if block == NONE:
                block = self.tree.insert(key, before, BLOCK_BYTES)
                fresh.append(block)
            else:
                found.append(block)
            before = block
        context = self._context()
        self.guard.on_request(context, found)
        self.tree.unhold(fresh)
        if fresh:
            self.guard.on_admitted(context, fresh)

    def evict(self, count: int) -> list[str]:
        if not count or not self.tree.evictable_count():
            return []
        named = self.guard.victims(self._context(), count)
        names = [self.tree.key[block].decode() for block in named]
        for block in named:
            self.tree.unlink(block)
            self.tree.recycle(block)
        self.guard.on_evicted(self._context(), named, "evicted")
        return names

    def drain(self) -> list[str]:
        gone: list[str] = []
        while self.tree.evictable_count():
            gone += self.evict(1)
        return gone

    def change(self, make: MakePolicy, step: int = 1_000) -> None:
        self.guard.begin_change(make, with_state=False)
        while not self.guard.change_step(step):
            self.guard.check()


class Told(LeafLru):
    """Leaf-first LRU that holds whoever tells it to the contract."""

    def __init__(self, tree: PrefixTree, capacity_bytes: int) -> None:
        super().__init__(tree, capacity_bytes)
        self.tree = tree
        self.known: set[int] = set()
        self.latest_ns = 0

    def _heard(self, context: RequestContext) -> None:
        assert context.now_ns >= self.latest_ns, "time runs back"
        self.latest_ns = context.now_ns

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self._heard(context)
        assert set(path) <= self.known, "a path of which it was not told"
        assert all(self.tree.parent[after] == before for before, after in pairwise(path))
        super().on_request(context, path)

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self._heard(context)
        assert not set(blocks) & self.known, "a block twice"
        before = self.tree.parent[blocks[0]]
        assert before == NONE or before in self.known, "a block before its parent"
        self.known.update(blocks)
        super().on_admitted(context, blocks)

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        self.known.difference_update(blocks)
        super().on_evicted(blocks, reason)


def test_what_was_used_last_still_goes_last() -> None:
    here = Guarded()
    for path in ("s/a", "s/b", "t/c", "u", "s/a", "t/c"):
        here.request(path)
    here.change(LeafLru)
    assert here.drain() == ["s/b", "u", "s/a", "s", "t/c", "t"]


def test_until_it_was_told_of_all_the_old_one_decides() -> None:
    here = Guarded(policy_class("leaf-fifo"))
    for path in ("a", "b", "c", "a"):
        here.request(path)
    here.guard.begin_change(LeafLru, with_state=False)
    assert here.guard.is_changing
    assert here.evict(1) == ["a"]
    here.request("a")
    while not here.guard.change_step(1):
        assert here.guard.is_changing
    assert not here.guard.is_changing
    assert here.drain() == ["b", "c", "a"]


def test_what_happens_meanwhile_is_heard_of_too() -> None:
    here = Guarded()
    for path in ("a", "b", "c"):
        here.request(path)
    here.guard.begin_change(LeafLru, with_state=False)
    here.request("a")
    here.request("d/e")
    assert here.evict(1) == ["b"]
    here.request("b")
    here.request("c")
    while not here.guard.change_step(1):
        pass
    assert here.drain() == ["a", "d/e", "d", "b", "c"]


class Whim(LeafLru):
    """Lets go whatever leaf it likes, what was just used as well. ``watched`` hears all that it hears."""

    watched: LeafLru

    def __init__(self, tree: PrefixTree, capacity_bytes: int) -> None:
        super().__init__(tree, capacity_bytes)
        self._leaves = tree.sample_leaves
        self._random = Random(1)
        self.watched = LeafLru(tree, capacity_bytes)

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self.watched.on_request(context, path)

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self.watched.on_admitted(context, blocks)

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        self.watched.on_evicted(blocks, reason)

    def victims(self, context: RequestContext, count: int) -> list[int]:
        return self._leaves(1, self._random)[:1]


@pytest.mark.parametrize("seed", range(40))
def test_any_traffic_meanwhile(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one is told what the contract says, and then knows what one knows that was always there."""
    monkeypatch.setattr(handover, "LOOK_BLOCKS", 16)
    random = Random(seed)
    here = Guarded(Whim)  # type: ignore[arg-type]  # It is over a PrefixTree.
    whim = here.guard._policy
    assert isinstance(whim, Whim)

    def busy(times: int) -> None:
        for _ in range(times):
            here.request("/".join(random.choice("abc") for _ in range(random.randint(1, 5))))
            while len(here.tree) > 60:
                here.evict(1)

    busy(100)
    here.guard.begin_change(Told, with_state=False)  # type: ignore[arg-type]  # As above.
    while not here.guard.change_step(random.randint(1, 4)):
        here.guard.check()
        busy(random.choice((0, 0, 1, 5)))
    told = here.guard._policy
    assert not here.guard.change_fault
    assert isinstance(told, Told)
    assert told.known == set(here.tree.linked())
    context = RequestContext(now_ns=1)
    assert [*told.victims(context, 100)] == [*whim.watched.victims(context, 100)]


@pytest.mark.parametrize("name", ["leaf-hazard", "leaf-arc", "leaf-fifo", "leaf-hazard+keep+cost"])
def test_any_policy_takes_over(name: str) -> None:
    random = Random(1)
    here = Guarded()
    for _ in range(300):
        here.request("/".join(random.choice("abcd") for _ in range(random.randint(1, 6))))
        if len(here.tree) > 200:
            here.evict(len(here.tree) - 200)
    here.change(policy_class(name), 7)
    assert len(here.drain()) == 200
    assert (here.guard.faults, here.guard.change_fault) == (0, "")


def test_the_ages_of_blocks_are_kept() -> None:
    here = Guarded()
    here.request("a")
    here.request("b/c")
    here.change(LeafHazard)
    policy = here.guard._policy
    assert isinstance(policy, LeafHazard)
    found = {here.tree.key[block]: use.at_ms for block, use in policy._uses.items()}
    assert found == {b"a": 2_000, b"b": 3_000, b"b/c": 3_000}


def test_what_a_device_held_before_has_no_age() -> None:
    here = Guarded()
    blocks = [here.tree.insert(StorageKey(name), NONE, BLOCK_BYTES) for name in (b"old", b"new")]
    here.tree.unhold(blocks)
    here.guard.on_restored(RequestContext(now_ns=0), [[block] for block in blocks])
    here.request("x")

    heard: list[int] = []

    class Listening(LeafLru):
        def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
            heard.append(context.now_ns)
            super().on_admitted(context, blocks)

    here.change(Listening)
    assert heard == [0, 0, 2_000_000_000]
    assert here.drain() == ["old", "new", "x"]


def test_what_was_learned_is_handed_on_where_it_is_understood() -> None:
    here = Guarded(LeafHazard)
    for number in range(200):
        here.request(f"{number % 17}/{number}")
    before = here.guard._policy.state()
    assert here.guard.begin_change(LeafHazard, with_state=True)
    assert here.guard._coming is not None
    assert here.guard._coming.policy.state() == before

    class Picky(LeafLru):
        def load_state(self, data: bytes) -> None:
            raise ValueError("not mine")

    assert not here.guard.begin_change(Picky, with_state=True)
    while not here.guard.change_step(50):
        pass
    assert isinstance(here.guard._policy, Picky)


def failing(hook: str) -> type[LeafLru]:
    def fail(self: LeafLru, *arguments: object) -> None:
        raise RuntimeError("cannot")

    return type("Failing", (LeafLru,), {hook: fail})


@pytest.mark.parametrize("hook", ["on_admitted", "on_request", "on_evicted"])
def test_one_that_fails_before_it_decides_does_not_take_over(hook: str) -> None:
    here = Guarded()
    for path in ("a/b", "d", "e", "a/c", "a/b", "f"):
        here.request(path)
    here.guard.begin_change(failing(hook), with_state=False)
    while here.guard.is_changing and here.guard.told_count < 4:
        here.guard.change_step(1)
    here.evict(2)
    assert not here.guard.is_changing
    assert "cannot" in here.guard.change_fault
    assert "Failing" in here.guard.change_fault
    assert type(here.guard._policy) is LeafLru
    assert here.guard.faults == 0
    here.drain()


def test_one_that_cannot_be_made_changes_nothing() -> None:
    here = Guarded()
    here.request("a")

    def make(tree: object, capacity_bytes: int) -> EvictionPolicy:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        here.guard.begin_change(make, with_state=False)
    assert not here.guard.is_changing
    assert here.drain() == ["a"]


def test_one_that_fails_once_it_decides_is_replaced_by_recency() -> None:
    here = Guarded()
    for path in ("a/b", "c", "d", "c", "a/b"):
        here.request(path)
    here.change(failing("victims"))
    assert here.drain() == ["d", "c", "a/b", "a"]
    assert here.guard.faults == 1


def test_a_change_can_be_given_up() -> None:
    here = Guarded()
    here.request("a")
    here.guard.begin_change(policy_class("leaf-fifo"), with_state=False)
    here.guard.cancel_change()
    assert here.guard.change_step(1)
    assert type(here.guard._policy) is LeafLru


@pytest.mark.parametrize("make", [LeafLru, LeafHazard])
def test_steps_are_small(make: MakePolicy) -> None:
    """No step tells much more than it was asked to, however many blocks there are."""
    here = Guarded()
    for number in range(3_000):
        here.request(f"s/{number % 50}/{number}")
    here.guard.begin_change(make, with_state=False)
    most, before, steps = 0, 0, 0
    while not here.guard.change_step(64):
        most = max(most, here.guard.told_count - before)
        before = here.guard.told_count
        steps += 1
    assert most <= 70
    assert steps >= 3_000 // 64
