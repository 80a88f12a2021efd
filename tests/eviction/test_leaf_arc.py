"""Leaf-ARC: the contract, and that a scan does not push out what is used again."""

from __future__ import annotations

from kvcache.eviction.leaf_arc import LeafArc
from kvcache.testing.policies import PolicyContract


class TestLeafArc(PolicyContract):
    make = LeafArc

    def test_what_was_used_again_outlives_a_scan(self) -> None:
        grove = self.grove("s/a", "t/b")
        grove.request("s/a")
        grove.store("u/c")
        grove.store("v/d")
        assert grove.evict(6) == ["t/b", "t", "u/c", "u", "v/d", "v"]

    def test_what_a_branch_gains_was_used_once(self) -> None:
        grove = self.grove("s/a", "t")
        grove.request("s/a/b")
        grove.store("s/a/b")
        assert grove.evict(4) == ["t", "s/a/b", "s/a", "s"]

    def test_regret_makes_room_for_what_was_used_once(self) -> None:
        grove = self.grove("s", "t", "u", "v", "w", "x", "y")
        grove.request("s")
        assert grove.evict(2) == ["t", "u"]
        for path in ("t", "u"):
            grove.store(path)  # They come back: used again, and the part of the others may grow.
        assert isinstance(grove.policy, LeafArc)
        assert grove.policy._target == 2
        assert grove.evict(2) == ["v", "w"]
        assert grove.evict(1) == ["s"]

    def test_names_of_what_left_are_bounded(self) -> None:
        grove = self.grove(*"abcdefgh")
        for turn in range(500):
            grove.store(f"x{turn}")
            grove.evict(1)
        assert isinstance(grove.policy, LeafArc)
        assert all(len(left) <= 9 for left in grove.policy._left.values())
