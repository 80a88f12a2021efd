"""Who may read what until when. A lease holds its blocks against eviction; it does not hold their keys.

    taken ──► live ── every owner released, or is gone ──► over
               │
               └── expired: its slots are free ── owner releases: not intact, or is gone ──► over

A lease may have several owners (an engine's scheduler and its workers, by the same request name). Its
end forbids new reads and gives the slots back; who reads on is told, at release, that the bytes were
not held all the time, and has their generations and sums to know it by.

Invariants (``check``): a live lease holds each of its blocks once and has an owner; no owner has more
than ``LEASES_MAX`` leases, live or expired; a shared name leads to a live lease.

The sum: 0.4 us a block; expiry costs nothing while nothing expires.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import NoReturn

from kvcache.block import Slot, StorageKey
from kvcache.errors import BadInput
from kvcache.prefix import PrefixTree

LEASES_MAX = 4_096
_SPARE_ENTRIES = 1_024

Owner = Hashable
SharedName = tuple[str, StorageKey, int]


@dataclass(frozen=True, slots=True)
class Lease:
    """A right to read. Tuples have one entry a block, in the order of the prefix. ``lease_id`` is 0 when
    there is none."""

    lease_id: int
    keys: tuple[StorageKey, ...]
    slots: tuple[Slot, ...]
    generations: tuple[int, ...]
    checksums: tuple[bytes, ...]
    block_bytes: int
    expires_ns: int


NO_LEASE = Lease(0, (), (), (), (), 0, 0)


class _Live:
    __slots__ = ("blocks", "lease", "name", "owners")

    def __init__(self, lease: Lease, blocks: list[int], name: SharedName | None) -> None:
        self.lease = lease
        self.blocks = blocks
        self.name = name
        self.owners: set[Owner] = set()


class LeaseBook:
    """Live leases, and expired ones until their owners know."""

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        self._live: dict[int, _Live] = {}
        self._of: dict[Owner, dict[int, bool]] = {}  # lease -> live?
        self._shared: dict[SharedName, int] = {}
        self._ends: list[tuple[int, int]] = []
        self.count = 0

    def __len__(self) -> int:
        return len(self._live)

    def admits(self, owner: Owner) -> bool:
        """May the owner have one more? At the limit, its oldest expired lease is forgotten for it."""
        mine = self._of.get(owner, {})
        if len(mine) < LEASES_MAX:
            return True
        expired = next((lease_id for lease_id, is_live in mine.items() if not is_live), 0)
        if expired:
            del mine[expired]
        return bool(expired)

    def add(self, lease: Lease, blocks: list[int], owner: Owner, name: SharedName | None) -> Lease:
        """Enter a new lease; its number is given here. REQUIRES: ``admits(owner)``."""
        self.count += 1
        numbered = replace(lease, lease_id=self.count)
        live = _Live(numbered, blocks, name)
        self._tree.hold(blocks)
        self._live[self.count] = live
        if name is not None:
            self._shared[name] = self.count
        self._join(live, owner)
        self._schedule(numbered)
        return numbered

    def share(self, name: SharedName, owner: Owner, expires_ns: int, now_ns: int) -> Lease:
        """The live lease of this name, with one more owner, and until ``expires_ns`` at least.

        NO_LEASE when there is none."""
        live = self._live.get(self._shared.get(name, 0))
        if live is None or live.lease.expires_ns <= now_ns:
            return NO_LEASE
        if expires_ns > live.lease.expires_ns:
            live.lease = replace(live.lease, expires_ns=expires_ns)
            self._schedule(live.lease)
        self._join(live, owner)
        return live.lease

    def find(self, lease_id: int, owner: Owner) -> Lease:
        """RAISES BadInput unless it is live and the owner's."""
        if not self._of.get(owner, {}).get(lease_id, False):
            self._refuse(lease_id)
        return self._live[lease_id].lease

    def release(self, lease_id: int, owner: Owner, now_ns: int) -> bool:
        """Was it live until now? RAISES BadInput unless the owner had it."""
        mine = self._of.get(owner, {})
        if lease_id not in mine:
            self._refuse(lease_id)
        if not mine[lease_id]:
            self._forget(lease_id, owner)
            return False
        live = self._live[lease_id]
        self._leave(live, owner)
        return now_ns < live.lease.expires_ns

    def expire(self, now_ns: int) -> int:
        """End the leases whose time is over. How many."""
        ended = 0
        while self._ends and self._ends[0][0] <= now_ns:
            expires_ns, lease_id = heappop(self._ends)
            live = self._live.get(lease_id)
            if live is None or live.lease.expires_ns != expires_ns:
                continue
            for owner in live.owners:
                self._of[owner][lease_id] = False
            self._end(live)
            ended += 1
        return ended

    def disconnect(self, owner: Owner) -> None:
        for lease_id, is_live in list(self._of.get(owner, {}).items()):
            if is_live:
                self._leave(self._live[lease_id], owner)
        self._of.pop(owner, None)

    def check(self) -> None:
        """Assert every invariant but the holds', which the ledger counts."""
        ends = set(self._ends)
        for lease_id, live in self._live.items():
            assert live.lease.lease_id == lease_id
            assert live.owners
            assert all(self._of[owner][lease_id] for owner in live.owners)
            assert (live.lease.expires_ns, lease_id) in ends
        for owner, mine in self._of.items():
            assert 0 < len(mine) <= LEASES_MAX
            assert all(owner in self._live[lease_id].owners for lease_id, is_live in mine.items() if is_live)
        for name, lease_id in self._shared.items():
            assert self._live[lease_id].name == name

    def holds(self) -> dict[int, int]:
        """How many live leases hold each block. For ``check``."""
        holds: dict[int, int] = {}
        for live in self._live.values():
            for block in live.blocks:
                holds[block] = holds.get(block, 0) + 1
        return holds

    def _join(self, live: _Live, owner: Owner) -> None:
        live.owners.add(owner)
        self._of.setdefault(owner, {})[live.lease.lease_id] = True

    def _leave(self, live: _Live, owner: Owner) -> None:
        live.owners.remove(owner)
        self._forget(live.lease.lease_id, owner)
        if not live.owners:
            self._end(live)

    def _forget(self, lease_id: int, owner: Owner) -> None:
        mine = self._of[owner]
        del mine[lease_id]
        if not mine:
            del self._of[owner]

    def _end(self, live: _Live) -> None:
        del self._live[live.lease.lease_id]
        if live.name is not None and self._shared.get(live.name) == live.lease.lease_id:
            del self._shared[live.name]
        self._tree.unhold(live.blocks)

    def _schedule(self, lease: Lease) -> None:
        heappush(self._ends, (lease.expires_ns, lease.lease_id))
        if len(self._ends) > 2 * len(self._live) + _SPARE_ENTRIES:
            self._ends = [(live.lease.expires_ns, lease_id) for lease_id, live in self._live.items()]
            heapify(self._ends)

    def _refuse(self, lease_id: int) -> NoReturn:
        raise BadInput(
            "bad_lease",
            f"lease {lease_id} is not held",
            "it has expired, was released, or is another's",
            "take a new lease",
        )
