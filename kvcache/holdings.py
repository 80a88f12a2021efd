"""What a tier holds and where: the tree, the slots, and every way a block can change state.

                 commit              all before it published
    reserved ───────────► waiting ◄──────────────────────────► published
       │ abort              │ evict       (a block before it withdrawn)    │ evict
       ▼                    ▼                                              ▼
     absent ◄───────────────┴──────────────────────────────────────────────┘

    reserved ── its writer vanished ──► parked ── the writer is known to have ended ──► absent
    waiting, published ── quarantine ──► parked ── time is over and no lease left ──► absent

Only a *published* block is matched. A *waiting* one is complete, but something before it is not: it
is being written, or was withdrawn (then the block is part of an orphaned subtree, which goes first).
A *parked* block is out of the tree: its slot is not used again yet, its key is free.

Invariants (``check``): every used slot of the space belongs to exactly one block that is not absent;
a published block's parent is published, or it is a first block; a reserved block is held once by its
writer; what is announced as stored and not as removed is exactly what is published.

The sum: 1 to 2 us a block and change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import repeat
from typing import Literal

from kvcache.block import Slot, StorageKey
from kvcache.prefix import NONE, PrefixTree, Run, put
from kvcache.restored import Restored, plan
from kvcache.tiers.space import Space, slot_arena


class State(Enum):
    RESERVED = "reserved"
    WAITING = "waiting"
    PUBLISHED = "published"
    PARKED = "parked"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Change:
    """What readers can or can no longer find. Stored ``keys`` are a path that continues ``parent``
    (None: the root); removed ones are in any order, and ``parent`` is None."""

    kind: Literal["stored", "removed"]
    keys: tuple[StorageKey, ...]
    parent: StorageKey | None
    reason: str


class Holding:
    """What the tree does not know of a block."""

    __slots__ = ("checksum", "generation", "pinned", "slot", "state", "sums")

    def __init__(
        self, slot: Slot, generation: int, state: State = State.RESERVED, checksum: bytes = b""
    ) -> None:
        self.slot = slot
        self.generation = generation
        self.state = state
        self.pinned = False
        self.checksum = checksum
        self.sums = b""


Gone = Callable[[Sequence[int], str], None]


class Holdings:
    """``holding`` is indexed by block. ``gone`` is told of every block that leaves the tree."""

    def __init__(self, space: Space, gone: Gone) -> None:
        self.tree = PrefixTree()
        self.holding: list[Holding] = []
        self.space = space
        self._gone = gone
        self._block_of: dict[Slot, int] = {}
        self._changes: list[Change] = []
        self._generation = 0
        self._held_bytes = 0

    # --- a block's life -------------------------------------------------------------------------

    def reserve(
        self, keys: Sequence[StorageKey], slots: Sequence[Slot], parent: int, block_bytes: int
    ) -> list[int]:
        """A path of reserved blocks behind ``parent``, each with a new generation."""
        blocks: list[int] = []
        before = parent
        for key, slot in zip(keys, slots, strict=True):
            self._generation += 1
            before = self.tree.insert(key, before, block_bytes)
            holding = Holding(slot, self._generation)
            if before == len(self.holding):
                self.holding.append(holding)
            else:
                self.holding[before] = holding
            self._block_of[slot] = before
            blocks.append(before)
        self._held_bytes += block_bytes * len(blocks)
        return blocks

    def restore(self, entries: Sequence[Restored]) -> tuple[list[list[int]], list[Restored]]:
        """What a device holds still. Paths of the blocks that are held now, parents first; and what is not:
        its key is known, its slot cannot be had, or the block before it is neither held nor restored."""
        find = self.tree.find
        known: set[StorageKey] = set()
        fresh: list[Restored] = []
        refused: list[Restored] = []
        for entry in entries:
            (refused if entry.key in known or find(entry.key) != NONE else fresh).append(entry)
            known.add(entry.key)
        unplaced = set(
            self.space.restore([entry.slot for entry in fresh], [entry.block_bytes for entry in fresh])
        )
        if unplaced:
            refused += [fresh[at] for at in unplaced]
            fresh = [entry for at, entry in enumerate(fresh) if at not in unplaced]
        order, runs = plan([entry.key for entry in fresh], [entry.parent for entry in fresh], find)
        if len(order) < len(fresh):
            lost = set(range(len(fresh))).difference(order)
            refused += [fresh[at] for at in lost]
            for at in lost:
                self.space.free(fresh[at].slot)
        return self._graft([fresh[at] for at in order], runs) if runs else [], refused

    def commit(self, blocks: Sequence[int], checksums: Sequence[bytes], sums: Sequence[bytes]) -> None:
        """The bytes are there. Publishes what can be found now, and announces it."""
        for block, checksum, sums_of_block in zip(blocks, checksums, sums, strict=True):
            holding = self.holding[block]
            assert holding.state is State.RESERVED
            holding.checksum = checksum
            holding.sums = sums_of_block
            holding.state = State.WAITING
        self.tree.unhold(blocks)
        self._publish(blocks[0], "committed")

    def abort(self, blocks: Sequence[int]) -> None:
        """Reserved blocks that will not be written; nobody writes to their slots any more."""
        self.give_up(blocks)
        self.unpark(blocks)

    def give_up(self, blocks: Sequence[int]) -> None:
        """Park reserved blocks whose writer may still write to their slots."""
        for block in reversed(blocks):
            assert self.holding[block].state is State.RESERVED
            self._park(block)
        self.tree.unhold(blocks)
        self._gone(blocks[::-1], "aborted")

    def withdraw(self, block: int) -> None:
        """Park a committed block; what continues it waits for it, orphaned."""
        assert self.holding[block].state in (State.WAITING, State.PUBLISHED)
        self._removed(self._lose([block]), "quarantined")
        self.unpin([block])
        self._park(block)
        self._gone([block], "quarantined")

    def withdraw_arena(self, arena: int) -> tuple[int, list[int]]:
        """Every committed block of an arena goes, as by ``withdraw``, but its slot is free at once unless
        somebody holds it. How many went, and those that are held, parked."""
        blocks = [
            block
            for slot, block in self._block_of.items()
            if slot_arena(slot) == arena and self.state(block) in (State.WAITING, State.PUBLISHED)
        ]
        blocks.sort(key=self.tree.depth.__getitem__)
        self._removed(self._lose(blocks), "fenced")
        self.unpin(blocks)
        blocks.reverse()
        for block in blocks:
            self._park(block)
        self._gone(blocks, "fenced")
        self.unpark([block for block in blocks if not self.tree.holds[block]])
        return len(blocks), [block for block in blocks if self.state(block) is State.PARKED]

    def unpark(self, blocks: Iterable[int]) -> None:
        """The slots of parked blocks are free. REQUIRES: nobody holds them."""
        for block in blocks:
            assert self.holding[block].state is State.PARKED
            assert not self.tree.holds[block]
            self._vanish(block)

    def evict(self, blocks: Sequence[int], reason: str) -> None:
        """REQUIRES: each is an evictable leaf once those before it have gone."""
        if not blocks:
            return
        self._removed([block for block in blocks if self.tree.ready[block]], reason)
        for block in blocks:
            assert self.tree.is_evictable(block)
            self.tree.unlink(block)
            self._vanish(block)
        self._gone(blocks, reason)

    def pin(self, blocks: Sequence[int]) -> None:
        fresh = [block for block in blocks if not self.holding[block].pinned]
        for block in fresh:
            self.holding[block].pinned = True
        self.tree.hold(fresh)

    def unpin(self, blocks: Sequence[int]) -> int:
        """How many were pinned. One that is named twice is unpinned once."""
        pinned = [block for block in dict.fromkeys(blocks) if self.holding[block].pinned]
        for block in pinned:
            self.holding[block].pinned = False
        self.tree.unhold(pinned)
        return len(pinned)

    # --- looking --------------------------------------------------------------------------------

    def state(self, block: int) -> State:
        return self.holding[block].state

    def at(self, slot: Slot) -> int:
        """The block in this slot; NONE while it is allocated for one that is not inserted yet."""
        return self._block_of.get(slot, NONE)

    def committed(self) -> list[int]:
        """Every block that is complete, those nearer to the root first."""
        blocks = [block for block in self.tree.linked() if self.state(block) is not State.RESERVED]
        return sorted(blocks, key=self.tree.depth.__getitem__)

    def take_changes(self) -> list[Change]:
        changes, self._changes = self._changes, []
        return changes

    def stats(self) -> dict[str, float]:
        return {
            "blocks": float(len(self.tree)),
            "block_bytes": float(self._held_bytes),
            "free_bytes": float(self.space.units_free * self.space.unit_bytes),
            "evictable_leaves": float(self.tree.evictable_count()),
            "orphans": float(len(self.tree.orphans())),
            "parked_blocks": float(len(self._block_of) - len(self.tree)),
        }

    def check(self) -> None:
        """Assert every invariant."""
        self.tree.check()
        self.space.check()
        assert set(self._block_of) == set(self.space.used_slots())
        linked = set(self.tree.linked())
        generations = set()
        for slot, block in self._block_of.items():
            holding = self.holding[block]
            assert holding.slot == slot
            assert 0 < holding.generation <= self._generation
            generations.add(holding.generation)
            assert holding.state is not State.ABSENT
            assert (holding.state is State.PARKED) == (block not in linked)
            assert bool(self.tree.ready[block]) == (holding.state is State.PUBLISHED)
            assert not holding.pinned or holding.state in (State.WAITING, State.PUBLISHED)
            if holding.state is State.RESERVED:
                assert self.tree.holds[block] == 1
            elif holding.state is State.WAITING:
                assert not self._publishable(block)
            elif holding.state is State.PUBLISHED:
                assert self._publishable(block)
        assert len(generations) == len(self._block_of)
        assert linked <= set(self._block_of.values())
        assert self._held_bytes == sum(self.tree.block_bytes[block] for block in self._block_of.values())

    # --- steps ----------------------------------------------------------------------------------

    def _publishable(self, block: int) -> bool:
        """Can all before it be found?"""
        parent = self.tree.parent[block]
        return bool(self.tree.ready[parent]) if parent != NONE else not self.tree.is_orphan(block)

    def _graft(self, entries: Sequence[Restored], runs: Sequence[Run]) -> list[list[int]]:
        """Hold these, which have their slots; publish what can be found now."""
        tree, start = self.tree, self._generation + 1
        keys = [entry.key for entry in entries]
        sizes = [entry.block_bytes for entry in entries]
        slots = [entry.slot for entry in entries]
        blocks, adopted = tree.graft(keys, sizes, runs)
        self._generation += len(blocks)
        self._held_bytes += sum(sizes)
        holdings = map(
            Holding,
            slots,
            range(start, start + len(blocks)),
            repeat(State.WAITING),
            [entry.checksum for entry in entries],
        )
        put(self.holding, blocks, list(holdings))
        self._block_of.update(zip(slots, blocks, strict=True))
        paths = [blocks[start:end] for start, end, _, _ in runs]
        for path, (start, end, _, _) in zip(paths, runs, strict=True):
            if self._publishable(path[0]):
                parent = tree.parent[path[0]]
                for block in path:
                    tree.ready[block] = 1
                    self.holding[block].state = State.PUBLISHED
                before = tree.key[parent] if parent != NONE else None
                self._changes.append(Change("stored", tuple(keys[start:end]), before, "restored"))
        for orphan in adopted:
            self._publish(orphan, "restored")
        return paths

    def _publish(self, first: int, reason: str) -> None:
        """Publish a waiting block and all waiting ones that continue it, a run at a time."""
        starts = [first] if self._publishable(first) else []
        for start in starts:
            run = [start]
            for block in run:
                self.holding[block].state = State.PUBLISHED
                self.tree.ready[block] = 1
                waiting = [
                    child
                    for child in self.tree.children_of(block)
                    if self.holding[child].state is State.WAITING
                ]
                run += waiting[:1]
                starts += waiting[1:]
            parent = self.tree.parent[start]
            before = self.tree.key[parent] if parent != NONE else None
            self._changes.append(Change("stored", self._keys(run), before, reason))

    def _lose(self, blocks: Iterable[int]) -> list[int]:
        """These and all that continues them wait now. Those that could be found until now."""
        ready = self.tree.ready
        lost: list[int] = []
        for first in blocks:
            walk = [first] if ready[first] else []
            for block in walk:
                ready[block] = 0
                self.holding[block].state = State.WAITING
                walk += [child for child in self.tree.children_of(block) if ready[child]]
            lost += walk
        return lost

    def _removed(self, blocks: Sequence[int], reason: str) -> None:
        if blocks:
            self._changes.append(Change("removed", self._keys(blocks), None, reason))

    def _keys(self, blocks: Iterable[int]) -> tuple[StorageKey, ...]:
        return tuple([self.tree.key[block] for block in blocks])

    def _park(self, block: int) -> None:
        self.tree.unlink(block)
        self.holding[block].state = State.PARKED

    def _vanish(self, block: int) -> None:
        holding = self.holding[block]
        holding.state = State.ABSENT
        del self._block_of[holding.slot]
        self.space.free(holding.slot)
        self._held_bytes -= self.tree.block_bytes[block]
        self.tree.recycle(block)
