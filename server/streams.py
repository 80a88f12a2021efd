"""Blocks that are given to a peer while they are still being written, plane after plane.

    writer      Reserve ── Advance ──── Advance ──── Commit
                              │            │            │
    its node                planes       planes      held blocks
                              │ ticket     │ ticket     │ ticket
    follower    Follow ───────┴─ Follow ───┴─ Follow ───┴─ ... all planes, or "none": it gives up

What a follower is given are the leading blocks of its prefix that lie in one reservation, its *run*. It
goes on with these until it has every plane, also when they are held by then, as long as they are the very
same ones; then it asks for the next. Each Follow ends the ticket of the one before it.

Invariants: a connection has at most one ticket; a run's blocks are those of one reservation, and what is
given of them later has the same generations.

The sum: a Follow that finds something takes 50 us and 1 us a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from kvcache import wire
from kvcache.block import HASH_BYTES, BlockSpec, Slot, StorageKey
from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput
from kvcache.server.core import Core
from kvcache.server.identity import Identity
from kvcache.server.lent import Lent, borrow, give_back
from kvcache.server.progress import Advanced
from kvcache.server.reading import WAIT_MS_MAX
from kvcache.server.session import Answer, Later
from kvcache.server.written import Written
from kvcache.sums import SUM_BYTES

TICKET_BYTES_MAX = 32 << 20
TICKET_CHUNKS_MAX = 64 << 10
"""The most that one ticket is for: fewer blocks a run, and fewer planes a Follow."""

NOTHING = wire.Followed("none")


@dataclass(frozen=True, slots=True)
class Run:
    """The blocks that a follower is being given."""

    reservation_id: int
    spec: BlockSpec
    keys: tuple[StorageKey, ...]
    slots: tuple[Slot, ...]
    generations: tuple[int, ...]


class Streams:
    """What one connection advances and follows."""

    def __init__(self, core: Core, identity: Identity, written: Written) -> None:
        self._core = core
        self._identity = identity
        self._written = written
        self._run: Run | None = None
        self._lent: Lent | None = None

    # --- the writer's side ----------------------------------------------------------------------

    def advance(self, request: wire.Advance) -> wire.Reply:
        """RAISES BadInput (bad_reservation) when it is not open, or cannot advance; (bad_block) for sums or
        planes that are not the next."""
        self._identity.require("writer")
        core = self._core
        reservation = core.ledger.reserved(request.reservation, self._identity.owner)
        wired = not self._identity.mapped or reservation.reservation_id in self._written
        if wired and self._written.missing(reservation, request.planes):
            raise BadInput(
                "bad_reservation",
                f"{request.planes} planes of these blocks have not all come over the wire",
                "only who maps the node's memory is believed that they are written",
                "map it (a unix socket), or let the planes be written first; the reservation is still open",
            )
        opened = core.namespaces.of(reservation.keys[0][:HASH_BYTES], self._identity.tenant)
        before = next(islice(core.ledger.ancestors(reservation.keys[0]), 1, None), None)
        advanced = core.progress.begin(reservation, self._identity.owner, opened.spec, before)
        core.progress.advance(advanced, request.planes, request.sums)
        if core.bringing.pusher is not None:
            core.bringing.pusher.advance(reservation.reservation_id, request.planes)
        return wire.Done()

    # --- the follower's side --------------------------------------------------------------------

    def follow(self, request: wire.Follow) -> Answer | Later:
        """RAISES BadInput (unknown_namespace, bad_prefix, bad_tier, bad_block)."""
        self._identity.require("peer")
        self._identity.require("reader")
        self._core.tickets.check_via(request.via)
        opened = self._core.namespaces.of(request.namespace, self._identity.tenant)
        keys = self._core.keys(opened, request.prefix, wire.BATCH_BLOCKS_MAX)
        if request.plane >= opened.spec.plane_count:
            what = f"plane {request.plane} of {opened.spec.plane_count}"
            raise BadInput("bad_block", what, "they count from 0")
        return self._follow(request, opened.spec, tuple(keys))

    async def _follow(self, request: wire.Follow, spec: BlockSpec, keys: tuple[StorageKey, ...]) -> Answer:
        core = self._core
        if self._lent is not None:
            await self._lent.stop()
        if not keys:
            return NOTHING
        until_ns = core.clock.now_ns() + min(request.wait_ms, WAIT_MS_MAX) * NS_PER_MS
        while True:
            found = self._go_on(request, keys) if request.plane else self._begin(request, spec, keys)
            is_over = bool(request.plane) and found == NOTHING
            left_ns = until_ns - core.clock.now_ns()
            if found.state != "none" or is_over or left_ns <= 0:
                return found
            await core.progress.bell.wait(keys[0], left_ns)

    def _begin(self, request: wire.Follow, spec: BlockSpec, keys: tuple[StorageKey, ...]) -> wire.Followed:
        self._run = None
        if held := self._core.ledger.match(keys):
            return wire.Followed("held", held)
        advanced, first = self._core.progress.find(keys[0])
        if advanced is None:
            return NOTHING
        whole = advanced.reservation
        pairs = zip(whole.keys[first : first + _blocks_max(spec)], keys, strict=False)
        end = first + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        at = slice(first, end)
        self._run = Run(whole.reservation_id, spec, whole.keys[at], whole.slots[at], whole.generations[at])
        return self._lend_of(self._run, advanced, request)

    def _go_on(self, request: wire.Follow, keys: tuple[StorageKey, ...]) -> wire.Followed:
        """``NOTHING`` when there will be no more of this run."""
        run = self._run
        if run is None or run.keys != keys[: len(run.keys)]:
            return NOTHING
        advanced = self._core.progress.of(run.reservation_id)
        if advanced is None:
            return self._lend_held(run, request)
        if advanced.planes <= request.plane:
            return wire.Followed("none", len(run.keys))
        return self._lend_of(run, advanced, request)

    def _lend_of(self, run: Run, advanced: Advanced, request: wire.Follow) -> wire.Followed:
        """What is written of an open reservation."""
        first = advanced.reservation.keys.index(run.keys[0])
        told = advanced.sums[first : first + len(run.keys)]
        lent, followed = self._lend(run, told, advanced.planes, request)
        lent.of(run.reservation_id, advanced.owner)
        return followed

    def _lend_held(self, run: Run, request: wire.Follow) -> wire.Followed:
        """The rest of what has been committed, if these are still the blocks that were begun with."""
        lease = borrow(self._core, run.keys)
        if lease.generations != run.generations:
            if lease.lease_id:
                give_back(self._core, lease.lease_id)
            return NOTHING
        told = [self._core.ledger.chunk_sums(key) for key in run.keys]
        try:
            lent, followed = self._lend(run, told, run.spec.plane_count, request)
        except BadInput:
            give_back(self._core, lease.lease_id)
            raise
        lent.of_held(lease)
        return followed

    def _lend(
        self, run: Run, told: Sequence[bytes], end: int, request: wire.Follow
    ) -> tuple[Lent, wire.Followed]:
        """Planes before ``end``, one piece a block. ``told`` are the sums of all planes before it.
        RAISES BadInput (bad_tier, too_large)."""
        core, spec, plane = self._core, run.spec, request.plane
        planes = min(end - plane, max(1, _blocks_max(spec) // len(run.keys)))
        start, stop = plane * spec.plane_bytes, (plane + planes) * spec.plane_bytes
        pieces = [core.host.view(slot, spec.block_bytes)[start:stop] for slot in run.slots]
        lent = self._lent = Lent(core, self._identity.owner, request.via, pieces, run.keys)
        first, last = (at // spec.chunk_bytes * SUM_BYTES for at in (start, stop))
        core.counters["lent_planes"] += planes * len(pieces)
        core.counters["lent_bytes"] += (stop - start) * len(pieces)
        return lent, wire.Followed(
            state="writing",
            count=len(pieces),
            planes=planes,
            address=lent.issued.address,
            ticket=lent.issued.ticket,
            sums=b"".join([sums[first:last] for sums in told]),
            remaining_ms=lent.issued.remaining_ms,
        )


def _blocks_max(spec: BlockSpec) -> int:
    """Of how many blocks one plane goes with one ticket."""
    most = min(TICKET_BYTES_MAX, TICKET_CHUNKS_MAX * spec.chunk_bytes)
    return max(1, most // spec.plane_bytes)
