"""Learns which blocks that fall out of memory are wanted again, and picks as many as may be written.

A block's class is how often it was used, how much of its prompt was found when it was computed, and how
much was not: a long first prompt, a short next turn. Of each class it is counted how many blocks fell, and
how many of these were wanted before as much was written below as fits there; old counts fade. The classes
are ranked by the share that was wanted, and the best are written, up to ``share`` of all that falls; of
the class at the border every other branch, or every third, so that some are whole.

Whatever is not written is counted as well, so a class is never shut out for want of news of it.

A block is any number that names it. So many are remembered, ``entries_max`` at most; what was remembered
first is forgotten first.

The sum: 1 us a block that falls or is missing, and 100 us for each 512 that fell; 250 bytes a block that is
remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

_Class = tuple[int, int, int]
_TOUCHES_MAX, _BITS_MAX = 4, 8
_PRIOR = 64.0
_FADE, _REBUILD_BLOCKS = 0.98, 512
_UNKNOWN: _Class = (0, 0, 0)


class Counts:
    """``fell`` and ``wanted`` are weights, not counts: they fade."""

    __slots__ = ("fell", "taken", "wanted")

    def __init__(self) -> None:
        self.fell = self.wanted = 0.0
        self.taken = 1.0  # What share of it is written.


class LearnedAdmission:
    def __init__(self, entries_max: int, share: float, capacity: int) -> None:
        """``capacity``: how much fits below, in the unit of ``wrote``."""
        self._entries_max = entries_max
        self._share = share
        self._capacity = capacity
        self._written = 0
        self._made: OrderedDict[int, _Class] = OrderedDict()
        # The class it fell in, and how much had been written then; until it is wanted.
        self._fallen: OrderedDict[int, tuple[Counts, int]] = OrderedDict()
        self._classes: dict[_Class, Counts] = {}
        self._since = 0

    def computed(self, blocks: Sequence[int], found: int) -> None:
        """These were, behind ``found`` blocks of a prompt that were not."""
        made = (0, _bits(found), _bits(len(blocks)))
        for block in blocks:
            self._made[block] = made
        while len(self._made) > self._entries_max:
            self._made.popitem(last=False)

    def wanted(self, blocks: Sequence[int]) -> None:
        """These are, and memory has not got them."""
        fallen = self._fallen
        for block in blocks:
            if (fell := fallen.pop(block, None)) is not None:
                counts, written = fell
                if self._written - written <= self._capacity:
                    counts.wanted += 1

    def fell(self, branch: Sequence[int], touches: Callable[[int], int]) -> int:
        """How many leading blocks of this chain, which memory lets go, are worth writing. To ask again of one
        that was not used since counts for nothing."""
        found = [self._class(block, touches(block)) for block in branch]
        fallen = self._fallen
        for block, counts in zip(branch, found, strict=True):
            last = fallen.get(block)
            if last is None or last[0] is not counts:
                counts.fell += 1
                self._since += 1
                fallen[block] = counts, self._written
        while len(fallen) > self._entries_max:
            fallen.popitem(last=False)
        if self._since >= _REBUILD_BLOCKS:
            self._since = 0
            self._rebuild()
        taken = 0
        for counts in found:
            # One number a branch: so that of the class at the border, branches are whole.
            if counts.taken <= _spread(branch[0]):
                break
            taken += 1
        return taken

    def wrote(self, count: int) -> None:
        """So much, below."""
        self._written += count

    def _class(self, block: int, touches: int) -> Counts:
        _, found, missing = self._made.get(block, _UNKNOWN)
        name = (min(touches, _TOUCHES_MAX), found, missing)
        counts = self._classes.get(name)
        if counts is None:
            counts = self._classes[name] = Counts()
        return counts

    def _rebuild(self) -> None:
        every = list(self._classes.values())
        fell, wanted = sum(each.fell for each in every), sum(each.wanted for each in every)
        mean = wanted / fell if fell else 0.0
        left = self._share * fell
        for each in sorted(every, key=lambda each: -(each.wanted + _PRIOR * mean) / (each.fell + _PRIOR)):
            each.taken = max(0.0, min(1.0, left / each.fell)) if each.fell else 1.0
            left -= each.fell
            each.fell *= _FADE
            each.wanted *= _FADE


def _bits(count: int) -> int:
    return min(_BITS_MAX, count.bit_length())


def _spread(block: int) -> float:
    """A number from 0 to 1 for each block, evenly spread: 0.618... of the way on for the next one."""
    return (block & 0xFFFF_FFFF) * 0.6180339887498949 % 1.0
