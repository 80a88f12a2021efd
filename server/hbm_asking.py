"""What a connection asks of its slab of HBM: leases and reservations in it. Bytes never come this way.

A block that a reader reports is withdrawn at once and nobody looks at it: whoever is right, it costs one copy
from the tier below, and those are not touched. Its slot is used again: it is not known to be bad, and who has
bad memory of its own must not take a GPU's away from others.

Who plans for others (``Identity.plans_for``) maps nothing, so it leases and releases, and neither writes nor
reports. Its slab is looked for when it asks, as those who map it may come later; then it is that for good.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache import wire
from kvcache.block import HASH_BYTES, NamespaceId, StorageKey
from kvcache.errors import BadInput
from kvcache.leases import NO_LEASE, Lease
from kvcache.policy import RequestContext
from kvcache.server.core import Core
from kvcache.server.hbm import NO_HBM, Hbm, check_same
from kvcache.server.identity import Identity
from kvcache.server.namespaces import Opened
from kvcache.sums import SUM_BYTES
from kvcache.tiers.hbm_arena import HbmArena
from kvcache.tiers.space import slot_offset


class HbmAsking:
    """Of one connection."""

    def __init__(self, core: Core, identity: Identity) -> None:
        self._core = core
        self._identity = identity
        self._number = identity.hbm

    def uses(self, namespace: NamespaceId) -> None:
        """An engine asks for blocks of it; nothing, where it has mapped no slab."""
        if self._core.hbm is not None and self._identity.hbm != NO_HBM:
            self._core.hbm.telling.used(self._identity.hbm, namespace)

    @property
    def name(self) -> str:
        """Of its slab, among those of the node."""
        return f"{wire.HBM} {self._number}"

    # --- reading --------------------------------------------------------------------------------

    def match(self, keys: Sequence[StorageKey]) -> int:
        """How many leading blocks its slab holds; 0 for one that has none."""
        arena = self._arena()
        return arena.match(keys) if arena is not None else 0

    def lease(
        self, keys: Sequence[StorageKey], expires_ns: int, context: RequestContext, request: str
    ) -> Lease:
        arena = self._arena()
        if arena is None:
            return NO_LEASE
        return arena.lease(keys, self._identity.owner, expires_ns, context, request)

    def leased(self, lease: Lease) -> wire.HbmLeased:
        """As it is told."""
        arena = self._arena()
        if arena is None or not lease.lease_id:
            return wire.NOTHING_LEASED
        return wire.HbmLeased(
            lease.lease_id,
            len(lease.keys),
            [slot_offset(slot) for slot in lease.slots],
            list(lease.generations),
            b"".join(lease.checksums),
            arena.ticket.incarnation,
        )

    def release(self, request: wire.Release) -> wire.Reply:
        core, owner, arena = self._core, self._identity.owner, self._needed(self._arena())
        now_ns = core.clock.now_ns()
        if request.failed:
            self._mapped()
            lease = arena.ledger.leased(request.lease, owner)
            check_positions(request.failed, len(lease.keys))
            for at in sorted(set(request.failed)):
                gone = arena.ledger.quarantine(lease.keys[at], lease.generations[at], now_ns)
                core.counters["hbm_rejected_blocks:reader"] += gone
        intact = arena.ledger.release(request.lease, owner, now_ns)
        core.settle()
        return wire.Released(intact and not arena.is_lost)

    # --- writing --------------------------------------------------------------------------------

    def reserve(
        self,
        opened: Opened,
        parent: StorageKey | None,
        keys: Sequence[StorageKey],
        context: RequestContext,
    ) -> wire.Reply:
        core, arena = self._core, self._mapped()
        self.uses(opened.namespace_id)
        reservation = arena.reserve(parent, keys, opened.spec.block_bytes, self._identity.owner, context)
        core.settle()
        core.cool_hbm(self._identity.hbm)
        return wire.Reserved(
            reservation=reservation.reservation_id,
            start=reservation.start,
            count=len(reservation.keys),
            offsets=[slot_offset(slot) for slot in reservation.slots],
            generations=list(reservation.generations),
            reason=reservation.reason,
        )

    def commit(self, request: wire.Commit) -> wire.Reply:
        core, owner, arena = self._core, self._identity.owner, self._mapped()
        reservation = arena.ledger.reserved(request.reservation, owner)
        opened = core.namespaces.of(reservation.keys[0][:HASH_BYTES], self._identity.tenant)
        sums = split_sums(opened, request.sums, len(reservation.keys))
        checksums = core.checksums(opened, reservation.keys, sums)
        try:
            promoted = check_same(core.below_hbm, reservation.keys, checksums, core.clock.now_ns())
        except BadInput:
            core.counters["hbm_rejected_blocks:differs"] += len(reservation.keys)
            raise
        if arena.is_lost:
            raise BadInput("bad_reservation", "the GPU is lost", "nothing in its memory counts any more")
        count = arena.ledger.commit(request.reservation, owner, checksums, sums)
        core.counters["hbm_saved_blocks"] += count
        core.counters["hbm_promoted_blocks"] += promoted
        core.settle()
        return wire.Committed(count)

    def abort(self, request: wire.Abort) -> wire.Reply:
        self._mapped().ledger.abort(request.reservation, self._identity.owner)
        self._core.settle()
        return wire.Done()

    def _arena(self) -> HbmArena | None:
        hbm: Hbm | None = self._core.hbm
        if hbm is None:
            return None
        if self._number == NO_HBM and self._identity.plans_for is not None:
            self._number = hbm.find(*self._identity.plans_for)
        return hbm[self._number] if self._number != NO_HBM else None

    def _mapped(self) -> HbmArena:
        """RAISES BadInput when this connection maps no slab."""
        return self._needed(self._arena() if self._identity.hbm != NO_HBM else None)

    def _needed(self, arena: HbmArena | None) -> HbmArena:
        """RAISES BadInput when this connection has no slab."""
        if arena is None:
            raise BadInput(
                "bad_tier",
                "this connection has no memory of a GPU",
                "it asked for none with Hello, or the node has none for it",
                "set hbm for the node, and connect with the GPU's UUID",
            )
        return arena


def is_hbm(tier: str) -> bool:
    """Else it is host memory. RAISES BadInput for a tier that nobody can name here."""
    if tier not in (wire.HOST, wire.HBM):
        raise BadInput("bad_tier", f"tier {tier!r:.40}", "it is host or hbm")
    return tier == wire.HBM


def split_sums(opened: Opened, sums: bytes, count: int) -> list[bytes]:
    """Those of each block. RAISES BadInput unless every chunk of ``count`` blocks has one."""
    step = opened.spec.chunk_count * SUM_BYTES
    if len(sums) != step * count:
        raise BadInput(
            "bad_block",
            f"{len(sums)} bytes of sums for {count} blocks",
            f"a block of this namespace has {opened.spec.chunk_count} chunks of {SUM_BYTES} bytes of sum",
            "send every chunk's sum, in order; the reservation is still open",
        )
    return [sums[at : at + step] for at in range(0, len(sums), step)]


def check_positions(failed: Sequence[int], count: int) -> None:
    """RAISES BadInput unless they are within a lease of so many blocks."""
    if min(failed) < 0 or max(failed) >= count:
        raise BadInput(
            "bad_lease",
            f"block {max(failed)} of a lease of {count}",
            "it is not in it",
            "report positions within the lease",
        )
