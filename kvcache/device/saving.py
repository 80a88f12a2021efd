"""Saves of an engine while it computes: planes are copied as they are ready, beside the engine's stream.

    engine's stream   layer i ─● e1   layer i + 1 ─● e2 ...         advance: marks the place, queues, returns
    a stream beside            └► gather, sum ─► slab of HBM         in one launch, of no cap
                                  gather, sum ─► staging ─► link     as the cap lets it and a part is free

``Saves`` are those of one device in this process, ``Writing`` the blocks of one reservation. What the cap or
the staging memory leaves for later is queued by the next that asks, whoever it is.

Invariants: a plane is copied behind all that the engine had queued when it was said to be ready; a part of
staging memory is in one copy at a time; after ``end`` nothing of a writing runs, and never does again. The
cap holds what crosses the link, and nothing else. Where a device answers nothing ``end`` says no such thing.
The sums are of what was in the pages, taken on the device.

The sum: 30 us of Python to queue a step of planes, and 5 us a block of it for the link; 16 MiB take 0.3 ms
there, so ``PARTS`` of them keep it busy. Planes are kept until there are ``STEP_BYTES`` of them, or
``1 / STEPS_MIN`` of all.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from kvcache.block import BlockSpec
from kvcache.clock import Clock
from kvcache.device.cap import Cap
from kvcache.device.copies import Copies, Copy, Link, Step, copying
from kvcache.device.gather import gather_and_sum
from kvcache.device.line import silent
from kvcache.device.pages import Moves
from kvcache.device.staging import Staging
from kvcache.device.streams import Event, Streams
from kvcache.device.sums import sum_chunks
from kvcache.device.waits import Waits
from kvcache.errors import Unavailable

PART_BYTES = 16 << 20
PARTS = 4
STEP_BYTES = 8 << 20
STEPS_MIN = 8


class Saves:
    """Of one device and process. Any thread."""

    def __init__(
        self,
        streams: Streams,
        clock: Clock,
        cap: Cap | None = None,
        lost: Callable[[str], None] = lambda why: None,
    ) -> None:
        """``lost`` is told once when the device fails."""
        self.streams = streams
        self.lock = threading.RLock()
        # Under it, all of these:
        self.copies = Copies(streams, clock, cap, lost)
        self._staging: Staging | None = None
        self.made: list[Event] = []
        """When staging memory may be written."""

    def staging(self) -> Staging:
        """RAISES Unavailable when the device has no memory for it."""
        if self._staging is None:
            try:
                memory = torch.empty(PARTS * PART_BYTES, dtype=torch.uint8, device=self.streams.device)
            except RuntimeError as error:  # Out of memory: the engine has it all.
                raise _later(str(error).partition("\n")[0]) from error
            self.made = [self.streams.current().mark()]  # What had that memory before may use it until then.
            self._staging = Staging(memory, PART_BYTES)
        return self._staging

    def close(self, timeout_s: float) -> None:
        """May be called twice."""
        with self.lock:
            self.copies.close(timeout_s)


@dataclass(frozen=True, slots=True)
class Piece:
    """Planes ``first`` to ``last`` of blocks ``start`` to ``end``: what one copy moves."""

    first: int
    last: int
    start: int
    end: int


class Way(Protocol):
    """How blocks get from the engine's memory to where they are saved."""

    @property
    def spec(self) -> BlockSpec: ...

    @property
    def count(self) -> int: ...

    @property
    def link(self) -> Link: ...

    def blocks_max(self, planes: int) -> int:
        """Of so many blocks these planes fit one copy. 0: not even of one."""

    def steps(self, saves: Saves, piece: Piece, sums: torch.Tensor) -> tuple[list[Step], Callable[[], None]]:
        """What copies them and brings their chunk sums to ``sums``, int64 [block, chunk], on the CPU; and
        what to call when that has ended. RAISES Unavailable when it cannot be just now."""


