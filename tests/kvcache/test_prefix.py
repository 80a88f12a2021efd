"""The prefix tree: who continues whom, what can go, what was orphaned."""

from __future__ import annotations

from random import Random

from kvcache.block import StorageKey
from kvcache.prefix import NONE, PrefixTree


def key(path: str) -> StorageKey:
    return StorageKey(path.encode())


def grow(tree: PrefixTree, path: str, *, ready: bool = True) -> list[int]:
    """Insert what is not there of "abc", "ab", "a"; unheld. Returns the whole path."""
    before, found = NONE, []
    for end in range(1, len(path) + 1):
        block = tree.find(key(path[:end]))
        if block == NONE:
            block = tree.insert(key(path[:end]), before, 64)
            tree.ready[block] = ready
            tree.unhold([block])
        found.append(block)
        before = block
    tree.check()
    return found


def names(tree: PrefixTree, blocks: list[int]) -> list[str]:
    return [tree.key[block].decode() for block in blocks]


def cut(tree: PrefixTree, path: str) -> None:
    block = tree.find(key(path))
    for each in tree.subtree(block):
        tree.ready[each] = 0
    tree.unlink(block)
    tree.recycle(block)
    tree.check()


def test_arrays_say_who_continues_whom() -> None:
    tree = PrefixTree()
    a, b, c = grow(tree, "abc")
    d = grow(tree, "abd")[-1]
    assert [tree.parent[block] for block in (a, b, c, d)] == [NONE, a, b, b]
    assert [tree.children[block] for block in (a, b, c, d)] == [1, 2, 0, 0]
    assert [tree.depth[block] for block in (a, b, c, d)] == [1, 2, 3, 3]
    assert sorted(tree.children_of(b)) == [c, d]
    assert len(tree) == 4


def test_the_longest_ready_run_is_matched() -> None:
    tree = PrefixTree()
    blocks = grow(tree, "abcd")
    keys = [key(path) for path in ("a", "ab", "abc", "abcd", "abcde")]
    assert tree.match(keys) == blocks
    tree.ready[blocks[3]] = 0
    assert tree.match(keys) == blocks[:3]
    assert tree.match([]) == tree.match([key("x"), *keys]) == []


def test_a_match_does_not_skip() -> None:
    tree = PrefixTree()
    grow(tree, "abc")
    assert len(tree.match([key("a"), key("abc")])) == 1
    assert len(tree.match([key("ab"), key("abc")])) == 2
    assert len(tree.match([key("a"), key("a")])) == 1


def test_a_subtree_lists_parents_before_children() -> None:
    tree = PrefixTree()
    for path in ("abc", "abd", "ae", "f"):
        grow(tree, path)
    found = names(tree, tree.subtree(tree.find(key("a"))))
    assert found[0] == "a"
    assert sorted(found) == ["a", "ab", "abc", "abd", "ae"]
    assert found.index("ab") < min(found.index("abc"), found.index("abd"))


def test_only_leaves_that_nobody_holds_are_evictable() -> None:
    tree = PrefixTree()
    a, b = grow(tree, "ab")
    (c,) = grow(tree, "c")
    random = Random(1)
    assert sorted(tree.sample_leaves(9, random)) == [b, c]
    tree.hold([a, b])
    tree.hold([b])
    assert tree.sample_leaves(9, random) == [c]
    tree.unhold([a, b])
    assert not tree.is_evictable(b)
    tree.unhold([b])
    assert tree.evictable_count() == 2
    assert not tree.is_evictable(a)
    assert set(tree.sample_leaves(1, random)) < {b, c}
    tree.check()


def test_a_parent_becomes_a_leaf_when_its_last_child_goes() -> None:
    tree = PrefixTree()
    a = grow(tree, "ab")[0]
    grow(tree, "ac")
    cut(tree, "ab")
    assert not tree.is_evictable(a)
    cut(tree, "ac")
    assert tree.is_evictable(a)


def test_what_continues_a_lost_block_is_orphaned_and_adopted_again() -> None:
    tree = PrefixTree()
    grow(tree, "abc")
    grow(tree, "abd")
    cut(tree, "ab")
    assert sorted(names(tree, tree.orphans())) == ["abc", "abd"]
    assert all(tree.parent[block] == NONE for block in tree.orphans())
    b = grow(tree, "ab")[-1]
    assert tree.orphans() == []
    assert sorted(names(tree, list(tree.children_of(b)))) == ["abc", "abd"]
    assert tree.children[b] == 2
    assert {tree.depth[block] for block in tree.children_of(b)} == {3}


def test_an_orphan_can_go_and_is_then_not_adopted() -> None:
    tree = PrefixTree()
    grow(tree, "abc")
    cut(tree, "ab")
    cut(tree, "abc")
    assert tree.orphans() == []
    assert tree.children[grow(tree, "ab")[-1]] == 0


def test_a_lost_block_stays_readable_and_keeps_its_holds_until_it_is_recycled() -> None:
    tree = PrefixTree()
    a, b = grow(tree, "ab")
    tree.hold([b])
    tree.ready[b] = 0
    tree.unlink(b)
    assert (tree.parent[b], tree.children[b], tree.holds[b]) == (a, NONE, 1)
    assert tree.find(key("ab")) == NONE
    assert tree.evictable_count() == 1
    tree.unhold([b])
    tree.check()
    tree.recycle(b)
    assert tree.insert(key("x"), NONE, 64) == b


def test_a_root_with_many_children_loses_any_of_them_at_once() -> None:
    tree = PrefixTree()
    a = grow(tree, "a")[0]
    paths = [f"a{chr(0x4E00 + at)}" for at in range(500)]
    for path in paths:
        grow(tree, path)
    Random(2).shuffle(paths)
    for left, path in enumerate(paths[:-1]):
        block = tree.find(key(path))
        tree.ready[block] = 0
        tree.unlink(block)
        tree.recycle(block)
        assert tree.children[a] == 499 - left
    tree.check()
    assert names(tree, list(tree.children_of(a))) == [paths[-1]]
