"""An engine's GPU, as a store sees it: where blocks are loaded to and saved from, the node's memory on it.

``Device`` and ``DeviceBlocks`` are what the store calls (``kvcache.device.engine`` has both); ``DeviceStore``
is what it offers who brought a device. Nothing here knows torch.

    lease_device ──► blocks in HBM, leading ──► load_device: device to device ──┐ sums on the device
                └──► the rest as by lease ─────► load_device: host to device ───┴──► failed in HBM? the copy
                                                                                     below, block by block
    begin_save_device ──► the same, plane by plane, while they are computed
    save_device ──► into HBM, which the node copies on into host memory before it leaves
                └──► what HBM does not take, over the link into host memory: sums on both sides of it

The rules of ``store`` hold: what ``load_device`` does not report is on the device, verified where it arrived.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

from kvcache.block import BlockHash, BlockSpec
from kvcache.client.store import (
    LEASE_MS,
    LEASE_WAIT_MS,
    NO_HINTS,
    BlockingStore,
    BlockingWriting,
    BlockStore,
    Handle,
    Lease,
    SaveHints,
    Writing,
)
from kvcache.errors import KVCacheError
from kvcache.request_hints import UNKNOWN, RequestHints
from kvcache.wire import HbmSlab, Welcome


class Device(Protocol):
    """One GPU of this process, and what of nodes' memory is mapped on it. Any thread."""

    gpu: bytes
    """Its UUID; empty: the CPU."""
    joined: Sequence[bytes]
    """Those whose memory it can use."""

    @property
    def is_stuck(self) -> bool:
        """It answers nothing, and what it was told to copy may still be under way."""

    pins: bool
    """Can host memory be registered with it, for copies at the link's speed?"""

    def open(self, slab: HbmSlab, descriptor: int) -> None:
        """Map it. The descriptor stays the caller's. RAISES BadInput when it is not safe to map,
        Unavailable."""

    def close(self, incarnation: bytes) -> None:
        """Unmap it, as soon as no copy runs over it. Once for each ``open``."""

    def is_lost(self, incarnation: bytes) -> bool:
        """Nothing in it counts any more, as far as this process knows."""

    def pin(self, memory: memoryview, descriptor: int, unit_bytes: int, count: Count) -> Pin:
        """Begin to register this map of the node's host memory, in the background, whole units of it: those
        that have memory, and those that blocks are copied from or to. The descriptor stays the caller's.
        ``count`` is told what came of it, from any thread. What is not registered is only slower."""


Count = Callable[[str, int], None]
"""Takes the name of a counter of the store, and by how much it grew."""


class Pin(Protocol):
    """A map that is being registered."""

    def close(self) -> None:
        """Undo it as soon as no copy runs over the map, which stays mapped until then. Does not wait."""


class DeviceBlocks(Protocol):
    """Where blocks lie in the engine's memory, in order, for one request: what is asked of them comes behind
    what the engine had queued when they were made, and the device is waited for so long in all. One call at a
    time; each returns, after the device has done it, the joined chunk sums of what was copied. RAISES
    Unavailable when it was not, or the slab is not mapped any more; nothing runs on then, unless the device
    answers nothing."""

    def __len__(self) -> int: ...

    def check(self, spec: BlockSpec) -> None:
        """RAISES BadInput (bad_block) when they have not this shape."""

    def follow(self) -> None:
        """What is begun from now on also comes behind what is queued now on the current stream of this
        thread, whichever thread begins it. Returns at once."""

    def load(self, incarnation: bytes, offsets: Sequence[int], first: int) -> bytes:
        """Fill those from ``first`` on from these slots of the slab."""

    def put(self, blocks: Sequence[memoryview], first: int) -> bytes:
        """Fill those from ``first`` on from host memory, a view a block."""

    def into_slab(self, incarnation: bytes, offsets: Sequence[int], first: int) -> DeviceWriting:
        """Begin to copy those from ``first`` on into these slots. RAISES Unavailable."""

    def into_host(self, blocks: Sequence[memoryview], first: int) -> DeviceWriting:
        """The same into host memory, a view a block: whether what was sent arrived is for the caller to find
        out. RAISES Unavailable."""


