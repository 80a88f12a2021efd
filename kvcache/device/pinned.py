"""Host memory, locked for the copies of this process's GPUs.

The host slab is a memfd that each engine maps and registers for itself: a GPU copies from and to locked
memory at the link's speed (50 GB/s), from other memory at a third of it, and not beside others.

    Pins ── pin ──► HostMap: a thread registers it, ── close, and no copy over it ──► undone ──► unmapped
                    first what copies wanted, then what has memory

What is registered is kept as it is. If its memory were taken out of the memfd, copies would go on into the
pages that it had, and nobody would see their bytes. (The checks would turn that into misses, for good.) So a
node takes none from an arena while a connection that pins it lives (``kvcache.tiers.host``), and a map is
registered for one connection.

Invariants: a piece lies in one unit of the node's, is registered whole or not at all, and no copy crosses its
edge (the driver takes none that is half in registered memory); nothing is undone under a copy, nor unmapped
before it is undone; an error of the driver ends the registering, and nothing else.

The sum: 0.1 to 0.3 s a GiB, once, in the background: 5 ms a piece, in which the driver serves others slowly.
Afterwards 2 us a block: no copy of a batch begins before all of its blocks are cut.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch

from kvcache.device.vmm import Vmm
from kvcache.errors import Unavailable

PIECE_BYTES = 16 << 20

Count = Callable[[str, int], None]


def flat(memory: memoryview) -> torch.Tensor:
    """The same bytes as a tensor, uint8 [len], which keeps the map alive. REQUIRES: writable."""
    return torch.frombuffer(memory, dtype=torch.uint8)


class Pinned:
    """Memory that is registered until ``close``."""

    def __init__(self, vmm: Vmm, ordinal: int, memory: torch.Tensor) -> None:
        """``memory``: on the CPU, uint8 [bytes], whole pages; ``ordinal``: a GPU, for all there are.

        RAISES Unavailable; it can be copied from and to all the same, slower."""
        self._vmm = vmm
        self._ordinal = ordinal
        vmm.register(ordinal, memory.data_ptr(), len(memory))
        self._memory: torch.Tensor | None = memory

    def close(self) -> None:
        """REQUIRES: no copy over it is under way. May be called twice."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._vmm.unregister(self._ordinal, memory.data_ptr())


class Pins:
    """The maps of host memory that are registered with one GPU of this process. Any thread."""

    def __init__(self, vmm: Vmm | None = None, ordinal: int = 0) -> None:
        """``vmm`` None: there is no GPU, and nothing is ever registered."""
        self._vmm = vmm
        self._ordinal = ordinal
        self._lock = threading.Lock()
        self._maps: list[HostMap] = []

    @property
    def possible(self) -> bool:
        return self._vmm is not None

    def pin(self, memory: memoryview, descriptor: int, unit_bytes: int, count: Count) -> HostMap:
        """As ``client.hbm.Device.pin``."""
        assert self._vmm is not None
        made = HostMap(self._vmm, self._ordinal, memory, unit_bytes, count, self._ended)
        with self._lock:
            self._maps.append(made)
        made.begin(descriptor)
        return made

    @contextmanager
    def used(
        self, blocks: Sequence[memoryview], is_over: Callable[[], bool]
    ) -> Iterator[list[list[torch.Tensor]]]:
        """Blocks as tensors, each cut where a copy has to be. Nothing of them is undone meanwhile: to be left
        when the copies are done. ``is_over``, asked then: are they? If not, the map stays for good. RAISES
        Unavailable when it is being undone."""
        whole = [flat(block) for block in blocks]
        with self._lock:
            maps = list(self._maps)
        of: list[HostMap | None] = []
        for each in whole:
            if not of or of[-1] is None or not of[-1].has(each):  # Mostly all are of one.
                of.append(next((one for one in maps if one.has(each)), None))
            else:
                of.append(of[-1])
        with ExitStack() as using:
            for one in {one for one in of if one is not None}:
                using.enter_context(one.used(is_over))
            yield [[each] if one is None else one.cut(each) for each, one in zip(whole, of, strict=True)]

    def _ended(self, ended: HostMap) -> None:
        with self._lock:
            self._maps.remove(ended)


