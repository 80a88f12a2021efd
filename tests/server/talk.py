"""What the tests of a node say to it: one function a message, over a real connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvcache import wire
from kvcache.block import BlockSpec
from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.errors import BadInput, NotAllowed
from kvcache.namespace import Namespace
from kvcache.sums import sum_chunks

SPEC = BlockSpec(block_tokens=16, plane_count=4, head_count=2, head_bytes=4096)
SIZE = SPEC.block_bytes
HASHES = [bytes([number]) * 16 for number in range(1, 65)]


def example(**fields: str | int) -> Namespace:
    plain = {"model": "m", "weights": "w", "dtype": "float32", "layout": "canonical", "shape": "4x2x4096"}
    return Namespace(**{**plain, "block_tokens": SPEC.block_tokens, **fields})  # type: ignore[arg-type]


def deadline() -> int:
    """A busy machine meets it."""
    return SystemClock().now_ns() + 30 * NS_PER_S


@contextmanager
def connected(address: str, token: str = "", **hello: bool) -> Iterator[BlockingChannel]:
    greeting = wire.Hello(wire.PROTOCOL_VERSION, token=token, **hello)
    channel = BlockingChannel.connect(address, greeting, deadline())
    try:
        yield channel
    finally:
        channel.close()


def opened(channel: BlockingChannel, **fields: str | int) -> bytes:
    namespace = example(**fields)
    request = wire.Open(namespace.to_map(), SPEC.plane_count, SPEC.head_count, SPEC.head_bytes)
    reply = channel.call(request, deadline())
    assert isinstance(reply, wire.Opened)
    assert reply.block_bytes == SIZE
    return reply.namespace


def reserve(
    channel: BlockingChannel, namespace: bytes, blocks: list[bytes], parent: bytes = b""
) -> wire.Reserved:
    reply = channel.call(wire.Reserve(namespace, parent, b"".join(blocks)), deadline())
    assert isinstance(reply, wire.Reserved)
    return reply


def content(block: bytes) -> bytes:
    return block * (SIZE // len(block))


def sums_of(*blocks: bytes) -> bytes:
    return sum_chunks([content(block) for block in blocks], SPEC.chunk_bytes)


def save(channel: BlockingChannel, namespace: bytes, blocks: list[bytes], parent: bytes = b"") -> int:
    reserved = reserve(channel, namespace, blocks, parent)
    mine = blocks[reserved.start : reserved.start + reserved.count]
    payload = [memoryview(content(block)) for block in mine]
    channel.call(wire.Write(reserved.reservation, 0, len(mine)), deadline(), payload)
    reply = channel.call(wire.Commit(reserved.reservation, sums_of(*mine)), deadline())
    assert isinstance(reply, wire.Committed)
    return reply.count


def held(channel: BlockingChannel, namespace: bytes, blocks: list[bytes]) -> int:
    reply = channel.call(wire.Match(namespace, b"".join(blocks)), deadline())
    assert isinstance(reply, wire.Matched)
    return reply.count


def lease(channel: BlockingChannel, namespace: bytes, blocks: list[bytes], request: str = "") -> wire.Leased:
    reply = channel.call(wire.TakeLease(namespace, b"".join(blocks), request), deadline())
    assert isinstance(reply, wire.Leased)
    return reply


def stats(channel: BlockingChannel) -> dict[str, float]:
    reply = channel.call(wire.Stats(), deadline())
    assert isinstance(reply, wire.StatsReply)
    return reply.values


def refused(
    code: str, channel: BlockingChannel, request: wire.Request, payload: list[memoryview] | None = None
) -> str:
    with pytest.raises((BadInput, NotAllowed)) as caught:
        channel.call(request, deadline(), payload or [])
    assert caught.value.code == code
    assert caught.value.what
    return str(caught.value)