class Writing:
    """A ``client.hbm.DeviceWriting``. One caller at a time, in any thread."""

    def __init__(self, saves: Saves, way: Way, behind: Sequence[Event], waits: Waits) -> None:
        """``behind``: what nothing of it begins before; ``waits``: the request's. ``closing`` is called when
        it has ended."""
        self._saves = saves
        self._waits = waits
        self._way = way
        self._behind = list(behind)
        self.closing: Callable[[], None] = lambda: None
        self._ending = threading.Lock()
        self._is_over = False
        self._planes = 0
        self._todo: deque[tuple[Piece, list[Event]]] = deque()
        self._copies: list[Copy] = []
        self._failure: Unavailable | None = None
        spec = way.spec
        self._sums = torch.zeros(
            (way.count, spec.plane_count, spec.chunk_count // spec.plane_count), dtype=torch.int64
        )
        self._parts: list[tuple[Piece, torch.Tensor]] = []

    def advance(self, planes: int) -> None:
        self._raise()
        assert self._planes <= planes <= self._way.spec.plane_count
        if planes == self._planes:
            return
        self._behind = [*self._behind, self._saves.streams.current().mark()]
        spec, fresh = self._way.spec, planes - self._planes
        is_little = fresh * spec.plane_bytes * self._way.count < STEP_BYTES
        if is_little and fresh * STEPS_MIN < spec.plane_count and planes < spec.plane_count:
            return
        with self._saves.lock:
            self._raise()
            self._todo.extend((piece, self._behind) for piece in self._pieces(self._planes, planes))
            self._planes, self._behind = planes, []  # What follows is behind those, on the same stream.
            self._queue()
        self._raise()

    @property
    def is_done(self) -> bool:
        with self._saves.lock:  # Another thread may be about to say that one of them failed.
            return self._planes == self._way.spec.plane_count and not self._todo and not self._running()

    def delay_ns(self) -> int:
        with self._saves.lock:
            self._queue()
            runs = any(copy.event is not None for copy in self._running())
            return 0 if runs or self._failure else self._saves.copies.delay_ns()

    def go_on(self) -> bytes:
        with self._saves.lock:
            self._queue()
            events = [copy.event for copy in self._running() if copy.event is not None]
            if not events:
                events = self._saves.copies.events()[:1]  # Others': a part of staging memory is free then.
        if not all(map(self._has_ended, events)):
            self._failure = silent()
        with self._saves.lock:
            self._queue()
        self._raise()
        return b""

    def sums(self) -> bytes:
        self._raise()
        assert self.is_done
        for piece, found in self._parts:
            blocks = self._sums[piece.start : piece.end, piece.first : piece.last]
            blocks.copy_(found.view(blocks.shape))
        joined: bytes = self._sums.numpy().tobytes()
        return joined

    def end(self) -> None:
        with self._ending:  # Whoever comes second waits too.
            if not self._is_over:  # Also when the wait for it was interrupted.
                self._end()
            if not self._is_over:
                raise silent()
            self.closing()
            self.closing = lambda: None
            self._copies.clear()  # They know this: what they copied to would stay mapped until a collection.

    # --- parts ----------------------------------------------------------------------------------

    def _end(self) -> None:
        given_up = _later("the save was given up")
        with self._saves.lock:
            if not self.is_done:
                self._failure = self._failure or given_up
            self._todo.clear()
            for copy in self._running():
                self._saves.copies.drop(copy, given_up)
            events = [copy.event for copy in self._running() if copy.event is not None]
        self._is_over = all(map(self._has_ended, events))
        with self._saves.lock:
            self._saves.copies.pump()

    def _has_ended(self, event: Event) -> bool:
        try:
            return self._waits.has_ended(event)
        except Unavailable:
            return True  # The copy knows.

    def _pieces(self, first: int, last: int) -> list[Piece]:
        """RAISES Unavailable when a plane of one block is too large."""
        step = last - first
        while not (blocks := self._way.blocks_max(step)) and step > 1:
            step = -(-step // 2)
        if not blocks:
            raise _later("a plane is larger than a part of the staging memory")
        return [
            Piece(plane, min(plane + step, last), at, min(at + blocks, self._way.count))
            for plane in range(first, last, step)
            for at in range(0, self._way.count, blocks)
        ]

    def _running(self) -> list[Copy]:
        return [copy for copy in self._copies if not copy.is_ended]

    def _queue(self) -> None:
        """As much as there is room for; and end what is done. REQUIRES: the lock."""
        copies, way = self._saves.copies, self._way
        copies.pump()
        while self._todo and self._failure is None:
            piece, behind = self._todo[0]
            shape = (piece.end - piece.start, self._sums.shape[2] * (piece.last - piece.first))
            try:
                pinned = self._saves.streams.device.type == "cuda"
                sums = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
                steps, ended = way.steps(self._saves, piece, sums)
            except RuntimeError as error:
                self._failure = _later(str(error).partition("\n")[0])
                return
            except Unavailable as failure:
                self._put_off(failure)
                return
            try:
                copy = copies.save_behind(
                    way.link, steps, [*behind, *self._saves.made], partial(self._ended, ended)
                )
            except Unavailable as failure:
                ended()
                self._put_off(failure)
                return
            self._todo.popleft()
            self._copies.append(copy)
            self._parts.append((piece, sums))

    def _put_off(self, failure: Unavailable) -> None:
        """Others that are under way have what it needs; with none, it will not come."""
        if self._saves.copies.failure is not None or not self._saves.copies.inflight_bytes:
            self._failure = self._saves.copies.failure or failure

    def _ended(self, ended: Callable[[], None], failure: Unavailable | None) -> None:
        ended()
        self._failure = self._failure or failure

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure


# --- ways -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """From ``rows``, uint8 [block, block_bytes] in one piece, to targets anywhere, each in pieces."""

    spec: BlockSpec
    rows: torch.Tensor
    targets: Sequence[Sequence[torch.Tensor]]
    link: Link

    @property
    def count(self) -> int:
        return len(self.rows)

    def blocks_max(self, planes: int) -> int:
        return self.count

    def steps(self, saves: Saves, piece: Piece, sums: torch.Tensor) -> tuple[list[Step], Callable[[], None]]:
        size, plane = self.spec.block_bytes, self.spec.plane_bytes
        span = slice(piece.first * plane, piece.last * plane)
        offsets = range(piece.start * size, piece.end * size, size)

        def summed() -> None:
            found = sum_chunks(self.rows.view(-1), offsets, self.spec, piece.first, piece.last)
            sums.copy_(found.view(sums.shape), non_blocking=True)

        steps = [Step(0, summed)]
        for at in range(piece.start, piece.end):
            steps += _across(self.rows[at, span], self.targets[at], span.start)
        return steps, lambda: None


@dataclass(frozen=True, slots=True)
class Paged:
    """From pages into slots of a slab of the same device, where ``moves`` says."""

    moves: Moves
    slab: torch.Tensor
    link: Link = "device"

    @property
    def spec(self) -> BlockSpec:
        return self.moves.spec

    @property
    def count(self) -> int:
        return self.moves.block_count

    def blocks_max(self, planes: int) -> int:
        return self.count

    def steps(self, saves: Saves, piece: Piece, sums: torch.Tensor) -> tuple[list[Step], Callable[[], None]]:
        def moved() -> None:
            found = gather_and_sum(self.moves, self.slab, piece.first, piece.last)
            sums.copy_(found.view(sums.shape), non_blocking=True)

        size = (piece.last - piece.first) * self.spec.plane_bytes * self.count
        return [Step(size, moved)], lambda: None


@dataclass(frozen=True, slots=True)
class Staged:
    """From pages to targets elsewhere, each in pieces, by way of memory in which planes of a block are one
    run. ``moves``: of all blocks; its offsets are of no account."""

    moves: Moves
    targets: Sequence[Sequence[torch.Tensor]]
    link: Link

    @property
    def spec(self) -> BlockSpec:
        return self.moves.spec

    @property
    def count(self) -> int:
        return self.moves.block_count

    def blocks_max(self, planes: int) -> int:
        return PART_BYTES // (planes * self.spec.plane_bytes)

    def steps(self, saves: Saves, piece: Piece, sums: torch.Tensor) -> tuple[list[Step], Callable[[], None]]:
        staging = saves.staging()
        part = staging.take()
        width, count = (piece.last - piece.first) * self.spec.plane_bytes, piece.end - piece.start
        memory = staging.memory[part : part + count * width]
        some = replace(self.moves, table=self.moves.table[piece.start : piece.end])

        def moved() -> None:
            found = gather_and_sum(some.alone(piece.first, piece.last), memory)
            sums.copy_(found.view(sums.shape), non_blocking=True)

        steps = [Step(0, moved)]
        for row, target in zip(memory.view(count, width), self.targets[piece.start : piece.end], strict=True):
            steps += _across(row, target, piece.first * self.spec.plane_bytes)
        return steps, partial(staging.give, part)


def _across(source: torch.Tensor, pieces: Sequence[torch.Tensor], start: int) -> list[Step]:
    """Copy ``source`` to the bytes from ``start`` on of what the pieces are together."""
    steps, at, end = [], 0, start + len(source)
    for piece in pieces:
        first, last = max(start, at), min(end, at + len(piece))
        if first < last:
            part = source[first - start : last - start]
            steps.append(Step(last - first, copying(piece[first - at : last - at], part)))
        at += len(piece)
    return steps


def _later(why: str) -> Unavailable:
    return Unavailable("unavailable", "blocks are not saved", why, "the caller goes on without")
