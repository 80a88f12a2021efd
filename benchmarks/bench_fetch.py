"""How fast a node brings blocks from its peer, verified and published, against the bare transport beneath it.

    fetch   a client asks its node for a prompt that only the peer holds, and waits: lease, export, transfer,
            sums of what arrived, checksums, commit; the clock ends with its own lease
    bare    this process reads as many blocks from the same peer over the same transport, with one ticket and
            into memory that it has touched before; nothing is verified and nothing decided

    python benchmarks/bench_fetch.py [--json] [--quick]

Two nodes, this process: three processes. On paper: the bytes go once over the loopback and are read once
more to sum them, at 10 GB/s and more in a thread of its own. So ``fetch`` is nearly as fast as ``bare`` where
a third core is free; where none is, the sums and what is decided (0.5 ms of interpreter on either side a
group of 8 MiB) take their time from the transfer: half as fast.
"""

from __future__ import annotations

import asyncio
import mmap
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import harness
from harness import MIB, Figure

from kvcache import wire
from kvcache.block import BlockSpec
from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.namespace import Namespace, shape_of
from kvcache.sums import sum_chunks
from kvcache.testing.processes import NodeProcess
from kvcache.transport.base import Endpoint, Ticket
from kvcache.transport.table import open_transport

SPEC = BlockSpec(block_tokens=16, plane_count=32, head_count=2, head_bytes=32 * 1024)
SPACE = Namespace(
    model="bench", weights="w", dtype="bf16", layout="canonical", shape=shape_of(SPEC), block_tokens=16
)
COUNTS = (1, 8, 64)
ROUNDS, ROUNDS_QUICK = 15, 4
HEARD_S = 0.05
"""After so long the peer's events have come: what it holds is known."""
CLOCK = SystemClock()
GB = 1e9


def soon() -> int:
    return CLOCK.now_ns() + 30 * NS_PER_S


class Client:
    """A connection to one of the nodes."""

    def __init__(self, channel: AsyncChannel, namespace: bytes) -> None:
        self.channel = channel
        self.namespace = namespace

    @classmethod
    async def connect(cls, address: str) -> Client:
        channel = await AsyncChannel.connect(address, wire.Hello(wire.PROTOCOL_VERSION), soon())
        request = wire.Open(SPACE.to_map(), SPEC.plane_count, SPEC.head_count, SPEC.head_bytes)
        opened = await channel.call(request, soon())
        assert isinstance(opened, wire.Opened)
        return cls(channel, opened.namespace)

    async def save(self, hashes: Sequence[bytes], block: memoryview, sums: bytes) -> None:
        request = wire.Reserve(self.namespace, b"", b"".join(hashes))
        reserved = await self.channel.call(request, soon())
        assert isinstance(reserved, wire.Reserved) and reserved.count == len(hashes), reserved
        write = wire.Write(reserved.reservation, 0, reserved.count)
        await self.channel.call(write, soon(), [block] * reserved.count)
        await self.channel.call(wire.Commit(reserved.reservation, sums * reserved.count), soon())

    async def lease(self, hashes: Sequence[bytes]) -> wire.Leased:
        request = wire.TakeLease(self.namespace, b"".join(hashes), wait_ms=10_000)
        leased = await self.channel.call(request, soon())
        assert isinstance(leased, wire.Leased) and leased.count == len(hashes), leased
        return leased

    async def release(self, leased: wire.Leased) -> None:
        await self.channel.call(wire.Release(leased.lease), soon())

    async def knows_its_peer(self) -> None:
        while True:
            reply = await self.channel.call(wire.Stats(), soon())
            if isinstance(reply, wire.StatsReply) and reply.values.get("peers:ok"):
                return
            await asyncio.sleep(0.01)


async def fetch(reader: Client, hashes: Sequence[bytes]) -> float:
    began = time.perf_counter()
    leased = await reader.lease(hashes)
    taken = time.perf_counter() - began
    await reader.release(leased)
    return taken


async def bare(owner: Client, endpoint: Endpoint, hashes: Sequence[bytes], into: memoryview) -> float:
    leased = await owner.lease(hashes)
    exported = await owner.channel.call(wire.Export(leased.lease, 0, leased.count, "tcp"), soon())
    assert isinstance(exported, wire.Exported)
    size = SPEC.block_bytes
    views = [into[at * size : (at + 1) * size] for at in range(leased.count)]
    began = time.perf_counter()
    await endpoint.read(Ticket(exported.ticket), views, soon())
    taken = time.perf_counter() - began
    await owner.release(leased)
    return taken


async def measure(owner: Client, reader: Client, rounds: int) -> list[Figure]:
    block = memoryview(secrets.token_bytes(SPEC.block_bytes))
    sums = sum_chunks([block], SPEC.chunk_bytes)
    into = memoryview(
        mmap.mmap(-1, max(COUNTS) * SPEC.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    )
    into[:] = bytes(len(into))
    transport = open_transport("tcp")
    endpoint = await transport.connect(owner.channel.welcome.data[0], soon(), lambda *_: None)
    figures: list[Figure] = []
    for count in COUNTS:
        fetched: list[float] = []
        plain: list[float] = []
        for _ in range(rounds):
            hashes = [secrets.token_bytes(16) for _ in range(count)]
            await owner.save(hashes, block, sums)
            await asyncio.sleep(HEARD_S)
            plain.append(await bare(owner, endpoint, hashes, into))
            fetched.append(await fetch(reader, hashes))
        figures.append(figure(count, fetched, plain))
    await transport.close()
    return figures


def figure(count: int, fetched: Sequence[float], plain: Sequence[float]) -> Figure:
    size = count * SPEC.block_bytes
    ratio = median(theirs / ours for ours, theirs in zip(fetched, plain, strict=True))
    speed = median(size / taken for taken in fetched) / GB
    name = f"fetch.{count}x{SPEC.block_bytes // MIB}MiB"
    against = f"the bare transport, {median(size / taken for taken in plain) / GB:.2f} GB/s"
    return Figure(name, round(speed, 3), "GB/s", round(ratio, 3), against, len(fetched), harness.machine())


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.options(__doc__ or "", arguments)
    with tempfile.TemporaryDirectory() as folder:
        plain = {"capacity": "1GiB", "http": "none", "tcp": "127.0.0.1:0"}
        owner = {**plain, "name": "owner", "socket": str(Path(folder) / "owner.sock")}
        reader = {**plain, "name": "reader", "socket": str(Path(folder) / "reader.sock")}
        with NodeProcess(owner) as one, NodeProcess({**reader, "peers": one.tcp}) as other:
            asyncio.run(_run(one.socket, other.socket, options))


async def _run(owner_address: str, reader_address: str, options: harness.Options) -> None:
    owner, reader = await Client.connect(owner_address), await Client.connect(reader_address)
    await reader.knows_its_peer()
    harness.report(await measure(owner, reader, options.rounds(ROUNDS, ROUNDS_QUICK)), options)
    owner.channel.close()
    reader.channel.close()


if __name__ == "__main__":
    main(sys.argv[1:])
