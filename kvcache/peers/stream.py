"""A follower's talk with the node that writes: ask for planes, read them, ask for the next.

    follow ──► Followed, with a ticket ──► read ──► follow, from the next plane on ──► ... ──► end
                └── "none": nothing new within the wait, or (without blocks) there will be no more

One connection, on which nobody else asks: the node answers a Follow when there is something, and each ends
the ticket of the one before it. What the peer says is checked for sense here; the bytes are the caller's to
verify.

The sum: one round trip (0.1 ms on a host) and one transfer for all planes that are ready.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from kvcache.block import HASH_BYTES, BlockSpec, NamespaceId, StorageKey
from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.namespace import Namespace
from kvcache.sums import SUM_BYTES
from kvcache.transport.base import Endpoint, PeerLost, Priority, Ticket, TransferLate, TransferRefused
from kvcache.transport.table import scheme_of
from kvcache.wire import Follow, Followed, Open, Reply, Welcome

FOLLOW_NS = NS_PER_S
"""A Follow waits so long at the peer, so that one which is gone is noticed soon."""
SPARE_NS = 2 * NS_PER_S
READ_NS = 10 * NS_PER_S
FAILURES = (
    *("lost", "late", "refused", "sums", "gone", "stalled", "full", "busy", "parent"),
    *("fetch", "none", "unknown", "queue"),
)
"""docs/streaming.md says of each what it means."""
_REASONS = {"bad_block": "sums", "bad_prefix": "parent"}


class StreamFailed(Exception):
    """No more of it comes. ``reason`` is one of ``FAILURES``."""

    def __init__(self, reason: str, why: str = "") -> None:
        assert reason in FAILURES, reason
        self.reason = reason
        super().__init__(why or reason)


class Way(Protocol):
    """How a peer's bytes are reached (``kvcache.peers.peer.Peer``)."""

    def data_address(self, welcome: Welcome) -> str: ...

    async def endpoint(self, address: str, deadline_ns: int) -> Endpoint: ...


class Stream:
    """Of blocks of one namespace. Every call RAISES StreamFailed."""

    def __init__(
        self,
        way: Way,
        channel: AsyncChannel,
        namespace_id: NamespaceId,
        namespace: Namespace | None,
        spec: BlockSpec,
        clock: Clock,
    ) -> None:
        """``namespace`` is what the peer is told when nobody has opened it there yet."""
        self._way = way
        self._channel = channel
        self._namespace_id = namespace_id
        self._namespace = namespace
        self._spec = spec
        self._clock = clock

    async def follow(self, keys: Sequence[StorageKey], plane: int, wait_ns: int) -> Followed:
        """What there is of the first of ``keys``, after so long at most, if that is not over long."""
        async with translated():
            via = scheme_of(self._way.data_address(self._channel.welcome))
            wait_ns = max(0, min(wait_ns, FOLLOW_NS))
            prefix = b"".join(key[HASH_BYTES:] for key in keys)
            request = Follow(self._namespace_id, prefix, via, plane, wait_ns // NS_PER_MS)
            try:
                reply = await self._call(request, wait_ns)
            except BadInput as error:
                if error.code != "unknown_namespace" or self._namespace is None:
                    raise
                await self._open(self._namespace)
                reply = await self._call(request, wait_ns)
            return self._sensible(reply, len(keys), plane)

    async def follow_on(self, keys: Sequence[StorageKey], plane: int, stall_ns: int) -> Followed:
        """The next planes of the very blocks that were begun with, when they are there."""
        end_ns = self._clock.now_ns() + stall_ns
        while True:
            left_ns = end_ns - self._clock.now_ns()
            followed = await self.follow(keys, plane, left_ns)
            if followed.count != len(keys) or followed.state == "held":
                raise StreamFailed("gone", "the writer gave them up, or is gone")
            if followed.state == "writing":
                return followed
            if left_ns <= 0:
                raise StreamFailed("stalled", f"no plane after the first {plane} for too long")

    async def read(self, followed: Followed, into: Sequence[memoryview]) -> None:
        """When it has returned or raised, nothing touches ``into`` any more."""
        async with translated():
            deadline_ns = self._clock.now_ns() + min(READ_NS, followed.remaining_ms * NS_PER_MS)
            endpoint = await self._way.endpoint(followed.address, deadline_ns)
            await endpoint.read(Ticket(followed.ticket), into, deadline_ns, Priority.DECODE)

    async def end(self) -> None:
        """Give the last ticket back: the connection is another's now. What cannot be said is not missed."""
        with contextlib.suppress(StreamFailed):
            await self.follow([], 0, 0)

    async def _call(self, request: Follow | Open, wait_ns: int) -> Reply:
        return await self._channel.call(request, self._clock.now_ns() + wait_ns + SPARE_NS)

    async def _open(self, namespace: Namespace) -> None:
        spec = self._spec
        request = Open(namespace.to_map(), spec.plane_count, spec.head_count, spec.head_bytes)
        await self._call(request, 0)

    def _sensible(self, reply: Reply, asked: int, plane: int) -> Followed:
        if not isinstance(reply, Followed):
            raise StreamFailed("refused", f"the peer answered {reply!r:.200}")
        is_sane = reply.count <= asked
        if reply.state == "writing":
            spec = self._spec
            size = reply.count * reply.planes * spec.plane_bytes // spec.chunk_bytes * SUM_BYTES
            fits = plane + reply.planes <= spec.plane_count
            is_sane = is_sane and fits and len(reply.sums) == size and size > 0
        elif reply.state == "held":
            is_sane = is_sane and reply.count > 0
        elif reply.state != "none":
            is_sane = False
        if not is_sane:
            raise StreamFailed("refused", f"the peer answered {reply!r:.200}")
        return reply


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """What can happen on the way, as one kind of failure."""
    try:
        yield
    except (PeerLost, Unavailable) as error:
        raise StreamFailed("lost", str(error)) from error
    except TransferLate as error:
        raise StreamFailed("late", str(error)) from error
    except TransferRefused as error:
        raise StreamFailed("gone", str(error)) from error
    except KVCacheError as error:
        raise StreamFailed(_REASONS.get(error.code, "refused"), str(error)) from error
