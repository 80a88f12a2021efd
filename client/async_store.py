"""The asyncio driver: a ``BlockStore`` over one node, for the tasks of one event loop.

Calls of many tasks share one connection; copies, and waits for a device, run in a small pool of threads,
so the loop never waits for bytes. A cancelled operation first lets its running step end (a copy by itself,
a call by its deadline), then cleans up, then is cancelled: nobody's buffer is written after that.

Invariants: no operation runs on an earlier connection when a new one is made, so no copy of ours is in
flight when Hello says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from kvcache.block import BlockHash, BlockSpec, NamespaceId
from kvcache.channel import AsyncChannel
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
from kvcache.client.steps import Answer, Call, Operation, Pause, Post, Step, Work, finished
from kvcache.client.store import (
    LEASE_MS,
    LEASE_WAIT_MS,
    NO_HINTS,
    PERSIST_WAIT_MS,
    Handle,
    Lease,
    SaveHints,
)
from kvcache.client.writing import AsyncWriting, from_device, from_host
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.errors import BadInput, KVCacheError, NotAllowed
from kvcache.namespace import Namespace
from kvcache.request_hints import UNKNOWN, RequestHints
from kvcache.uncancelled import to_the_end

if TYPE_CHECKING:
    from typing_extensions import Buffer

COPY_THREADS = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Attached:
    channel: AsyncChannel
    link: Link


class AsyncNodeStore:
    """See ``store.BlockStore``. For one event loop; connects when first needed."""

    def __init__(self, options: Options, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._name = client_name(options.name, os.getpid())
        self._tally = Tally()
        self._copying = ThreadPoolExecutor(COPY_THREADS, "kvcache-copy")
        self._handles: dict[NamespaceId, Handle] = {}
        self._attached: _Attached | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._connecting: asyncio.Task[None] | None = None
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

    async def open(self, namespace: Namespace, spec: BlockSpec) -> Handle:
        attached = await self._enter(self._options.greeting_ms * NS_PER_MS, patient=True)
        if attached is None:
            raise self._refusal or away(self._options.address)
        try:
            opening = open_namespace(self._context(attached.link), namespace, spec)
            handle = await self._drive(attached, opening)
            if self._attached is not attached:
                raise away(self._options.address)
            self._handles[handle.namespace_id] = handle
            attached.link.opened |= {handle.namespace_id}
        finally:
            await self._leave(attached)
        return handle

    async def match(self, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        return await self._run(lambda context: operations.match(context, handle, prefix))

    async def lease(
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
        return await self._run(
            lambda c: leasing.lease(c, handle, prefix, request, duration_ms, wait_ms, source, pushed, hints),
            leasing.release,
        )

    async def load(
        self,
        lease: Lease,
        into: Sequence[Sequence[Buffer]],
        start: int = 0,
        heads: tuple[int, int] | None = None,
    ) -> frozenset[int]:
        return await self._run(lambda context: operations.load(context, lease, into, start, heads))

    async def save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        return await self._run(lambda c: operations.save(c, handle, prefix, blocks, parent, hints))

    async def begin_save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> AsyncWriting:
        draft = await self._run(
            lambda c: layered.begin(c, handle, prefix, blocks, parent, hints), layered.abort
        )
        return AsyncWriting(self._run, from_host(draft))

    async def persist(
        self, handle: Handle, prefix: Sequence[BlockHash], wait_ms: int = PERSIST_WAIT_MS
    ) -> int:
        return await self._run(lambda context: operations.persist(context, handle, prefix, wait_ms))

    async def match_device(self, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        return await self._run(lambda c: operations.match(c, handle, prefix, hbm=True))

    async def lease_device(
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
        return await self._run(
            lambda c: leasing.lease(
                c, handle, prefix, request, duration_ms, wait_ms, source, pushed, hints, hbm=True
            ),
            leasing.release,
        )

    async def load_device(self, lease: Lease, into: DeviceBlocks, start: int = 0) -> frozenset[int]:
        return await self._run(lambda c: hbm_operations.load(c, lease, into, start))

    async def save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: DeviceBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        return await self._run(lambda c: hbm_saving.save(c, handle, prefix, blocks, parent, hints))

    async def begin_save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: DeviceBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> AsyncWriting:
        draft = await self._run(
            lambda c: hbm_layered.begin(c, handle, prefix, blocks, parent, hints), hbm_layered.abort
        )
        return AsyncWriting(self._run, from_device(draft))

    async def release(self, lease: Lease) -> None:
        if lease.grants:
            await self._run(lambda context: leasing.release(context, lease))

    async def close(self) -> None:
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.channel.close()
            await self._waited(attached.link.close)
        await self._idle.wait()  # What ran finds its calls failed; its copies end by themselves.
        self._copying.shutdown()

    # --- driving ----------------------------------------------------------------------------------

    async def _run(
        self,
        operation: Callable[[Context], Operation[T]],
        undo: Callable[[Context, T], Operation[None]] | None = None,
    ) -> T:
        """``undo`` takes back a result that a cancelled caller will not see."""
        attached = await self._enter(RECONNECT_WAIT_NS, patient=False)
        if attached is None:
            return finished(operation(self._context(nowhere())))
        context = self._context(attached.link)
        try:
            result, cancelled = await self._finished(attached, operation(context))
            if cancelled is not None:
                if undo is not None:
                    await self._finished(attached, undo(context, result))
                raise cancelled
            return result
        finally:
            await self._leave(attached)

    def _context(self, link: Link) -> Context:
        return Context(link, self._tally, self._clock, self.prefill_tokens_s)

    async def _drive(self, attached: _Attached, operation: Operation[T]) -> T:
        result, cancelled = await self._finished(attached, operation)
        if cancelled is not None:
            raise cancelled
        return result

    async def _finished(
        self, attached: _Attached, operation: Operation[T]
    ) -> tuple[T, asyncio.CancelledError | None]:
        """Run to the end, the clean-up after a cancellation included. When the cancellation came during
        the last step, its result is there, and still to be taken back."""
        cancelled: asyncio.CancelledError | None = None
        told = False
        try:
            step = next(operation)
            while True:
                running = self._begin(attached, step)
                cancelled = await to_the_end(running) or cancelled
                if running.cancelled():  # Not by the caller: the loop ends all its tasks.
                    attached.link.broken = "interrupted"
                    operation.close()
                failure = running.exception()
                if isinstance(failure, KVCacheError):
                    step = operation.throw(failure)
                else:
                    step = operation.send(running.result())
                if cancelled is not None and not told:
                    told = True
                    step = operation.throw(cancelled)
        except StopIteration as done:
            return done.value, cancelled
        except (KVCacheError, asyncio.CancelledError):
            raise
        except BaseException:
            attached.link.broken = "interrupted"
            operation.close()
            raise

    def _begin(self, attached: _Attached, step: Step) -> asyncio.Future[Answer]:
        """A copy is no task: nothing that cancels tasks can part us from it while it runs."""
        if isinstance(step, Work):
            copying = asyncio.get_running_loop().run_in_executor(self._copying, step.run)
            return cast("asyncio.Future[Answer]", copying)
        if isinstance(step, Pause):
            return asyncio.ensure_future(asyncio.sleep(step.duration_ns / NS_PER_S))
        return asyncio.ensure_future(self._asked(attached, step))

    async def _asked(self, attached: _Attached, step: Call | Post) -> Answer:
        deadline_ns = attached.link.deadline_ns(self._options, self._clock.now_ns(), step)
        if isinstance(step, Post):
            with contextlib.suppress(BadInput, NotAllowed):
                await attached.channel.call(step.request, deadline_ns)
            return None
        reply = await attached.channel.call(step.request, deadline_ns, step.payload, step.into)
        self._outage.answered()
        return reply

    # --- connection -------------------------------------------------------------------------------

    async def _enter(self, wait_ns: int, *, patient: bool) -> _Attached | None:
        """The connection to work on until ``_leave``; None while there is none. A patient caller waits
        for a connection that another has begun to make."""
        begun = self._begin_connecting()
        if self._connecting is not None and (begun or patient):
            await asyncio.wait([self._connecting], timeout=wait_ns / NS_PER_S)
        if self._attached is not None:
            self._running += 1
            self._attached.link.running = self._running
            self._idle.clear()
        return self._attached

    async def _leave(self, attached: _Attached) -> None:
        ended = attached.channel.ended_by or attached.link.broken
        try:
            if ended and self._attached is attached:
                self._attached = None
                self._outage.failed(self._clock.now_ns())
                self._tally.add(f"ended:{ended}")
                attached.channel.close()
                await self._waited(attached.link.close)
            elif ended:
                await self._waited(attached.link.end_writings)
        finally:
            self._running = attached.link.running = self._running - 1
            if self._running == 0:
                self._idle.set()

    async def _waited(self, end: Callable[[], None]) -> None:
        """In a thread: a device may copy still."""
        ending = asyncio.get_running_loop().run_in_executor(self._copying, end)
        if (cancelled := await to_the_end(ending)) is not None:
            raise cancelled
        ending.result()

    def _begin_connecting(self) -> bool:
        if self._attached is not None or self._closed or self._connecting is not None or self._running:
            return False
        if not self._outage.may_try(self._clock.now_ns()):
            return False
        self._connecting = asyncio.get_running_loop().create_task(self._connect())
        return True

    async def _connect(self) -> None:
        try:
            self._attached, self._refusal = await self._attach(), None
            self._tally.add("connects")
        except (KVCacheError, OSError) as error:  # No descriptors left, too.
            self._refusal = error if isinstance(error, KVCacheError) else away(self._options.address)
            self._outage.failed(self._clock.now_ns())
            self._tally.add("refused_connects")
        finally:
            self._connecting = None

    async def _attach(self) -> _Attached:
        """RAISES BadInput, NotAllowed, Unavailable."""
        hello = self._options.hello(self._name, again=self._connections > 0)
        self._connections += 1
        deadline_ns = self._clock.now_ns() + self._options.greeting_ms * NS_PER_MS
        channel = await AsyncChannel.connect(self._options.address, hello, deadline_ns, self._clock)
        with contextlib.ExitStack() as undo:
            undo.callback(channel.close)
            slab = Slab.of(channel.slab_fd, channel.welcome)
            hbm = Mapped.of(self._options.device, channel.hbm_fd, channel.welcome)
            self._tally.add("unmapped_hbm", hbm is None and channel.hbm_fd is not None)
            plans = self._options.plans_for is not None
            link = Link(self._connections, channel.welcome, slab, hbm, plans=plans)
            attached = _Attached(channel, link)
            undo.callback(link.close)
            link.pin(self._options.device, channel.slab_fd, self._tally)
            reopening = reopen(self._context(link), list(self._handles.values()))
            link.opened = await self._drive(attached, reopening)
            self._node = channel.welcome.node
            undo.pop_all()
        return attached
