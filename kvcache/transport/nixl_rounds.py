"""Cutting a transfer into rounds, and the small buffers that stand in for memory that is not registered.

A transfer is its pieces in a row, ``sum(sizes)`` bytes; a round is a part of that row, at most so many
bytes; a cut is the part of one piece that a round holds. Both sides know the sizes, so a round is told by
its start and length.

The sum: 1 us a piece; a slot is 1 MiB, and a round through one costs a copy of it (100 us) on each side that
is not registered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SLOT_BYTES = 1 << 20
SLOT_COUNT = 8

Place = tuple[int, int]
"""Address, and the number of the registration that it lies in (``nixl_regions``)."""
Span = tuple[int, int, int]
"""Address, length, and the number of the registration."""
SMALL = 0
"""That of the buffers which each agent is made with."""


@dataclass(frozen=True, slots=True)
class Cut:
    piece: int
    start: int
    length: int


def rounds(sizes: Sequence[int], round_bytes: int) -> Iterator[tuple[int, list[Cut]]]:
    """Where each round starts in the row, and its cuts. No round is empty nor over ``round_bytes``."""
    start, room = 0, round_bytes
    cuts: list[Cut] = []
    for piece, size in enumerate(sizes):
        at = 0
        while at < size:
            length = min(size - at, room)
            cuts.append(Cut(piece, at, length))
            at += length
            room -= length
            if room == 0:
                yield start, cuts
                start, room, cuts = start + round_bytes, round_bytes, []
    if cuts:
        yield start, cuts


def length_of(cuts: Sequence[Cut]) -> int:
    return sum(cut.length for cut in cuts)


def apart(places: Sequence[Place], cuts: Sequence[Cut]) -> list[Span]:
    """The cuts where the pieces are."""
    return [(places[cut.piece][0] + cut.start, cut.length, places[cut.piece][1]) for cut in cuts]


def in_a_row(place: int, cuts: Sequence[Cut]) -> list[Span]:
    """The cuts one behind the other in a small buffer, from ``place``."""
    spans: list[Span] = []
    for cut in cuts:
        spans.append((place, cut.length, SMALL))
        place += cut.length
    return spans


def gather(pieces: Sequence[memoryview], start: int, target: memoryview) -> None:
    """Fill ``target`` from the row of pieces. REQUIRES: the row has so many bytes from ``start``."""
    at = 0
    for piece in pieces:
        if at == len(target):
            return
        if start >= len(piece):
            start -= len(piece)
            continue
        part = piece[start : start + len(target) - at]
        target[at : at + len(part)] = part
        at += len(part)
        start = 0


def scatter(source: memoryview, cuts: Sequence[Cut], pieces: Sequence[memoryview]) -> None:
    """From a row into the pieces."""
    at = 0
    for cut in cuts:
        pieces[cut.piece][cut.start : cut.start + cut.length] = source[at : at + cut.length]
        at += cut.length


@dataclass(frozen=True, slots=True)
class Slot:
    place: int
    view: memoryview


class Slots:
    """Small registered buffers, for whoever comes first. For one loop."""

    def __init__(self, memory: memoryview, place: int, slot_bytes: int) -> None:
        """REQUIRES: ``memory`` is a multiple of ``slot_bytes`` long and lies at ``place``."""
        self._free = deque(
            Slot(place + at, memory[at : at + slot_bytes]) for at in range(0, len(memory), slot_bytes)
        )
        self._waiting: deque[asyncio.Future[Slot]] = deque()

    async def take(self) -> Slot:
        if self._free:
            return self._free.popleft()
        granted: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(granted)
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.give(granted.result())
            raise

    def give(self, slot: Slot) -> None:
        while self._waiting:
            granted = self._waiting.popleft()
            if not granted.done():
                granted.set_result(slot)
                return
        self._free.append(slot)


@dataclass(slots=True, eq=False)
class Path:
    """To one peer's serving agent. ``descriptions``: what he has told of it, from the first. ``generation``:
    of the reading agent that knows ``met`` of them, 0 for none."""

    descriptions: list[bytes]
    name: str = ""
    generation: int = 0
    met: int = 0


@dataclass(slots=True, eq=False)
class Flight:
    """One round. ``request`` 0: nothing is in flight."""

    path: Path
    local: Sequence[Span]
    remote: Sequence[Span]
    request: int = 0
    lists: list[int] = field(default_factory=list)
    is_done: bool = False
    is_unmet: bool = False
    is_dropped: bool = False
    error: str = ""

    @property
    def is_over(self) -> bool:
        return self.is_done or self.is_unmet or bool(self.error)
