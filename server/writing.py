"""What a writer asks on one connection: room, the bytes where they come over the socket, publish or not.

A commit of blocks that came over the wire first sums what lies in the slots, then publishes: unpublished ->
written -> summed -> published.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache import wire
from kvcache.block import HASH_BYTES
from kvcache.errors import BadInput
from kvcache.ledger import Reservation
from kvcache.policy import RequestContext
from kvcache.request_hints import hints_of
from kvcache.server.core import Core
from kvcache.server.exports import Exports
from kvcache.server.hbm_asking import HbmAsking, is_hbm, split_sums
from kvcache.server.identity import Identity
from kvcache.server.namespaces import Opened
from kvcache.server.reading import offsets, parent_key
from kvcache.server.session import Answer, Later
from kvcache.server.written import Written


class Writing:
    """The writer's half of one connection."""

    def __init__(
        self, core: Core, identity: Identity, exports: Exports, written: Written, hbm: HbmAsking
    ) -> None:
        self._core = core
        self._identity = identity
        self._exports = exports
        self._written = written
        self._hbm = hbm

    def reserve(self, request: wire.Reserve) -> wire.Reply:
        self._identity.require("writer")
        core = self._core
        opened = core.namespaces.of(request.namespace, self._identity.tenant)
        keys = core.keys(opened, request.prefix, wire.BATCH_BLOCKS_MAX)
        context = self._context(request)
        if is_hbm(request.tier):
            reply = self._hbm.reserve(opened, parent_key(opened, request.parent), keys, context)
            self._heard(request, opened, context)
            return reply
        reservation = core.ledger.reserve(
            self._identity.arena,
            parent_key(opened, request.parent),
            keys,
            opened.spec.block_bytes,
            self._identity.owner,
            context,
        )
        core.settle()
        self._heard(request, opened, context)
        if reservation.reason in ("busy", "full"):
            core.counters[f"short_reservations:{reservation.reason}"] += 1
        if reservation.reservation_id:
            core.make_room_later(self._identity.arena, opened.spec.block_bytes, len(reservation.keys))
            self._tell_peers(request, reservation)
        return wire.Reserved(
            reservation=reservation.reservation_id,
            start=reservation.start,
            count=len(reservation.keys),
            offsets=offsets(self._identity, reservation.slots),
            generations=list(reservation.generations),
            reason=reservation.reason,
        )

    def _heard(self, request: wire.Reserve, opened: Opened, context: RequestContext) -> None:
        """For recordings, and for the caches that show what host memory would hold of all that is saved."""
        core, spec = self._core, opened.spec
        if self._identity.node:
            return
        if core.recording.is_on:
            core.recording.saved(request, spec.block_tokens, opened.tenant)
        if core.tuning.shadowing.is_on:
            core.tuning.shadowing.saved(
                context,
                opened.namespace_id,
                request.prefix,
                request.parent,
                spec.block_bytes,
                spec.block_tokens,
            )

    def _tell_peers(self, request: wire.Reserve, reservation: Reservation) -> None:
        """Bring it to the peer that is named; or it is what a peer brings here."""
        core, owner, number = self._core, self._identity.owner, reservation.reservation_id
        if self._identity.node:
            core.bringing.arriving.begin(reservation, owner)
        elif request.push and core.bringing.pusher is None:
            core.counters["push_failures:unknown"] += 1
        elif request.push and core.bringing.pusher is not None:
            push = core.bringing.pusher.begin(
                request.push, reservation, lambda ended: core.uses.remove(number, ended)
            )
            if push is not None:
                core.uses.add(number, owner, push)

    def _context(self, request: wire.Reserve) -> RequestContext:
        return hints_of(request).context(self._core.clock.now_ns(), self._identity.tenant)

    def _reserved(self, reservation_id: int) -> tuple[Opened, Reservation]:
        reservation = self._core.ledger.reserved(reservation_id, self._identity.owner)
        return self._core.namespaces.of(reservation.keys[0][:HASH_BYTES], self._identity.tenant), reservation

    def destination(self, request: wire.Write, payload_bytes: int) -> list[memoryview]:
        """The reserved slots that a Write fills. RAISES KVCacheError when it may not."""
        self._identity.require("writer")
        opened, reservation = self._reserved(request.reservation)
        end = request.start + request.count
        size = opened.spec.block_bytes
        if not 0 <= request.start < end <= len(reservation.keys) or payload_bytes != request.count * size:
            raise BadInput(
                "bad_block",
                f"{payload_bytes} bytes for {request.count} blocks from {request.start}",
                f"{len(reservation.keys)} are reserved, of {size} bytes each",
                "send whole blocks within the reservation",
            )
        return [self._core.host.view(slot, size) for slot in reservation.slots[request.start : end]]

    def wrote(self, request: wire.Write) -> wire.Reply:
        opened, reservation = self._reserved(request.reservation)
        blocks = range(request.start, request.start + request.count)
        self._written.mark(reservation, blocks, range(opened.spec.plane_count))
        self._core.counters["written_bytes:socket"] += request.count * opened.spec.block_bytes
        return wire.Done()

    def commit(self, request: wire.Commit) -> Answer | Later:
        self._identity.require("writer")
        if is_hbm(request.tier):
            return self._hbm.commit(request)
        opened, reservation = self._reserved(request.reservation)
        sums = split_sums(opened, request.sums, len(reservation.keys))
        self._check_promised(reservation, sums)
        if self._identity.mapped and reservation.reservation_id not in self._written:
            if self._is_cut_off(reservation):
                return self._stop_and_publish(opened, reservation, sums)
            return self._publish(opened, reservation, sums)
        if missing := self._written.missing(reservation, opened.spec.plane_count):
            raise BadInput(
                "bad_reservation",
                f"{missing} of {len(reservation.keys)} reserved blocks were not written",
                "commit publishes what was written",
                "write every block first, or abort; the reservation is still open",
            )
        return self._verify_and_publish(opened, reservation, sums)

    async def _verify_and_publish(
        self, opened: Opened, reservation: Reservation, sums: Sequence[bytes]
    ) -> Answer:
        await self._exports.stop_posts(reservation.reservation_id)
        arrived = await self._core.slot_sums(opened, reservation.slots)
        if arrived != list(sums):
            self._core.counters["rejected_blocks:transfer"] += len(reservation.keys)
            raise BadInput(
                "bad_block",
                "the bytes that arrived do not have the sums that were sent",
                "they changed on the way, or were summed wrongly",
                "write them again; the reservation is still open",
            )
        return await self._stop_and_publish(opened, reservation, sums)

    def _check_promised(self, reservation: Reservation, sums: Sequence[bytes]) -> None:
        """RAISES BadInput unless they are what followers were told (``server.streams``)."""
        advanced = self._core.progress.of(reservation.reservation_id)
        if advanced is not None:
            advanced.check_promised(sums)

    def _is_cut_off(self, reservation: Reservation) -> bool:
        """Has the block before it been lost, so that what is published now cannot be held for followers?"""
        advanced = self._core.progress.of(reservation.reservation_id)
        before = advanced.parent if advanced is not None else None
        return before is not None and not self._core.ledger.has(before)

    async def _stop_and_publish(
        self, opened: Opened, reservation: Reservation, sums: Sequence[bytes]
    ) -> Answer:
        if self._is_cut_off(reservation):
            self._core.progress.forget(reservation.reservation_id)
            await self._core.uses.stop(reservation.reservation_id)
        return self._publish(opened, reservation, sums)

    def _publish(self, opened: Opened, reservation: Reservation, sums: Sequence[bytes]) -> wire.Reply:
        core = self._core
        checksums = core.checksums(opened, reservation.keys, sums)
        count = core.ledger.commit(reservation.reservation_id, self._identity.owner, checksums, sums)
        core.uses.keep(reservation.reservation_id)
        core.progress.forget(reservation.reservation_id)
        core.counters["saved_tokens"] += count * opened.spec.block_tokens
        if core.stack is not None:
            core.stack.committed(reservation.keys)
        self._forget(reservation.reservation_id)
        return wire.Committed(count)

    def abort(self, request: wire.Abort) -> Answer | Later:
        if is_hbm(request.tier):
            return self._hbm.abort(request)
        self._core.ledger.reserved(request.reservation, self._identity.owner)
        self._core.progress.forget(request.reservation)
        if self._core.uses.any(request.reservation):
            return self._stop_and_abort(request.reservation)
        return self._abort(request.reservation)

    async def _stop_and_abort(self, reservation_id: int) -> Answer:
        await self._core.uses.stop(reservation_id)
        return self._abort(reservation_id)

    def _abort(self, reservation_id: int) -> wire.Reply:
        self._core.ledger.abort(reservation_id, self._identity.owner)
        self._forget(reservation_id)
        return wire.Done()

    def _forget(self, reservation_id: int) -> None:
        self._written.forget(reservation_id)
        self._core.bringing.arriving.end(reservation_id)
        self._core.settle()
