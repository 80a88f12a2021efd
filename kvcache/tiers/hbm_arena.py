"""One GPU's memory for one trust domain: what is in it, who may use which slot, whether it is still there.

    serving ── lose (the GPU failed or was reset) ──► lost: finds nothing, takes nothing, for good

Each arena has a ledger of its own, so each GPU keeps what its own engines use: what two of them need lies on
both, and no engine is given a block that it cannot reach. An arena is prefix-closed in itself.

Invariants: a lost arena gives no lease and no reservation; what was reserved in it stays its writers'. The
bytes are those who map it copy; this class reads none.

The sum: as ``kvcache.ledger``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcache.block import StorageKey
from kvcache.leases import NO_LEASE, Lease, Owner
from kvcache.ledger import Change, Ledger
from kvcache.policy import MakePolicy, RequestContext
from kvcache.reservations import Reservation
from kvcache.tiers.space import HBM_LAYOUT, Space

if TYPE_CHECKING:
    from kvcache.device.slab import SlabTicket
    from kvcache.tiers.hbm import HbmTier

_OWNER = "hbm-arena"
ARENA = 0
"""Its number in its own memory and space."""


class HbmArena:
    """One owner; every call returns at once. After every call of the ledger, ``settle``."""

    def __init__(self, memory: HbmTier, name: str, unit_bytes: int, make_policy: MakePolicy) -> None:
        """``memory`` has one arena, of that name: ``ARENA``."""
        self.name = name
        self.memory = memory
        self._space = Space(memory.capacity_bytes, unit_bytes, HBM_LAYOUT)
        assert self._space.add_arena(memory.capacity_bytes) == ARENA
        self.ledger = Ledger(self._space, make_policy)
        self.is_lost = False

    @property
    def capacity_bytes(self) -> int:
        return self._space.capacity_bytes

    @property
    def free_bytes(self) -> int:
        """In extents that nobody uses."""
        return self._space.units_free * self._space.unit_bytes

    @property
    def ticket(self) -> SlabTicket:
        return self.memory.ticket(ARENA)

    @property
    def descriptor(self) -> int:
        return self.memory.descriptor(ARENA)

    def serves(self, name: str, gpu: bytes) -> bool:
        """Is it that GPU's, and may this trust domain map it?"""
        return self.memory.on(gpu, name) is not None

    def match(self, keys: Sequence[StorageKey]) -> int:
        """How many leading blocks can be found."""
        return 0 if self.is_lost else self.ledger.match(keys)

    def lease(
        self, keys: Sequence[StorageKey], owner: Owner, expires_ns: int, context: RequestContext, request: str
    ) -> Lease:
        """As ``Ledger.lease``."""
        if self.is_lost:
            return NO_LEASE
        return self.ledger.lease(keys, owner, expires_ns, context, request)

    def reserve(
        self,
        parent: StorageKey | None,
        keys: Sequence[StorageKey],
        block_bytes: int,
        owner: Owner,
        context: RequestContext,
    ) -> Reservation:
        """As ``Ledger.reserve``; "full" when the GPU is lost."""
        if self.is_lost:
            return Reservation(0, 0, (), (), (), block_bytes, "full")
        return self.ledger.reserve(ARENA, parent, keys, block_bytes, owner, context)

    def overrule(self, keys: Sequence[StorageKey], below: Ledger, now_ns: int) -> int:
        """Withdraw those of them that it holds with other bytes than ``below``. How many it did."""
        count = 0
        for key in keys if not self.is_lost else ():
            mine, theirs = self.ledger.chunk_sums(key), below.chunk_sums(key)
            if mine and theirs and mine != theirs:
                count += self.ledger.quarantine(key, self._generation(key, now_ns), now_ns)
        return count

    def _generation(self, key: StorageKey, now_ns: int) -> int:
        """REQUIRES: it can be found."""
        held = self.ledger.borrow([key], _OWNER, now_ns + 1)
        self.ledger.release(held.lease_id, _OWNER, now_ns)
        return held.generations[0]

    def settle(self) -> None:
        """Memory follows what the ledger decided."""
        if moves := self._space.take_moves():
            self.memory.apply(moves)

    def take_changes(self) -> list[Change]:
        return self.ledger.take_changes()

    def lose(self, why: str, now_ns: int) -> None:
        """Its GPU failed or was reset: nothing in it can be found any more. May be called twice."""
        self.memory.lose(ARENA, why)
        if not self.is_lost:
            self.is_lost = True
            self.ledger.withdraw_arena(ARENA, now_ns)
            self.settle()

    def troubles(self) -> list[str]:
        """In plain words, what does not work as it should."""
        return self.memory.troubles()

    def check(self) -> None:
        """Assert every invariant."""
        self.ledger.check()
        self._space.check()
        self.memory.check()
        assert not self.is_lost or self.memory.troubles()

    def close(self) -> None:
        """Let the memory go. May be called twice."""
        self.memory.close()
