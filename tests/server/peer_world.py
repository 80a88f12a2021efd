"""Nodes of one process, each with its own loop, that are peers of each other over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from kvcache import wire
from kvcache.block import BlockHash, NamespaceId, StorageKey, storage_key
from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.config import NodeConfig
from kvcache.transport.base import Endpoint, Priority, Ticket
from tests.server.conftest import EmbeddedNode
from tests.server.talk import SIZE, connected, content, deadline, opened, save, stats

PATIENCE_S = 20
WAIT_MS = 20_000
"""Nothing is given up for being late, however busy the machine is."""
NEVER_LATE = {"peer_wait_ms": WAIT_MS, "nvme_late_ms": WAIT_MS}
"""Settings of nodes that are not tried for what is late."""
QUIET = ("reservations", "leases", "limbo_blocks", "tickets", "peer_coming_bytes")
"""What must come back to nothing when nobody asks for anything."""


class Here:
    """One node, and a connection to it without a map."""

    def __init__(
        self,
        folder: Path,
        name: str,
        stack: ExitStack,
        token: str = "",
        **settings: object,
    ) -> None:
        plain: dict[str, object] = {
            "name": name,
            "socket": str(folder / f"{name}.sock"),
            "tcp": "127.0.0.1:0",
            "http": "none",
            "capacity": "8MiB",
            "unit": "256KiB",
            **NEVER_LATE,
        }
        self.embedded = EmbeddedNode(NodeConfig(**{**plain, **settings}))  # type: ignore[arg-type]
        self.node = self.embedded.node
        self._token = token
        self._is_closed = False
        self._stack = stack.enter_context(ExitStack())
        stack.callback(self.close)
        self.channel = self.connect()
        self.namespace = opened(self.channel)

    def connect(self, **hello: str) -> BlockingChannel:
        return self._stack.enter_context(connected(self.node.address, self._token, **hello))  # type: ignore[arg-type]

    def close(self) -> None:
        """After a look whether anything was left behind."""
        if not self._is_closed:
            self._is_closed = True
            self._stack.close()
            self.embedded.close()

    def end(self) -> None:
        """It is gone, whatever is on its way, and looked at no more."""
        self._is_closed = True
        self.embedded.run(self.node.close())

    def release(self, lease: int) -> None:
        self.channel.call(wire.Release(lease), deadline())

    def save(self, blocks: list[bytes], parent: bytes = b"") -> None:
        assert save(self.channel, self.namespace, blocks, parent) == len(blocks)

    def lease(
        self,
        blocks: list[bytes],
        wait_ms: int = WAIT_MS,
        channel: BlockingChannel | None = None,
        **more: object,
    ) -> wire.Leased:
        request = wire.TakeLease(self.namespace, b"".join(blocks), wait_ms=wait_ms, **more)  # type: ignore[arg-type]
        reply = (channel or self.channel).call(request, deadline())
        assert isinstance(reply, wire.Leased)
        return reply

    def load(
        self,
        blocks: list[bytes],
        wait_ms: int = WAIT_MS,
        channel: BlockingChannel | None = None,
        **more: object,
    ) -> int:
        """Lease, read, compare, release: how many were there."""
        wired = channel or self.channel
        leased = self.lease(blocks, wait_ms, wired, **more)
        if leased.count:
            memory = [memoryview(bytearray(SIZE)) for _ in range(leased.count)]
            wired.call(wire.Read(leased.lease, 0, leased.count), deadline(), into=memory)
            wired.call(wire.Release(leased.lease), deadline())
            assert [bytes(view) for view in memory] == [content(block) for block in blocks[: leased.count]]
        return leased.count

    def match(self, blocks: list[bytes]) -> int:
        reply = self.channel.call(wire.Match(self.namespace, b"".join(blocks)), deadline())
        assert isinstance(reply, wire.Matched)
        return reply.count

    def stats(self) -> dict[str, float]:
        return stats(self.channel)

    def stat(self, name: str) -> float:
        return self.stats().get(name, 0)

    def troubles(self) -> list[str]:
        reply = self.channel.call(wire.Stats(), deadline())
        assert isinstance(reply, wire.StatsReply)
        return reply.troubles

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Ask again and again: each question lets the loops go on."""
        end_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
        while not condition():
            assert SystemClock().now_ns() < end_ns, f"never: {what}"
            self.stats()

    def until_known(self, blocks: int) -> None:
        """The index knows so many blocks of the peers."""
        self.until(lambda: self.stat("peer_known_blocks") == blocks, f"{blocks} blocks are known")

    def until_quiet(self) -> None:
        """Nothing is held, reserved or lent any more."""
        self.until(lambda: not any(self.stat(name) for name in QUIET), f"nothing of {QUIET}: {self.stats()}")

    # What only the node itself could do.

    def key(self, block: bytes) -> StorageKey:
        return storage_key(NamespaceId(self.namespace), BlockHash(block))

    def holds(self, blocks: Sequence[bytes]) -> int:
        """How many leading blocks are in host memory; nothing is brought for this."""
        keys = [self.key(block) for block in blocks]
        return self.embedded.call(lambda: self.node.core.ledger.match(keys))

    def flip(self, block: bytes) -> None:
        """One bit of a block in host memory, behind everybody's back."""

        def work() -> None:
            slot = self.node.core.ledger.slot_of(self.key(block))
            assert slot is not None
            self.node.core.host.view(slot, SIZE)[SIZE // 2] ^= 1

        self.embedded.call(work)

    def quarantine(self, block: bytes) -> None:
        """Make a hole."""

        def work() -> None:
            core = self.node.core
            lease = core.ledger.borrow([self.key(block)], "test", 1 << 62)
            assert core.ledger.quarantine(lease.keys[0], lease.generations[0], 0)
            core.ledger.release(lease.lease_id, "test", 0)
            core.settle()

        self.embedded.call(work)

    def stop_following(self) -> None:
        """What peers tell from now on is not heard."""

        async def work() -> None:
            directory = self.node.core.bringing.directory
            assert directory is not None
            for task in directory._tasks:
                task.cancel()
            await asyncio.gather(*directory._tasks, return_exceptions=True)

        self.embedded.run(work())

    def on_the_way(self, meddle: Callable[[Endpoint], Endpoint]) -> None:
        """From now on every transfer goes through what ``meddle`` makes of the endpoint."""
        plane = self.node.core.plane
        plain = plane.endpoint

        async def endpoint(address: str, deadline_ns: int) -> Endpoint:
            return meddle(await plain(address, deadline_ns))

        plane.endpoint = endpoint  # type: ignore[method-assign]


class Meddler:
    """An endpoint that passes everything on; tests change ``read``."""

    def __init__(self, inner: Endpoint) -> None:
        self.inner = inner

    @property
    def peer(self) -> str:
        return self.inner.peer

    @property
    def is_lost(self) -> bool:
        return self.inner.is_lost

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        await self.inner.read(ticket, into, deadline_ns, priority)

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        await self.inner.write(ticket, pieces, deadline_ns, priority)

    async def notify(self, note: bytes, deadline_ns: int) -> None:
        await self.inner.notify(note, deadline_ns)

    async def close(self) -> None:
        await self.inner.close()


class Flipper(Meddler):
    """Turns one bit of every block that arrives."""

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        await self.inner.read(ticket, into, deadline_ns, priority)
        for view in into:
            view[0] ^= 0x80


class Sleeper(Meddler):
    """Nothing arrives, until the caller gives up; and then it is noted whether he did."""

    def __init__(self, inner: Endpoint, ended: list[str], begun: list[str] | None = None) -> None:
        super().__init__(inner)
        self._ended = ended
        self._begun = begun if begun is not None else []

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        self._begun.append(self.peer)
        try:
            await asyncio.Event().wait()
        finally:
            self._ended.append(self.peer)


Start = Callable[..., Here]
