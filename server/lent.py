"""Planes of blocks that a follower may read now: of an open reservation, or of blocks that are held.

    of a reservation ── committed ──► of held blocks, by a lease of its own
           │                               │
           └── stop, or its time is over ──┴──► the ticket is withdrawn, then the lease given back: over

Invariant: while the ticket lives, its slots hold these blocks: either the reservation knows of this use
(``server.uses``), or the lease holds them.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.leases import Owner
from kvcache.ledger import Lease
from kvcache.server.core import Core
from kvcache.server.tickets import Issued

TICKET_MS = 20_000
"""A follower has read what he was given by then: some MiB."""
HOLD_NS = 3_600 * NS_PER_S
OWNER = "streams"


class Lent:
    """A ticket, and what keeps its slots. It is one of ``server.uses``."""

    def __init__(
        self, core: Core, follower: Owner, via: str, pieces: Sequence[memoryview], keys: Sequence[StorageKey]
    ) -> None:
        """RAISES BadInput (bad_tier, too_large). REQUIRES: ``of`` or ``of_held`` is called at once."""
        self._core = core
        self._keys = keys
        self._reservation_id = 0
        self._lease_id = 0
        until_ns = core.clock.now_ns() + TICKET_MS * NS_PER_MS
        self.issued: Issued = core.tickets.export(follower, via, pieces, until_ns, self._over)

    def of(self, reservation_id: int, owner: Owner) -> None:
        """The pieces are of an open reservation."""
        self._reservation_id = reservation_id
        self._core.uses.add(reservation_id, owner, self)

    def of_held(self, lease: Lease) -> None:
        """The pieces are of blocks that this lease, which nobody else has, holds."""
        self._lease_id = lease.lease_id

    def keep(self) -> None:
        lease = borrow(self._core, self._keys)
        self._lease_id = lease.lease_id
        if len(lease.keys) < len(self._keys):  # What comes before them was lost: they may go at any time.
            self._core.tickets.end(self.issued)

    async def stop(self) -> None:
        await self.issued.stop()

    def _over(self) -> None:
        self._core.uses.remove(self._reservation_id, self)
        if self._lease_id:
            give_back(self._core, self._lease_id)


def borrow(core: Core, keys: Sequence[StorageKey]) -> Lease:
    """Hold these blocks for a follower: it ends when it is given back, long before its time."""
    return core.ledger.borrow(keys, OWNER, core.clock.now_ns() + HOLD_NS)


def give_back(core: Core, lease_id: int) -> None:
    core.ledger.release(lease_id, OWNER, core.clock.now_ns())
    core.settle()
