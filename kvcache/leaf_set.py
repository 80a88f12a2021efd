"""A set of blocks to draw from evenly: adding, discarding and drawing cost the same however many there are.

Invariant (``check``): each block knows its place in the list, and the list has no others.
"""

from __future__ import annotations

from random import Random


class LeafSet:
    def __init__(self) -> None:
        self._blocks: list[int] = []
        self._place: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._place

    def add(self, block: int) -> None:
        """REQUIRES: it is not in the set."""
        self._place[block] = len(self._blocks)
        self._blocks.append(block)

    def discard(self, block: int) -> None:
        """Nothing happens when it is not in the set."""
        place = self._place.pop(block, None)
        if place is None:
            return
        last = self._blocks.pop()
        if last != block:
            self._blocks[place] = last
            self._place[last] = place

    def sample(self, count: int, random: Random) -> list[int]:
        """At most ``count``, evenly drawn, with repeats; all of them when there are no more."""
        if len(self._blocks) <= count:
            return list(self._blocks)
        return [self._blocks[int(random.random() * len(self._blocks))] for _ in range(count)]

    def check(self) -> None:
        assert len(self._place) == len(self._blocks)
        for place, block in enumerate(self._blocks):
            assert self._place[block] == place
