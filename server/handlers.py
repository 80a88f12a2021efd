"""What one client may do: every request, by its kind, to who answers it on this connection."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from kvcache import wire, wire_tuning
from kvcache.block import BlockSpec, StorageKey
from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput, KVCacheError, NotAllowed
from kvcache.namespace import Namespace
from kvcache.server.core import Core
from kvcache.server.exports import Exports
from kvcache.server.hbm_asking import HbmAsking
from kvcache.server.identity import Identity
from kvcache.server.reading import WAIT_MS_MAX, Reading
from kvcache.server.recording import Plan, asked_plan
from kvcache.server.session import Answer, Later
from kvcache.server.streams import Streams
from kvcache.server.watching import Watching
from kvcache.server.writing import Writing
from kvcache.server.written import Written
from kvcache.wire_record import BEGIN, END, TELL


class Connection:
    """The Responder of one session."""

    def __init__(self, core: Core, identity: Identity, push: Callable[[bytes, int], None]) -> None:
        """``push`` sends a packed event batch under the call number of the Watch."""
        self._core = core
        self._identity = identity
        written = Written()
        self._exports = Exports(core, identity, written)
        self._hbm = hbm = HbmAsking(core, identity)
        self._reading = Reading(core, identity, self._exports, hbm)
        self._writing = Writing(core, identity, self._exports, written, hbm)
        self._streams = Streams(core, identity, written)
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
                return self._reading.match(request)
            case wire.TakeLease():
                return self._reading.lease(request)
            case wire.Release():
                return self._reading.release(request)
            case wire.Reserve():
                return self._writing.reserve(request)
            case wire.Commit():
                return self._writing.commit(request)
            case wire.Abort():
                return self._writing.abort(request)
            case wire.Read():
                return self._reading.read(request)
            case wire.Sums():
                return self._reading.sums(request)
            case wire.Write():
                return self._writing.wrote(request)
            case wire.Pin() | wire.Unpin():
                return self._pin(request)
            case wire.Persist():
                return self._persist(request)
            case wire.Scrub():
                return self._scrub()
            case wire.Record():
                return self._record(request)
            case wire.Tune():
                return self._tune(request)
            case wire.Stats():
                identity.require("reader", "writer", "router", "operator")
                return wire.StatsReply(core.stats(), core.troubles())
            case wire.Watch():
                return self._watching.begin(call, request)
            case wire.Export():
                return self._exports.export(request)
            case wire.Post():
                return self._exports.post(request)
            case wire.Advance():
                return self._streams.advance(request)
            case wire.Follow():
                return self._streams.follow(request)
            case wire.Hello():
                raise BadInput("bad_message", "a second Hello", "Hello comes first, once")

    def destination(self, request: wire.Write, payload_bytes: int) -> list[memoryview]:
        return self._writing.destination(request, payload_bytes)

    def refused(self, error: KVCacheError) -> None:
        self._core.counters[f"refusals:{error.code}"] += 1

    def lagged(self) -> None:
        self._core.counters["watchers_dropped"] += 1

    def ended(self) -> None:
        """The connection is gone: give back what it held. Unmapped, the node wrote, and has stopped."""
        self._core.counters["connections_closed"] += 1
        self._core.telling.unwatch(self._identity.owner)
        self._core.tickets.leave(self._identity.owner)
        self._core.progress.leave(self._identity.owner)
        self._core.bringing.arriving.leave(self._identity.owner)
        used = self._core.uses.leave(self._identity.owner)
        no_copies = not self._identity.mapped and not used
        self.kept_aside = self._core.ledger.disconnect(self._identity.owner, no_copies)
        if self._core.hbm is not None:
            self.kept_aside |= self._core.hbm.disconnect(self._identity.owner)
        self._core.settle()

    # --- namespaces --------------------------------------------------------------------------------

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
            self._core.namespaces.of(request.expect, self._identity.tenant).namespace.check_same(namespace)
        opened, verdict = self._core.namespaces.open(namespace, spec)
        self._hbm.uses(opened.namespace_id)
        return wire.Opened(opened.namespace_id, spec.block_bytes, spec.chunk_bytes, verdict)

    # --- operators and routers ------------------------------------------------------------------

    def _pin(self, request: wire.Pin | wire.Unpin) -> wire.Reply:
        self._identity.require("operator")
        opened = self._core.namespaces.of(request.namespace, self._identity.tenant)
        keys = self._core.keys(opened, request.prefix, wire.PREFIX_BLOCKS_MAX)
        change = self._core.ledger.pin if isinstance(request, wire.Pin) else self._core.ledger.unpin
        return wire.Matched(change(keys))

    def _tune(self, request: wire.Tune) -> wire.Reply:
        if request.action not in (wire_tuning.TELL, wire_tuning.SET):
            raise BadInput("bad_message", f"action {request.action!r:.40}", "it is tell or set")
        if request.action == wire_tuning.TELL:
            self._identity.require("router", "operator")
        else:
            self._identity.require("operator")
            self._core.tuning.set(request)
        return self._core.tuning.tell()

    def _record(self, request: wire.Record) -> Answer | Later:
        self._identity.require("operator")
        recording = self._core.recording
        if request.action not in (BEGIN, END, TELL):
            raise BadInput("bad_message", f"action {request.action!r:.40}", f"it is {BEGIN}, {END} or {TELL}")
        if request.action == END:
            return self._end_recording()
        if request.action == BEGIN:
            plan = asked_plan(self._core.config, request, self._identity.peer.uid == os.getuid())
            return self._begin_recording(plan)
        return wire.StatsReply(recording.stats(), [recording.said()])

    async def _begin_recording(self, plan: Plan) -> Answer:
        recording = self._core.recording
        await recording.begin_and_wait(plan, time.time_ns() // NS_PER_MS)
        return wire.StatsReply(recording.stats(), [recording.said()])

    async def _end_recording(self) -> Answer:
        recording = self._core.recording
        await recording.end_and_wait()
        return wire.StatsReply(recording.stats(), [recording.said()])

    def _persist(self, request: wire.Persist) -> Answer | Later:
        self._identity.require("writer")
        opened = self._core.namespaces.of(request.namespace, self._identity.tenant)
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
