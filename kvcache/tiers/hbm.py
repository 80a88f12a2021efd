"""The HBM tier: spare memory of this host's GPUs, as slabs that engines on them map.

One *arena* is one slab (``kvcache.device.slab``): one GPU's memory for one trust domain (uid, tenant), all of
it taken when the arena is made. An engine is given the arena of its own GPU, else one of a GPU that is
joined to it; slots and what they hold are the ledger's, as for host memory.

    made ── tensor, descriptor, ticket ──► lost (the GPU failed or was reset) ──► closed

Invariants: each arena has its own budget (``HBM_LAYOUT``); memory that is read or written lies in a granted
unit; an arena that is lost gives no tensor, for good, and its blocks are the ledger's to withdraw: a slab
made after it has another incarnation, so no lease of before reaches it.

What the node must hold to: a slot that an engine was writing when it died is used again only when its
process is known dead (pidfd): only then have its copies ended. A reader's lease ends with its event, not
with the call that queued the copy.

The sum: nothing after the start; bytes are copied by those who use them (``kvcache.device.copies``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from kvcache.block import Slot
from kvcache.device.slab import Memory, Slab, SlabTicket
from kvcache.tiers.space import Move, slot_arena, slot_offset


@dataclass(frozen=True, slots=True)
class Arena:
    """One trust domain's memory on one GPU. ``granted`` are the units in use."""

    name: str
    slab: Slab
    granted: set[int] = field(default_factory=set)


class HbmTier:
    """Arenas, one a GPU and trust domain. One owner."""

    def __init__(self, unit_bytes: int) -> None:
        """``unit_bytes`` is that of ``Space``: moves are whole units."""
        self._unit_bytes = unit_bytes
        self._arenas: list[Arena] = []

    @property
    def capacity_bytes(self) -> int:
        """Of all arenas together."""
        return sum(arena.slab.size_bytes for arena in self._arenas)

    def add_arena(self, name: str, memory: Memory, capacity_bytes: int) -> int:
        """A new, empty arena. The number is the one ``Space.add_arena`` gave for it.

        RAISES Unavailable when the GPU has not so much memory: nothing is held then."""
        size_bytes = capacity_bytes // self._unit_bytes * self._unit_bytes
        self._arenas.append(Arena(name, Slab.create(memory, name, size_bytes)))
        return len(self._arenas) - 1

    def on(self, uuid: bytes, name: str) -> int | None:
        """The arena on this GPU of that trust domain. None when there is none, or it is lost."""
        found = (
            number
            for number, arena in enumerate(self._arenas)
            if arena.name == name and arena.slab.ticket.uuid == uuid and not arena.slab.trouble
        )
        return next(found, None)

    def descriptor(self, arena: int) -> int:
        """To be handed, with the ticket, to who may map it. REQUIRES: not closed."""
        return self._arenas[arena].slab.descriptor

    def ticket(self, arena: int) -> SlabTicket:
        """What an engine needs beside the descriptor, and what its leases name."""
        return self._arenas[arena].slab.ticket

    def device(self, arena: int) -> torch.device:
        """Where it lies, as this process calls it."""
        return self._arenas[arena].slab.device

    def tensor(self, slot: Slot, length: int) -> torch.Tensor:
        """The bytes of a slot, uint8 [length], no copy. REQUIRES: the slot is granted, and nobody else owns
        it just now. RAISES Unavailable when its GPU is lost: a miss."""
        arena, offset = self._arenas[slot_arena(slot)], slot_offset(slot)
        first, last = offset // self._unit_bytes, (offset + length - 1) // self._unit_bytes
        assert arena.granted.issuperset(range(first, last + 1))
        return arena.slab.tensor(offset, length)

    def start(self, arena: int, length: int) -> torch.Tensor:
        """Its first bytes, whoever owns them: to see whether the GPU answers. RAISES Unavailable."""
        return self._arenas[arena].slab.tensor(0, length)

    def apply(self, moves: Iterable[Move]) -> None:
        """Follow what ``Space`` granted and took back, in its order. No memory moves between arenas."""
        for move in moves:
            first = move.offset // self._unit_bytes
            units = range(first, first + move.length // self._unit_bytes)
            granted = self._arenas[move.arena].granted
            if move.gained:
                granted.update(units)
            else:
                granted.difference_update(units)

    def resident_units(self) -> int:
        """Units with memory, in all arenas: all there are."""
        return self.capacity_bytes // self._unit_bytes

    def lose(self, arena: int, why: str) -> None:
        """Its GPU failed or was reset: what it held is not there any more."""
        self._arenas[arena].slab.lose(why)

    def troubles(self) -> list[str]:
        """In plain words, what does not work as it should."""
        return [f"HBM arena {each.name}: {each.slab.trouble}" for each in self._arenas if each.slab.trouble]

    def check(self) -> None:
        """Assert every invariant."""
        for arena in self._arenas:
            assert all(0 <= unit < arena.slab.size_bytes // self._unit_bytes for unit in arena.granted)

    def close(self) -> None:
        """Let the memory go. Engines that still map it keep it until they unmap. May be called twice."""
        for arena in self._arenas:
            arena.slab.close()
        self._arenas.clear()
