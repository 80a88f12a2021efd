"""An engine at its node: it maps the memory for blocks, writes plane after plane into it, and tells."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from kvcache import wire
from kvcache.block import BlockSpec
from kvcache.channel import AsyncChannel
from kvcache.errors import KVCacheError
from kvcache.namespace import shape_of
from kvcache.sums import sum_chunks
from tests.server.peer import different
from tests.server.talk import SPEC, deadline, example


class Writer:
    """One reservation at a time. ``made`` are the bytes of the blocks that it reserved."""

    def __init__(self, channel: AsyncChannel) -> None:
        assert channel.slab_fd is not None
        self.channel = channel
        self.spec: BlockSpec = SPEC
        self.namespace = b""
        self.reserved = wire.Reserved(0, 0, 0, [], [])
        self.made: list[bytes] = []
        self._slab = mmap.mmap(channel.slab_fd, channel.welcome.slab_bytes)
        self._planes = 0

    @classmethod
    async def at(cls, address: str, spec: BlockSpec = SPEC) -> Writer:
        hello = wire.Hello(wire.PROTOCOL_VERSION, map=True, client="writer")
        writer = cls(await AsyncChannel.connect(address, hello, deadline()))
        writer.spec = spec
        fields = example(shape=shape_of(spec)).to_map()
        reply = await writer.ask(wire.Open(fields, spec.plane_count, spec.head_count, spec.head_bytes))
        assert isinstance(reply, wire.Opened)
        writer.namespace = reply.namespace
        return writer

    async def ask(self, request: wire.Request) -> wire.Reply:
        return await self.channel.call(request, deadline())

    async def reserve(self, blocks: Sequence[bytes], parent: bytes = b"", push: str = "") -> wire.Reserved:
        reply = await self.ask(wire.Reserve(self.namespace, parent, b"".join(blocks), push=push))
        assert isinstance(reply, wire.Reserved)
        self.reserved = reply
        mine = blocks[reply.start : reply.start + reply.count]
        self.made = [different(block, self.spec) for block in mine]
        self._planes = 0
        return reply

    def write(self, planes: int, data: Sequence[bytes] = ()) -> None:
        """So many more planes of every block, into the mapped memory."""
        start = self._planes * self.spec.plane_bytes
        end = start + planes * self.spec.plane_bytes
        for offset, block in zip(self.reserved.offsets, data or self.made, strict=True):
            self._slab[offset + start : offset + end] = block[start:end]

    async def advance(self, planes: int = 1, sums: bytes | None = None) -> None:
        """Write so many more planes, and tell."""
        self.write(planes)
        first, end = self._planes, self._planes + planes
        told = self.sums(first, end) if sums is None else sums
        self._planes = end
        assert await self.ask(wire.Advance(self.reserved.reservation, end, told)) == wire.Done()

    def sums(self, first: int, end: int) -> bytes:
        """Of these planes, block after block."""
        start, stop = first * self.spec.plane_bytes, end * self.spec.plane_bytes
        return sum_chunks([block[start:stop] for block in self.made], self.spec.chunk_bytes)

    async def commit(self, *, flipped: bool = False) -> int:
        """Write what is missing (``flipped``: and turn a bit of it), and publish."""
        self.write(self.spec.plane_count - self._planes)
        if flipped:
            self._slab[self.reserved.offsets[-1]] ^= 1
        reply = await self.ask(wire.Commit(self.reserved.reservation, self.sums(0, self.spec.plane_count)))
        assert isinstance(reply, wire.Committed)
        return reply.count

    async def abort(self) -> None:
        assert await self.ask(wire.Abort(self.reserved.reservation)) == wire.Done()

    async def refused(self, request: wire.Request) -> KVCacheError:
        try:
            await self.ask(request)
        except KVCacheError as error:
            return error
        raise AssertionError("it was not refused")

    def close(self) -> None:
        """The connection is cut; the process lives, so what it had reserved may still be written to."""
        self.channel.close()
        self._slab.close()
