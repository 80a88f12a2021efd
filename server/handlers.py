"""One function a message. A Connection is what one client may do: its identity, bound to the node's core.

Order matters in two places. A commit of blocks that came over the wire first sums what lies in the slots,
then publishes: unpublished -> written -> summed -> published. A release that reports failed blocks looks
at them while the lease still holds their slots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from kvcache import wire
from kvcache.block import HASH_BYTES, BlockHash, BlockSpec, Slot, StorageKey, split_hashes, storage_key
from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput, KVCacheError, NotAllowed
from kvcache.ledger import Lease, Reservation
from kvcache.namespace import Namespace
from kvcache.policy import RequestContext
from kvcache.server.core import Core, Opened
from kvcache.server.identity import Identity
from kvcache.server.session import Answer, Later, Outgoing
from kvcache.server.watching import Watching
from kvcache.sums import SUM_BYTES
from kvcache.tiers.space import slot_arena, slot_offset

OFFSET_ELSEWHERE = -1
WAIT_MS_MAX = 60_000


class Connection:
    """The Responder of one session."""

    def __init__(self, core: Core, identity: Identity, push: Callable[[wire.EventBatch, int], None]) -> None:
        """``push`` sends an event batch under the call number of the Watch."""
        self._core = core
        self._identity = identity
        self._written: dict[int, set[int]] = {}  # by reservation, while it is open
        self._watching = Watching(core, identity, push)
        self.kept_aside = False
        """Ended with reserved slots into which copies may still be in flight."""

    def answer(self, call: int, request: wire.Request) -> Answer | Later:
        """RAISES KVCacheError when the request is refused; then nothing has changed."""
        core, identity = self._core, self._identity
        core.counters[f"requests:{request.__struct_config__.tag}"] += 1
        match request:
            case wire.Open():
                return self._open(request)
            case wire.Match():
                return self._match(request)
            case wire.TakeLease():
                return self._lease(request)
            case wire.Release():
                return self._release(request)
            case wire.Reserve():
                return self._reserve(request)
            case wire.Commit():
                return self._commit(request)
            case wire.Abort():
                return self._abort(request)
            case wire.Read():
                return self._read(request)
            case wire.Write():
                return self._wrote(request)
            case wire.Pin() | wire.Unpin():
                return self._pin(request)
            case wire.Persist():
                return self._persist(request)
            case wire.Scrub():
                return self._scrub()
            case wire.Stats():
                identity.require("reader", "writer", "router", "operator")
                return wire.StatsReply(core.stats(), core.troubles())
            case wire.Watch():
                return self._watching.begin(call)
            case wire.Hello():
                raise BadInput("bad_message", "a second Hello", "Hello comes first, once")

    def refused(self, error: KVCacheError) -> None:
        self._core.counters[f"refusals:{error.code}"] += 1

    def lagged(self) -> None:
        self._core.counters["watchers_dropped"] += 1

    def ended(self) -> None:
        """The connection is gone: give back what it held. Unmapped, the node wrote, and has stopped."""
        self._core.counters["connections_closed"] += 1
        self._core.unwatch(self._identity.owner)
        self.kept_aside = self._core.ledger.disconnect(self._identity.owner, not self._identity.mapped)
        self._core.settle()

    # --- reading --------------------------------------------------------------------------------

    def _open(self, request: wire.Open) -> wire.Reply:
        self._identity.require("reader", "writer")
        fields = dict(request.namespace)
        if fields.get("tenant", "") not in ("", self._identity.tenant):
            raise NotAllowed(
                "not_allowed",
                "a namespace of another tenant",
                "the tenant comes from the credential",
                "leave the field tenant empty",
            )
        namespace = Namespace.from_map({**fields, "tenant": self._identity.tenant})
        spec = BlockSpec(
            block_tokens=namespace.block_tokens,
            plane_count=request.plane_count,
            head_count=request.head_count,
            head_bytes=request.head_bytes,
        )
        namespace.check_shape(spec)
        if request.expect:
            self._core.namespace(request.expect, self._identity.tenant).namespace.check_same(namespace)
        opened, verdict = self._core.open(namespace, spec)
        return wire.Opened(opened.namespace_id, spec.block_bytes, spec.chunk_bytes, verdict)

    def _match(self, request: wire.Match) -> wire.Reply:
        self._identity.require("reader", "writer", "router")
        opened = self._core.namespace(request.namespace, self._identity.tenant)
        keys = self._core.keys(opened, request.prefix, wire.PREFIX_BLOCKS_MAX)
        count = self._ask(opened, keys, request.prefill_tokens_s)
        self._core.counters["match_blocks"] += len(keys)
        self._core.counters["match_hit_blocks"] += count
        return wire.Matched(count)

    def _ask(self, opened: Opened, keys: Sequence[StorageKey], prefill_tokens_s: int) -> int:
        """How many leading blocks can be had. What is on NVMe starts to be read into memory."""
        core = self._core
        if core.stack is None:
            return core.ledger.match(keys)
        arena = self._identity.arena
        if "writer" not in self._identity.roles:
            arena = core.arena(os.getuid(), self._identity.tenant)
        return core.stack.ask(keys, arena, opened.spec.block_tokens, prefill_tokens_s)

    def _lease(self, request: wire.TakeLease) -> Answer | Later:
        self._identity.require("reader")
        core = self._core
        opened = core.namespace(request.namespace, self._identity.tenant)
        keys = core.keys(opened, request.prefix, wire.BATCH_BLOCKS_MAX)
        if core.stack is not None:
            count = self._ask(opened, keys, request.prefill_tokens_s)
            held = core.ledger.match(keys)
            if held < count and request.wait_ms:
                return self._wait_and_lease(request, opened, keys, held)
        return self._grant(request, opened, keys)

    async def _wait_and_lease(
        self, request: wire.TakeLease, opened: Opened, keys: Sequence[StorageKey], held: int
    ) -> Answer:
        stack = self._core.stack
        assert stack is not None
        await stack.wait(keys[held:], min(request.wait_ms, WAIT_MS_MAX) * NS_PER_MS)
        return self._grant(request, opened, keys)

    def _grant(self, request: wire.TakeLease, opened: Opened, keys: Sequence[StorageKey]) -> wire.Reply:
        core = self._core
        duration_ms = min(max(request.duration_ms, 1), core.config.lease_ms_max)
        now_ns = core.clock.now_ns()
        context = RequestContext(now_ns=now_ns)
        lease = core.ledger.lease(
            keys, self._identity.owner, now_ns + duration_ms * NS_PER_MS, context, request.request
        )
        coming = 0
        if core.stack is not None:
            coming = core.stack.coming(keys[len(lease.keys) :])
            if not coming:
                core.stack.touched(lease.keys)
        if not coming:  # Else it is asked again.
            core.count_lease(lease.lease_id, len(keys), len(lease.keys), opened.spec.block_tokens)
        return wire.Leased(
            lease=lease.lease_id,
            count=len(lease.keys),
            offsets=self._offsets(lease.slots),
            generations=list(lease.generations),
            checksums=b"".join(lease.checksums),
            expires_ns=lease.expires_ns,
            remaining_ms=max(0, lease.expires_ns - now_ns) // NS_PER_MS,
            coming=coming,
        )

    def _offsets(self, slots: Sequence[Slot]) -> list[int]:
        if not self._identity.mapped:
            return []
        mine = self._identity.arena
        return [slot_offset(slot) if slot_arena(slot) == mine else OFFSET_ELSEWHERE for slot in slots]

    def _held(self, lease_id: int) -> tuple[Opened, Lease]:
        lease = self._core.ledger.leased(lease_id, self._identity.owner)
        return self._of(lease.keys[0]), lease

    def _of(self, key: StorageKey) -> Opened:
        """The namespace of a key that this connection holds."""
        return self._core.namespace(key[:HASH_BYTES], self._identity.tenant)

    def _read(self, request: wire.Read) -> Answer:
        self._identity.require("reader")
        opened, lease = self._held(request.lease)
        end = request.start + request.count
        size = opened.spec.block_bytes
        if not 0 <= request.start < end <= len(lease.keys) or request.count * size > wire.PAYLOAD_BYTES_MAX:
            raise BadInput(
                "bad_lease",
                f"blocks {request.start} to {end} of a lease of {len(lease.keys)}",
                "they are not in it, or are too many bytes for one reply",
                "read within the lease, fewer blocks a call",
            )
        self._core.counters["read_bytes:socket"] += request.count * size
        views = [self._core.host.view(slot, size) for slot in lease.slots[request.start : end]]
        return Outgoing(wire.Blocks(request.count), views)

    def _release(self, request: wire.Release) -> Answer | Later:
        if not request.failed:
            return self._let_go(request.lease)
        opened, lease = self._held(request.lease)
        positions = sorted(set(request.failed))
        if positions[0] < 0 or positions[-1] >= len(lease.keys):
            raise BadInput(
                "bad_lease",
                f"block {positions[-1]} of a lease of {len(lease.keys)}",
                "it is not in it",
                "report positions within the lease",
            )
        return self._examine_and_let_go(opened, lease, positions)

    async def _examine_and_let_go(self, opened: Opened, lease: Lease, positions: Sequence[int]) -> Answer:
        await self._core.examine(opened, lease, positions)
        return self._let_go(lease.lease_id)

    def _let_go(self, lease_id: int) -> wire.Reply:
        core = self._core
        intact = core.ledger.release(lease_id, self._identity.owner, core.clock.now_ns())
        core.settle()
        return wire.Released(intact)

    # --- writing --------------------------------------------------------------------------------

    def _reserve(self, request: wire.Reserve) -> wire.Reply:
        self._identity.require("writer")
        core = self._core
        opened = core.namespace(request.namespace, self._identity.tenant)
        keys = core.keys(opened, request.prefix, wire.BATCH_BLOCKS_MAX)
        reservation = core.ledger.reserve(
            self._identity.arena,
            self._parent(opened, request.parent),
            keys,
            opened.spec.block_bytes,
            self._identity.owner,
            self._context(request),
        )
        core.settle()
        if reservation.reason in ("busy", "full"):
            core.counters[f"short_reservations:{reservation.reason}"] += 1
        if reservation.reservation_id:
            core.make_room_later(self._identity.arena, opened.spec.block_bytes, len(reservation.keys))
        return wire.Reserved(
            reservation=reservation.reservation_id,
            start=reservation.start,
            count=len(reservation.keys),
            offsets=self._offsets(reservation.slots),
            generations=list(reservation.generations),
            reason=reservation.reason,
        )

    def _parent(self, opened: Opened, parent: bytes) -> StorageKey | None:
        if not parent:
            return None
        hashes = split_hashes(parent)
        if len(hashes) != 1:
            raise BadInput("bad_prefix", f"a parent of {len(parent)} bytes", "it is one block hash, or empty")
        return storage_key(opened.namespace_id, BlockHash(hashes[0]))

    def _context(self, request: wire.Reserve) -> RequestContext:
        return RequestContext(
            now_ns=self._core.clock.now_ns(),
            session=request.session,
            hint=request.hint,
            priority=request.priority,
            expected_gap_ms=request.gap_ms if request.gap_ms >= 0 else None,
        )

    def _reserved(self, reservation_id: int) -> tuple[Opened, Reservation]:
        reservation = self._core.ledger.reserved(reservation_id, self._identity.owner)
        return self._of(reservation.keys[0]), reservation

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

    def _wrote(self, request: wire.Write) -> wire.Reply:
        opened, _ = self._reserved(request.reservation)
        written = self._written.setdefault(request.reservation, set())
        written.update(range(request.start, request.start + request.count))
        self._core.counters["written_bytes:socket"] += request.count * opened.spec.block_bytes
        return wire.Done()

    def _commit(self, request: wire.Commit) -> Answer | Later:
        self._identity.require("writer")
        opened, reservation = self._reserved(request.reservation)
        step = opened.spec.chunk_count * SUM_BYTES
        if len(request.sums) != step * len(reservation.keys):
            raise BadInput(
                "bad_block",
                f"{len(request.sums)} bytes of sums for {len(reservation.keys)} blocks",
                f"a block of this namespace has {opened.spec.chunk_count} chunks of {SUM_BYTES} bytes of sum",
                "send every chunk's sum, in order; the reservation is still open",
            )
        sums = [request.sums[at : at + step] for at in range(0, len(request.sums), step)]
        if self._identity.mapped and reservation.reservation_id not in self._written:
            return self._publish(opened, reservation, sums)
        missing = set(range(len(reservation.keys))) - self._written.get(reservation.reservation_id, set())
        if missing:
            raise BadInput(
                "bad_reservation",
                f"{len(missing)} of {len(reservation.keys)} reserved blocks were not written",
                "commit publishes what was written",
                "write every block first, or abort; the reservation is still open",
            )
        return self._verify_and_publish(opened, reservation, sums)

    async def _verify_and_publish(
        self, opened: Opened, reservation: Reservation, sums: Sequence[bytes]
    ) -> Answer:
        arrived = await self._core.slot_sums(opened, reservation.slots)
        if arrived != list(sums):
            self._core.counters["rejected_blocks:transfer"] += len(reservation.keys)
            raise BadInput(
                "bad_block",
                "the bytes that arrived do not have the sums that were sent",
                "they changed on the way, or were summed wrongly",
                "write them again; the reservation is still open",
            )
        return self._publish(opened, reservation, sums)

    def _publish(self, opened: Opened, reservation: Reservation, sums: Sequence[bytes]) -> wire.Reply:
        core = self._core
        checksums = core.checksums(opened, reservation.keys, sums)
        count = core.ledger.commit(reservation.reservation_id, self._identity.owner, checksums, sums)
        core.counters["saved_tokens"] += count * opened.spec.block_tokens
        if core.stack is not None:
            core.stack.committed(reservation.keys)
        self._forget(reservation.reservation_id)
        return wire.Committed(count)

    def _abort(self, request: wire.Abort) -> wire.Reply:
        self._core.ledger.abort(request.reservation, self._identity.owner)
        self._forget(request.reservation)
        return wire.Done()

    def _forget(self, reservation_id: int) -> None:
        self._written.pop(reservation_id, None)
        self._core.settle()

    # --- operators and routers ------------------------------------------------------------------

    def _pin(self, request: wire.Pin | wire.Unpin) -> wire.Reply:
        self._identity.require("operator")
        opened = self._core.namespace(request.namespace, self._identity.tenant)
        keys = self._core.keys(opened, request.prefix, wire.PREFIX_BLOCKS_MAX)
        change = self._core.ledger.pin if isinstance(request, wire.Pin) else self._core.ledger.unpin
        return wire.Matched(change(keys))

    def _persist(self, request: wire.Persist) -> Answer | Later:
        self._identity.require("writer")
        opened = self._core.namespace(request.namespace, self._identity.tenant)
        keys = self._core.keys(opened, request.prefix, wire.PREFIX_BLOCKS_MAX)
        if self._core.stack is None or not keys:
            return wire.Matched(0)
        return self._persist_and_count(keys, min(request.wait_ms, WAIT_MS_MAX))

    async def _persist_and_count(self, keys: Sequence[StorageKey], wait_ms: int) -> Answer:
        assert self._core.stack is not None
        return wire.Matched(await self._core.stack.persist(keys, wait_ms * NS_PER_MS))

    def _scrub(self) -> wire.Reply:
        self._identity.require("operator")
        if self._core.stack is None:
            raise BadInput(
                "bad_tier", "there is nothing to scrub", "this node has no NVMe tier", "give --nvme"
            )
        self._core.stack.scrub()
        return wire.Done()
