"""A node as its clients see it: what it grants, what it refuses, and what it forgets of whom."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.channel import BlockingChannel
from kvcache.errors import BadInput, KVCacheError, NotAllowed, Unavailable
from kvcache.metrics import unknown_names
from kvcache.metrics_stats import STATS
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.talk import (
    HASHES,
    SIZE,
    SPEC,
    connected,
    content,
    deadline,
    example,
    held,
    lease,
    opened,
    refused,
    reserve,
    save,
    stats,
    sums_of,
)


@pytest.fixture
def node(serve: Serve) -> EmbeddedNode:
    return serve(tcp="127.0.0.1:0")


@pytest.fixture
def wired(node: EmbeddedNode) -> Iterator[BlockingChannel]:
    """A connection without a map."""
    with connected(node.node.address) as channel:
        yield channel


@pytest.fixture
def mapped(node: EmbeddedNode) -> Iterator[BlockingChannel]:
    with connected(node.node.address, map=True) as channel:
        yield channel


class TestBytesOverTheSocket:
    def test_what_was_saved_is_read_back(self, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        assert save(wired, namespace, HASHES[:8]) == 8
        assert held(wired, namespace, HASHES[:10]) == 8
        leased = lease(wired, namespace, HASHES[:10])
        assert leased.count == 8
        assert leased.offsets == []
        into = bytearray(8 * SIZE)
        wired.call(wire.Read(leased.lease, 0, 8), deadline(), into=[memoryview(into)])
        assert into == b"".join(map(content, HASHES[:8]))
        assert wired.call(wire.Release(leased.lease), deadline()) == wire.Released(True)

    def test_over_tcp_too(self, node: EmbeddedNode) -> None:
        with connected(node.node.tcp_address) as channel:
            namespace = opened(channel)
            assert save(channel, namespace, HASHES[:3]) == 3
        with connected(node.node.tcp_address) as channel:
            assert held(channel, opened(channel), HASHES) == 3

    def test_a_child_needs_its_parent(self, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        request = wire.Reserve(namespace, HASHES[0], HASHES[1])
        assert "parent" in refused("bad_prefix", wired, request)
        save(wired, namespace, HASHES[:1])
        assert save(wired, namespace, HASHES[1:3], HASHES[0]) == 2
        assert held(wired, namespace, HASHES) == 3

    def test_commit_before_every_block_was_written(self, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        reserved = reserve(wired, namespace, HASHES[:2])
        wired.call(wire.Write(reserved.reservation, 0, 1), deadline(), [memoryview(content(HASHES[0]))])
        refused("bad_reservation", wired, wire.Commit(reserved.reservation, sums_of(*HASHES[:2])))
        assert held(wired, namespace, HASHES) == 0
        wired.call(wire.Write(reserved.reservation, 1, 1), deadline(), [memoryview(content(HASHES[1]))])
        wired.call(wire.Commit(reserved.reservation, sums_of(*HASHES[:2])), deadline())
        assert held(wired, namespace, HASHES) == 2

    def test_bytes_that_changed_on_the_way_are_not_published(self, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        reserved = reserve(wired, namespace, HASHES[:1])
        wrong = bytearray(content(HASHES[0]))
        wrong[SIZE // 2] ^= 1
        wired.call(wire.Write(reserved.reservation, 0, 1), deadline(), [memoryview(wrong)])
        refused("bad_block", wired, wire.Commit(reserved.reservation, sums_of(HASHES[0])))
        assert held(wired, namespace, HASHES) == 0
        assert stats(wired)["rejected_blocks:transfer"] == 1

    def test_wrong_block_length(self, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        reserved = reserve(wired, namespace, HASHES[:2])
        for payload in (bytes(SIZE - 1), bytes(2 * SIZE), b"x"):
            request = wire.Write(reserved.reservation, 0, 1)
            assert str(SIZE) in refused("bad_block", wired, request, [memoryview(payload)])
        refused("bad_block", wired, wire.Write(reserved.reservation, 1, 2), [memoryview(bytes(2 * SIZE))])
        refused("bad_block", wired, wire.Commit(reserved.reservation, b"12345678"))
        wired.call(wire.Abort(reserved.reservation), deadline())
        assert save(wired, namespace, HASHES[:2]) == 2

    def test_the_end_of_a_reservation_is_final(self, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        reserved = reserve(wired, namespace, HASHES[:1])
        wired.call(wire.Write(reserved.reservation, 0, 1), deadline(), [memoryview(content(HASHES[0]))])
        commit = wire.Commit(reserved.reservation, sums_of(HASHES[0]))
        wired.call(commit, deadline())
        refused("bad_reservation", wired, commit)
        refused("bad_reservation", wired, wire.Abort(reserved.reservation))
        again = reserve(wired, namespace, HASHES[1:2], HASHES[0])
        wired.call(wire.Abort(again.reservation), deadline())
        refused("bad_reservation", wired, wire.Commit(again.reservation, sums_of(HASHES[1])))
        refused(
            "bad_reservation", wired, wire.Write(again.reservation, 0, 1), [memoryview(content(HASHES[1]))]
        )
        assert held(wired, namespace, HASHES) == 1

    def test_another_connections_lease_and_reservation(
        self, node: EmbeddedNode, wired: BlockingChannel
    ) -> None:
        namespace = opened(wired)
        save(wired, namespace, HASHES[:1])
        leased = lease(wired, namespace, HASHES[:1])
        reserved = reserve(wired, namespace, HASHES[1:2], HASHES[0])
        with connected(node.node.address) as other:
            refused("bad_lease", other, wire.Read(leased.lease, 0, 1))
            refused("bad_lease", other, wire.Release(leased.lease))
            refused("bad_reservation", other, wire.Commit(reserved.reservation, sums_of(HASHES[1])))
            refused("bad_reservation", other, wire.Abort(reserved.reservation))

    def test_a_shared_lease_is_counted_once(self, node: EmbeddedNode, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        save(wired, namespace, HASHES[:2])
        with connected(node.node.address) as worker:
            first = lease(wired, namespace, HASHES[:3], "request 1")
            assert lease(worker, opened(worker), HASHES[:3], "request 1").lease == first.lease
            assert lease(worker, opened(worker), HASHES[:3], "request 2").lease != first.lease
            numbers = stats(worker)
        assert numbers["leases_taken"] == 2
        assert numbers["lookup_tokens"] == 2 * 3 * SPEC.block_tokens
        assert numbers["hit_tokens"] == 2 * 2 * SPEC.block_tokens

    def test_a_read_outside_the_lease(self, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        save(wired, namespace, HASHES[:2])
        leased = lease(wired, namespace, HASHES[:2])
        for start, count in ((0, 3), (2, 1), (0, 0), (2, 0)):
            refused("bad_lease", wired, wire.Read(leased.lease, start, count))

    def test_a_request_with_a_payload_that_carries_none(self, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        refused("bad_message", wired, wire.Match(namespace, HASHES[0]), [memoryview(bytes(300_000))])
        assert held(wired, namespace, HASHES) == 0


class TestTheMap:
    def test_bytes_go_through_the_map_only(self, node: EmbeddedNode, mapped: BlockingChannel) -> None:
        namespace = opened(mapped)
        assert mapped.slab_fd is not None
        reserved = reserve(mapped, namespace, HASHES[:2])
        with mmap.mmap(mapped.slab_fd, mapped.welcome.slab_bytes) as slab:
            for offset, block in zip(reserved.offsets, HASHES, strict=False):
                slab[offset : offset + SIZE] = content(block)
        assert held(mapped, namespace, HASHES) == 0, "nothing is visible before commit"
        mapped.call(wire.Commit(reserved.reservation, sums_of(*HASHES[:2])), deadline())
        assert lease(mapped, namespace, HASHES).offsets == reserved.offsets
        with connected(node.node.address) as wired:
            leased = lease(wired, opened(wired), HASHES)
            into = bytearray(2 * SIZE)
            wired.call(wire.Read(leased.lease, 0, 2), deadline(), into=[memoryview(into)])
            assert into == content(HASHES[0]) + content(HASHES[1])

    def test_it_cannot_be_cut_short(self, mapped: BlockingChannel) -> None:
        assert mapped.slab_fd is not None
        with pytest.raises(PermissionError):
            os.ftruncate(mapped.slab_fd, 0)

    def test_a_failed_block_is_looked_at_and_quarantined(self, mapped: BlockingChannel) -> None:
        namespace = opened(mapped)
        assert save(mapped, namespace, HASHES[:4]) == 4
        leased = lease(mapped, namespace, HASHES[:4])
        assert mapped.slab_fd is not None
        with mmap.mmap(mapped.slab_fd, mapped.welcome.slab_bytes) as slab:
            slab[leased.offsets[2] + 77] ^= 0x10
        mapped.call(wire.Release(leased.lease, [1, 2]), deadline())
        assert held(mapped, namespace, HASHES) == 2
        numbers = stats(mapped)
        assert numbers["rejected_blocks:checksum"] == 1
        assert numbers["reader_disagreed_blocks"] == 1

    def test_slots_of_a_closed_connection_wait_for_its_process(self, node: EmbeddedNode) -> None:
        """This process lives, so only its own word frees what it may still be writing into."""
        blocks = 8 * (1 << 20) // SIZE
        names = [bytes([number % 251, number // 251, 255, 255]) * 4 for number in range(1, blocks + 1)]
        with connected(node.node.address, map=True) as first:
            namespace = opened(first)
            assert reserve(first, namespace, names).count == blocks
        with connected(node.node.address, map=True) as second:
            refused_room = reserve(second, opened(second), HASHES[:1])
            assert (refused_room.count, refused_room.reason) == (0, "full")
        with connected(node.node.address, map=True, writes_ended=True) as third:
            assert save(third, opened(third), HASHES[:1]) == 1

    def test_a_connection_without_a_map_frees_at_once(self, node: EmbeddedNode) -> None:
        with connected(node.node.address) as first:
            namespace = opened(first)
            reserve(first, namespace, HASHES)
            save(first, namespace, [b"k" * 16])
            lease(first, namespace, [b"k" * 16])
        with connected(node.node.address) as second:
            assert save(second, opened(second), HASHES) == len(HASHES)
            assert stats(second)["leases"] == 0


class TestNamespaces:
    def test_an_unknown_one(self, wired: BlockingChannel) -> None:
        for request in (
            wire.Match(b"x" * 16, HASHES[0]),
            wire.TakeLease(b"x" * 16, HASHES[0]),
            wire.Reserve(b"", b"", HASHES[0]),
            wire.Pin(b"x" * 16, HASHES[0]),
        ):
            assert "Open" in refused("unknown_namespace", wired, request)

    def test_different_fields_never_share_blocks(self, wired: BlockingChannel) -> None:
        here = opened(wired)
        save(wired, here, HASHES[:1])
        there = opened(wired, dtype="float16")
        assert here != there
        assert held(wired, there, HASHES[:1]) == 0

    def test_the_verdict_names_the_field(self, wired: BlockingChannel) -> None:
        opened(wired, dtype="float32")
        namespace = example(dtype="float16")
        request = wire.Open(namespace.to_map(), SPEC.plane_count, SPEC.head_count, SPEC.head_bytes)
        reply = wired.call(request, deadline())
        assert isinstance(reply, wire.Opened)
        assert "dtype" in reply.verdict
        assert "float32" in reply.verdict

    def test_expecting_another_one_is_refused_with_the_field(self, wired: BlockingChannel) -> None:
        first = opened(wired, dtype="float32")
        namespace = example(dtype="float16")
        request = wire.Open(
            namespace.to_map(), SPEC.plane_count, SPEC.head_count, SPEC.head_bytes, expect=first
        )
        assert "dtype" in refused("namespace_differs", wired, request)

    def test_a_malformed_prefix(self, wired: BlockingChannel) -> None:
        namespace = opened(wired)
        refused("bad_prefix", wired, wire.Match(namespace, b"short"))
        refused("bad_prefix", wired, wire.Reserve(namespace, b"short", HASHES[0]))
        refused("too_large", wired, wire.TakeLease(namespace, bytes(16 * (wire.BATCH_BLOCKS_MAX + 1))))

    def test_a_block_larger_than_the_tier(self, wired: BlockingChannel) -> None:
        namespace = example(shape="64x64x65536")
        assert "--capacity" in refused("too_small", wired, wire.Open(namespace.to_map(), 64, 64, 65_536))

    def test_a_shape_that_the_namespace_does_not_name(self, wired: BlockingChannel) -> None:
        text = refused("namespace_differs", wired, wire.Open(example().to_map(), 8, 1, 4096))
        assert "8x1x4096" in text
        assert "4x2x4096" in text

    def test_another_tenants_name_is_refused(self, wired: BlockingChannel) -> None:
        fields = {**example().to_map(), "tenant": "somebody-else"}
        refused("not_allowed", wired, wire.Open(fields, 4, 2, 4096))


class TestTheHandshake:
    def raw(self, node: EmbeddedNode, data: bytes) -> bytes:
        """Send bytes as they are; return everything that comes back until the node closes."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(node.node.socket_path)
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            with suppress(ConnectionResetError):  # It does not read to the end of garbage.
                while part := connection.recv(65_536):
                    received += part
            return received

    @pytest.mark.parametrize(
        "data",
        [
            b"GET / HTTP/1.1\r\n\r\n",
            b"",
            b"KV",
            wire.encode(1, wire.Hello(wire.PROTOCOL_VERSION))[:-1],
            wire.encode(1, wire.Stats()),
            wire.HEADER.pack(b"KV", 9, 0, 4, 0) + b"abcd",
            wire.HEADER.pack(b"KV", 1, 0, 2**31, 0),
            wire.HEADER.pack(b"KV", 1, 0, 3, 2**40) + b"abc",
        ],
    )
    def test_garbage_is_closed_and_harms_nobody(self, node: EmbeddedNode, data: bytes) -> None:
        self.raw(node, data)
        with connected(node.node.address) as channel:
            assert stats(channel)["capacity_bytes:host"] > 0

    @pytest.mark.parametrize(
        "data",
        [
            b"GET / HTTP/1.1\r\n\r\n",
            wire.encode(2, wire.Hello(wire.PROTOCOL_VERSION)),
            wire.HEADER.pack(b"KV", 1, 0, 5, 0) + b"\xff\xff\xff\xff\xff",
            wire.HEADER.pack(b"KV", 1, 0, wire.BODY_BYTES_MAX, 0) + b"\x92",
            wire.encode(2, wire.Commit(99, b""))[:20],
        ],
    )
    def test_garbage_after_hello(self, node: EmbeddedNode, data: bytes) -> None:
        self.raw(node, wire.encode(1, wire.Hello(wire.PROTOCOL_VERSION)) + data)
        with connected(node.node.address) as channel:
            assert stats(channel)["capacity_bytes:host"] > 0

    def test_another_protocol_version(self, node: EmbeddedNode) -> None:
        with pytest.raises(BadInput, match="version 7") as caught:
            BlockingChannel.connect(node.node.address, wire.Hello(7), deadline())
        assert caught.value.code == "bad_version"

    def test_an_unknown_token(self, node: EmbeddedNode) -> None:
        with pytest.raises(NotAllowed), connected(node.node.address, token="wrong"):
            pass

    def test_too_many_connections(self, serve: Serve) -> None:
        node = serve(connections_max=1)
        with connected(node.node.address) as first:
            stats(first)
            with pytest.raises(Unavailable), connected(node.node.address):
                pass


