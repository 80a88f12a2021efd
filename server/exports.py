"""Blocks that leave or come over a transport, on behalf of one connection.

    lease ── export ─► ticket, its blocks held by a lease of its own
                          └── released, connection or time over ─► withdrawn ─► let go
    reservation ── post ─► ticket ── filled ─► written ── commit, which ends what is left and verifies
                          └── abort, connection or time over ─► withdrawn ─► slots free

Invariants: an exported block lies where the peer's lease says, from the ticket's first moment until it was
withdrawn; a posted slot is nobody else's so long (``uses``).

The sum: 20 us a ticket, 1 us a block, 0.5 us a piece of one; the reply carries 8 bytes a chunk.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kvcache import wire
from kvcache.block import HASH_BYTES, BlockSpec
from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.errors import BadInput
from kvcache.ledger import Lease, Reservation
from kvcache.server.core import Core
from kvcache.server.identity import Identity
from kvcache.server.namespaces import Opened
from kvcache.server.tickets import Issued
from kvcache.server.written import Written
from kvcache.sums import SUM_BYTES

PIECES_MAX = 16_384
"""Of one ticket: what every transport takes."""
SUMS_BYTES_MAX = wire.BODY_BYTES_MAX - (64 << 10)
HOLD_NS = 3_600 * NS_PER_S
"""How much longer than its ticket a hold lasts when the ticket does not end, which none should."""


@dataclass(frozen=True, slots=True)
class Part:
    """Of a block ``planes`` planes from ``plane`` on, of each plane ``length`` bytes from ``offset`` on."""

    spec: BlockSpec
    plane: int
    planes: int
    offset: int
    length: int

    @classmethod
    def of(cls, spec: BlockSpec, plane: int, planes: int, offset: int = 0, length: int = 0) -> Part:
        """0 planes, 0 bytes: all that follow. RAISES BadInput (bad_block) for what is not in a block, or no
        whole chunks."""
        part = cls(
            spec, plane, planes or spec.plane_count - plane, offset, length or spec.plane_bytes - offset
        )
        if part.planes < 1 or plane + part.planes > spec.plane_count:
            raise BadInput(
                "bad_block",
                f"{part.planes} planes from plane {plane}",
                f"a block of this namespace has {spec.plane_count} planes",
                "ask within the block",
            )
        whole_chunks = offset % spec.chunk_bytes == 0 == part.length % spec.chunk_bytes
        if part.length < 1 or offset + part.length > spec.plane_bytes or not whole_chunks:
            raise BadInput(
                "bad_block",
                f"{part.length} bytes from byte {offset} of a plane",
                f"a plane has {spec.plane_bytes} bytes, in chunks of {spec.chunk_bytes}; less than a whole "
                "one cannot be verified",
                "ask for whole chunks within the plane",
            )
        return part

    @property
    def is_whole(self) -> bool:
        return self.byte_count == self.spec.block_bytes

    @property
    def byte_count(self) -> int:
        return self.planes * self.length

    @property
    def piece_count(self) -> int:
        return 1 if self.is_whole else self.planes

    def pieces(self, block: memoryview) -> Iterator[memoryview]:
        """Those of one block, in the order of the messages."""
        if self.is_whole:
            yield block
            return
        first = self.plane * self.spec.plane_bytes + self.offset
        for at in range(first, first + self.planes * self.spec.plane_bytes, self.spec.plane_bytes):
            yield block[at : at + self.length]


class Exports:
    """What one connection has exported and posted."""

    def __init__(self, core: Core, identity: Identity, written: Written) -> None:
        self._core = core
        self._identity = identity
        self._written = written
        self._numbers = itertools.count(1)
        self._exported: dict[int, set[Issued]] = {}  # by lease
        self._posted: dict[int, set[Issued]] = {}  # by reservation

    # --- a peer reads ---------------------------------------------------------------------------

    def export(self, request: wire.Export) -> wire.Reply:
        """RAISES BadInput when the lease does not hold these blocks (bad_lease), when that is no part of a
        block (bad_block), when no transport is there (bad_tier), or it is too much at once (too_large)."""
        self._identity.require("peer")
        self._identity.require("reader")
        core = self._core
        core.tickets.check_via(request.via)
        lease = core.ledger.leased(request.lease, self._identity.owner)
        opened = core.namespaces.of(lease.keys[0][:HASH_BYTES], self._identity.tenant)
        _check_within("bad_lease", request.start, request.count, len(lease.keys))
        part = Part.of(opened.spec, request.plane, request.planes, request.offset, request.length)
        _check_size(opened, part, request.count, SUM_BYTES)
        held = self._hold(request, lease)
        try:
            issued = self._export(request, lease, part, held)
        except BaseException:
            self._let_go(held)
            raise
        core.counters["exported_blocks"] += request.count
        core.counters["exported_bytes"] += request.count * part.byte_count
        sums = b"".join([core.ledger.chunk_sums(key) for key in held.lease.keys])
        return wire.Exported(issued.address, issued.ticket, sums, issued.remaining_ms)

    def _export(self, request: wire.Export, lease: Lease, part: Part, held: _Held) -> Issued:
        host, size = self._core.host, part.spec.block_bytes
        pieces = [piece for slot in held.lease.slots for piece in part.pieces(host.view(slot, size))]

        def over() -> None:
            self._let_go(held)
            _discard(self._exported, request.lease, issued)

        issued = self._core.tickets.export(self._identity.owner, request.via, pieces, lease.expires_ns, over)
        self._exported.setdefault(request.lease, set()).add(issued)
        return issued

    def _hold(self, request: wire.Export, lease: Lease) -> _Held:
        """RAISES BadInput (bad_lease) unless the very blocks of the lease are there."""
        now_ns = self._core.clock.now_ns()
        mine = slice(request.start, request.start + request.count)
        owner = ("export", self._identity.owner, next(self._numbers))
        held = _Held(owner, self._core.ledger.borrow(lease.keys[mine], owner, lease.expires_ns + HOLD_NS))
        same = (held.lease.slots, held.lease.generations) == (lease.slots[mine], lease.generations[mine])
        if not same or lease.expires_ns <= now_ns:
            self._let_go(held)
            raise BadInput(
                "bad_lease",
                f"lease {request.lease} does not hold these blocks any more",
                "its time is over, or one of them was found damaged",
                "take a new lease",
            )
        return held

    def _let_go(self, held: _Held) -> None:
        if held.lease.lease_id:
            self._core.ledger.release(held.lease.lease_id, held.owner, self._core.clock.now_ns())
            self._core.settle()

    def is_exported(self, lease_id: int) -> bool:
        """Is a ticket for blocks of this lease out?"""
        return lease_id in self._exported

    async def stop_exports(self, lease_id: int) -> None:
        """When it returns, nobody reads with a ticket for this lease."""
        await _stop(self._exported, lease_id)

    # --- a peer writes --------------------------------------------------------------------------

    def post(self, request: wire.Post) -> wire.Reply:
        """RAISES BadInput when the reservation is not open (bad_reservation), when that is no part of a block
        (bad_block), when no transport is there (bad_tier), or it is too much at once (too_large)."""
        self._identity.require("peer")
        self._identity.require("writer")
        core = self._core
        core.tickets.check_via(request.via)
        reservation = core.ledger.reserved(request.reservation, self._identity.owner)
        opened = core.namespaces.of(reservation.keys[0][:HASH_BYTES], self._identity.tenant)
        _check_within("bad_reservation", request.start, request.count, len(reservation.keys))
        part = Part.of(opened.spec, request.plane, request.planes)
        _check_size(opened, part, request.count, 0)
        issued = self._post(request, reservation, part)
        self._written.begin(reservation)
        core.uses.add(request.reservation, self._identity.owner, issued)
        self._posted.setdefault(request.reservation, set()).add(issued)
        return wire.Posted(issued.address, issued.ticket, issued.remaining_ms)

    def _post(self, request: wire.Post, reservation: Reservation, part: Part) -> Issued:
        core = self._core
        blocks = range(request.start, request.start + request.count)
        slots = reservation.slots[blocks.start : blocks.stop]
        pieces = [
            piece for slot in slots for piece in part.pieces(core.host.view(slot, part.spec.block_bytes))
        ]
        until_ns = core.clock.now_ns() + core.config.lease_ms_max * NS_PER_MS

        def filled() -> None:
            self._written.mark(reservation, blocks, range(part.plane, part.plane + part.planes))
            core.counters["posted_blocks"] += len(blocks)
            core.counters["posted_bytes"] += len(blocks) * part.byte_count

        def over() -> None:
            core.uses.remove(request.reservation, issued)
            _discard(self._posted, request.reservation, issued)

        issued = core.tickets.post(self._identity.owner, request.via, pieces, until_ns, filled, over)
        return issued

    async def stop_posts(self, reservation_id: int) -> None:
        """When it returns, nobody writes with a ticket for this reservation."""
        await _stop(self._posted, reservation_id)


@dataclass(frozen=True, slots=True)
class _Held:
    """A lease of a ticket's own."""

    owner: tuple[str, int, int]
    lease: Lease


async def _stop(tickets: dict[int, set[Issued]], number: int) -> None:
    await asyncio.gather(*(issued.stop() for issued in tickets.get(number, ())))


def _discard(tickets: dict[int, set[Issued]], number: int, issued: Issued) -> None:
    tickets[number].discard(issued)
    if not tickets[number]:
        del tickets[number]


def _check_within(code: str, start: int, count: int, there: int) -> None:
    if not start < start + count <= there:
        raise BadInput(
            code,
            f"blocks {start} to {start + count} of {there}",
            "they are not in it",
            "ask for some that are",
        )


def _check_size(opened: Opened, part: Part, count: int, sum_bytes: int) -> None:
    """``sum_bytes``: of each chunk's sum in the reply."""
    most = PIECES_MAX // part.piece_count
    if sum_bytes:
        most = min(most, SUMS_BYTES_MAX // (opened.spec.chunk_count * sum_bytes))
    if count > most:
        raise BadInput(
            "too_large",
            f"{count} blocks with one ticket, {part.piece_count} pieces of each",
            f"a ticket is for {PIECES_MAX} pieces, and its reply has {SUMS_BYTES_MAX} bytes for sums",
            f"ask for {most} blocks at a time" if most else "ask for fewer planes at a time",
        )
