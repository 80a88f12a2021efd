"""Clients that take more than their due, leave at the worst moment, or ask what makes no sense."""

from __future__ import annotations

import os
import resource
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.server.listening import tune
from kvcache.server.node import Node
from kvcache.tiers.host import HostTier
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.talk import (
    HASHES,
    SIZE,
    connected,
    deadline,
    example,
    held,
    lease,
    opened,
    refused,
    reserve,
    save,
    stats,
)

CAPACITY_BLOCKS = 8 * (1 << 20) // SIZE
NAMES = [bytes([number % 251, number // 251, 255, 255]) * 4 for number in range(1, CAPACITY_BLOCKS + 1)]
TOKENS = {"all": "t" * 16, "reader": "r" * 16, "router": "o" * 16, "other": "u" * 16}

CREDENTIALS = f"""
master_key = "{"0f" * 32}"
credential = [
  {{ token = "{TOKENS["all"]}", tenant = "a", roles = ["reader", "writer", "router", "operator"] }},
  {{ token = "{TOKENS["reader"]}", tenant = "a", roles = ["reader"] }},
  {{ token = "{TOKENS["router"]}", tenant = "a", roles = ["router"] }},
  {{ token = "{TOKENS["other"]}", tenant = "b", roles = ["reader", "writer"] }},
]
"""


@pytest.fixture
def node(serve: Serve) -> EmbeddedNode:
    return serve()


@pytest.fixture
def guarded(serve: Serve, tmp_path: Path) -> EmbeddedNode:
    """A node with a credentials file."""
    path = tmp_path / "credentials.toml"
    path.touch(0o600)
    path.write_text(CREDENTIALS)
    return serve(credentials=str(path))


@contextmanager
def greeted(node: EmbeddedNode, client: str, *, writes_ended: bool = False) -> Iterator[BlockingChannel]:
    hello = wire.Hello(wire.PROTOCOL_VERSION, map=True, client=client, writes_ended=writes_ended)
    channel = BlockingChannel.connect(node.node.address, hello, deadline())
    try:
        yield channel
    finally:
        channel.close()


def process_descriptors() -> int:
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += "pidfd" in str(entry.readlink())
        except FileNotFoundError:  # The one that lists them.
            continue
    return found


def eventually(holds: Callable[[], bool], what: str) -> None:
    end_ns = SystemClock().now_ns() + 20 * NS_PER_S
    while not holds():
        assert SystemClock().now_ns() < end_ns, what


class TestWhoMaps:
    def test_a_thousand_visits_leave_nothing_behind(self, node: EmbeddedNode) -> None:
        before = process_descriptors()
        for _ in range(20):
            with connected(node.node.address, map=True) as channel:
                stats(channel)
        eventually(lambda: process_descriptors() == before, "a descriptor a visit stays open")

    def test_many_connections_of_a_process_cost_one_descriptor(self, node: EmbeddedNode) -> None:
        before = process_descriptors()
        with ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(connected(node.node.address, map=True))
            assert process_descriptors() == before + 1

    def test_one_store_does_not_speak_for_another_of_its_process(self, node: EmbeddedNode) -> None:
        with greeted(node, "first") as first:
            reserve(first, opened(first), NAMES)
        with greeted(node, "second", writes_ended=True) as second:
            assert reserve(second, opened(second), HASHES[:1]).reason == "full"
            assert stats(second)["limbo_blocks"] == CAPACITY_BLOCKS
        with greeted(node, "first", writes_ended=True) as again:
            assert save(again, opened(again), HASHES[:1]) == 1

    def test_a_word_that_comes_before_the_end_of_the_connection_counts(self, node: EmbeddedNode) -> None:
        """The node may see the new connection of a store before the end of its old one."""
        with greeted(node, "store") as before:
            reserve(before, opened(before), NAMES)
            with greeted(node, "store", writes_ended=True) as after:
                assert reserve(after, opened(after), HASHES[:1]).reason == "full"
                before.close()
                eventually(lambda: stats(after)["reservations"] == 0, "the old connection does not end")
                assert stats(after)["limbo_blocks"] == 0

    @pytest.mark.parametrize("role", ["reader", "router"])
    def test_who_may_not_write_all_of_it_gets_no_map(self, guarded: EmbeddedNode, role: str) -> None:
        with connected(guarded.node.address, TOKENS[role], map=True) as channel:
            assert channel.slab_fd is None
            assert channel.welcome.slab_bytes == 0
        with connected(guarded.node.address, TOKENS["all"], map=True) as channel:
            assert channel.slab_fd is not None

    def test_memory_that_is_refused_harms_nobody_else(
        self, guarded: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = process_descriptors()

        def refuse(name: str, flags: int) -> int:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(os, "memfd_create", refuse)
            with pytest.raises(BadInput, match="Too many open files"):
                connected(guarded.node.address, TOKENS["other"], map=True).__enter__()
        eventually(lambda: process_descriptors() == before, "the refused one's descriptor stays open")
        with connected(guarded.node.address, TOKENS["other"], map=True) as channel:
            assert save(channel, opened(channel), HASHES[:2]) == 2


class TestConnecting:
    def silent(self, node: EmbeddedNode) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        connection.connect(node.node.socket_path)
        return connection

    def test_who_says_nothing_counts_as_a_connection(self, serve: Serve) -> None:
        node = serve(connections_max=2, handshake_ms=60_000)
        with self.silent(node), self.silent(node), self.silent(node) as third:
            assert third.recv(1) == b""

    def test_without_descriptors_it_waits_and_goes_on(self, node: EmbeddedNode) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with ExitStack() as stack:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.settimeout(20)
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            taken = ExitStack()
            stack.enter_context(taken)
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            waiting.connect(node.node.socket_path)
            counters = node.node.core.counters
            eventually(lambda: counters["refusals:unavailable"] > 0, "it does not notice")
            taken.close()
            waiting.sendall(wire.encode(1, wire.Hello(wire.PROTOCOL_VERSION)))
            assert waiting.recv(2) == wire.MAGIC

    def test_a_host_that_vanished_is_noticed(self) -> None:
        with socket.socket() as connection:
            tune(connection)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle_s = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            period_s = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            probes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
            assert idle_s + period_s * probes <= 60


class TestAsking:
    def test_a_block_named_twice_is_unpinned_once(self, node: EmbeddedNode) -> None:
        with connected(node.node.address) as channel:
            namespace = opened(channel)
            save(channel, namespace, HASHES[:1])
            assert channel.call(wire.Pin(namespace, HASHES[0]), deadline()) == wire.Matched(1)
            assert channel.call(wire.Unpin(namespace, HASHES[0] * 2), deadline()) == wire.Matched(1)
            assert held(channel, namespace, HASHES) == 1

    def test_a_verdict_is_never_too_long_to_be_read(self, node: EmbeddedNode) -> None:
        fields = ("weights", "dtype", "layout", "codec", "rope", "scales", "isa", "adapter")
        with connected(node.node.address) as channel:
            opened(channel, **dict.fromkeys(fields, "\U0001f980" * 500))
            namespace = example(**dict.fromkeys(fields, "\U0001f991" * 500))
            request = wire.Open(namespace.to_map(), 4, 2, 4096)
            reply = channel.call(request, deadline())
            assert isinstance(reply, wire.Opened)
            assert "weights" in reply.verdict

    def test_a_second_watch(self, node: EmbeddedNode) -> None:
        with connected(node.node.address) as channel:
            channel.call(wire.Watch(), deadline())
            refused("bad_message", channel, wire.Watch())

    def test_leases_that_end_by_themselves(self, node: EmbeddedNode) -> None:
        with connected(node.node.address) as channel:
            namespace = opened(channel)
            save(channel, namespace, HASHES[:1])
            leased = lease(channel, namespace, HASHES[:1])
            end_ns = SystemClock().now_ns() + 3600 * NS_PER_S
            node.call(lambda: node.node.core.ledger.expire(end_ns))
            refused("bad_lease", channel, wire.Read(leased.lease, 0, 1))
            assert channel.call(wire.Release(leased.lease), deadline()) == wire.Released(False)


class TestStarting:
    def test_a_file_in_the_sockets_place_is_left_alone(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "precious.db"
        path.write_text("data")
        with pytest.raises(BadInput, match="no socket"):
            serve(socket=str(path))
        assert path.read_text() == "data"

    def test_a_place_that_cannot_be_used_is_said(self, serve: Serve, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(BadInput, match="--socket"):
            serve(socket=str(tmp_path / "file" / "node.sock"))

    def test_the_sockets_mode_does_not_hang_on_the_umask(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = os.umask(0)
        monkeypatch.setattr(os, "umask", None)  # It is the whole process's, other threads' files too.
        try:
            path = Path(serve().node.socket_path)
        finally:
            monkeypatch.undo()
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_it_says_that_it_takes_memory(self, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "kvcache.server")
        serve(capacity="4MiB")
        assert "4MiB" in caplog.messages[0]
        assert "memory" in caplog.messages[0]

    def test_taking_memory_ends_when_the_tier_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvcache.tiers.host._POPULATE_STEP_BYTES", 4096)
        tier = HostTier(64 << 10, 4096)
        arena = tier.add_arena("a")
        steps: list[int] = []

        class Interrupted:
            def madvise(self, address: int, length: int, advice: int) -> int:
                steps.append(length)
                tier.close()
                return 0

        monkeypatch.setattr("kvcache.tiers.host._libc", Interrupted())
        tier.populate(arena)
        assert steps == [4096]

    def test_huge_pages_need_units_of_whole_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvcache.server.sizing.huge_pages_free_bytes", lambda: 1 << 30)
        with pytest.raises(BadInput, match="whole pages"):
            Node(NodeConfig(capacity="64MiB", unit="256KiB", huge_pages="on", http="none"))
        assert not Node(NodeConfig(capacity="64MiB", unit="256KiB", http="none")).core.host.huge_pages
