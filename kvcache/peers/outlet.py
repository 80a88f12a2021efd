"""A writer's talk with a peer that is given blocks: room, planes by ticket, publish.

    reserve ──► Reserved ──► post ──► Posted, with a ticket ──► write ──► ... ──► commit, which verifies there

One connection, which nobody else uses meanwhile: what was reserved and not committed ends with it.

The sum: two round trips (0.2 ms on a host) for what is written with one ticket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from kvcache.block import HASH_BYTES, BlockSpec, NamespaceId, StorageKey
from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.errors import BadInput
from kvcache.namespace import Namespace
from kvcache.peers.stream import StreamFailed, Way, translated
from kvcache.transport.base import Priority, Ticket
from kvcache.transport.table import scheme_of
from kvcache.wire import Commit, Committed, Open, Post, Posted, Reply, Request, Reserve, Reserved

CALL_NS = 5 * NS_PER_S
WRITE_NS = 10 * NS_PER_S
TICKET_BYTES_MAX = 32 << 20
TICKET_PIECES_MAX = 16_384

Answered = TypeVar("Answered", bound=Reply)


class Outlet:
    """For blocks of one namespace. Every call RAISES StreamFailed."""

    def __init__(
        self,
        way: Way,
        channel: AsyncChannel,
        namespace_id: NamespaceId,
        namespace: Namespace,
        spec: BlockSpec,
        clock: Clock,
        priority: Priority = Priority.DECODE,
    ) -> None:
        self._way = way
        self._channel = channel
        self._namespace_id = namespace_id
        self._namespace = namespace
        self._spec = spec
        self._clock = clock
        self._priority = priority

    async def reserve(self, keys: Sequence[StorageKey], parent: StorageKey | None) -> Reserved:
        """Of these, as many as there is room for. "parent": the peer has not the block before them."""
        before = b"" if parent is None else parent[HASH_BYTES:]
        request = Reserve(self._namespace_id, before, b"".join(key[HASH_BYTES:] for key in keys))
        async with translated():
            try:
                reserved = await self._call(request, Reserved)
            except BadInput as error:
                if error.code != "unknown_namespace":
                    raise
                await self._open()
                reserved = await self._call(request, Reserved)
        if reserved.start + reserved.count > len(keys):
            raise StreamFailed("refused", f"the peer answered {reserved!r:.200}")
        return reserved

    async def write(self, reserved: Reserved, blocks: Sequence[memoryview], plane: int, end: int) -> None:
        """Planes from ``plane`` on, before ``end``, of all reserved blocks, from those here. When it has
        returned or raised, nothing touches ``blocks`` any more."""
        for first, count, low, high in self._parts(len(blocks), plane, end):
            request = Post(reserved.reservation, first, count, self._via(), plane=low, planes=high - low)
            pieces = self._pieces(blocks[first : first + count], low, high)
            async with translated():
                posted = await self._call(request, Posted)
                left_ns = min(WRITE_NS, posted.remaining_ms * NS_PER_MS)
                deadline_ns = self._clock.now_ns() + left_ns
                endpoint = await self._way.endpoint(posted.address, deadline_ns)
                await endpoint.write(Ticket(posted.ticket), pieces, deadline_ns, self._priority)

    async def commit(self, reserved: Reserved, sums: Sequence[bytes]) -> None:
        """``sums``: all chunk sums of each. "sums": what arrived there has others."""
        async with translated():
            committed = await self._call(Commit(reserved.reservation, b"".join(sums)), Committed)
        if committed.count != reserved.count:
            raise StreamFailed("refused", f"the peer answered {committed!r:.200}")

    def _via(self) -> str:
        return scheme_of(self._way.data_address(self._channel.welcome))

    def _parts(self, count: int, plane: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Blocks from, how many, planes from, before: what goes with one ticket."""
        size = self._spec.plane_bytes
        planes = max(1, min(end - plane, TICKET_BYTES_MAX // (size * count), TICKET_PIECES_MAX // count))
        blocks = max(1, min(count, TICKET_BYTES_MAX // (size * planes)))
        for low in range(plane, end, planes):
            for first in range(0, count, blocks):
                yield first, min(blocks, count - first), low, min(low + planes, end)

    def _pieces(self, blocks: Sequence[memoryview], low: int, high: int) -> list[memoryview]:
        if high - low == self._spec.plane_count:
            return list(blocks)
        size = self._spec.plane_bytes
        return [block[at * size : (at + 1) * size] for block in blocks for at in range(low, high)]

    async def _call(self, request: Request, kind: type[Answered]) -> Answered:
        reply = await self._channel.call(request, self._clock.now_ns() + CALL_NS)
        if not isinstance(reply, kind):
            raise StreamFailed("refused", f"the peer answered {reply!r:.200}")
        return reply

    async def _open(self) -> None:
        spec = self._spec
        request = Open(self._namespace.to_map(), spec.plane_count, spec.head_count, spec.head_bytes)
        await self._channel.call(request, self._clock.now_ns() + CALL_NS)
