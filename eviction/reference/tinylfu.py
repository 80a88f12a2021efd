"""W-TinyLFU over single blocks: a window of new ones, and a main part that takes only what is asked for more.

G. Einziger, R. Friedman and B. Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM Transactions
on Storage 13(4), 2017; shares as in the Caffeine library: window 1 %, of the main part 80 % protected.
How often a block was asked for is estimated by a count-min sketch of small counters, halved now and then.
"""

from __future__ import annotations

from collections import OrderedDict

_WINDOW_SHARE = 0.01
_PROTECTED_SHARE = 0.8
_COUNT_MAX = 15
_AGE_FACTOR = 10
_BITS_MAX = 26  # For as many blocks as a trace may have.
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_MASK = (1 << 64) - 1

_Queue = OrderedDict[int, None]


class Sketch:
    """How often numbers were seen, never too low between two halvings. All rows lie in one array."""

    def __init__(self, capacity: int) -> None:
        self._bits = min(_BITS_MAX, max(6, (4 * capacity - 1).bit_length()))
        self._counts = bytearray(len(_MULTIPLIERS) << self._bits)
        self._places: dict[int, tuple[int, ...]] = {}
        self._left = self._period = _AGE_FACTOR * capacity

    def add(self, number: int) -> None:
        counts, places = self._counts, self._of(number)
        lowest = min([counts[place] for place in places])
        if lowest < _COUNT_MAX:
            for place in places:
                if counts[place] == lowest:
                    counts[place] += 1
        self._left -= 1
        if not self._left:
            self._left = self._period
            self._counts = counts.translate(_HALVED)

    def count(self, number: int) -> int:
        counts = self._counts
        return min([counts[place] for place in self._of(number)])

    def _of(self, number: int) -> tuple[int, ...]:
        places = self._places.get(number)
        if places is None:
            places = self._places[number] = tuple(
                (row << self._bits) + (((number + 1) * multiplier & _MASK) >> (64 - self._bits))
                for row, multiplier in enumerate(_MULTIPLIERS)
            )
        return places


_HALVED = bytes(count // 2 for count in range(256))


class WTinyLfu:
    """A ``BlockPolicy``. Window, probation and protected are LRU queues."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._window_max = max(1, int(capacity * _WINDOW_SHARE))
        self._protected_max = int((capacity - self._window_max) * _PROTECTED_SHARE)
        self._sketch = Sketch(capacity)
        self._window: _Queue = OrderedDict()
        self._probation: _Queue = OrderedDict()
        self._protected: _Queue = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._window or block in self._protected or block in self._probation

    def __len__(self) -> int:
        return len(self._window) + len(self._protected) + len(self._probation)

    def use(self, block: int) -> bool:
        self._sketch.add(block)
        if block in self._window:
            self._window.move_to_end(block)
            return True
        if block in self._protected:
            self._protected.move_to_end(block)
            return True
        if block in self._probation:
            self._protect(block)
            return True
        self._window[block] = None
        if len(self._window) > self._window_max:
            self._admit(self._window.popitem(last=False)[0])
        return False

    def _protect(self, block: int) -> None:
        del self._probation[block]
        self._protected[block] = None
        if len(self._protected) > self._protected_max:
            self._probation[self._protected.popitem(last=False)[0]] = None

    def _admit(self, candidate: int) -> None:
        """It left the window. The main part takes it if there is room, or something there is worth less."""
        self._probation[candidate] = None
        if len(self) <= self._capacity:
            return
        queue = self._probation if len(self._probation) > 1 else self._protected
        victim = next(iter(queue), candidate)
        if self._sketch.count(candidate) > self._sketch.count(victim):
            del queue[victim]
        else:
            del self._probation[candidate]
