"""Writes that are not over: what is reserved for whom, and the slots of writers that vanished.

    reserved ── add ──► open ── close ──► (the ledger commits or aborts its blocks)
                         └──── leave ──► limbo ── take_limbo ──► (the ledger frees its slots)

Invariants: a block is in at most one open reservation or in limbo once; numbers grow and are never
used again.

The sum: under 1 us a call; whose a block is takes a look at each open reservation of one owner.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.block import Slot, StorageKey
from kvcache.errors import BadInput
from kvcache.leases import Owner
from kvcache.policy import RequestContext


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots to write: block ``start + i`` of the keys asked for goes into ``slots[i]``; those before
    ``start`` are held. ``reservation_id`` is 0 when there are none.

    ``reason`` says why there are not more: "held" (the next one is there already), "busy" (the next
    one is being written by somebody), "full" (no room), "declined" (the policy does not want it),
    "short" (the rest was given up), or nothing (there are no more)."""

    reservation_id: int
    start: int
    keys: tuple[StorageKey, ...]
    slots: tuple[Slot, ...]
    generations: tuple[int, ...]
    block_bytes: int
    reason: str

    def first(self, count: int) -> Reservation:
        """Its leading ``count`` blocks. REQUIRES: it has more."""
        return Reservation(
            self.reservation_id if count else 0,
            self.start,
            self.keys[:count],
            self.slots[:count],
            self.generations[:count],
            self.block_bytes,
            "short",
        )


@dataclass(frozen=True, slots=True)
class OpenWrite:
    reservation: Reservation
    blocks: list[int]
    owner: Owner
    context: RequestContext


class WriteBook:
    """One owner."""

    def __init__(self) -> None:
        self._open: dict[int, OpenWrite] = {}
        self._limbo: dict[Owner, list[int]] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._open)

    def new_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def add(self, write: OpenWrite) -> None:
        """Enter it, in the place of one with the same number."""
        self._open[write.reservation.reservation_id] = write

    def find(self, reservation_id: int, owner: Owner) -> OpenWrite:
        """RAISES BadInput (bad_reservation) when it is not open, or another's."""
        write = self._open.get(reservation_id)
        if write is None or write.owner != owner:
            raise BadInput(
                "bad_reservation",
                f"reservation {reservation_id} is not open",
                "it was committed or aborted before, ended with its connection, or is another's",
                "reserve again",
            )
        return write

    def close(self, reservation_id: int) -> None:
        del self._open[reservation_id]

    def is_writing(self, block: int, owner: Owner) -> bool:
        return any(block in write.blocks for write in self._open.values() if write.owner == owner)

    def leave(self, owner: Owner) -> list[OpenWrite]:
        """What the owner, which is gone, had open: its blocks are in limbo now."""
        theirs = [write for write in self._open.values() if write.owner == owner]
        for write in theirs:
            self.close(write.reservation.reservation_id)
            self._limbo.setdefault(owner, []).extend(write.blocks)
        return theirs

    def in_limbo(self, owner: Owner) -> bool:
        return owner in self._limbo

    def take_limbo(self, owner: Owner) -> list[int]:
        return self._limbo.pop(owner, [])

    def reserved(self) -> list[int]:
        """Every block of an open reservation."""
        return [block for write in self._open.values() for block in write.blocks]

    def limbo(self) -> list[int]:
        """Every block in limbo."""
        return [block for blocks in self._limbo.values() for block in blocks]
