"""Room between size classes and arenas: who gives when somebody needs it."""

from __future__ import annotations

import pytest

from kvcache.block import StorageKey
from kvcache.leaf_lru import LeafLru
from kvcache.ledger import Ledger, Reservation
from kvcache.policy import RequestContext
from kvcache.tiers.space import Space

UNIT = 256
NOW = RequestContext(now_ns=1)


class House:
    """A ledger over arenas 0 and 1. A path's first letter is its own tree."""

    def __init__(self, units: int) -> None:
        self.space = Space(units * UNIT, UNIT)
        self.space.add_arena()
        self.space.add_arena()
        self.ledger = Ledger(self.space, LeafLru)

    def keys(self, path: str) -> list[StorageKey]:
        return [StorageKey(path[: end + 1].encode()) for end in range(len(path))]

    def reserve(self, path: str, size: int = 64, arena: int = 0) -> Reservation:
        made = self.ledger.reserve(arena, None, self.keys(path), size, "ann", NOW)
        self.ledger.check()
        return made

    def save(self, path: str, size: int = 64, arena: int = 0) -> int:
        made = self.reserve(path, size, arena)
        blank = [b""] * len(made.keys)
        return self.ledger.commit(made.reservation_id, "ann", blank, blank) if made.keys else 0

    def use(self, path: str) -> None:
        lease = self.ledger.lease(self.keys(path), "ann", 100, NOW)
        assert len(lease.keys) == len(path)
        self.ledger.release(lease.lease_id, "ann", 2)

    def match(self, path: str) -> int:
        return self.ledger.match(self.keys(path))


def test_a_class_with_nothing_gets_the_extent_of_the_coldest_leaf() -> None:
    house = House(2)
    house.save("abcd")
    house.save("wxyz")
    house.use("abcd")
    assert house.save("!", size=128) == 1
    assert (house.match("abcd"), house.match("wxyz")) == (4, 0)
    assert house.ledger.stats()["reclaimed_extents"] == 1


def test_memory_moves_between_arenas() -> None:
    house = House(2)
    house.save("abcdefgh")
    house.space.take_moves()
    assert house.save("xyz", arena=1) == 3
    moves = house.space.take_moves()
    assert [(move.arena, move.gained) for move in moves] == [(0, False), (1, True)]


def test_what_continues_a_reclaimed_block_in_another_extent_goes_with_it() -> None:
    house = House(2)
    house.save("abcdefgh")
    house.use("ab")
    assert house.save("!", size=256) == 1
    assert house.match("abcdefgh") == 4
    assert house.save("?", size=256) == 1
    assert house.match("a") == 0


@pytest.mark.parametrize("how", ["leased", "pinned", "reserved", "vanished"])
def test_an_extent_with_anything_that_must_stay_is_passed_over(how: str) -> None:
    house = House(2)
    house.save("abc")
    if how == "leased":
        house.ledger.lease(house.keys("a"), "bob", 100, NOW)
    elif how == "pinned":
        house.ledger.pin(house.keys("a"))
    else:
        house.reserve("x")
        if how == "vanished":
            house.ledger.disconnect("ann", writes_ended=False)
    house.save("ABCDE")
    house.use("ABCDE")
    assert house.save("!", size=256) == 1
    assert house.match("ab") == 2
    assert house.match("ABCDE") <= 1


def test_a_hot_tree_is_not_taken_for_one_cold_leaf_beside_its_root() -> None:
    """Units of four blocks: [r lat late later] [r1 r1a r2 r2a] ... [r9 r9a l la], the coldest being later."""
    house = House(6)
    house.save("r")
    house.save("col")
    for branch in "123456789":
        house.save(f"r{branch}a")
    house.save("later")
    for branch in "123456789":
        house.use(f"r{branch}a")
    assert house.save("!", size=256) == 1
    assert house.match("later") == 0
    assert [house.match(f"r{branch}a") for branch in "123456789"] == [3] * 8 + [1]


def test_if_there_is_no_other_way_a_whole_tree_goes() -> None:
    """Units of four blocks: [r r1 r2 r3] [r4 r5 x r6] [r7 r8 y r9] [ra rb z rc], and x, y, z are leased."""
    house = House(4)
    for path in ["r", "r1", "r2", "r3", "r4", "r5", "x", "r6", "r7", "r8", "y", "r9", "ra", "rb", "z", "rc"]:
        house.save(path)
    for path in "xyz":
        house.ledger.lease(house.keys(path), "bob", 100, NOW)
    assert house.save("!", size=256) == 1
    assert house.match("r") == 0
    assert all(house.match(path) for path in "xyz")


def test_a_branch_that_crosses_arenas_goes_when_its_extents_cannot() -> None:
    """Arena 0: [a p q r], arena 1: [ab z]. All but a and ab are leased, and only a's slot is of use."""
    house = House(2)
    for path in "apqr":
        house.save(path)
    house.save("ab", arena=1)
    house.save("z", arena=1)
    for path in "pqrz":
        house.ledger.lease(house.keys(path), "bob", 100, NOW)
    assert house.save("n") == 1
    assert house.match("a") == 0
    assert all(house.match(path) for path in "pqrz")


def test_no_class_starves_another_for_good() -> None:
    house = House(4)
    for step in range(40):
        assert house.save(f"{chr(1_000 + step)}abc", 64) == 4
        assert house.save(f"{chr(2_000 + step)}ab", 128) == 3
        assert house.save(f"{chr(3_000 + step)}a", 64, arena=1) == 2
        assert house.save(f"{chr(4_000 + step)}", 512, arena=1) == 1


def test_a_large_block_gets_a_run_though_memory_is_in_pieces() -> None:
    house = House(6)
    for letter in "abcdef":
        house.save(letter, size=256)
    for letter in "ace":
        house.use(letter)
    assert house.save("!", size=3 * UNIT) == 1
    assert sum(house.match(letter) for letter in "abcdef") == 3


def test_no_more_goes_than_is_needed() -> None:
    house = House(4)
    for letter in "abcdefghijklmnop":
        house.save(letter)
    assert house.save("123") == 3
    assert sum(house.match(letter) for letter in "abcdefghijklmnop") == 13
    assert house.save("!", size=256) == 1
    assert sum(house.match(letter) for letter in "abcdefghijklmnop") >= 9


def test_room_made_ahead_is_what_the_next_reserve_would_have_taken() -> None:
    house = House(2)
    house.save("abcdefgh")
    house.ledger.make_room(NOW, 0, 64, 3)
    house.ledger.check()
    assert house.match("abcdefgh") == 5
    assert house.save("xyz") == 3
    assert house.match("abcdefgh") == 5
    house.ledger.make_room(NOW, 0, 3 * UNIT, 1)
    assert house.match("abcdefgh") == 5


def test_a_block_larger_than_all_takes_nothing() -> None:
    house = House(2)
    house.save("abcd")
    assert house.reserve("!", size=3 * UNIT).reason == "full"
    assert house.match("abcd") == 4
