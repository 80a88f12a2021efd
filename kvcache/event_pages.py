"""A snapshot: all that a source holds at one moment, in pages that are made one by one.

    Part = what one namespace has in one tier: hashes (u64), and the lengths of their runs (u16)
    [ Part | Part | Part ]  cut into pages ──►  EventBatch left 2, 1, 0

The parts are copies, so whoever takes long sees the moment of the copy. A run that is cut in two goes on with
the hash before it as parent; one at the start of a part has none: nobody needs it.

The sum: 8 bytes a block and at most 2 a run, and nearly all runs of one block cost nothing, so never over
10 bytes a block; copying a million blocks takes 1 to 4 ms in runs of 64 and of 8, a page 1 to 2 ms.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvcache.block import NamespaceId
from kvcache.wire import BlockEvent, EventBatch

PAGE_BYTES_MAX = 1 << 20
PAGE_ROOM_BYTES = PAGE_BYTES_MAX - 4_096
"""For its events; the rest is for what a batch says beside them."""
NAMESPACES_A_PAGE_MAX = 64
EVENTS_A_PAGE_MAX = 4_096

_MEMBER_BYTES_MAX = 10
_EVENT_BYTES_MAX = 160  # What an event costs beside its blocks: 118 measured; names of tiers are short.
_SINGLE = b"\x01\x00"
_WINDOW_RUNS = 4_096

NamespaceMap = dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Part:
    """What one namespace has in one tier, as ``Index.runs`` gives it."""

    namespace: NamespaceId
    tier: str
    hashes: memoryview
    lengths: memoryview


@dataclass(frozen=True, slots=True)
class _Piece:
    """These blocks of a part."""

    part: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Snapshot:
    """Everything a source held after its batch ``seq``."""

    source: str
    incarnation: int
    seq: int
    namespaces: Sequence[NamespaceMap]
    parts: Sequence[Part]
    digests: dict[str, bytes]

    def pages(self) -> Iterator[EventBatch]:
        """All of it, one at least; namespaces come first. Each page is made when it is asked for."""
        step = NAMESPACES_A_PAGE_MAX
        names = [self.namespaces[at : at + step] for at in range(0, len(self.namespaces), step)]
        plan = list(self._plan())
        left = len(names) + len(plan)
        if not left:
            yield self._page([], [], 0)
        for some in names:
            left -= 1
            yield self._page(list(some), [], left)
        cutters = [_Cutter(part.lengths) for part in self.parts]
        for pieces in plan:
            left -= 1
            yield self._page([], [self._event(piece, cutters[piece.part]) for piece in pieces], left)

    def _page(self, names: list[NamespaceMap], events: list[BlockEvent], left: int) -> EventBatch:
        digests = {} if left else self.digests
        return EventBatch(self.source, self.incarnation, self.seq, True, events, left, names, digests)

    def _plan(self) -> Iterator[list[_Piece]]:
        """Which blocks of which parts go into each page."""
        pieces: list[_Piece] = []
        room = PAGE_ROOM_BYTES
        for number, part in enumerate(self.parts):
            at = 0
            while at < len(part.hashes):
                fits = (room - _EVENT_BYTES_MAX) // _MEMBER_BYTES_MAX
                if fits < 1 or len(pieces) == EVENTS_A_PAGE_MAX:
                    yield pieces
                    pieces, room = [], PAGE_ROOM_BYTES
                    continue
                end = min(at + fits, len(part.hashes))
                pieces.append(_Piece(number, at, end))
                room -= _EVENT_BYTES_MAX + (end - at) * _MEMBER_BYTES_MAX
                at = end
        if pieces:
            yield pieces

    def _event(self, piece: _Piece, cutter: _Cutter) -> BlockEvent:
        part, count = self.parts[piece.part], piece.end - piece.start
        before = part.hashes[piece.start - 1 : piece.start].tobytes() if cutter.is_inside else b""
        hashes = part.hashes[piece.start : piece.end].tobytes()
        runs = _packed(cutter.take(count), count)
        return BlockEvent("stored", part.namespace, part.tier, before, hashes, runs)


class _Cutter:
    """The lengths of a part's runs, taken from the front, so many blocks at a time."""

    def __init__(self, lengths: memoryview) -> None:
        self._lengths = lengths
        self._at = 0
        self._rest = 0  # Of the run before ``_at``, which was cut.

    @property
    def is_inside(self) -> bool:
        """The next block goes on with a run that has begun."""
        return self._rest > 0

    def take(self, count: int) -> array[int]:
        """The lengths of the runs in the next ``count`` blocks. REQUIRES: there are so many."""
        taken: array[int] = array("H")
        if self._rest:
            part = min(self._rest, count)
            taken.append(part)
            self._rest -= part
            count -= part
        while count:
            window = self._lengths[self._at : self._at + _WINDOW_RUNS]
            ends = list(accumulate(window))
            whole = bisect_right(ends, count)
            taken.frombytes(window[:whole].tobytes())
            count -= ends[whole - 1] if whole else 0
            self._at += whole
            if whole < len(window) and count:
                taken.append(count)
                self._rest = window[whole] - count
                self._at += 1
                count = 0
        return taken


def _packed(lengths: array[int], count: int) -> bytes:
    """As ``BlockEvent.runs``. Where nearly all are of one block, the others are cut into such: it is as true,
    and takes less."""
    if len(lengths) == 1:
        return b""
    if 10 * len(lengths) > 9 * count:
        return _SINGLE
    if sys.byteorder == "big":
        lengths = array("H", lengths)
        lengths.byteswap()
    return lengths.tobytes()
