"""What a faulty machine might do to a stored block: one byte of it changes, behind the node's back."""

from __future__ import annotations

import mmap
import time

from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S
from kvcache.wire import PROTOCOL_VERSION, Hello, Leased, Release, Stats, StatsReply, TakeLease

TIMEOUT_NS = 30 * NS_PER_S


def flip_byte_in_hbm(address: str, namespace: bytes, prefix: list[bytes], position: int, at: int) -> None:
    """The same of its copy in HBM, on the CPU. REQUIRES: HBM holds the blocks."""
    deadline_ns = time.monotonic_ns() + TIMEOUT_NS
    channel = BlockingChannel.connect(address, Hello(PROTOCOL_VERSION, map=True, hbm=True), deadline_ns)
    try:
        leased = channel.call(TakeLease(namespace, b"".join(prefix), hbm=True), deadline_ns)
        assert isinstance(leased, Leased) and leased.hbm.count > position
        assert channel.hbm_fd is not None
        with mmap.mmap(channel.hbm_fd, channel.welcome.hbm.size_bytes) as slab:
            slab[leased.hbm.offsets[position] + at] ^= 1
    finally:
        channel.close()


def flip_byte(address: str, namespace: bytes, prefix: list[bytes], position: int, at: int) -> None:
    """Byte ``at`` of block ``position`` of ``prefix``. REQUIRES: the blocks are held."""
    deadline_ns = time.monotonic_ns() + TIMEOUT_NS
    channel = BlockingChannel.connect(address, Hello(PROTOCOL_VERSION, map=True), deadline_ns)
    try:
        leased = channel.call(TakeLease(namespace, b"".join(prefix)), deadline_ns)
        assert isinstance(leased, Leased) and leased.count > position
        assert channel.slab_fd is not None
        with mmap.mmap(channel.slab_fd, channel.welcome.slab_bytes) as slab:
            slab[leased.offsets[position] + at] ^= 1
        channel.call(Release(leased.lease), deadline_ns)
    finally:
        channel.close()


def node_stats(address: str) -> dict[str, float]:
    """The node's own counters."""
    deadline_ns = time.monotonic_ns() + TIMEOUT_NS
    channel = BlockingChannel.connect(address, Hello(PROTOCOL_VERSION), deadline_ns)
    try:
        reply = channel.call(Stats(), deadline_ns)
        assert isinstance(reply, StatsReply)
        return reply.values
    finally:
        channel.close()
