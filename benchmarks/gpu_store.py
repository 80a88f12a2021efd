"""What ``gpu_engine.py`` does with a node: blocks between its host memory and the client.

The only place here that needs the client (msgspec and msgpack), and the one to change when the client
serves blocks of the HBM tier itself: today the node knows host memory and NVMe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gpu_engine import Shape

    from kvcache.block import BlockSpec

BATCH_BYTES = 64 << 20
WAIT_MS = 60_000


class Node:
    """One connection. RAISES RuntimeError when fewer blocks are had than were asked for."""

    def __init__(self, socket: str, shape: Shape) -> None:
        from kvcache.client import connect_blocking

        self._shape = shape
        self._store = connect_blocking(socket, timeout_ms=WAIT_MS)

    def save(self, spec: BlockSpec, tokens: Sequence[int], blocks: Sequence[torch.Tensor]) -> None:
        """And wait until they are durable."""
        handle = self._handle(spec)
        names = handle.hashes(tokens)
        step = max(1, BATCH_BYTES // spec.block_bytes)
        for at in range(0, len(names), step):
            parent = names[at - 1] if at else b""
            some = names[at : at + step]
            held = self._store.save(handle, some, list(_pieces(blocks[at : at + step])), parent)
            if held < len(some):
                raise RuntimeError(f"{held} of {len(some)} blocks saved: {dict(self._store.counters)}")
        durable = self._store.persist(handle, names, WAIT_MS)
        if durable < len(names):
            raise RuntimeError(f"{durable} of {len(names)} blocks are durable")

    def load(self, spec: BlockSpec, tokens: Sequence[int], blocks: Sequence[torch.Tensor]) -> None:
        handle = self._handle(spec)
        names = handle.hashes(tokens)
        lease = self._store.lease(handle, names, wait_ms=WAIT_MS)
        try:
            if lease.count < len(names):
                raise RuntimeError(f"{lease.count} of {len(names)} blocks leased")
            if failed := self._store.load(lease, list(_pieces(blocks))):
                raise RuntimeError(f"{len(failed)} of {len(names)} blocks failed")
        finally:
            self._store.release(lease)

    def close(self) -> None:
        self._store.close()

    def _handle(self, spec: BlockSpec) -> Any:
        from kvcache.namespace import Namespace, shape_of

        names = Namespace(
            model="random",
            weights="seed 0",
            dtype=self._shape.dtype,
            layout="canonical",
            layer_count=self._shape.layers,
            block_tokens=spec.block_tokens,
            shape=shape_of(spec),
        )
        return self._store.open(names, spec)


def _pieces(blocks: Sequence[torch.Tensor]) -> Iterator[list[memoryview]]:
    for block in blocks:
        yield [memoryview(block.numpy())]
