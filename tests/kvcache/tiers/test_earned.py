"""Which blocks have earned their place on NVMe: each rule, on a host tier of its own."""

from __future__ import annotations

import pytest

from kvcache.block import StorageKey
from kvcache.leaf_lru import LeafLru
from kvcache.ledger import Ledger
from kvcache.policy import RequestContext
from kvcache.tiers.earned import Admission, Earned
from kvcache.tiers.space import Space

BLOCK = 64
NOW = RequestContext(now_ns=1)


def key(name: str) -> StorageKey:
    return StorageKey(b"namespace" * 2 + name.encode().rjust(16, b"."))


def keys(path: str) -> list[StorageKey]:
    return [key(path[: end + 1]) for end in range(len(path))]


class World:
    """A host tier, and what is said of its blocks. Paths are words, a letter a block."""

    def __init__(self, rule: Admission, nvme_bytes: int = 1 << 30) -> None:
        space = Space(4_096 * BLOCK, 64 * BLOCK)
        self.arena = space.add_arena()
        self.host = Ledger(space, LeafLru)
        self.earned = Earned(rule, self.host, nvme_bytes)
        self.on_nvme: set[StorageKey] = set()

    def store(self, path: str) -> list[StorageKey]:
        """What was missing of it is computed."""
        made = self.host.reserve(self.arena, None, keys(path), BLOCK, "me", NOW)
        if made.reservation_id:
            blank = [b""] * len(made.keys)
            self.host.commit(made.reservation_id, "me", blank, blank)
        self.earned.made(made.keys)
        self.earned.used(made.keys)
        return list(made.keys)

    def look(self, path: str) -> None:
        self.earned.asked(keys(path))
        self.earned.used(keys(path)[: self.host.match(keys(path))])

    def leading(self, path: str, start: int = 0) -> int:
        return self.earned.leading(keys(path)[start:])

    def tips(self, *cold: str) -> list[str]:
        found = self.earned.tips([key(path) for path in cold], self.on_nvme.__contains__)
        return [tip[18:].decode().lstrip(".") for tip in found]


def test_all_have() -> None:
    world = World("all")
    world.store("abc")
    assert (world.leading("abc"), world.leading("")) == (3, 0)


@pytest.mark.parametrize("rule", ["second-touch", "touched>=2"])
def test_what_two_requests_had(rule: Admission) -> None:
    world = World(rule)
    world.store("abc")
    assert world.leading("abc") == 0
    world.look("ab")
    assert world.leading("abc") == 2


def test_a_conversation_that_came_back_is_written_whole() -> None:
    world = World("branch-reused")
    world.store("abc")
    assert world.leading("abc") == 0
    world.look("abc")
    world.store("abcde")
    assert world.leading("abcde") == 5
    assert world.leading("abcde", 3) == 2


def test_what_comes_behind_a_fork_has_to_come_back_itself() -> None:
    world = World("branch-reused")
    world.store("abcd")
    world.look("ab")
    world.store("abxy")
    assert world.leading("abxy") == 2
    assert world.leading("abxy", 2) == 0
    assert world.leading("abcd", 2) == 0
    world.look("abxy")
    assert world.leading("abxy", 2) == 2


def learned(world: World) -> None:
    """What comes behind a found block is wanted again, long first prompts are not."""
    for at in range(200):
        name = chr(0x4E00 + at)
        first = world.store(name + "firsttime")
        world.earned.leading(first)
        turn = world.store(name + "firsttimeok")
        world.earned.leading(turn)
        world.host.quarantine(turn[0], world.host.borrow(turn[:1], "me", 9).generations[0], 10)
        world.look(name + "firsttimeok")
        world.host.expire(100)


def test_what_is_like_what_came_back_is_written_under_hazard() -> None:
    world = World("hazard")
    learned(world)
    first, turn = world.store("zfirsttime"), world.store("zfirsttimeok")
    assert world.earned.leading(turn) == 2
    assert world.earned.leading(first) == 0


def test_what_memory_has_is_not_wanted_from_below() -> None:
    world = World("hazard")
    world.earned.leading(world.store("abc"))
    world.look("abcd")
    learned = world.earned._learned
    assert learned is not None
    assert sum(each.wanted for each in learned._classes.values()) == 0


def test_of_what_is_cold_the_end_of_each_run_that_is_worth_it() -> None:
    world = World("all")
    for path in ("abc", "abd", "x"):
        world.store(path)
    assert world.tips("abc", "abd", "ab", "a", "x") == ["abc", "abd", "x"]
    world.on_nvme.update(keys("ab"))
    assert world.tips("abd", "ab", "a") == ["abd"]
    assert world.tips("ab", "a") == []
    assert world.tips() == []


def test_of_a_cold_run_only_the_beginning_may_be_worth_it() -> None:
    world = World("touched>=2")
    world.store("abc")
    world.look("ab")
    assert world.tips("abc", "ab", "a") == ["ab"]


def test_nothing_is_remembered_where_all_are_written() -> None:
    world = World("all")
    world.store("abc")
    assert len(world.earned._seen) == 0
