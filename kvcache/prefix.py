"""The prefix tree: which block continues which, as arrays over small dense numbers.

Keys are chained hashes, so a key names its whole path and looking one up needs no walk; what the tree
adds is who continues whom: parents, counts of children, leaves, subtrees, runs. A block is a number
that is used again after ``recycle``; entries are arrays indexed by it, which policies read as
``kvcache.policy.TreeView``.

    absent ── insert ──► linked ── unlink ──► unlinked ── recycle ──► absent
                           │  ▲
             parent        ▼  │  parent inserted again
             unlinked    orphan

An *orphan* is linked, but the block before it is missing (quarantined, or given up by its writer). It
remembers that key, and is adopted when the key is inserted again.

Invariants (``check``): parent and child lists agree; ``children`` is -1 exactly for blocks not linked;
``evictable`` holds exactly the linked blocks without children and without holds; each orphan is filed
under the key it misses, and that key is absent.

The sum: a match costs 0.1 us a block (one dictionary look-up and three array reads), an insert
or unlink about 1 us.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import repeat
from random import Random
from typing import cast

from kvcache.block import StorageKey
from kvcache.leaf_set import LeafSet
from kvcache.orphans import Orphans
from kvcache.restored import Graft, put

NONE = -1


class PrefixTree:
    """One owner. Blocks are numbers; ``NONE`` is no block."""

    def __init__(self) -> None:
        self.key: list[StorageKey] = []
        self.parent: list[int] = []
        self.children: list[int] = []
        self.depth: list[int] = []
        self.block_bytes: list[int] = []
        self.device: list[int] = []
        self.holds: list[int] = []
        self.ready = bytearray()  # may be matched: committed, and so is all before it
        self._first: list[int] = []  # the newest child; siblings are a doubly linked list
        self._next: list[int] = []
        self._previous: list[int] = []
        self._blocks: dict[StorageKey, int] = {}
        self._evictable = LeafSet()
        self._orphans = Orphans()
        self._recycled: list[int] = []

    def __len__(self) -> int:
        return len(self._blocks)

    # --- looking --------------------------------------------------------------------------------

    def find(self, key: StorageKey) -> int:
        """The linked block of this key, or NONE."""
        return self._blocks.get(key, NONE)

    def known(self, keys: Set[StorageKey]) -> Set[StorageKey]:
        """Those that are linked."""
        return self._blocks.keys() & keys

    def match(self, keys: Sequence[StorageKey]) -> list[int]:
        """The longest leading run of ``keys`` that is ready, each the child of the one before."""
        found: list[int] = []
        get, parent, ready = self._blocks.get, self.parent, self.ready
        before = NONE
        for key in keys:
            block = get(key)
            if block is None or not ready[block] or (parent[block] != before and found):
                break
            found.append(block)
            before = block
        return found

    def is_evictable(self, block: int) -> bool:
        return not self.children[block] and not self.holds[block]

    def evictable_count(self) -> int:
        return len(self._evictable)

    def sample_leaves(self, count: int, random: Random) -> list[int]:
        return self._evictable.sample(count, random)

    def orphans(self) -> list[int]:
        return list(self._orphans)

    def is_orphan(self, block: int) -> bool:
        return block in self._orphans

    def children_of(self, block: int) -> Iterator[int]:
        """Newest first. The tree must not change meanwhile."""
        child = self._first[block]
        while child != NONE:
            yield child
            child = self._next[child]

    def subtree(self, block: int) -> list[int]:
        """The block and all that continues it, parents before children."""
        found = [block]
        for each in found:
            if self.children[each]:
                found.extend(self.children_of(each))
        return found

    def linked(self) -> Iterator[int]:
        return iter(self._blocks.values())

    # --- changing -------------------------------------------------------------------------------

    def insert(self, key: StorageKey, parent: int, block_bytes: int, device: int = 0) -> int:
        """A new block, held once and not ready. Adopts the orphans that were missing it.

        REQUIRES: ``key`` is absent; ``parent`` is linked, or NONE for a first block."""
        assert key not in self._blocks
        block = self._number()
        self.key[block] = key
        self.block_bytes[block] = block_bytes
        self.device[block] = device
        self.depth[block] = self.depth[parent] + 1 if parent != NONE else 1
        self.holds[block] = 1
        self.children[block] = 0
        self._blocks[key] = block
        self._attach(block, parent)
        self._adopt(key, block)
        return block

    def graft(
        self,
        keys: Sequence[StorageKey],
        parents: Sequence[StorageKey | None],
        block_bytes: Sequence[int],
        device: Sequence[int],
    ) -> Graft:
        """New blocks in any order, not held and not ready, each behind the block of its parent's key
        (None: a first block). As many an ``insert`` and ``unhold`` each, in a quarter of the time.
        Those whose parent is neither linked nor among them are left out.

        A path ends where several blocks continue it. Paths whose last key is listed earlier come earlier.

        REQUIRES: the keys are absent, and none comes twice."""
        base = len(self.key)
        blocks = self._numbers(len(keys))
        self._blocks.update(zip(keys, blocks, strict=True))
        find = cast("Callable[[StorageKey | None, int], int]", self._blocks.get)
        before = list(map(find, parents, repeat(NONE)))
        for entries, values in (
            (self.parent, before),
            (self.block_bytes, block_bytes),
            (self.device, device),
        ):
            put(entries, blocks, values)
        put(self.key, blocks, keys)
        for entries, value in (
            (self.children, 1),
            (self.depth, 0),
            (self.holds, 0),
            (self._first, NONE),
            (self._next, NONE),
            (self._previous, NONE),
        ):
            put(entries, blocks, [value] * len(blocks))
        reused = set(blocks[: bisect_left(blocks, base)])
        starts, forks = self._link_all(blocks, before, base, reused)
        starts += [block for block, key in zip(blocks, parents, strict=True) if key is None]
        paths = self._paths(starts, forks)
        left_out = self._leave_out(blocks) if sum(map(len, paths)) < len(blocks) else []
        adopted: list[int] = []
        if self._orphans:
            awaited = self._orphans.awaited()
            for key in [key for key in keys if key in awaited and key in self._blocks]:
                adopted += self._adopt(key, self._blocks[key])
        return Graft(blocks, left_out, paths, adopted)

    def _link_all(
        self, blocks: Sequence[int], before: Sequence[int], base: int, reused: Set[int]
    ) -> tuple[list[int], Set[int]]:
        """Make each the newest child of the one before it, where new blocks have one child beforehand.

        Those behind a block that was linked already, which is one under ``base`` that is not ``reused``;
        and the new blocks that several continue."""
        first, following, previous, children = self._first, self._next, self._previous, self.children
        starts: list[int] = []
        forks: set[int] = set()
        for block, parent in zip(blocks, before, strict=True):
            if parent == NONE:
                continue
            newest = first[parent]
            first[parent] = block
            if newest != NONE:
                following[block] = newest
                previous[newest] = block
            if parent < base and parent not in reused:
                children[parent] += 1
                self._evictable.discard(parent)
                starts.append(block)
            elif newest != NONE:
                children[parent] += 1
                forks.add(parent)
        return starts, forks

    def _paths(self, starts: list[int], forks: Set[int]) -> list[list[int]]:
        """All that continues ``starts``, which grows. Sets depths, and finds the leaves."""
        first, depth = self._first, self.depth
        paths: list[list[int]] = []
        ages: list[int] = []
        forked: dict[int, int] = {}  # a fork -> the age of the path it ends
        for block in starts:
            before = self.parent[block]
            at = depth[before] if before != NONE else 0
            path: list[int] = []
            end = block
            while block != NONE:
                at += 1
                depth[block] = at
                path.append(block)
                end = block
                block = NONE if block in forks else first[block]
            age = max(end, forked.get(before, NONE))
            if end in forks:
                starts += reversed(list(self.children_of(end)))
                forked[end] = age
            else:
                self.children[end] = 0
                self._evictable.add(end)
            paths.append(path)
            ages.append(age)
        return [paths[at] for at in sorted(range(len(paths)), key=ages.__getitem__)]

    def _leave_out(self, blocks: Sequence[int]) -> list[int]:
        """Unlink those that no path reached. Which, by their places."""
        places = [at for at, block in enumerate(blocks) if not self.depth[block]]
        for at in places:
            block = blocks[at]
            del self._blocks[self.key[block]]
            self._first[block] = NONE
            self.children[block] = NONE
        return places

    def unlink(self, block: int) -> None:
        """The block is no longer found by its key; its children become orphans. Its entries stay
        readable until ``recycle``; its holds stay its own. REQUIRES: linked."""
        key = self.key[block]
        for child in list(self.children_of(block)):
            self.parent[child] = NONE
            self._orphans.add(child, key)
        self._first[block] = NONE
        self._evictable.discard(block)
        self.children[block] = NONE
        self.ready[block] = 0
        del self._blocks[key]
        self._detach(block)

    def unlink_all(self, blocks: Sequence[int]) -> None:
        """As many ``unlink``, in half the time, as links among them are left alone. REQUIRES: linked."""
        going = set(blocks)
        for block in blocks:
            key, child = self.key[block], self._first[block]
            if child == NONE:
                self._evictable.discard(block)
            while child != NONE:
                if child not in going:
                    self.parent[child] = NONE
                    self._orphans.add(child, key)
                child = self._next[child]
            if self.parent[block] not in going:
                self._detach(block)
            self.children[block] = NONE
            del self._blocks[key]
        for block in blocks:
            self._first[block] = NONE
            self.ready[block] = 0

    def recycle(self, block: int) -> None:
        """The number may be used again. REQUIRES: unlinked."""
        assert self.children[block] == NONE
        self._recycled.append(block)

    def hold(self, blocks: Sequence[int]) -> None:
        """Forbid eviction, once more. REQUIRES: each is linked."""
        holds, children = self.holds, self.children
        for block in blocks:
            holds[block] += 1
            if not children[block]:
                self._evictable.discard(block)

    def unhold(self, blocks: Sequence[int]) -> None:
        """Undo one ``hold``. The blocks may have been unlinked since."""
        holds, children = self.holds, self.children
        for block in blocks:
            left = holds[block] - 1
            assert left >= 0
            holds[block] = left
            if not left and not children[block]:
                self._evictable.add(block)

    def check(self) -> None:
        """Assert every invariant."""
        recycled = set(self._recycled)
        assert len(recycled) == len(self._recycled)
        for key, block in self._blocks.items():
            assert self.key[block] == key
            assert block not in recycled
            children = list(self.children_of(block))
            assert len(children) == self.children[block]
            assert all(self.parent[child] == block for child in children)
            assert all(self._blocks.get(self.key[child]) == child for child in children)
            before = self.parent[block]
            assert before == NONE or self.children[before] > 0
            assert self.depth[block] == (self.depth[before] + 1 if before != NONE else 1) or self.is_orphan(
                block
            )
            assert before == NONE or block not in self._orphans
            assert (block in self._evictable) == self.is_evictable(block)
            assert not self.ready[block] or before == NONE or self.ready[before]
            assert not self.ready[block] or block not in self._orphans
        self._evictable.check()
        assert len(self._evictable) == sum(map(self.is_evictable, self._blocks.values()))
        linked = set(self._blocks.values())
        for block in range(len(self.key)):
            assert (self.children[block] >= 0) == (block in linked)
        self._orphans.check()
        assert all(orphan in linked and self.parent[orphan] == NONE for orphan in self._orphans)
        assert not any(key in self._blocks for key in self._orphans.awaited())

    # --- numbers and links ----------------------------------------------------------------------

    def _number(self) -> int:
        if self._recycled:
            return self._recycled.pop()
        block = len(self.key)
        self.key.append(StorageKey(b""))
        for entries in (self.parent, self._first, self._next, self._previous):
            entries.append(NONE)
        self.children.append(NONE)
        self.depth.append(0)
        self.block_bytes.append(0)
        self.device.append(0)
        self.holds.append(0)
        self.ready.append(0)
        return block

    def _numbers(self, count: int) -> list[int]:
        """Used ones first. The entries of the others are not there yet: ``put`` appends them."""
        used = max(0, len(self._recycled) - count)
        blocks = sorted(self._recycled[used:])
        del self._recycled[used:]
        fresh = count - len(blocks)
        blocks += range(len(self.key), len(self.key) + fresh)
        self.ready += bytes(fresh)
        return blocks

    def _adopt(self, key: StorageKey, block: int) -> list[int]:
        orphans = self._orphans.take(key)
        for orphan in orphans:
            self._attach(orphan, block)
        return orphans

    def _attach(self, block: int, parent: int) -> None:
        self.parent[block] = parent
        self._previous[block] = NONE
        self._next[block] = NONE
        if parent == NONE:
            return
        newest = self._first[parent]
        self._next[block] = newest
        if newest != NONE:
            self._previous[newest] = block
        self._first[parent] = block
        self.children[parent] += 1
        self._evictable.discard(parent)

    def _detach(self, block: int) -> None:
        """``parent`` stays readable: policies look at it when told that the block has gone."""
        self._orphans.discard(block)
        parent = self.parent[block]
        if parent == NONE:
            return
        previous, following = self._previous[block], self._next[block]
        if previous != NONE:
            self._next[previous] = following
        else:
            self._first[parent] = following
        if following != NONE:
            self._previous[following] = previous
        self.children[parent] -= 1
        if not self.children[parent] and not self.holds[parent]:
            self._evictable.add(parent)
