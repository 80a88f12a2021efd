"""How whole blocks go between the engine's pages and the store: from and to host memory, or by a device.

    pages in host memory   views of them are filled and read by the store's own copies
    pages on a device      DeviceBlocks: each block of a lease from the tier that has it; saves into HBM, and
                           what that does not take into host memory

An engine on the CPU has both: it takes the second where HBM is asked for, and a slab of the node is mapped.
For one thread, that of the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from kvcache.wire_hbm import HBM

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvcache.block import BlockHash
    from kvcache.client.connectors.attach import Attachment
    from kvcache.client.hbm import BlockingDeviceStore, DeviceBlocks
    from kvcache.client.store import Handle, Lease, SaveHints


class Pages(Protocol):
    """The engine's pages, by the engine's block id."""

    def planes(self, block_id: int) -> Sequence[Buffer]:
        """Writable views of one block's pages, one a layer, in the order of the model's layers."""


class DevicePages(Protocol):
    """The same on a device, for which the store was connected (``connect_device_blocking``)."""

    @property
    def has_slab(self) -> bool:
        """HBM of a node is mapped on it."""

    def blocks(self, block_ids: Sequence[int]) -> DeviceBlocks: ...


class Moves:
    """REQUIRES of all that takes a handle or a lease: the attachment has a store."""

    def __init__(self, attachment: Attachment, pages: Pages, device: DevicePages | None = None) -> None:
        self._attachment = attachment
        self._pages = pages
        self._device = device

    @property
    def lacks_hbm(self) -> bool:
        """Is there a device, and nothing of the node's mapped on it?"""
        return self._device is not None and not self._device.has_slab

    def planes(self, block_ids: Sequence[int]) -> list[Sequence[Buffer]]:
        return [self._pages.planes(block_id) for block_id in block_ids]

    def lease(self, handle: Handle, prefix: Sequence[BlockHash], name: str, hbm: bool) -> Lease:
        """Take part in the lease of that name, as it was taken, with HBM or without. The scheduler has waited
        for what it leased; where that was lost, others' loads do not wait."""
        take = self._store.lease_device if hbm and self._device is not None else self._store.lease
        return take(handle, prefix, name, wait_ms=0)

    def load(self, lease: Lease, block_ids: Sequence[int], start: int) -> frozenset[int]:
        """As ``BlockingStore.load``."""
        if self._device is not None and any(grant.tier == HBM for grant in lease.grants):
            return self._store.load_device(lease, self._device.blocks(block_ids), start)
        return self._store.load(lease, self.planes(block_ids), start)

    def save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        block_ids: Sequence[int],
        parent: bytes,
        hints: SaveHints,
        hbm: bool,
    ) -> int:
        """As ``BlockingStore.save``; ``hbm``: there, as far as it goes."""
        if hbm and self._device is not None and self._device.has_slab:
            return self._store.save_device(handle, prefix, self._device.blocks(block_ids), parent, hints)
        return self._store.save(handle, prefix, self.planes(block_ids), parent, hints)

    @property
    def _store(self) -> BlockingDeviceStore:
        """It is one where there is a device."""
        return cast("BlockingDeviceStore", self._attachment.store)
