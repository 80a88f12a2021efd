"""The contract of ``EvictionPolicy`` as tests, for our policies and other people's:

    class TestMine(PolicyContract):
        make = Mine

        def test_oldest_use_goes_first(self) -> None:
            grove = self.grove("a", "b", "c")
            grove.request("a")
            assert grove.evict(3) == ["b", "c", "a"]

A ``Grove`` is a prefix tree with a policy over it, driven as the core drives them. Blocks are written as
paths: "s/a/b" is the block that continues "s/a", which continues "s".
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from random import Random

from kvcache.block import StorageKey
from kvcache.ledger import Ledger
from kvcache.policy import DevicePolicy, EvictionPolicy, RequestContext
from kvcache.prefix import NONE, PrefixTree
from kvcache.tiers.space import Space

CONTEXT = RequestContext(now_ns=1)
BLOCK_BYTES = 64


def path_keys(path: str) -> list[StorageKey]:
    """The keys of "s/a/b": those of "s", "s/a" and "s/a/b"."""
    names = path.split("/")
    return [StorageKey("/".join(names[: end + 1]).encode()) for end in range(len(names))]


class Grove:
    def __init__(self, make: type[EvictionPolicy], paths: Sequence[str] = ()) -> None:
        self.tree = PrefixTree()
        self.policy = make(self.tree, 1 << 20)
        for path in paths:
            self.store(path)

    def __contains__(self, path: str) -> bool:
        return self.block(path) != NONE

    def block(self, path: str) -> int:
        return self.tree.find(StorageKey(path.encode()))

    def store(self, path: str, context: RequestContext = CONTEXT, device: int = 0) -> None:
        """Commit the blocks of the path that are not there yet, as one save."""
        blocks = self.reserve(path, device)
        self.tree.unhold(blocks)
        if blocks:
            self.policy.on_admitted(context, blocks)

    def reserve(self, path: str, device: int = 0) -> list[int]:
        """Insert what is not there yet, held by its writer and not announced."""
        before, blocks = NONE, []
        for key in path_keys(path):
            block = self.tree.find(key)
            if block == NONE:
                block = self.tree.insert(key, before, BLOCK_BYTES, device)
                blocks.append(block)
            before = block
        return blocks

    def request(self, path: str, context: RequestContext = CONTEXT) -> None:
        """A look-up of this path, which finds what is there."""
        found: list[int] = []
        for key in path_keys(path):
            if (block := self.tree.find(key)) == NONE:
                break
            found.append(block)
        self.policy.on_request(context, found)

    def hold(self, path: str) -> None:
        self.tree.hold([self.block(path)])

    def unhold(self, path: str) -> None:
        self.tree.unhold([self.block(path)])

    def victims(self, count: int, context: RequestContext = CONTEXT) -> list[str]:
        """What the policy names. Asserts that each is an evictable leaf once those before it have gone."""
        named = list(self.policy.victims(context, count))
        assert len(named) <= count, "more than asked for"
        assert named or not self.tree.evictable_count(), "none, though there are leaves that could go"
        assert len(set(named)) == len(named), "a block twice"
        for at, block in enumerate(named):
            assert self.tree.children[block] >= 0, "a block that is not held"
            assert not self.tree.holds[block], "a block that must stay"
            assert set(self.tree.children_of(block)) <= set(named[:at]), "a parent before its children"
        return [self.tree.key[block].decode() for block in named]

    def evict(self, count: int, context: RequestContext = CONTEXT) -> list[str]:
        """Let go what the policy names. Returns it."""
        named = self.victims(count, context)
        self.drop(named, "evicted")
        return named

    def drop(self, paths: Sequence[str], reason: str) -> None:
        blocks = [self.block(path) for path in paths]
        for block in blocks:
            self.tree.unlink(block)
            self.tree.recycle(block)
        self.policy.on_evicted(blocks, reason)

    def drain(self) -> list[str]:
        """Evict all that can go, in as many calls as it takes."""
        gone: list[str] = []
        while self.tree.evictable_count():
            gone += self.evict(7)
        return gone


class PolicyContract:
    """Subclass it and set ``make``."""

    make: type[EvictionPolicy]

    def grove(self, *paths: str) -> Grove:
        return Grove(self.make, paths)

    def test_children_go_before_parents_in_one_call(self) -> None:
        named = self.grove("s/a/b", "s/c", "t").victims(5)
        assert sorted(named) == ["s", "s/a", "s/a/b", "s/c", "t"]

    def test_a_long_chain_goes_in_one_call(self) -> None:
        grove = self.grove("/".join("x" * 300))
        assert len(grove.evict(200)) == 200
        assert len(grove.evict(200)) == 100

    def test_no_more_than_asked_for_are_named(self) -> None:
        assert len(self.grove("s/a", "t", "u").victims(1)) == 1

    def test_an_empty_tree_has_no_victims(self) -> None:
        assert self.grove().victims(3) == []

    def test_what_is_held_stays_and_so_does_all_before_it(self) -> None:
        grove = self.grove("s/a/b", "s/c")
        grove.hold("s/a")
        assert sorted(grove.drain()) == ["s/a/b", "s/c"]
        assert grove.victims(3) == []

    def test_what_was_held_can_go_later(self) -> None:
        grove = self.grove("s/a", "t")
        grove.hold("s/a")
        grove.hold("t")
        assert grove.victims(2) == []
        grove.unhold("s/a")
        grove.unhold("t")
        assert sorted(grove.drain()) == ["s", "s/a", "t"]

    def test_asking_changes_nothing(self) -> None:
        grove = self.grove("s/a/b", "s/c", "t")
        for count in (1, 5, 3):
            grove.victims(count)
        assert len(grove.drain()) == 5

    def test_a_block_that_is_being_continued_stays(self) -> None:
        grove = self.grove("s")
        grove.reserve("s/a")
        assert grove.victims(1) == []
        grove.drop(["s/a"], "aborted")
        assert grove.victims(1) == ["s"]

    def test_what_continues_a_block_that_was_lost_can_go(self) -> None:
        grove = self.grove("s/a/b", "s/a/c")
        grove.drop(["s/a"], "quarantined")
        assert sorted(grove.drain()) == ["s", "s/a/b", "s/a/c"]

    def test_what_was_lost_can_be_stored_again(self) -> None:
        grove = self.grove("s/a/b")
        grove.drop(["s/a"], "quarantined")
        grove.store("s/a/b")
        assert grove.victims(3) == ["s/a/b", "s/a", "s"]

    def test_numbers_are_used_again(self) -> None:
        grove = self.grove("s/a", "t")
        grove.drain()
        grove.store("u/v")
        grove.request("u/v/w")
        assert grove.victims(5) == ["u/v", "u"]

    def test_what_is_named_on_a_device_lies_there(self) -> None:
        """Only where the policy knows of devices: "s" is covered by a block of another one."""
        grove = self.grove("s", "t/a/b")
        grove.store("s/c/d", device=2)
        grove.store("t/e", device=2)
        policy = grove.policy
        if isinstance(policy, DevicePolicy):
            for device, expected in ((0, ["t/a", "t/a/b"]), (1, []), (2, ["s/c", "s/c/d", "t/e"])):
                named = [grove.tree.key[block].decode() for block in policy.victims_on(CONTEXT, 9, device)]
                assert sorted(named) == expected
                assert len(policy.victims_on(CONTEXT, 1, device)) == min(1, len(expected))
        assert len(grove.drain()) == 7

    def test_requests_may_find_anything_or_nothing(self) -> None:
        grove = self.grove("s/a")
        for path in ("x", "s", "s/b", "s/a", "s/a/b"):
            grove.request(path)
        assert sorted(grove.drain()) == ["s", "s/a"]

    def test_what_is_admitted_leads(self) -> None:
        grove = self.grove("s")
        for parent, count in ((NONE, 0), (NONE, 1), (grove.block("s"), 17)):
            assert 0 <= grove.policy.admit(CONTEXT, parent, count) <= count

    def test_what_was_learned_can_be_handed_on(self) -> None:
        grove = self.grove("s/a", "t")
        grove.request("s/a")
        fresh = self.grove()
        fresh.policy.load_state(grove.policy.state())
        fresh.store("s/a")
        assert fresh.victims(2) == ["s/a", "s"]

    def test_the_tree_is_only_read(self) -> None:
        grove = self.grove("s/a/b", "s/c", "t")
        tree, policy = grove.tree, grove.policy
        before = _picture(tree)
        policy.on_request(CONTEXT, [grove.block("s"), grove.block("s/a")])
        policy.admit(CONTEXT, grove.block("t"), 3)
        policy.victims(CONTEXT, 4)
        assert _picture(tree) == before
        tree.hold([grove.block("t")])
        before = _picture(tree)
        policy.victims(CONTEXT, 4)
        policy.state()
        assert _picture(tree) == before
        gone = grove.block("s/c")
        tree.unlink(gone)
        tree.recycle(gone)
        before = _picture(tree)
        policy.on_evicted([gone], "evicted")
        assert _picture(tree) == before
        tree.check()

    def test_settings_are_described(self) -> None:
        taken = inspect.signature(self.make.__init__).parameters
        for name, param in self.make.params().items():
            assert name in taken, f"the constructor takes no {name}"
            assert taken[name].default == param.default
            assert param.low <= param.default <= param.high
            assert param.doc

    def test_the_core_has_nothing_to_complain_of(self) -> None:
        """A few hundred random requests through a real ledger: the policy is never replaced."""
        random = Random(7)
        space = Space(40 * BLOCK_BYTES, 4 * BLOCK_BYTES)
        ledger = Ledger(space, self.make)
        arena = space.add_arena()
        for now_ns in range(1, 500):
            context = RequestContext(now_ns=now_ns, session=random.randrange(5))
            keys = path_keys("/".join(random.choice("ab") for _ in range(random.randint(1, 8))))
            lease = ledger.lease(keys, "reader", now_ns + random.randint(1, 9), context)
            made = ledger.reserve(arena, None, keys, BLOCK_BYTES, "writer", context)
            if made.reservation_id and random.random() < 0.8:
                ledger.commit(made.reservation_id, "writer", [b""] * len(made.keys), [b""] * len(made.keys))
            elif made.reservation_id:
                ledger.abort(made.reservation_id, "writer")
            if lease.lease_id and random.random() < 0.1:
                ledger.quarantine(lease.keys[0], lease.generations[0], now_ns + 3)
            ledger.expire(now_ns)
            ledger.check()
        assert ledger.policy.last_fault == ""


def _picture(tree: PrefixTree) -> tuple[object, ...]:
    """What a policy could have changed of the tree."""
    numbers = (tree.parent, tree.children, tree.depth, tree.block_bytes, tree.device, tree.holds)
    return tuple(tree.key), *map(tuple, numbers), sorted(tree.linked()), tree.evictable_count()
