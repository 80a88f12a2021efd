"""One chain of the structure in Python: blocks that follow one another, and who holds which part of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

RUN_BLOCKS_MAX = 16_384

Holders = frozenset[int]  # Each TIER_COUNT * row + tier.


class Chain:
    """Blocks that follow one another (``linked``), and their spans: where each ends, and its holders."""

    __slots__ = ("ends", "ghosts", "hashes", "linked", "sets")

    def __init__(self, linked: bool) -> None:
        self.hashes: list[int] = []
        self.ends: list[int] = []
        self.sets: list[Holders] = []
        self.ghosts = 0
        self.linked = linked

    def spans(self) -> Iterator[tuple[int, int, Holders]]:
        start = 0
        for end, holders in zip(self.ends, self.sets, strict=True):
            yield start, end, holders
            start = end

    def pieces(self, holder: int) -> Iterator[list[int]]:
        """Its blocks, as runs of at most RUN_BLOCKS_MAX."""
        longest = RUN_BLOCKS_MAX if self.linked else 1
        held = ((start, end) for start, end, holders in self.spans() if holder in holders)
        joined: list[list[int]] = []
        for start, end in held:
            if joined and joined[-1][1] == start:
                joined[-1][1] = end
            else:
                joined.append([start, end])
        for start, end in joined:
            for at in range(start, end, longest):
                yield self.hashes[at : min(at + longest, end)]

    def equal_run(self, offset: int, query: Sequence[int], place: int, exact: bool) -> int:
        """How many blocks of ``query`` from ``place`` on are these. REQUIRES: the first is."""
        longest = min(len(self.hashes) - offset, len(query) - place)
        if exact or not self.linked:
            run = 1
            while run < longest and self.hashes[offset + run] == query[place + run]:
                run += 1
            return run
        if self.hashes[offset + longest - 1] == query[place + longest - 1]:
            return longest
        equal, unequal = 0, longest - 1
        while unequal - equal > 1:
            middle = (equal + unequal) // 2
            if self.hashes[offset + middle] == query[place + middle]:
                equal = middle
            else:
                unequal = middle
        return equal + 1
