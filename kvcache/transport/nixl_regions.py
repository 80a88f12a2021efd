"""Which memory is registered with NIXL, and which registration a piece lies in. Decides only; for one loop.

    wanted ── the thread has pinned it ──► ready: pieces in it have places ── forget ──► gone
       └── refused, or forget ─────────────────────────────────────────────────────────► gone

NIXL refuses a span that a peer knows already when its key is another, and forgets the peer over it. So each
registration has a number of its own, told to NIXL as the memory's device, which host memory has none of:
what is registered anew is new to every peer, and what peers still know of it is found no more.

The sum: a piece's place is one search among the starts, 1 us.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvcache.transport.nixl_rounds import SMALL, Place

REGIONS_MAX = 4_096
"""So many at a time; what is more goes through buffers. A description of them all fits a frame: 44 bytes
each, and the keys of each network card."""


def address_of(view: memoryview) -> int:
    """REQUIRES: flat, not empty."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One registration. ``memory`` keeps it mapped until it is undone."""

    start: int
    device: int
    memory: memoryview

    @property
    def row(self) -> tuple[int, int, int, str]:
        """As NIXL wants it."""
        return self.start, len(self.memory), self.device, ""


class Regions:
    """By start: none has two."""

    def __init__(self) -> None:
        self._by_start: dict[int, Region] = {}
        self._ready: list[int] = []
        self._devices = itertools.count(SMALL + 1)

    def want(self, memory: memoryview) -> Region | None:
        """To be pinned. None: it is already, or there are too many."""
        start = address_of(memory)
        if start in self._by_start or len(self._by_start) >= REGIONS_MAX:
            return None
        region = self._by_start[start] = Region(start, next(self._devices), memory)
        return region

    def pinned(self, region: Region) -> bool:
        """It is: pieces in it have places from now on. False: it was forgotten meanwhile."""
        if self._by_start.get(region.start) is not region:
            return False
        insort(self._ready, region.start)
        return True

    def refused(self, region: Region) -> None:
        """It cannot be pinned. Nothing when it was forgotten meanwhile."""
        if self._by_start.get(region.start) is region:
            del self._by_start[region.start]

    def forget(self, memory: memoryview) -> Region | None:
        """No piece in it has a place any more. What is to be undone, if anything."""
        region = self._by_start.pop(address_of(memory), None)
        if region is not None and region.start in self._ready:
            self._ready.remove(region.start)
        return region

    def places(self, pieces: Iterable[memoryview]) -> list[Place]:
        """None at all when one of them is not in registered memory."""
        found: list[Place] = []
        for piece in pieces:
            at = address_of(piece)
            before = bisect_right(self._ready, at)
            region = self._by_start[self._ready[before - 1]] if before else None
            if region is None or at + len(piece) > region.start + len(region.memory):
                return []
            found.append((at, region.device))
        return found
