"""Curves as characters, for a terminal: hit ratio upwards, size to the right, each size ten times further."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

MARKS = "*o+x#@%&"
_WIDTH, _HEIGHT = 64, 16
_LEFT = 6

Column = Callable[[float], int]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve and its name. REQUIRES: points are (size over 0, ratio), sizes rise."""

    name: str
    points: Sequence[tuple[float, float]]


def draw(lines: Sequence[Line], labels: Sequence[tuple[float, str]]) -> str:
    """Where curves meet, the first is seen. ``labels`` are sizes to name under the picture.
    REQUIRES: some line has a point."""
    sizes = [size for line in lines for size, _ in line.points]
    low, high = math.log(min(sizes)), math.log(max(sizes))
    top = _top(max(ratio for line in lines for _, ratio in line.points))
    rows = [[" "] * _WIDTH for _ in range(_HEIGHT)]

    def column(size: float) -> int:
        if high <= low:
            return 0
        return min(_WIDTH - 1, max(0, round((math.log(size) - low) / (high - low) * (_WIDTH - 1))))

    for line, mark in reversed(list(zip(lines, _marks(len(lines)), strict=True))):
        for at, ratio in _steps(line.points, column):
            rows[_HEIGHT - 1 - min(_HEIGHT - 1, int(ratio / top * _HEIGHT))][at] = mark
    heights = [f"{top * (_HEIGHT - at) / _HEIGHT:.0%}" if not at % 4 else "" for at in range(_HEIGHT)]
    drawn = [
        f"{height:>{_LEFT - 1}}|{''.join(row)}".rstrip() for height, row in zip(heights, rows, strict=True)
    ]
    legend = "   ".join(f"{mark} {line.name}" for line, mark in zip(lines, _marks(len(lines)), strict=True))
    return "\n".join(
        [*drawn, f"{'0%':>{_LEFT - 1}}+{'-' * _WIDTH}", _axis(labels, column), "", " " * _LEFT + legend, ""]
    )


def _marks(count: int) -> list[str]:
    return [MARKS[at % len(MARKS)] for at in range(count)]


def _top(ratio: float) -> float:
    """A round number just above."""
    return next(top for top in (0.02, 0.04, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if ratio <= top or top == 1.0)


def _steps(points: Sequence[tuple[float, float]], column: Column) -> list[tuple[int, float]]:
    """A height for each column from the first point to the last, straight between points."""
    found: list[tuple[int, float]] = []
    for (size, ratio), (next_size, next_ratio) in pairwise(points):
        start, end = column(size), column(next_size)
        found += [
            (at, ratio + (next_ratio - ratio) * (at - start) / max(end - start, 1))
            for at in range(start, end)
        ]
    size, ratio = points[-1]
    return [*found, (column(size), ratio)]


def _axis(labels: Sequence[tuple[float, str]], column: Column) -> str:
    """As many labels as there is room for."""
    line = ""
    for size, text in labels:
        start = max(0, _LEFT + column(size) - len(text) // 2)
        if start > len(line) or not line:
            line = line.ljust(start) + text
    return line
