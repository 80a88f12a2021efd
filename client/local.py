"""The mapped path: the node's slab in our address space, and copies between it and the caller's buffers.

A descriptor is mapped only when nobody can shrink the memory behind it any more: otherwise whoever did
would kill this process with SIGBUS. The map is not inherited by forked children, and it goes when the
connection does, or with the last copy that still runs over it: each copy holds views of its own. A GPU that
has registered it holds one, too, until it has undone that.

The sum: the copy is the limit. Around it Python spends about 0.1 ms for 16 blocks, against 2 to 4 ms
for copying 2 MiB each. A first touch by a write costs 1.5 us a page of 4 KiB, three times the copy of
that page; asking for many pages at once costs a fifth of it. So the whole map is warmed once, beside the
first copies, and only where the node has memory already.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Final

from kvcache import memfd
from kvcache.client.hbm import Count, Device, Pin
from kvcache.client.steps import BadReply, Operation, work
from kvcache.errors import Unavailable
from kvcache.sums import copy_and_sum
from kvcache.wire import Welcome

_MADV_POPULATE_READ: Final = 22
_WARM_STEP_BYTES: Final = 16 << 20

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Slab:
    """A map of the node's memory. ``close`` may be called while copies run."""

    def __init__(self, descriptor: int, slab_bytes: int) -> None:
        """The descriptor stays the caller's. RAISES BadInput when it is not safe to map."""
        memfd.check(descriptor, slab_bytes)
        try:
            self._map: mmap.mmap | None = mmap.mmap(descriptor, slab_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise memfd.unsafe(f"it cannot be mapped: {error}") from error
        self._map.madvise(mmap.MADV_DONTFORK)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._view: memoryview | None = memoryview(self._map)
        self._lock = threading.Lock()
        self._cold: int | None = os.dup(descriptor)  # Ours until the map is being warmed.
        self._pin: Pin | None = None

    @classmethod
    def of(cls, descriptor: int | None, welcome: Welcome) -> Slab | None:
        """The map that came with a Welcome, None when none did. RAISES BadInput."""
        return None if descriptor is None else cls(descriptor, welcome.slab_bytes)

    def pin(self, device: Device, descriptor: int, unit_bytes: int, count: Count) -> None:
        """Have it registered with that GPU, piece by piece. REQUIRES: the node said that it may be; once."""
        assert self._view is not None
        assert self._pin is None
        self._pin = device.pin(self._view, descriptor, unit_bytes, count)

    def pieces(
        self, offsets: Sequence[int], shapes: Sequence[Sequence[memoryview]], block_bytes: int
    ) -> list[memoryview]:
        """The slots at ``offsets``, cut like the pieces of the blocks that go in or out.

        RAISES Unavailable when closed, BadReply when a slot is not within the slab.
        """
        cut: list[memoryview] = []
        for slot, shape in zip(self.slots(offsets, block_bytes), shapes, strict=True):
            if len(shape) == 1:
                cut.append(slot)
                continue
            start = 0
            for piece in shape:
                cut.append(slot[start : start + len(piece)])
                start += len(piece)
        return cut

    def slots(self, offsets: Sequence[int], block_bytes: int) -> list[memoryview]:
        """RAISES as ``pieces``."""
        view = self._view
        if view is None:
            raise Unavailable("unavailable", "the slab is not mapped any more", "the connection ended")
        last = len(view) - block_bytes
        for offset in offsets:
            if not 0 <= offset <= last:
                raise BadReply(f"a slot at {offset} in a slab of {len(view)} bytes")
        return [view[offset : offset + block_bytes] for offset in offsets]

    def warm(self) -> None:
        """Bring the node's memory into this process's page tables, once, in a thread of its own."""
        if self._cold is None:
            return
        with self._lock:
            descriptor, self._cold = self._cold, None
        if descriptor is not None:
            warming = threading.Thread(
                target=self._warm, args=(descriptor,), name="kvcache-warm", daemon=True
            )
            try:
                warming.start()
            except RuntimeError:  # No more threads: pages are touched one by one.
                os.close(descriptor)

    def _warm(self, descriptor: int) -> None:
        start = hole = 0
        try:
            while (view := self._view) is not None:  # Held during each step: nothing is unmapped under it.
                if start == hole:
                    start = os.lseek(descriptor, hole, os.SEEK_DATA)
                    hole = os.lseek(descriptor, start, os.SEEK_HOLE)
                step = min(hole, len(view)) - start
                step = min(step, _WARM_STEP_BYTES)
                if step <= 0 or _libc.madvise(self._address + start, step, _MADV_POPULATE_READ):
                    return  # All done; or an older kernel, and pages are touched one by one.
                start += step
                del view
        except OSError:
            return  # No memory behind ``hole``.
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Unmap now, or as soon as the last copy has ended. May be called twice."""
        with self._lock:
            descriptor, self._cold = self._cold, None
            pin, self._pin = self._pin, None
        if descriptor is not None:
            os.close(descriptor)
        if pin is not None:
            pin.close()
        self._view = None
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):  # A copy holds views: the map goes with the last of them.
                mapped.close()


def load(
    slab: Slab,
    offsets: Sequence[int],
    into: Sequence[Sequence[memoryview]],
    block_bytes: int,
    chunk_bytes: int,
) -> Operation[bytes]:
    """Copy the slots out. Returns the sums of what was copied. RAISES Unavailable."""
    slab.warm()
    sources = slab.pieces(offsets, into, block_bytes)
    targets = [piece for block in into for piece in block]
    return (yield from work(lambda: copy_and_sum(sources, targets, chunk_bytes)))


def save(
    slab: Slab,
    offsets: Sequence[int],
    blocks: Sequence[Sequence[memoryview]],
    block_bytes: int,
    chunk_bytes: int,
) -> Operation[bytes]:
    """Copy into the slots. Returns the sums of what was written. RAISES Unavailable."""
    slab.warm()
    targets = slab.pieces(offsets, blocks, block_bytes)
    sources = [piece for block in blocks for piece in block]
    return (yield from work(lambda: copy_and_sum(sources, targets, chunk_bytes)))
