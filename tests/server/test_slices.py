"""What a node answers to a reader of parts: byte ranges of every plane, and the sums that vouch for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvcache import wire
from kvcache.channel import BlockingChannel
from kvcache.client import connect_blocking
from kvcache.slices import Slice
from kvcache.sums import SUM_BYTES, sum_chunks
from kvcache.testing.sharded import ShardedModel
from kvcache.testing.slices import prefix_of
from tests.server.conftest import Serve
from tests.server.talk import connected, deadline, lease, refused, stats

MODEL = ShardedModel(plane_count=3, head_count=6, head_bytes=16_384)  # Chunks of 3 heads, 2 a plane.
SPEC = MODEL.spec(1)
CHUNK = SPEC.chunk_bytes
COUNT = 4


class Reader:
    """A connection that holds a lease on ``COUNT`` blocks of the model."""

    def __init__(self, channel: BlockingChannel, lease_id: int) -> None:
        self.channel = channel
        self.lease = lease_id

    def read(self, start: int, count: int, offset: int = 0, length: int = 0) -> bytes:
        into = bytearray(COUNT * SPEC.block_bytes)
        request = wire.Read(self.lease, start, count, offset, length)
        before = stats(self.channel).get("read_bytes:socket", 0)
        assert self.channel.call(request, deadline(), into=[memoryview(into)]) == wire.Blocks(count)
        return bytes(into[: int(stats(self.channel)["read_bytes:socket"] - before)])

    def sums(self, start: int, count: int) -> bytes:
        reply = self.channel.call(wire.Sums(self.lease, start, count), deadline())
        assert isinstance(reply, wire.ChunkSums)
        return reply.sums


@pytest.fixture
def reader(serve: Serve) -> Iterator[Reader]:
    node = serve()
    store = connect_blocking(node.node.address, timeout_ms=20_000)
    handle = store.open(MODEL.namespace(1, 0), SPEC)
    prefix = prefix_of(handle, COUNT)
    assert store.save(handle, prefix, [[MODEL.block(at, 1, 0)] for at in range(COUNT)]) == COUNT
    store.close()
    with connected(node.node.address) as channel:
        yield Reader(channel, lease(channel, handle.namespace_id, list(prefix)).lease)


def test_a_range_of_every_plane(reader: Reader) -> None:
    for start, count, offset, length in ((0, 4, 0, CHUNK), (1, 2, CHUNK, CHUNK), (3, 1, CHUNK, 0)):
        cover = Slice(SPEC, 3 * offset // CHUNK, 3).cover
        expected = [
            bytes(piece)
            for at in range(start, start + count)
            for piece in cover.pieces(memoryview(MODEL.block(at, 1, 0)))
        ]
        assert reader.read(start, count, offset, length) == b"".join(expected)
    for offset, length in ((0, 0), (0, 2 * CHUNK)):
        assert reader.read(2, 1, offset, length) == MODEL.block(2, 1, 0)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (1, CHUNK),
        (0, 1),
        (0, CHUNK - 1),
        (CHUNK, 2 * CHUNK),
        (2 * CHUNK, 0),
        (3 * CHUNK, 0),
        (1 << 62, 1 << 62),
    ],
)
def test_a_range_that_is_no_chunks_is_refused(reader: Reader, offset: int, length: int) -> None:
    refused("bad_slice", reader.channel, wire.Read(reader.lease, 0, 1, offset, length))
    assert reader.read(0, 1, CHUNK, CHUNK)


def test_the_sums_of_all_chunks(reader: Reader) -> None:
    blocks = [MODEL.block(at, 1, 0) for at in range(COUNT)]
    assert reader.sums(0, COUNT) == sum_chunks(blocks, CHUNK)
    assert reader.sums(2, 1) == sum_chunks(blocks[2:3], CHUNK)


@pytest.mark.parametrize(("start", "count"), [(0, 0), (0, COUNT + 1), (COUNT, 1), (1 << 60, 1)])
def test_outside_the_lease(reader: Reader, start: int, count: int) -> None:
    refused("bad_lease", reader.channel, wire.Sums(reader.lease, start, count))
    refused("bad_lease", reader.channel, wire.Read(reader.lease, start, count, 0, CHUNK))
    refused("bad_lease", reader.channel, wire.Sums(reader.lease + 1, 0, 1))


def test_another_connections_lease(reader: Reader, serve: Serve) -> None:
    with connected(str(reader.channel.address)) as other:
        refused("bad_lease", other, wire.Sums(reader.lease, 0, 1))
        refused("bad_lease", other, wire.Read(reader.lease, 0, 1, 0, CHUNK))


def test_the_limits_of_one_answer(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    step = SPEC.chunk_count * SUM_BYTES
    with monkeypatch.context() as patch:
        patch.setattr(wire, "SUMS_BYTES_MAX", 2 * step)
        assert len(reader.sums(0, 2)) == 2 * step
        refused("too_large", reader.channel, wire.Sums(reader.lease, 0, 3))
        patch.setattr(wire, "SUMS_BYTES_MAX", 1)
        assert len(reader.sums(0, 1)) == step, "one block is always answered"
        patch.setattr(wire, "PIECES_MAX", 2 * SPEC.plane_count)
        assert reader.read(0, 2, 0, CHUNK)
        refused("bad_lease", reader.channel, wire.Read(reader.lease, 0, 3, 0, CHUNK))
        assert reader.read(0, 4), "a whole block is one piece"
