"""How whole blocks go between the engine's pages and the store: from and to host memory, or by a device.

    pages in host memory   views of them are filled and read by the store's own copies
    pages on a device      DeviceBlocks: each block of a lease from the tier that has it; saves into HBM, and
                           what that does not take into host memory

An engine on the CPU has both: it takes the second where HBM is asked for, and a slab of the node is mapped.
One on CUDA has the second alone, also for host memory. For one thread, that of the worker; ``mark`` is the
engine's thread's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, cast

from kvcache.errors import Unavailable
from kvcache.wire_hbm import HBM

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvcache.block import BlockHash
    from kvcache.client.connectors.attach import Attachment
    from kvcache.client.hbm import BlockingDeviceStore, DeviceBlocks
    from kvcache.client.store import BlockingWriting, Handle, Lease, SaveHints
    from kvcache.device.streams import Event


class Pages(Protocol):
    """The engine's pages, by the engine's block id."""

    def planes(self, block_id: int) -> Sequence[Buffer]:
        """Writable views of one block's pages, one a layer, in the order of the model's layers."""


class DevicePages(Protocol):
    """The same on a device, for which the store was connected (``connect_device_blocking``)."""

    @property
    def has_slab(self) -> bool:
        """HBM of a node is mapped on it."""

    def mark(self) -> Event:
        """What the engine has queued by now. By the engine's thread. RAISES Unavailable."""

    def follow(self, behind: Event) -> None:
        """What this thread has it do from now on, it does behind that. RAISES Unavailable."""

    def blocks(self, block_ids: Sequence[int]) -> DeviceBlocks: ...


class Moves:
    """REQUIRES of all that takes a handle or a lease: the attachment has a store."""

    def __init__(
        self, attachment: Attachment, pages: Pages | None, device: DevicePages | None = None
    ) -> None:
        """One of the two there is. Without ``pages`` they are in the device's memory alone."""
        assert pages is not None or device is not None
        self._attachment = attachment
        self._pages = pages
        self._device = device

    @property
    def lacks_hbm(self) -> bool:
        """Is there a device, and nothing of the node's mapped on it?"""
        return self._device is not None and not self._device.has_slab

    def mark(self) -> Event | None:
        """What the engine has queued on its device by now: what follows is done behind it. None: there is no
        device, or it failed."""
        with contextlib.suppress(Unavailable):
            return self._device.mark() if self._device is not None else None
        return None

    def planes(self, block_ids: Sequence[int]) -> list[Sequence[Buffer]]:
        """REQUIRES: they are in host memory."""
        assert self._pages is not None
        return [self._pages.planes(block_id) for block_id in block_ids]

    def lease(self, handle: Handle, prefix: Sequence[BlockHash], name: str, hbm: bool) -> Lease:
        """Take part in the lease of that name, as it was taken, with HBM or without. The scheduler has waited
        for what it leased; where that was lost, others' loads do not wait."""
        take = self._store.lease_device if hbm and self._device is not None else self._store.lease
        return take(handle, prefix, name, wait_ms=0)

    def load(
        self, lease: Lease, block_ids: Sequence[int], start: int, behind: Event | None
    ) -> frozenset[int]:
        """As ``BlockingStore.load``. RAISES Unavailable, as ``save``, when the device failed."""
        if self._pages is None or (
            self._device is not None and any(grant.tier == HBM for grant in lease.grants)
        ):
            return self._store.load_device(lease, self._blocks(block_ids, behind), start)
        return self._store.load(lease, self.planes(block_ids), start)

    def save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        block_ids: Sequence[int],
        parent: bytes,
        hints: SaveHints,
        hbm: bool,
        behind: Event | None,
    ) -> int:
        """As ``BlockingStore.save``; ``hbm``: there, as far as it goes; else into host memory alone."""
        if self._by_device(hbm):
            blocks, hints = self._blocks(block_ids, behind), replace(hints, below=not hbm)
            return self._store.save_device(handle, prefix, blocks, parent, hints)
        return self._store.save(handle, prefix, self.planes(block_ids), parent, hints)

    def begin_save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        block_ids: Sequence[int],
        parent: bytes,
        hints: SaveHints,
        hbm: bool,
        behind: Event | None,
    ) -> BlockingWriting:
        """As ``BlockingStore.begin_save``, to where ``save`` saves. Before each call of what is returned:
        ``follow`` what the engine has queued by then."""
        if self._by_device(hbm):
            blocks, hints = self._blocks(block_ids, behind), replace(hints, below=not hbm)
            return self._store.begin_save_device(handle, prefix, blocks, parent, hints)
        return self._store.begin_save(handle, prefix, self.planes(block_ids), parent, hints)

    def follow(self, behind: Event | None) -> None:
        """What this thread has the device do from now on, it does behind that. RAISES Unavailable when there
        is a device, and it did not say behind what."""
        if self._device is None:
            return
        if behind is None:
            raise Unavailable("unavailable", "the engine's device", "it failed before")
        self._device.follow(behind)

    def _by_device(self, hbm: bool) -> bool:
        return self._pages is None or (hbm and self._device is not None and self._device.has_slab)

    def _blocks(self, block_ids: Sequence[int], behind: Event | None) -> DeviceBlocks:
        assert self._device is not None
        self.follow(behind)
        return self._device.blocks(block_ids)

    @property
    def _store(self) -> BlockingDeviceStore:
        """It is one where there is a device."""
        return cast("BlockingDeviceStore", self._attachment.store)
