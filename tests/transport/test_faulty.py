"""Over a transport that lies, whoever verifies has no wrong byte: 10,000 transfers, each checked twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from kvcache.block import StorageKey
from kvcache.sums import block_checksum, sum_chunks
from kvcache.testing.faulty import FaultyEndpoint, FaultyTransport
from kvcache.testing.transport_pair import Pair, soon
from kvcache.transport.base import Transport
from kvcache.transport.inproc import Hub, InprocTransport
from kvcache.transport.tcp import DEFAULT_ADDRESS, TcpTransport

CHUNK_BYTES = 64
TRANSFERS = 10_000


@dataclass(frozen=True, slots=True)
class Block:
    key: StorageKey
    data: bytes
    checksum: bytes


def block_of(draw: random.Random) -> Block:
    """Small, and often much like another: a fault that brings the wrong one is not seen at a glance."""
    key = StorageKey(draw.randbytes(32))
    size = CHUNK_BYTES * draw.randrange(1, 5)
    data = draw.randbytes(4) * (size // 4)
    return Block(key, data, checksum(key, data))


def checksum(key: StorageKey, data: bytes | memoryview) -> bytes:
    return block_checksum(key, len(data), CHUNK_BYTES, sum_chunks([data], CHUNK_BYTES))


class Verdict:
    def __init__(self) -> None:
        self.right = self.refused = self.wrong = self.damaged = 0

    def judge(self, blocks: Sequence[Block], into: Sequence[memoryview]) -> None:
        for block, view in zip(blocks, into, strict=True):
            is_right = view == block.data
            self.damaged += not is_right
            if checksum(block.key, view) != block.checksum:
                self.refused += 1
            elif is_right:
                self.right += 1
            else:
                self.wrong += 1


async def transfer(pair: Pair, blocks: Sequence[Block], is_read: bool, verdict: Verdict) -> None:
    sources = [memoryview(block.data) for block in blocks]
    into = [memoryview(bytearray(len(block.data))) for block in blocks]
    if is_read:
        ticket = pair.far.export(sources, soon())
        await pair.near_end.read(ticket, into, soon())
    else:
        ticket = pair.far.post(into, soon(), lambda: None)
        await pair.near_end.write(ticket, sources, soon())
    verdict.judge(blocks, into)
    await pair.far.withdraw(ticket)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["inproc", "tcp"])
def test_no_wrong_byte_is_believed(scheme: str) -> None:
    hub = Hub()

    def make() -> Transport:
        return InprocTransport(hub) if scheme == "inproc" else TcpTransport()

    async def main() -> tuple[Verdict, dict[str, int]]:
        pair, verdict, draw = Pair(FaultyTransport(make(), 1), make()), Verdict(), random.Random(2)
        await pair.join("inproc://far" if scheme == "inproc" else DEFAULT_ADDRESS)
        try:
            for _ in range(TRANSFERS // 100):
                crowd = [[block_of(draw) for _ in range(draw.randrange(1, 4))] for _ in range(100)]
                await asyncio.gather(
                    *(transfer(pair, blocks, draw.random() < 0.5, verdict) for blocks in crowd)
                )
            end = pair.near_end
            assert isinstance(end, FaultyEndpoint)
            return verdict, {fault.name: count for fault, count in end.faults.items()}
        finally:
            await pair.close()

    verdict, faults = asyncio.run(main())
    assert min(faults.values()) > TRANSFERS // 20, faults
    assert verdict.wrong == 0
    assert verdict.refused == verdict.damaged > TRANSFERS // 5
    assert verdict.right > TRANSFERS // 2
