"""Answers of the locality index: columns, one answer a line, and what the numbers in them mean.

    source  namespace  blocks  hbm  host  nvme  placed        u32 each
      3         0        64     0    64    10      0          holds the first 64 blocks
      4         0        12    12     0     0     20          20 more are predicted: placed there just now

The sum: 0.5 us for what the native index found, however many answers; 0.15 us an answer where placements
are joined to them, or answers are filtered.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from kvcache.block import NamespaceId
from kvcache.index import TIER_COUNT, Match

COLUMNS = 3 + TIER_COUNT

_PLACED = COLUMNS - 1
_NOBODY = NamespaceId(b"")

Namespaces = Container[bytes]


@dataclass(frozen=True, slots=True)
class Located:
    """One shard's leading blocks: ``blocks`` in the union of its tiers, up to the first hole, how many of
    these each of ``TIERS`` has, and how many more are predicted."""

    source: str
    namespace: NamespaceId
    blocks: int
    tiers: tuple[int, ...]
    placed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Names:
    """What the numbers of one time mean. None of it changes, but ``namespaces`` grows."""

    sources: Mapping[int, str]
    namespaces: Mapping[int, NamespaceId]
    suspects: frozenset[int]
    """Numbers of the sources whose word is not current."""


class Found:
    """What ``LocalityIndex.match`` found. Who holds nothing of the prompt is not in it."""

    __slots__ = ("names", "table")

    def __init__(self, table: memoryview, names: Names) -> None:
        self.table = table
        """All of it, u32, ``COLUMNS`` values an answer."""
        self.names = names

    def __len__(self) -> int:
        return len(self.table) // COLUMNS

    @property
    def sources(self) -> memoryview:
        """Their numbers."""
        return self.table[0::COLUMNS]

    @property
    def namespaces(self) -> memoryview:
        """Their numbers."""
        return self.table[1::COLUMNS]

    @property
    def blocks(self) -> memoryview:
        """How many leading blocks it holds, in the union of the tiers that were asked for."""
        return self.table[2::COLUMNS]

    @property
    def placed(self) -> memoryview:
        """How many blocks beyond these are predicted. No block is counted that the source told of."""
        return self.table[_PLACED::COLUMNS]

    def tier(self, tier: int) -> memoryview:
        """How many of the blocks are in this one of ``TIERS``."""
        assert 0 <= tier < _PLACED - 3, tier
        return self.table[3 + tier :: COLUMNS]

    @property
    def suspect(self) -> bytes:
        """One byte an answer: 1 when the source's word is not current."""
        suspects = self.names.suspects
        return bytes([number in suspects for number in self.sources])

    def source(self, at: int) -> str:
        """The name in answer ``at``; empty where it was forgotten meanwhile."""
        return self.names.sources.get(self.table[at * COLUMNS], "")

    def namespace(self, at: int) -> NamespaceId:
        """The namespace in answer ``at``; empty where it was forgotten meanwhile."""
        return self.names.namespaces.get(self.table[at * COLUMNS + 1], _NOBODY)

    def located(self) -> list[Located]:
        """All of it as values. Slower than the columns."""
        found = []
        for at, (_, _, blocks, *tiers, placed) in enumerate(lines_of(self.table)):
            source, namespace = self.source(at), self.namespace(at)
            if source and namespace:
                found.append(Located(source, namespace, blocks, tuple(tiers), placed))
        return found


def lines_of(table: memoryview) -> list[list[int]]:
    """An answer a line."""
    values = table.tolist()
    return [values[at : at + COLUMNS] for at in range(0, len(values), COLUMNS)]


def joined(exact: memoryview, placed: Match) -> memoryview:
    """``exact`` with what ``placed`` predicts beyond it, and lines for what is predicted only."""
    rows = array("I")
    rows.frombytes(exact.tobytes())
    lines = {pair: at for at, pair in enumerate(zip(exact[0::COLUMNS], exact[1::COLUMNS], strict=True))}
    for source, namespace, blocks in zip(placed.workers, placed.dp_ranks, placed.blocks, strict=True):
        line = lines.get((source, namespace))
        if line is None:
            rows.extend((source, namespace, 0, 0, 0, 0, blocks))
        elif blocks > rows[line * COLUMNS + 2]:
            rows[line * COLUMNS + _PLACED] = blocks - rows[line * COLUMNS + 2]
    return memoryview(rows).toreadonly()


def within(table: memoryview, names: Names, namespaces: Namespaces) -> memoryview:
    """The lines of these namespaces."""
    ids = names.namespaces
    others = {number for number in set(table[1::COLUMNS]) if ids.get(number, _NOBODY) not in namespaces}
    if not others:
        return table
    return _table(line for line in lines_of(table) if line[1] not in others)


def best(table: memoryview, limit: int) -> memoryview:
    """The ``limit`` lines with the most blocks, predicted ones too; of equals the lowest numbers."""
    if len(table) <= limit * COLUMNS:
        return table
    lines = lines_of(table)
    lines.sort(key=lambda line: (-line[2] - line[_PLACED], line[0], line[1]))
    return _table(lines[:limit])


def _table(lines: Iterable[list[int]]) -> memoryview:
    return memoryview(array("I", chain.from_iterable(lines))).toreadonly()
