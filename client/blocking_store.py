"""The blocking driver: a ``BlockingStore`` over one node, for the threads of an engine.

Calls take turns on one connection, because leases and reservations belong to it; copies run side by
side outside that turn. A call that cannot have its turn by its deadline is a miss, like any other.
Connecting happens in a thread of its own, so that a node which accepts and then says nothing costs an
engine's thread ``RECONNECT_WAIT_NS`` once a back-off, and otherwise nothing.

Invariants: no operation runs on an earlier connection when a new one is made, so no copy of ours is in
flight when Hello says so; a socket is closed only by who has the turn.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kvcache.block import BlockHash, BlockSpec, NamespaceId
from kvcache.channel import BlockingChannel
from kvcache.client import hbm_layered, hbm_operations, hbm_saving, layered, leasing, operations
from kvcache.client.hbm import DeviceBlocks, Mapped
from kvcache.client.link import (
    RECONNECT_WAIT_NS,
    Context,
    Link,
    Options,
    Outage,
    Tally,
    away,
    client_name,
    nowhere,
)
from kvcache.client.local import Slab
from kvcache.client.opening import open_namespace, reopen
from kvcache.client.steps import Answer, Operation, Pause, Post, Step, Work, finished
from kvcache.client.store import (
    LEASE_MS,
    LEASE_WAIT_MS,
    NO_HINTS,
    PERSIST_WAIT_MS,
    Handle,
    Lease,
    SaveHints,
)
from kvcache.client.writing import BlockingWriting, from_device, from_host
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.errors import BadInput, KVCacheError
from kvcache.namespace import Namespace
from kvcache.request_hints import UNKNOWN, RequestHints

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Attached:
    channel: BlockingChannel
    link: Link


class BlockingNodeStore:
    """See ``store.BlockingStore``. Any thread may call; connects when first needed."""

    def __init__(self, options: Options, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._pid = os.getpid()
        self._name = client_name(options.name, self._pid)
        self._tally = Tally()
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        # Under _changed, all of these:
        self._handles: dict[NamespaceId, Handle] = {}
        self._attached: _Attached | None = None
        self._running = 0
        self._connecting = False
        self._connections = 0
        self._outage = Outage()
        self._refusal: KVCacheError | None = None
        self._closed = False
        self._node = ""
        self.prefill_tokens_s = 0.0

    @property
    def counters(self) -> Mapping[str, int]:
        return self._tally.copy()

    @property
    def node(self) -> str:
        return self._node

    def open(self, namespace: Namespace, spec: BlockSpec) -> Handle:
        attached = self._enter(self._options.greeting_ms * NS_PER_MS, patient=True)
        if attached is None:
            raise self._refusal or away(self._options.address)
        try:
            handle = self._drive(attached, open_namespace(self._context(attached), namespace, spec))
            with self._changed:
                if self._attached is not attached:
                    raise away(self._options.address)
                self._handles[handle.namespace_id] = handle
                attached.link.opened |= {handle.namespace_id}
        finally:
            self._leave(attached)
        return handle

    def match(self, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        return self._run(lambda context: operations.match(context, handle, prefix))

    def lease(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        request: str = "",
        duration_ms: int = LEASE_MS,
        wait_ms: int = LEASE_WAIT_MS,
        source: str = "",
        pushed: bool = False,
        hints: RequestHints = UNKNOWN,
    ) -> Lease:
        return self._run(
            lambda c: leasing.lease(c, handle, prefix, request, duration_ms, wait_ms, source, pushed, hints)
        )

    def load(
        self,
        lease: Lease,
        into: Sequence[Sequence[Buffer]],
        start: int = 0,
        heads: tuple[int, int] | None = None,
    ) -> frozenset[int]:
        return self._run(lambda context: operations.load(context, lease, into, start, heads))

    def save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        return self._run(lambda c: operations.save(c, handle, prefix, blocks, parent, hints))

    def begin_save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> BlockingWriting:
        draft = self._run(lambda c: layered.begin(c, handle, prefix, blocks, parent, hints))
        return BlockingWriting(self._run, from_host(draft))

    def persist(self, handle: Handle, prefix: Sequence[BlockHash], wait_ms: int = PERSIST_WAIT_MS) -> int:
        return self._run(lambda context: operations.persist(context, handle, prefix, wait_ms))

    def match_device(self, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        return self._run(lambda c: operations.match(c, handle, prefix, hbm=True))

    def lease_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        request: str = "",
        duration_ms: int = LEASE_MS,
        wait_ms: int = LEASE_WAIT_MS,
        source: str = "",
        pushed: bool = False,
        hints: RequestHints = UNKNOWN,
    ) -> Lease:
        return self._run(
            lambda c: leasing.lease(
                c, handle, prefix, request, duration_ms, wait_ms, source, pushed, hints, hbm=True
            )
        )

    def load_device(self, lease: Lease, into: DeviceBlocks, start: int = 0) -> frozenset[int]:
        return self._run(lambda c: hbm_operations.load(c, lease, into, start))

    def save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: DeviceBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        return self._run(lambda c: hbm_saving.save(c, handle, prefix, blocks, parent, hints))

    def begin_save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: DeviceBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> BlockingWriting:
        draft = self._run(lambda c: hbm_layered.begin(c, handle, prefix, blocks, parent, hints))
        return BlockingWriting(self._run, from_device(draft))

    def release(self, lease: Lease) -> None:
        if lease.grants:
            self._run(lambda context: leasing.release(context, lease))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            attached, self._attached = self._attached, None
        if attached is not None:
            self._hang_up(attached)

    # --- driving ----------------------------------------------------------------------------------

    def _run(self, operation: Callable[[Context], Operation[T]]) -> T:
        attached = self._enter(RECONNECT_WAIT_NS, patient=False)
        if attached is None:
            return finished(operation(self._context_on(nowhere())))
        try:
            return self._drive(attached, operation(self._context(attached)))
        finally:
            self._leave(attached)

    def _context(self, attached: _Attached) -> Context:
        return self._context_on(attached.link)

    def _context_on(self, link: Link) -> Context:
        return Context(link, self._tally, self._clock, self.prefill_tokens_s)

    def _drive(self, attached: _Attached, operation: Operation[T]) -> T:
        """Run to the end. An interrupt gives up the connection: the node then takes back what we held."""
        try:
            step = next(operation)
            while True:
                try:
                    answer = self._perform(attached, step)
                except KVCacheError as error:
                    step = operation.throw(error)
                else:
                    step = operation.send(answer)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # StopIteration is not generic
        except KVCacheError:
            raise
        except BaseException:
            attached.link.broken = "interrupted"
            operation.close()
            raise

    def _perform(self, attached: _Attached, step: Step) -> Answer:
        if isinstance(step, Work):
            return step.run()
        if isinstance(step, Pause):
            time.sleep(step.duration_ns / NS_PER_S)
            return None
        now_ns = self._clock.now_ns()
        deadline_ns = attached.link.deadline_ns(self._options, now_ns, step)
        if not self._turn.acquire(timeout=(deadline_ns - now_ns) / NS_PER_S):
            self._tally.add("missed_calls:busy")
            raise away(self._options.address)
        try:
            if isinstance(step, Post):
                attached.channel.post(step.request, deadline_ns)
                return None
            reply = attached.channel.call(step.request, deadline_ns, step.payload, step.into)
        finally:
            self._turn.release()
        self._outage.answered()
        return reply

    # --- connection -------------------------------------------------------------------------------

    def _enter(self, wait_ns: int, *, patient: bool) -> _Attached | None:
        """The connection to work on until ``_leave``; None while there is none. A patient caller waits
        for a connection that another has begun to make."""
        if os.getpid() != self._pid:
            raise BadInput(
                "bad_config",
                "this store was made in another process",
                "neither its connection nor its map can be shared",
                "connect again after fork",
            )
        with self._changed:
            if self._begin_connecting() or (patient and self._connecting):
                self._changed.wait_for(lambda: not self._connecting, wait_ns / NS_PER_S)
            if self._attached is not None:
                self._running += 1
                self._attached.link.running = self._running
            return self._attached

    def _leave(self, attached: _Attached) -> None:
        ended = attached.channel.ended_by or attached.link.broken
        try:
            if ended:
                attached.link.end_writings()
        finally:
            with self._changed:
                self._running -= 1
                attached.link.running = self._running
                is_ours = bool(ended) and self._attached is attached
                if is_ours:
                    self._attached = None
                    self._outage.failed(self._clock.now_ns())
            if is_ours:
                self._tally.add(f"ended:{ended}")
                self._hang_up(attached)

    def _hang_up(self, attached: _Attached) -> None:
        with self._turn:
            attached.channel.close()
        attached.link.close()

    def _begin_connecting(self) -> bool:
        if self._attached is not None or self._closed or self._connecting or self._running:
            return False
        if not self._outage.may_try(self._clock.now_ns()):
            return False
        self._connecting = True
        try:
            threading.Thread(target=self._connect, name="kvcache-connect", daemon=True).start()
        except RuntimeError:  # The process may have no more threads.
            self._connecting = False
            self._outage.failed(self._clock.now_ns())
            return False
        return True

    def _connect(self) -> None:
        attached: _Attached | None = None
        refusal: KVCacheError | None = away(self._options.address)
        try:
            attached, refusal = self._attach(), None
        except KVCacheError as error:
            refusal = error
        finally:
            with self._changed:
                self._connecting = False
                self._refusal = refusal
                if attached is None:
                    self._outage.failed(self._clock.now_ns())
                elif not self._closed:
                    self._attached = attached
                self._changed.notify_all()
        self._tally.add("connects" if attached else "refused_connects")
        if attached is not None and self._closed:
            self._hang_up(attached)

    def _attach(self) -> _Attached:
        """RAISES BadInput, NotAllowed, Unavailable."""
        with self._changed:
            again, handles = self._connections > 0, list(self._handles.values())
            self._connections += 1
        deadline_ns = self._clock.now_ns() + self._options.greeting_ms * NS_PER_MS
        hello = self._options.hello(self._name, again)
        channel = BlockingChannel.connect(self._options.address, hello, deadline_ns, self._clock)
        with contextlib.ExitStack() as undo:
            undo.callback(channel.close)
            slab = Slab.of(channel.slab_fd, channel.welcome)
            hbm = Mapped.of(self._options.device, channel.hbm_fd, channel.welcome)
            self._tally.add("unmapped_hbm", hbm is None and channel.hbm_fd is not None)
            plans = self._options.plans_for is not None
            link = Link(self._connections, channel.welcome, slab, hbm, plans=plans)
            attached = _Attached(channel, link)
            undo.callback(attached.link.close)
            attached.link.pin(self._options.device, channel.slab_fd, self._tally)
            attached.link.opened = self._drive(attached, reopen(self._context(attached), handles))
            self._node = channel.welcome.node
            undo.pop_all()
        return attached
