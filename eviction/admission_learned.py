"""Learns which blocks that fall out of memory are wanted again, and picks as many as may be written.

A block's class is how often it was used, how much of its prompt was found when it was computed, and how
much was not: a long first prompt, a short next turn. Of each class it is counted how many blocks fell, and
how many of these were wanted before as much was written below as fits there; old counts fade. The classes
are ranked by the share that was wanted, and the best are written, up to ``share`` of all that falls; of
the class at the border every other branch, or every third, so that some are whole.

Whatever is not written is counted as well, so a class is never shut out for want of news of it.

The sum: 1 us a block that falls or is missing, and 100 us for each 512 that fell.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    def __init__(self, block_count: int, share: float, capacity: int) -> None:
        self._share = share
        self._capacity = capacity
        self._written = 0
        self._fell_at = [0] * block_count  # How much had been written when it fell.
        self._made: list[_Class] = [_UNKNOWN] * block_count
        self._fallen: list[Counts | None] = [None] * block_count  # The class it fell in, until it is wanted.
        self._classes: dict[_Class, Counts] = {}
        self._since = 0

    def computed(self, blocks: Sequence[int], found: int) -> None:
        """These were, behind ``found`` blocks of a prompt that were not."""
        made = (0, _bits(found), _bits(len(blocks)))
        for block in blocks:
            self._made[block] = made

    def wanted(self, blocks: Sequence[int]) -> None:
        """These are, and memory has not got them."""
        fallen = self._fallen
        for block in blocks:
            if (counts := fallen[block]) is not None:
                fallen[block] = None
                if self._written - self._fell_at[block] <= self._capacity:
                    counts.wanted += 1

    def fell(self, branch: Sequence[int], touches: Sequence[int]) -> int:
        """How many leading blocks of this chain, which memory lets go, are worth writing."""
        found = [self._class(block, touches[block]) for block in branch]
        for block, counts in zip(branch, found, strict=True):
            counts.fell += 1
            self._fallen[block] = counts
            self._fell_at[block] = self._written
        self._since += len(branch)
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
        """So many blocks, below."""
        self._written += count

    def _class(self, block: int, touches: int) -> Counts:
        _, found, missing = self._made[block]
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
    return block * 0.6180339887498949 % 1.0