class HostMap:
    """One map of a node's host memory, a connection's. A ``client.hbm.Pin``."""

    def __init__(
        self,
        vmm: Vmm,
        ordinal: int,
        memory: memoryview,
        unit_bytes: int,
        count: Count,
        ended: Callable[[HostMap], None],
    ) -> None:
        """``ended`` is told when it is undone and no more held."""
        self._vmm = vmm
        self._ordinal = ordinal
        self._count = count
        self._ended = ended
        self._memory: torch.Tensor | None = flat(memory)
        self._start = self._memory.data_ptr()
        self._length = len(memory)
        self.piece_bytes = unit_bytes if unit_bytes % PIECE_BYTES else min(unit_bytes, PIECE_BYTES)
        self._changed = threading.Condition()
        # Under _changed:
        self._pinned: set[int] = set()
        self._wanted: dict[int, None] | None = {}  # In the order of the wishes. None: no more is registered.
        self._users = 0
        self._is_closed = False
        self._is_undone = False

    def begin(self, descriptor: int) -> None:
        """Once. What fails is counted."""
        own = -1
        try:
            if self.piece_bytes % os.sysconf("SC_PAGE_SIZE"):
                raise OSError("a node's units are whole pages")
            own = os.dup(descriptor)
            threading.Thread(target=self._serve, args=(own,), name="kvcache-pin", daemon=True).start()
        except (OSError, RuntimeError):  # No more descriptors, or threads.
            if own >= 0:
                os.close(own)
            self._count("failed_pins", 1)
            self._is_closed = True
            self._undo()

    @property
    def pinned_bytes(self) -> int:
        with self._changed:
            return len(self._pinned) * self.piece_bytes

    def has(self, block: torch.Tensor) -> bool:
        return bool(self._start <= block.data_ptr() < self._start + self._length)

    @contextmanager
    def used(self, is_over: Callable[[], bool]) -> Iterator[None]:
        """Meanwhile nothing is undone, nor ever unless ``is_over`` then. RAISES Unavailable when it is."""
        with self._changed:
            if self._is_undone:
                raise Unavailable("unavailable", "the slab is not mapped any more", "the connection ended")
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= is_over()
                self._changed.notify_all()

    def cut(self, block: torch.Tensor) -> list[torch.Tensor]:
        """At the edges of pieces; what is not registered is wanted from now on. REQUIRES: ``used``."""
        size, first = self.piece_bytes, block.data_ptr() - self._start
        pieces = range(first // size, -(-(first + len(block)) // size))
        if len(pieces) == 1 and pieces[0] in self._pinned:  # Mostly; and it stays so meanwhile.
            return [block]
        with self._changed:
            if self._wanted is not None and not self._pinned.issuperset(pieces):
                self._wanted.update(dict.fromkeys(pieces))
                self._changed.notify_all()
        edges = [first, *(piece * size for piece in pieces[1:]), first + len(block)]
        return list(block.split([end - start for start, end in pairwise(edges)]))

    def close(self) -> None:
        """As ``client.hbm.Pin``. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # --- its thread -----------------------------------------------------------------------------

    def _serve(self, descriptor: int) -> None:
        try:
            for piece in self._coming(_filled(descriptor, self.piece_bytes)):
                self._register(piece)
        except Unavailable:
            self._count("failed_pins", 1)
        finally:
            os.close(descriptor)
            with self._changed:
                self._wanted = None
                self._changed.wait_for(self._may_undo)
            self._undo()

    def _coming(self, filled: Iterator[int]) -> Iterator[int]:
        """The next piece to register, until it is closed."""
        more = True
        while True:
            with self._changed:
                while not (self._is_closed or self._wanted or more):
                    self._changed.wait()
                if self._is_closed:
                    return
                piece = next(iter(self._wanted)) if self._wanted else next(filled, -1)
                if self._wanted:
                    del self._wanted[piece]
                more = more and piece >= 0
                is_fresh = 0 <= piece < self._length // self.piece_bytes and piece not in self._pinned
            if is_fresh:
                yield piece

    def _may_undo(self) -> bool:
        return self._is_closed and not self._users

    def _register(self, piece: int) -> None:
        """RAISES Unavailable."""
        self._vmm.register(self._ordinal, self._start + piece * self.piece_bytes, self.piece_bytes)
        with self._changed:
            self._pinned.add(piece)
        self._count("pinned_bytes", self.piece_bytes)

    def _undo(self) -> None:
        """What cannot be undone stays mapped until the process ends: a GPU may still use it."""
        with self._changed:
            assert not self._users
            self._is_undone = True
            pinned = sorted(self._pinned)
        for piece in pinned:
            if self._vmm.unregister(self._ordinal, self._start + piece * self.piece_bytes):
                with self._changed:
                    self._pinned.discard(piece)
        if not self._pinned:
            self._ended(self)
            self._memory = None


def _filled(descriptor: int, piece_bytes: int) -> Iterator[int]:
    """Which whole pieces have memory: to register others would take memory that the node has not given."""
    if os.fstat(descriptor).st_blksize > os.sysconf("SC_PAGE_SIZE"):
        return  # Of huge pages the kernel does not say.
    start = hole = 0
    while True:
        try:
            start = os.lseek(descriptor, hole, os.SEEK_DATA)
            hole = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError:
            return  # No more.
        yield from range(-(-start // piece_bytes), hole // piece_bytes)


def along(whole: torch.Tensor, pieces: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each piece beside its part of ``whole``, which is as long as all of them."""
    parts = [whole] if len(pieces) == 1 else whole.split([len(piece) for piece in pieces])
    return zip(parts, pieces, strict=True)
