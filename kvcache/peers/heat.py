"""Which prefixes are used often: uses within a minute, counted at marks along each path.

    blocks of a path   1 2 3 4 5 6 7 8  10  12  14  16  20 ...  last
    marks              x x x x x x x x   x   x   x   x   x        x      four an octave, and the end

Prompts that begin alike use the same marks up to where they part, so the deepest mark that is hot is, to a
quarter of its depth, the prefix that they share.

The count is that of a sliding window, from two fixed ones (the older weighs by what of it is still
inside); it is off by no more than the older window's uses being unevenly spread.

Invariants: at most ``MARKS_MAX`` marks are counted in a window; a mark is hot once a window.

The sum: 0.4 us a mark, 50 marks for a path of 8,000 blocks; 100 bytes a mark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S

WINDOW_NS = 60 * NS_PER_S
MARKS_MAX = 65_536


class Heat:
    """One owner. Takes the time, keeps no clock."""

    def __init__(self, hits: int) -> None:
        """``hits``: uses within a minute that make a prefix hot."""
        assert hits >= 1
        self._hits = hits
        self._began_ns = 0
        self._now: dict[StorageKey, int] = {}
        self._before: dict[StorageKey, int] = {}
        self._told: set[StorageKey] = set()

    def used(self, path: Sequence[StorageKey], now_ns: int) -> int:
        """A request used this path. How many leading blocks of it have just become hot; 0: none anew."""
        self._turn(now_ns)
        share = 1 - (now_ns - self._began_ns) / WINDOW_NS
        hot = 0
        for mark in marks(len(path)):
            key = path[mark - 1]
            count = self._now.get(key, 0) + 1
            if count > 1 or len(self._now) < MARKS_MAX:
                self._now[key] = count
            if count + self._before.get(key, 0) * share >= self._hits and key not in self._told:
                self._told.add(key)
                hot = mark
        return hot

    def _turn(self, now_ns: int) -> None:
        windows = (now_ns - self._began_ns) // WINDOW_NS
        if windows > 0:
            self._before = self._now if windows == 1 else {}
            self._now = {}
            self._told.clear()
            self._began_ns += windows * WINDOW_NS


def marks(length: int) -> Iterator[int]:
    """The marked depths of a path of so many blocks, from 1 on, its end included."""
    depth = 1
    while depth < length:
        yield depth
        depth += max(1, 1 << max(0, depth.bit_length() - 3))
    if length:
        yield length