class TestStarting:
    def test_two_nodes_on_one_socket(self, node: EmbeddedNode, serve: Serve) -> None:
        with pytest.raises(BadInput, match="another node serves") as caught:
            serve(socket=node.node.socket_path)
        assert caught.value.code == "address_in_use"
        with connected(node.node.address) as channel:
            stats(channel)

    def test_the_socket_of_a_dead_node_is_taken_over(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "left.sock"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        with connected(serve(socket=str(path)).node.address) as channel:
            stats(channel)

    @pytest.mark.parametrize("setting", ["tcp", "http"])
    @pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1"])
    def test_a_wide_bind_without_a_token(self, serve: Serve, setting: str, host: str) -> None:
        with pytest.raises(BadInput, match="--credentials") as caught:
            serve(**{setting: f"{host}:0"})
        assert caught.value.code == "unsafe_bind"

    def test_more_memory_than_there_is(self, serve: Serve) -> None:
        with pytest.raises(BadInput, match="lower --capacity"):
            serve(capacity="100TiB")

    def test_only_the_owner_may_use_the_socket(self, node: EmbeddedNode) -> None:
        assert Path(node.node.socket_path).stat().st_mode & 0o077 == 0

    def test_an_unknown_policy(self, serve: Serve) -> None:
        with pytest.raises(KVCacheError, match="leaf-lru"):
            serve(policy="no-such-policy")


def test_the_node_counts_by_the_table_of_metrics_and_nothing_else(serve: Serve, tmp_path: Path) -> None:
    node = serve(nvme=f"{tmp_path / 'tier'}:16MiB", peers="tcp://127.0.0.1:1")
    with connected(node.node.address) as wired:
        opened(wired)
        with pytest.raises(BadInput):
            wired.call(wire.Release(12345), deadline())
    values = node.call(node.node.core.stats)
    assert unknown_names(values) == []
    assert values["requests:open"] == 1
    assert values["refusals:bad_lease"] == 1
    counted = {stat.name for stat in STATS if stat.kind == "gauge" and not stat.label}
    counted -= {name for name in counted if name.startswith("hbm_")}  # Those need torch: tests/device.
    assert counted <= set(values), "a gauge that nobody fills would always be 0"


def test_an_address_of_ipv6_is_told_as_others_write_it(serve: Serve) -> None:
    assert serve(tcp="[::1]:0").node.tcp_address.startswith("tcp://[::1]:")
