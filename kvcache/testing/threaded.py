"""A blocking store in the place of an async one, so that the contract in ``stores`` holds for both."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvcache.block import BlockHash, BlockSpec
from kvcache.client.store import (
    LEASE_MS,
    LEASE_WAIT_MS,
    NO_HINTS,
    PERSIST_WAIT_MS,
    BlockingStore,
    BlockingWriting,
    Handle,
    Lease,
    SaveHints,
)
from kvcache.namespace import Namespace
from kvcache.request_hints import UNKNOWN, RequestHints

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Threaded:
    """A BlockingStore as a BlockStore: each call in a thread."""

    def __init__(self, store: BlockingStore) -> None:
        self.store = store

    @property
    def counters(self) -> Mapping[str, int]:
        return self.store.counters

    @property
    def node(self) -> str:
        return self.store.node

    @property
    def prefill_tokens_s(self) -> float:
        return self.store.prefill_tokens_s

    @prefill_tokens_s.setter
    def prefill_tokens_s(self, rate: float) -> None:
        self.store.prefill_tokens_s = rate

    async def open(self, namespace: Namespace, spec: BlockSpec) -> Handle:
        return await asyncio.to_thread(self.store.open, namespace, spec)

    async def match(self, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        return await asyncio.to_thread(self.store.match, handle, prefix)

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
        return await asyncio.to_thread(
            self.store.lease, handle, prefix, request, duration_ms, wait_ms, source, pushed, hints
        )

    async def load(
        self,
        lease: Lease,
        into: Sequence[Sequence[Buffer]],
        start: int = 0,
        heads: tuple[int, int] | None = None,
    ) -> frozenset[int]:
        return await asyncio.to_thread(self.store.load, lease, into, start, heads)

    async def save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        return await asyncio.to_thread(self.store.save, handle, prefix, blocks, parent, hints)

    async def begin_save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> ThreadedWriting:
        writing = await asyncio.to_thread(self.store.begin_save, handle, prefix, blocks, parent, hints)
        return ThreadedWriting(writing)

    async def persist(
        self, handle: Handle, prefix: Sequence[BlockHash], wait_ms: int = PERSIST_WAIT_MS
    ) -> int:
        return await asyncio.to_thread(self.store.persist, handle, prefix, wait_ms)

    async def release(self, lease: Lease) -> None:
        await asyncio.to_thread(self.store.release, lease)

    async def close(self) -> None:
        await asyncio.to_thread(self.store.close)


class ThreadedWriting:
    """A BlockingWriting as a Writing."""

    def __init__(self, writing: BlockingWriting) -> None:
        self._writing = writing

    async def advance(self, planes: int) -> None:
        await asyncio.to_thread(self._writing.advance, planes)

    async def finish(self) -> int:
        return await asyncio.to_thread(self._writing.finish)

    async def abort(self) -> None:
        await asyncio.to_thread(self._writing.abort)
