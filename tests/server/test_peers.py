"""Blocks that another node holds: brought here, verified, shared; and what happens when that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.channel import BlockingChannel
from kvcache.config import NodeConfig
from tests.server.conftest import EmbeddedNode
from tests.server.talk import (
    HASHES,
    SIZE,
    connected,
    content,
    deadline,
    held,
    opened,
    save,
    stats,
)

TRIES = 20_000


class Here:
    """One node, and a connection to it without a map."""

    def __init__(self, folder: Path, name: str, stack: ExitStack, **settings: object) -> None:
        plain: dict[str, object] = {
            "name": name,
            "socket": str(folder / f"{name}.sock"),
            "tcp": "127.0.0.1:0",
            "http": "none",
            "capacity": "8MiB",
            "unit": "256KiB",
        }
        config = NodeConfig(**{**plain, **settings})  # type: ignore[arg-type]
        self.embedded = EmbeddedNode(config)
        stack.callback(self.close)
        self.node = self.embedded.node
        self._stack = stack.enter_context(ExitStack())
        self.channel = self.connect()
        self.namespace = opened(self.channel)
        self._is_closed = False

    def connect(self) -> BlockingChannel:
        return self._stack.enter_context(connected(self.node.address))

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._stack.close()
            self.embedded.close()

    def lease(self, blocks: list[bytes], wait_ms: int = 5_000, **more: object) -> wire.Leased:
        request = wire.TakeLease(self.namespace, b"".join(blocks), wait_ms=wait_ms, **more)  # type: ignore[arg-type]
        reply = self.channel.call(request, deadline())
        assert isinstance(reply, wire.Leased)
        return reply

    def load(self, blocks: list[bytes], wait_ms: int = 5_000, **more: object) -> int:
        """Lease, read, compare, release: how many were there."""
        leased = self.lease(blocks, wait_ms, **more)
        if leased.count:
            memory = [memoryview(bytearray(SIZE)) for _ in range(leased.count)]
            self.channel.call(wire.Read(leased.lease, 0, leased.count), deadline(), into=memory)
            self.channel.call(wire.Release(leased.lease), deadline())
            assert [bytes(view) for view in memory] == [content(block) for block in blocks[: leased.count]]
        return leased.count

    def stats(self) -> dict[str, float]:
        return stats(self.channel)

    def troubles(self) -> list[str]:
        reply = self.channel.call(wire.Stats(), deadline())
        assert isinstance(reply, wire.StatsReply)
        return reply.troubles

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Ask again and again: each question lets the loops go on."""
        for _ in range(TRIES):
            if condition():
                return
            self.stats()
        raise AssertionError(f"never: {what}")

    def until_known(self, blocks: int) -> None:
        """The index knows so many blocks of the peers."""
        self.until(lambda: self.stats().get("peer_known_blocks", 0) == blocks, f"{blocks} blocks are known")


Start = Callable[..., Here]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(name: str, *peers: Here, **settings: object) -> Here:
            addresses = ",".join(peer.node.tcp_address for peer in peers) or "none"
            return Here(tmp_path, name, stack, peers=addresses, **settings)

        yield begin


def test_what_a_peer_holds_is_had_here(start: Start) -> None:
    a = start("a")
    save(a.channel, a.namespace, HASHES[:8])
    b = start("b", a)
    b.until_known(8)
    assert b.load(HASHES[:10]) == 8
    told = b.stats()
    assert told["peer_fetched_blocks"] == 8
    assert told["peer_fetched_bytes"] == 8 * SIZE
    assert held(b.channel, b.namespace, HASHES[:8]) == 8
