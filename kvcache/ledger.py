"""Reservations and leases of one tier: decides, does no I/O, reads no clock, awaits nothing.

A write:

    reserve ──► open ── commit ──► its blocks are published (``holdings`` draws a block's states)
                 │ ├── abort ────► its slots are free (``shorten``: those of its last blocks)
                 │ └── disconnect, while copies may be in flight ──► limbo ── writes_ended ──► free
                 └──── disconnect, when no copy can be in flight ──► as abort

A reserved slot is so used again only after its writer said that it has stopped, or is known to have
ended; a writer that was stopped in the middle and wakes up late writes into slots that are nobody's.
Reads are leases (``leases``); a read that outlasts its lease learns so at release. Each reservation
gives its slots new generations, larger than all before. What outlives the process is taken back by
``restore``, and goes with its device by ``withdraw_arena``.

What goes when room is needed is the policy's choice within the core's rules (``room``, ``guard``).
After every call, ``take_changes`` says what readers can and cannot find now, and the space's
``take_moves`` which memory the arenas gained and lost.

Invariants (``check``): a block's holds are its live leases, its pin and its writer, no more; every
used slot is a block's, a reservation's or parked; those of ``holdings``, ``leases`` and the space.

The sum (benchmarks/bench_ledger.py): reserve, commit and lease of 16 blocks take 10 to 30 us each, a
reserve that evicts as many 90 us; a match 0.1 us a block; ``restore`` and ``withdraw_arena`` 2 to 3 us a
block, so a node that serves calls them for a few thousand at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from kvcache.block import Slot, StorageKey
from kvcache.errors import BadInput
from kvcache.guard import PolicyGuard
from kvcache.holdings import Change, Holdings, State
from kvcache.leases import NO_LEASE, Lease, LeaseBook, Owner, SharedName
from kvcache.paths import ancestors, complete, missing, parent_block
from kvcache.policy import MakePolicy, RequestContext
from kvcache.prefix import NONE
from kvcache.recency import Recency
from kvcache.reservations import OpenWrite, Reservation, WriteBook
from kvcache.restored import Restored
from kvcache.room import Room
from kvcache.tiers.space import Space

__all__ = ["Change", "Lease", "Ledger", "Owner", "Reservation", "Restored"]

_TIMELESS = RequestContext(now_ns=0)
_NEAR_BLOCKS = 4_096  # What is known of so many stays in the processor's cache: four times as fast.


class Ledger:
    """One owner; every call returns at once."""

    def __init__(self, space: Space, make_policy: MakePolicy) -> None:
        self._holdings = Holdings(space, self._gone)
        self._tree = self._holdings.tree
        self._recency = Recency(self._tree)
        self.policy = PolicyGuard(
            self._tree, space.capacity_bytes, make_policy, self._holdings.committed, self._recency
        )
        self._room = Room(self._holdings, self.policy)
        self._leases = LeaseBook(self._tree)
        self._writes = WriteBook()
        self._quarantine: list[tuple[int, int]] = []

    # --- reading --------------------------------------------------------------------------------

    def match(self, keys: Sequence[StorageKey]) -> int:
        """How many leading blocks can be found. Changes nothing."""
        return len(self._tree.match(keys))

    def touch(self, keys: Sequence[StorageKey], context: RequestContext) -> int:
        """Tell the policy of a use without holding anything. How many leading blocks were found."""
        blocks = self._tree.match(keys)
        self.policy.on_request(context, blocks)
        return len(blocks)

    def lease(
        self,
        keys: Sequence[StorageKey],
        owner: Owner,
        expires_ns: int,
        context: RequestContext,
        request: str = "",
    ) -> Lease:
        """Hold the leading blocks that can be found, until ``expires_ns``; none when it is past, or when
        the owner has too many. With ``request``, all who name it with the same keys share one lease,
        which ends when each has released it; an owner has it once, however often it asks."""
        if expires_ns <= context.now_ns or not keys or not self._leases.admits(owner):
            return NO_LEASE
        name = (request, keys[-1], len(keys)) if request else None
        if name is not None:
            shared = self._leases.share(name, owner, expires_ns, context.now_ns)
            if shared.lease_id:
                return shared
        blocks = self._tree.match(keys)
        self.policy.on_request(context, blocks)
        if not blocks:
            return NO_LEASE
        return self._take(blocks, keys, owner, expires_ns, name)

    def borrow(self, keys: Sequence[StorageKey], owner: Owner, expires_ns: int) -> Lease:
        """Hold these blocks, wherever in the tree they are, until ``expires_ns``: those before the first
        that cannot be found, or that has another size; none when the owner has too many. For the tier's
        own errands: no policy hears of it."""
        ready, sizes = self._tree.ready, self._tree.block_bytes
        blocks: list[int] = []
        for key in keys:
            block = self._tree.find(key)
            if block == NONE or not ready[block] or sizes[block] != sizes[blocks[0] if blocks else block]:
                break
            blocks.append(block)
        if not blocks or not self._leases.admits(owner):
            return NO_LEASE
        return self._take(blocks, keys, owner, expires_ns, None)

    def leased(self, lease_id: int, owner: Owner) -> Lease:
        """RAISES BadInput (bad_lease) unless ``expire`` and ``release`` have left it to this owner."""
        return self._leases.find(lease_id, owner)

    def release(self, lease_id: int, owner: Owner, now_ns: int) -> bool:
        """Did the lease hold its blocks until now? RAISES BadInput (bad_lease) when the owner never had it
        or released it before."""
        return self._leases.release(lease_id, owner, now_ns)

    def chunk_sums(self, key: StorageKey) -> bytes:
        """The chunk sums of a block that can be found; empty when it cannot."""
        block = self._tree.find(key)
        return self._holdings.sums[block] if block != NONE and self._tree.ready[block] else b""

    def has(self, key: StorageKey) -> bool:
        """Can it be found?"""
        return self.slot_of(key) is not None

    def slot_of(self, key: StorageKey) -> Slot | None:
        """Where a block lies that can be found."""
        block = self._tree.find(key)
        return self._holdings.slot[block] if block != NONE and self._tree.ready[block] else None

    def ancestors(self, key: StorageKey) -> Iterator[StorageKey]:
        """The block itself, then those before it, nearest first, as far as they are held, be it only
        reserved. REQUIRES: nothing is changed before the last is taken."""
        return ancestors(self._tree, key)

    def continued(self, key: StorageKey) -> int:
        """How many blocks continue it, those that are only reserved included."""
        block = self._tree.find(key)
        return self._tree.children[block] if block != NONE else 0

    def coldest(self, context: RequestContext, count: int) -> list[StorageKey]:
        """At most ``count`` blocks that would go next, in this order. Changes nothing."""
        return [self._tree.key[block] for block in self.policy.victims(context, count)]

    # --- writing --------------------------------------------------------------------------------

    def reserve(
        self,
        arena: int,
        parent: StorageKey | None,
        keys: Sequence[StorageKey],
        block_bytes: int,
        owner: Owner,
        context: RequestContext,
    ) -> Reservation:
        """Room for the blocks of ``keys`` that are not held yet, behind ``parent`` (None: the root).

        Evicts as it must, but never what these blocks stand on. The parent may still be reserved, by
        the same owner. RAISES BadInput (bad_prefix) when the parent is not held, when a key comes
        twice, or when the keys skip a block that is known to come between."""
        start, before = complete(self._holdings, keys, parent_block(self._tree, parent))
        fresh, reason = missing(self._holdings, self._writes, keys, start, before, owner)
        admitted = self.policy.admit(context, before, fresh) if fresh else 0
        if admitted < len(fresh):
            fresh, reason = fresh[:admitted], "declined"
        slots = self._slots(context, arena, block_bytes, len(fresh), before) if fresh else []
        if len(slots) < len(fresh):
            fresh, reason = fresh[: len(slots)], "full"
        if not fresh:
            return Reservation(0, start, (), (), (), block_bytes, reason)
        blocks = self._holdings.reserve(fresh, slots, before, block_bytes)
        reservation = Reservation(
            reservation_id=self._writes.new_number(),
            start=start,
            keys=tuple(fresh),
            slots=tuple(slots),
            generations=tuple([self._holdings.generation[block] for block in blocks]),
            block_bytes=block_bytes,
            reason=reason,
        )
        self._writes.add(OpenWrite(reservation, blocks, owner, context))
        return reservation

    def make_room(self, context: RequestContext, arena: int, block_bytes: int, count: int) -> None:
        """Evict ahead, so that a later ``reserve`` of ``count`` such blocks need not."""
        self._room.ahead(context, arena, block_bytes, count)

    def reserved(self, reservation_id: int, owner: Owner) -> Reservation:
        """RAISES BadInput (bad_reservation) when it is not open, or another's."""
        return self._writes.find(reservation_id, owner).reservation

    def commit(
        self, reservation_id: int, owner: Owner, checksums: Sequence[bytes], sums: Sequence[bytes]
    ) -> int:
        """Every reserved block has been written; readers may find them. How many.

        RAISES BadInput (bad_reservation) when it is not open, or another's; (bad_block) unless there is
        one checksum and one run of chunk sums a block: the reservation is then still open."""
        opened = self._writes.find(reservation_id, owner)
        if not len(checksums) == len(sums) == len(opened.blocks):
            raise BadInput(
                "bad_block",
                f"{len(checksums)} checksums and {len(sums)} runs of sums for {len(opened.blocks)} blocks",
                "every reserved block has one of each",
                "commit again with all of them; the reservation is still open",
            )
        self._writes.close(reservation_id)
        self._holdings.commit(opened.blocks, checksums, sums)
        self.policy.on_admitted(opened.context, opened.blocks)
        return len(opened.blocks)

    def abort(self, reservation_id: int, owner: Owner) -> None:
        """The slots will not be filled after all, and nobody writes to them any more.

        RAISES BadInput (bad_reservation) when it is not open, or another's."""
        self._holdings.abort(self._writes.find(reservation_id, owner).blocks)
        self._writes.close(reservation_id)

    def shorten(self, reservation_id: int, owner: Owner, count: int) -> Reservation:
        """Give up all but the leading ``count`` blocks, as ``abort`` would; what is left. With 0, an empty
        reservation that is not open.

        RAISES BadInput (bad_reservation) when it is not open, or another's."""
        opened = self._writes.find(reservation_id, owner)
        assert count >= 0
        if count >= len(opened.blocks):
            return opened.reservation
        left = opened.reservation.first(count)
        self._holdings.abort(opened.blocks[count:])
        if count:
            self._writes.add(OpenWrite(left, opened.blocks[:count], owner, opened.context))
        else:
            self._writes.close(reservation_id)
        return left

    def restore(self, entries: Sequence[Restored]) -> list[Restored]:
        """What a device holds still is held again, and found as far as all before it is. Those listed
        first are taken for the oldest.

        What is not taken is returned, and takes nothing: its key is known, its slot is used or is none,
        or the block before it is neither held nor taken."""
        paths, refused = self._holdings.restore(entries)
        self.policy.on_restored(_TIMELESS, paths)
        return refused

    # --- time and people ------------------------------------------------------------------------

    def expire(self, now_ns: int) -> int:
        """End the leases whose time is over, and free what was long enough in quarantine. How many."""
        ended = self._leases.expire(now_ns)
        still: list[tuple[int, int]] = []
        while self._quarantine and self._quarantine[0][0] <= now_ns:
            until_ns, block = heappop(self._quarantine)
            if self._tree.holds[block]:
                still.append((until_ns, block))
            else:
                self._holdings.unpark([block])
                ended += 1
        for entry in still:
            heappush(self._quarantine, entry)
        return ended

    def disconnect(self, owner: Owner, writes_ended: bool) -> bool:
        """The owner is gone. Its leases are released; its reservations are aborted if no copy of its can
        be in flight, else their slots are kept aside until ``writes_ended(owner)``. Are any kept?"""
        self._leases.disconnect(owner)
        for opened in self._writes.leave(owner):
            self._holdings.give_up(opened.blocks)
        if writes_ended:
            self.writes_ended(owner)
        return self._writes.in_limbo(owner)

    def writes_ended(self, owner: Owner) -> None:
        """No copy of the owner, which is gone, is in flight any more."""
        self._holdings.unpark(self._writes.take_limbo(owner))

    def pin(self, keys: Sequence[StorageKey]) -> int:
        """Keep the leading blocks that can be found until ``unpin``, or until one of them is quarantined.
        Pinning twice is pinning once. How many are pinned now."""
        blocks = self._tree.match(keys)
        self._holdings.pin(blocks)
        return len(blocks)

    def unpin(self, keys: Sequence[StorageKey]) -> int:
        """How many were pinned, wherever in ``keys`` they stand."""
        found = [self._tree.find(key) for key in keys]
        return self._holdings.unpin([block for block in found if block != NONE])

    def quarantine(self, key: StorageKey, generation: int, until_ns: int) -> bool:
        """Withdraw a block whose bytes failed their check: nobody finds it or what continues it, and its
        slot is not used again before ``until_ns`` nor while it is leased. False when it has gone, or
        has been written anew, since. Its key can be reserved again at once, and then those that
        continue it are found again."""
        block = self._tree.find(key)
        if block == NONE or self._holdings.state(block) is State.RESERVED:
            return False
        if self._holdings.generation[block] != generation:
            return False
        self._holdings.withdraw(block)
        heappush(self._quarantine, (until_ns, block))
        return True

    def withdraw_arena(self, arena: int, until_ns: int, count: int | None = None) -> int:
        """A device is lost: nobody finds its blocks, nor what continues them elsewhere. Slots that somebody
        holds are kept aside as by ``quarantine``; the others are free, and can be restored, at once. What
        is being written there is its writers' to abort.

        How many blocks went: all, or ``count`` at most; call it again until none does."""
        gone = 0
        while count is None or gone < count:
            most = _NEAR_BLOCKS if count is None else min(_NEAR_BLOCKS, count - gone)
            step, parked = self._holdings.withdraw_arena(arena, most)
            for block in parked:
                heappush(self._quarantine, (until_ns, block))
            gone += step
            if not step:
                break
        return gone

    # --- what it tells --------------------------------------------------------------------------

    def take_changes(self) -> list[Change]:
        """What changed for readers since the last call, in order. REQUIRES: called after every call."""
        return self._holdings.take_changes()

    def stats(self) -> dict[str, float]:
        return {
            **self._holdings.stats(),
            "leases": float(len(self._leases)),
            "reservations": float(len(self._writes)),
            "limbo_blocks": float(len(self._writes.limbo())),
            "quarantined_blocks": float(len(self._quarantine)),
            "reclaimed_extents": float(self._room.reclaimed_extents),
            "policy_faults": float(self.policy.faults),
        }

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is held."""
        self._holdings.check()
        self.policy.check()
        self._leases.check()
        holds = self._leases.holds()
        reserved = self._writes.reserved()
        parked = self._writes.limbo() + [block for _, block in self._quarantine]
        assert len(set(reserved + parked)) == len(reserved) + len(parked)
        for block in range(len(self._holdings.slot)):
            state = self._holdings.state(block)
            if state is State.ABSENT:
                assert block not in holds
                continue
            expected = holds.get(block, 0) + self._holdings.is_pinned(block) + (state is State.RESERVED)
            assert self._tree.holds[block] == expected
            assert (state is State.RESERVED) == (block in reserved)
            assert (state is State.PARKED) == (block in parked)

    # --- steps ----------------------------------------------------------------------------------

    def _take(
        self,
        blocks: list[int],
        keys: Sequence[StorageKey],
        owner: Owner,
        expires_ns: int,
        name: SharedName | None,
    ) -> Lease:
        slot, generation, checksum = self._holdings.slot, self._holdings.generation, self._holdings.checksum
        lease = Lease(
            lease_id=0,
            keys=tuple(keys[: len(blocks)]),
            slots=tuple([slot[block] for block in blocks]),
            generations=tuple([generation[block] for block in blocks]),
            checksums=tuple([checksum[block] for block in blocks]),
            block_bytes=self._tree.block_bytes[blocks[0]],
            expires_ns=expires_ns,
        )
        return self._leases.add(lease, blocks, owner, name)

    def _slots(
        self, context: RequestContext, arena: int, block_bytes: int, count: int, parent: int
    ) -> list[Slot]:
        standing = [parent] if parent != NONE else []
        self._tree.hold(standing)
        try:
            return self._room.slots(context, arena, block_bytes, count)
        finally:
            self._tree.unhold(standing)

    def _gone(self, blocks: Sequence[int], reason: str) -> None:
        self.policy.on_evicted(_TIMELESS, blocks, reason)
