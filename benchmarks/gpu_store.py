"""What ``gpu_engine.py`` does with a node: an engine's pages to and from HBM, host memory and NVMe.

The only place here that needs the client (msgspec and msgpack), and where a change of it is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kvcache.device.engine import EngineDevice, PagedBlocks

if TYPE_CHECKING:
    import torch
    from gpu_engine import Kv, Shape

    from kvcache.client.hbm import BlockingDeviceStore
    from kvcache.client.store import Handle

BATCH_BYTES = 64 << 20
WAIT_MS = 60_000
GREETINGS_MAX = 6
"""A node lets no engine wait longer than some seconds until it has a GPU's memory: the next has it then."""
HBM, HOST, ANY = "node_hbm", "node_host", "node_nvme"


class Node:
    """One connection, made before anything is timed. RAISES RuntimeError when fewer blocks are had than were
    asked for."""

    def __init__(self, socket: str, shape: Shape, device: torch.device) -> None:
        self._shape = shape
        self._device = EngineDevice.of(device)
        self._socket = socket
        self._store = self._connected()
        self._handle = self._opened()
        for _ in range(GREETINGS_MAX - 1):
            if not self._device.has_slab:
                self._store.close()
                self._store = self._connected()
                self._handle = self._opened()

    def save(self, kv: Kv, tokens: Sequence[int], blocks: Sequence[torch.Tensor]) -> str:
        """Into host memory, and wait until they are durable; then into HBM. ``blocks`` are those of ``kv`` in
        host memory. Returns why HBM has not all of them, if so."""
        handle = self._handle
        assert kv.spec == handle.spec
        names = handle.hashes(tokens)
        step = max(1, BATCH_BYTES // kv.spec.block_bytes)
        for at in range(0, len(names), step):
            parent = names[at - 1] if at else b""
            some = names[at : at + step]
            held = self._store.save(handle, some, list(_pieces(blocks[at : at + step])), parent)
            if held < len(some):
                raise RuntimeError(f"{held} of {len(some)} blocks saved: {dict(self._store.counters)}")
        durable = self._store.persist(handle, names, WAIT_MS)
        if durable < len(names):
            raise RuntimeError(f"{durable} of {len(names)} blocks are durable")
        before = self._counted("hbm_saved_blocks")
        held = self._store.save_device(handle, names, self._pages(kv))
        into_hbm = self._counted("hbm_saved_blocks") - before
        return "" if held == into_hbm == len(names) else f"HBM took {into_hbm}: {dict(self._store.counters)}"

    def load(self, tier: str, kv: Kv, tokens: Sequence[int]) -> None:
        """Into the pages of ``kv``, verified by the client. ``ANY``: from wherever the node has them."""
        handle = self._handle
        names = handle.hashes(tokens)
        take = self._store.lease if tier == HOST else self._store.lease_device
        before = self._counted("hbm_loaded_blocks")
        lease = take(handle, names, wait_ms=WAIT_MS)
        try:
            if lease.count < len(names):
                raise RuntimeError(f"{lease.count} of {len(names)} blocks leased")
            if failed := self._store.load_device(lease, self._pages(kv)):
                raise RuntimeError(f"{len(failed)} of {len(names)} blocks failed")
        finally:
            self._store.release(lease)
        from_hbm = self._counted("hbm_loaded_blocks") - before
        if from_hbm != (len(names) if tier == HBM else 0):
            raise RuntimeError(
                f"{from_hbm} of {len(names)} blocks came from HBM: {dict(self._store.counters)}"
            )

    def close(self) -> None:
        self._store.close()

    def _connected(self) -> BlockingDeviceStore:
        from kvcache.client import connect_device_blocking

        return connect_device_blocking(self._device, self._socket, timeout_ms=WAIT_MS)

    def _counted(self, name: str) -> int:
        return self._store.counters.get(name, 0)

    def _pages(self, kv: Kv) -> PagedBlocks:
        return PagedBlocks(self._device, kv.cache, kv.blocks)

    def _opened(self) -> Handle:
        from kvcache.namespace import Namespace, shape_of

        spec = self._shape.spec
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
