"""Between an engine's pages and host memory: device memory in which blocks lie for the time of a copy.

    save   pages ─ gather ─► staging ─ copy ─► host slots       one launch, then the link
    load   host slots ─ copy ─► staging ─ scatter ─► pages      the link, then one launch

Pages of a block are scattered over the device, and the link is fast only for long runs: so all layers and
blocks go through a *part* of staging memory that lies in one piece. ``first`` and ``last`` name planes, so
that layer i is copied while layer i + 1 computes; the planes of a layer are one run of each block.

Invariants: a part is in one copy at a time, and is free again when the copy has ended, by its event, never
before; bytes of it that the copy does not name are not written. Chunks are summed on the device, on the way.

The sum: 64 MiB, two groups of 32 MiB under way, keep 50 GB/s busy at 1.3 ms a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvcache.device.checks import check_planes, check_slab, refused
from kvcache.device.copies import Copies, Copy, Link, Step, Then, copy_steps
from kvcache.device.gather import gather_and_sum, scatter_and_sum
from kvcache.device.pages import Moves, PagedCache
from kvcache.device.streams import Stream, failed
from kvcache.errors import Unavailable

_LINK: Link = "host"


class Staging:
    """Device memory in equal parts. One owner; ``take`` and ``give`` decide only."""

    def __init__(self, memory: torch.Tensor, part_bytes: int) -> None:
        """``memory``: uint8 [bytes], of the cache's device. REQUIRES: at least one part."""
        assert 0 < part_bytes <= len(memory)
        self.memory = memory
        self.part_bytes = part_bytes
        self._count = len(memory) // part_bytes
        self._free = list(range(self._count - 1, -1, -1))

    def take(self) -> int:
        """The offset of a part, the taker's until ``give``.

        RAISES Unavailable when all are in copies: pump them, or do without."""
        if not self._free:
            raise Unavailable(
                "unavailable",
                "no memory of the device is free to copy through",
                f"all {self._count} parts are in copies",
                "wait for one of them, or recompute",
            )
        return self._free.pop() * self.part_bytes

    def give(self, offset: int) -> None:
        """REQUIRES: taken, and no copy over it is under way."""
        part = offset // self.part_bytes
        assert part not in self._free
        self._free.append(part)

    @property
    def free_count(self) -> int:
        return len(self._free)


@dataclass(frozen=True, slots=True)
class Passage:
    """A copy, and the chunk sums that it took on the device: of what it read, when it saves, and of what it
    wrote to the pages, when it loads.

    ``sums``: on the CPU, int64 [block, chunk of those planes], the bits of the u64 that ``kvcache.sums`` has.
    Defined once the copy has ended and did not fail; until they are right, what was loaded is a miss."""

    copy: Copy
    sums: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Plan:
    """``ranges``: (offset in the host slab, in staging memory, bytes), a block each."""

    part: int
    moves: Moves
    ranges: list[tuple[int, int, int]]
    sums: torch.Tensor

    def sum(self, sums: torch.Tensor) -> None:
        """Bring them to the host, on the current stream."""
        self.sums.copy_(sums, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Path:
    """From pages to host slots and back, of one cache and one host slab (``host``: uint8 [bytes], pinned)."""

    copies: Copies
    cache: PagedCache
    staging: Staging
    host: torch.Tensor

    def blocks_max(self, pages_per_block: int, first: int = 0, last: int | None = None) -> int:
        """Of so many blocks these planes fit one copy. RAISES BadInput when a block has no such planes."""
        end = check_planes(first, last, len(self.cache.planes))
        return self.staging.part_bytes // self.cache.part(first, end).spec(pages_per_block).block_bytes

    def save(
        self,
        offsets: Sequence[int],
        pages: Sequence[Sequence[int]],
        engine: Stream,
        then: Then,
        first: int = 0,
        last: int | None = None,
    ) -> Passage:
        """Planes ``first`` to ``last`` (default: all) of the blocks of ``pages`` into the host slots at
        ``offsets``. ``then`` as in ``Copies``. REQUIRES: ``engine`` is the current stream; the slots are
        reserved until ``then``; pages are not written again before ``hold``.

        RAISES BadInput as ``gather`` and ``PagedCache.moves``; Unavailable: nothing is copied then."""
        plan = self._plan(offsets, pages, first, last)
        out = [(host, staged, length) for host, staged, length in plan.ranges]
        steps = [
            Step(0, lambda: plan.sum(gather_and_sum(plan.moves, self.staging.memory))),
            *copy_steps(self.host, self.staging.memory, out),
        ]
        return self._with(plan, then, lambda ended: self.copies.save(_LINK, steps, engine, ended))

    def load(
        self,
        offsets: Sequence[int],
        pages: Sequence[Sequence[int]],
        engine: Stream,
        then: Then,
        first: int = 0,
        last: int | None = None,
    ) -> Passage:
        """As ``save``, the other way: the slots are leased until ``then``. The pages are to be read only
        behind ``hold``, and counted only when their sums are right. RAISES BadInput also when a page is
        named twice."""
        plan = self._plan(offsets, pages, first, last)
        if not plan.moves.pages_differ:
            self.staging.give(plan.part)
            raise refused("a page that is named twice", "two blocks would be written to it, in no order")
        into = [(staged, host, length) for host, staged, length in plan.ranges]
        steps = [
            *copy_steps(self.staging.memory, self.host, into),
            Step(0, lambda: plan.sum(scatter_and_sum(plan.moves, self.staging.memory))),
        ]
        return self._with(plan, then, lambda ended: self.copies.load(_LINK, steps, engine, ended))

    def _plan(
        self, offsets: Sequence[int], pages: Sequence[Sequence[int]], first: int, last: int | None
    ) -> _Plan:
        """All that can be wrong is found here: an error in the middle of a copy would cost more than it."""
        end = check_planes(first, last, len(self.cache.planes))
        per_block = max(1, len(pages[0]) if pages else 1)
        whole = self.cache.spec(per_block)
        check_slab(self.host, offsets, whole.block_bytes)
        cache = self.cache.part(first, end)
        spec = cache.spec(per_block)
        size = spec.block_bytes
        if len(offsets) * size > self.staging.part_bytes:
            raise refused(
                f"{size} bytes of each of {len(offsets)} blocks in one copy",
                f"a part of the staging memory has {self.staging.part_bytes} bytes",
            )
        part = self.staging.take()
        try:
            staged = [part + at * size for at in range(len(offsets))]
            moves = cache.moves(staged, pages)
            ranges = [
                (at + first * whole.plane_bytes, via, size) for at, via in zip(offsets, staged, strict=True)
            ]
            shape = (len(offsets), spec.chunk_count)
            sums = torch.empty(shape, dtype=torch.int64, pin_memory=cache.device.type == "cuda")
        except BaseException as error:
            self.staging.give(part)
            if isinstance(error, RuntimeError):
                raise failed(error) from error
            raise
        return _Plan(part, moves, ranges, sums)

    def _with(self, plan: _Plan, then: Then, ask: Callable[[Then], Copy]) -> Passage:
        """The part is free when the copy has ended, or was not taken."""

        is_free = False

        def ended(failure: Unavailable | None) -> None:
            nonlocal is_free
            is_free = True
            self.staging.give(plan.part)
            then(failure)

        try:
            return Passage(ask(ended), plan.sums)
        except BaseException:
            if not is_free:  # Nothing was begun: ``then`` is never called.
                self.staging.give(plan.part)
            raise
