"""What a reader asks on one connection: what is there, hold it, send it, let it go.

A release that reports failed blocks looks at them while the lease still holds their slots.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from kvcache import wire
from kvcache.block import HASH_BYTES, Slot, StorageKey, split_hashes, storage_key
from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput
from kvcache.leases import NO_LEASE, Lease
from kvcache.peers.fetch import Asked
from kvcache.policy import RequestContext
from kvcache.request_hints import hints_of
from kvcache.server.core import Core
from kvcache.server.exports import Exports
from kvcache.server.hbm_asking import HbmAsking, check_positions, is_hbm
from kvcache.server.identity import Identity
from kvcache.server.namespaces import Opened
from kvcache.server.session import Answer, Later, Outgoing
from kvcache.slices import ChunkRange
from kvcache.sums import SUM_BYTES
from kvcache.tiers.space import slot_arena, slot_offset

OFFSET_ELSEWHERE = -1
WAIT_MS_MAX = 60_000


class Reading:
    """The reader's half of one connection."""

    def __init__(self, core: Core, identity: Identity, exports: Exports, hbm: HbmAsking) -> None:
        self._core = core
        self._identity = identity
        self._exports = exports
        self._hbm = hbm

    def match(self, request: wire.Match) -> wire.Reply:
        self._identity.require("reader", "writer", "router")
        opened = self._core.namespaces.of(request.namespace, self._identity.tenant)
        keys = self._core.keys(opened, request.prefix, wire.PREFIX_BLOCKS_MAX)
        hot = self._hbm.match(keys) if request.hbm else 0
        rest = self._rest(keys, hot)
        there = len(keys) - len(rest) + self._ask(rest, self._asked(opened, request.prefill_tokens_s))
        count = max(hot, there)
        self._core.counters["match_blocks"] += len(keys)
        self._core.counters["match_hit_blocks"] += count
        return wire.Matched(count)

    def _rest(self, keys: Sequence[StorageKey], hot: int) -> Sequence[StorageKey]:
        """Of these, the first ``hot`` of which are in HBM, what the tiers below are asked for. What stands
        behind a block that they lack cannot be brought there alone: then all."""
        is_joined = hot == 0 or hot == len(keys) or self._core.ledger.has(keys[hot - 1])
        return keys[hot:] if is_joined else keys

    def _asked(self, opened: Opened, prefill_tokens_s: int) -> Asked:
        core, identity = self._core, self._identity
        arena = identity.arena
        if "writer" not in identity.roles and core.bringing.is_able:
            arena = core.arena(os.getuid(), identity.tenant)
        return Asked(
            identity.tenant, opened.namespace_id, opened.spec, arena, prefill_tokens_s=prefill_tokens_s
        )

    def _ask(self, keys: Sequence[StorageKey], asked: Asked) -> int:
        """How many leading blocks can be had. What is on NVMe, or at a peer, starts to come into memory."""
        return self._core.bringing.ask(keys, asked, from_peers=not self._identity.node)

    def lease(self, request: wire.TakeLease) -> Answer | Later:
        self._identity.require("reader")
        core = self._core
        opened = core.namespaces.of(request.namespace, self._identity.tenant)
        keys = core.keys(opened, request.prefix, wire.BATCH_BLOCKS_MAX)
        context = self._context(request, opened, core.clock.now_ns())
        if core.bringing.is_able or request.pushed or request.source:
            asked = replace(
                self._asked(opened, request.prefill_tokens_s),
                context=context,
                parent=parent_key(opened, request.parent),
                source=request.source,
                pushed=request.pushed,
            )
            rest = self._rest(keys, self._hbm.match(keys) if request.hbm else 0)
            if len(rest) < len(keys):
                asked = replace(asked, parent=keys[len(keys) - len(rest) - 1])
            count = self._ask(rest, asked)
            if request.wait_ms and core.ledger.match(rest) < count:
                return self._wait_and_lease(request, opened, keys, rest, asked)
        return self._grant(request, opened, keys)

    async def _wait_and_lease(
        self,
        request: wire.TakeLease,
        opened: Opened,
        keys: Sequence[StorageKey],
        rest: Sequence[StorageKey],
        asked: Asked,
    ) -> Answer:
        wait_ns = min(request.wait_ms, WAIT_MS_MAX) * NS_PER_MS
        await self._core.bringing.wait(rest, asked, wait_ns, from_peers=not self._identity.node)
        return self._grant(request, opened, keys)

    def _grant(self, request: wire.TakeLease, opened: Opened, keys: Sequence[StorageKey]) -> wire.Reply:
        core = self._core
        duration_ms = min(max(request.duration_ms, 1), core.config.lease_ms_max)
        now_ns = core.clock.now_ns()
        context = self._context(request, opened, now_ns)
        expires_ns = now_ns + duration_ms * NS_PER_MS
        hot = NO_LEASE
        if request.hbm:
            hot = self._hbm.lease(keys, expires_ns, context, request.request)
        below = keys[len(hot.keys) :]
        lease = core.ledger.lease(below, self._identity.owner, expires_ns, context, request.request)
        rest = below[len(lease.keys) :]
        coming = core.bringing.coming(rest, with_pushes=request.pushed or bool(request.source))
        if not coming and not (rest and core.bringing.awaits(rest[0])):  # Else it is asked again.
            core.bringing.touched(lease.keys, by_engine=not self._identity.node)
            if not self._identity.node:  # What a node asks for is counted where it was asked first.
                self._count(request, opened, context, hot, lease)
        ends_ns = min((each.expires_ns for each in (hot, lease) if each.lease_id), default=0)
        return wire.Leased(
            lease=lease.lease_id,
            count=len(lease.keys),
            offsets=offsets(self._identity, lease.slots),
            generations=list(lease.generations),
            checksums=b"".join(lease.checksums),
            expires_ns=ends_ns,
            remaining_ms=max(0, ends_ns - now_ns) // NS_PER_MS,
            coming=coming,
            hbm=self._hbm.leased(hot),
        )

    def _count(
        self, request: wire.TakeLease, opened: Opened, context: RequestContext, hot: Lease, lease: Lease
    ) -> None:
        core, tokens, shadowing = self._core, opened.spec.block_tokens, self._core.tuning.shadowing
        asked, held = len(request.prefix) // HASH_BYTES, len(hot.keys) + len(lease.keys)
        memory, lease_id = (self._hbm.name, hot.lease_id) if hot.lease_id else (wire.HOST, lease.lease_id)
        is_first = core.count_lease(memory, lease_id, asked, held, tokens)
        if is_first:
            core.counters["hbm_hit_blocks"] += len(hot.keys)
        if is_first and shadowing.is_on:
            shadowing.asked(
                context,
                opened.namespace_id,
                request.prefix,
                request.parent,
                held,
                opened.spec.block_bytes,
                tokens,
            )
        if core.recording.is_on:
            core.recording.asked(request, opened.spec.block_tokens, opened.tenant)

    def _context(self, request: wire.TakeLease, opened: Opened, now_ns: int) -> RequestContext:
        """RAISES BadInput for hints that are none."""
        asked_tokens = len(request.prefix) // HASH_BYTES * opened.spec.block_tokens
        return hints_of(request).context(now_ns, self._identity.tenant, asked_tokens)

    def _held(self, lease_id: int) -> tuple[Opened, Lease]:
        lease = self._core.ledger.leased(lease_id, self._identity.owner)
        return self._of(lease.keys[0]), lease

    def _of(self, key: StorageKey) -> Opened:
        """The namespace of a key that this connection holds."""
        return self._core.namespaces.of(key[:HASH_BYTES], self._identity.tenant)

    def read(self, request: wire.Read) -> Answer:
        self._identity.require("reader")
        opened, lease = self._leased(request)
        length = request.length or opened.spec.plane_bytes - request.offset
        part = ChunkRange(opened.spec, request.offset, length)
        size = request.count * part.block_bytes
        piece_count = request.count * part.piece_count
        if size > wire.PAYLOAD_BYTES_MAX or piece_count > wire.PIECES_MAX:
            raise BadInput(
                "bad_lease",
                f"{size} bytes in {piece_count} pieces for one reply",
                f"the limits are {wire.PAYLOAD_BYTES_MAX} bytes and {wire.PIECES_MAX} pieces",
                "read fewer blocks a call",
            )
        self._core.counters["read_bytes:socket"] += size
        views: list[memoryview] = []
        for slot in lease.slots[request.start : request.start + request.count]:
            views += part.pieces(self._core.host.view(slot, opened.spec.block_bytes))
        return Outgoing(wire.Blocks(request.count), views)

    def sums(self, request: wire.Sums) -> wire.Reply:
        self._identity.require("reader")
        opened, lease = self._leased(request)
        step = opened.spec.chunk_count * SUM_BYTES
        if request.count > 1 and request.count * step > wire.SUMS_BYTES_MAX:
            raise BadInput(
                "too_large",
                f"the sums of {request.count} blocks, of {step} bytes each",
                f"the limit is {wire.SUMS_BYTES_MAX} bytes",
                "ask for fewer blocks a call",
            )
        keys = lease.keys[request.start : request.start + request.count]
        known = [self._core.ledger.chunk_sums(key) for key in keys]
        return wire.ChunkSums(b"".join([each if len(each) == step else bytes(step) for each in known]))

    def _leased(self, request: wire.Read | wire.Sums) -> tuple[Opened, Lease]:
        """RAISES BadInput unless the blocks are in the lease."""
        opened, lease = self._held(request.lease)
        end = request.start + request.count
        if not request.start < end <= len(lease.keys):
            raise BadInput(
                "bad_lease",
                f"blocks {request.start} to {end} of a lease of {len(lease.keys)}",
                "they are not in it",
                "ask within the lease",
            )
        return opened, lease

    def release(self, request: wire.Release) -> Answer | Later:
        if is_hbm(request.tier):
            return self._hbm.release(request)
        if not request.failed:
            if self._exports.is_exported(request.lease):
                return self._withdraw_and_let_go(request.lease)
            return self._let_go(request.lease)
        opened, lease = self._held(request.lease)
        check_positions(request.failed, len(lease.keys))
        return self._examine_and_let_go(opened, lease, sorted(set(request.failed)))

    async def _examine_and_let_go(self, opened: Opened, lease: Lease, positions: Sequence[int]) -> Answer:
        await self._core.examine(opened, lease, positions)
        return await self._withdraw_and_let_go(lease.lease_id)

    async def _withdraw_and_let_go(self, lease_id: int) -> Answer:
        await self._exports.stop_exports(lease_id)
        return self._let_go(lease_id)

    def _let_go(self, lease_id: int) -> wire.Reply:
        core = self._core
        intact = core.ledger.release(lease_id, self._identity.owner, core.clock.now_ns())
        core.settle()
        return wire.Released(intact)


def offsets(identity: Identity, slots: Sequence[Slot]) -> list[int]:
    """Where a connection that maps the slab finds these slots; empty for one that does not."""
    if not identity.mapped:
        return []
    mine = identity.arena
    return [slot_offset(slot) if slot_arena(slot) == mine else OFFSET_ELSEWHERE for slot in slots]


def parent_key(opened: Opened, parent: bytes) -> StorageKey | None:
    """The block that a prefix continues; None when it begins a prompt. RAISES BadInput."""
    if not parent:
        return None
    hashes = split_hashes(parent)
    if len(hashes) != 1:
        raise BadInput("bad_prefix", f"a parent of {len(parent)} bytes", "it is one block hash, or empty")
    return storage_key(opened.namespace_id, hashes[0])