class DeviceWriting(Protocol):
    """Blocks on their way out of the engine's memory, plane by plane, beside what the engine computes. One
    caller at a time. All but ``end`` RAISE Unavailable when the device does not copy them."""

    def advance(self, planes: int) -> None:
        """So many leading planes of each block are ready behind what is queued now on the current stream of
        this thread. Returns at once."""

    @property
    def is_done(self) -> bool:
        """All planes were ready, and are copied."""

    def delay_ns(self) -> int:
        """For so long nothing more may be copied. 0: ``go_on`` has something to do, or to wait for."""

    def go_on(self) -> bytes:
        """Copy what may be copied, and wait for what is under way. Nothing is returned."""

    def sums(self) -> bytes:
        """The joined chunk sums of all blocks, taken on the device, before the link. REQUIRES: done."""

    def end(self) -> None:
        """Copy no more, and wait until nothing of it runs. May be called twice. RAISES Unavailable when the
        device answers nothing: what it was to write to is not to be given back."""


class DeviceStore(BlockStore, Protocol):
    """A store that was given a device."""

    async def match_device(self, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        """As ``match``, with what only HBM holds."""

    async def lease_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        request: str = "",
        duration_ms: int = LEASE_MS,
        wait_ms: int = LEASE_WAIT_MS,
        source: str = "",
        pushed: bool = False,
        hints: RequestHints = UNKNOWN,
    ) -> Lease:
        """As ``lease``; the leading blocks are in HBM, as far as it has them. For ``load_device``; who plans
        for an engine (``connect_planning_blocking``) holds them for it, under the same ``request``."""

    async def load_device(self, lease: Lease, into: DeviceBlocks, start: int = 0) -> frozenset[int]:
        """Fill ``into`` with blocks ``start`` and on of the lease, whatever tier each is in. Returns the
        positions in the lease that could not be had: what their places hold is undefined. RAISES BadInput."""

    async def save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: DeviceBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        """Save into HBM as far as it takes them, and what it does not take into host memory. Returns how many
        leading blocks of ``prefix`` one of them holds now: a tier takes only what continues what it holds.
        RAISES BadInput. REQUIRES: as ``save``."""

    async def begin_save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: DeviceBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> Writing:
        """Begin to save blocks that are being computed, as ``begin_save`` does: to the same places as
        ``save_device``. Planes are ready behind what the current stream of this thread has queued when
        ``advance`` is called, which waits for none of it. REQUIRES: the blocks stay until the end."""


class BlockingDeviceStore(BlockingStore, Protocol):
    """The same for threads."""

    def match_device(self, handle: Handle, prefix: Sequence[BlockHash]) -> int: ...

    def lease_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        request: str = "",
        duration_ms: int = LEASE_MS,
        wait_ms: int = LEASE_WAIT_MS,
        source: str = "",
        pushed: bool = False,
        hints: RequestHints = UNKNOWN,
    ) -> Lease: ...

    def load_device(self, lease: Lease, into: DeviceBlocks, start: int = 0) -> frozenset[int]: ...

    def save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: DeviceBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int: ...

    def begin_save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: DeviceBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> BlockingWriting: ...


class Mapped:
    """The slab of one connection on the device. ``close`` may be called twice."""

    def __init__(self, device: Device, slab: HbmSlab, descriptor: int) -> None:
        """RAISES as ``Device.open``."""
        device.open(slab, descriptor)
        self.incarnation = slab.incarnation
        self._device: Device | None = device

    @classmethod
    def of(cls, device: Device | None, descriptor: int | None, welcome: Welcome) -> Mapped | None:
        """None when the node gave none, or it cannot be mapped: then host memory does."""
        if device is None or descriptor is None:
            return None
        with contextlib.suppress(KVCacheError):
            return cls(device, welcome.hbm, descriptor)
        return None

    @property
    def is_lost(self) -> bool:
        """Blocks are neither to be had from it nor to be written there."""
        device = self._device  # Another thread may close it meanwhile.
        return device is None or device.is_lost(self.incarnation)

    def close(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            device.close(self.incarnation)
