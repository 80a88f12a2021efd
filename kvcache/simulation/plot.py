"""The comparison as one self-contained SVG: a panel a trace, hit rate across, the time to the first token up.

    better is to the right and down; the time is on a logarithmic scale; the dashed line is the ideal hit rate

Written by hand, so that the same figures give the same file, byte for byte, without a plotting library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

from kvcache.simulation.report import Figures
from kvcache.simulation.run import OURS, ROUTERS

WIDTH, HEIGHT = 460, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 46, 48
LEGEND = 46
COLUMNS = 2
_MARK = 5.5

_Box = tuple[float, float, float, float]
_Place = tuple[float, float, str]

# Colours that differ for colour-blind eyes too (Okabe and Ito), and shapes, so that neither is needed alone.
_LOOKS = {
    "random": ("#999999", "circle"),
    "round-robin": ("#999999", "square"),
    "least-loaded": ("#999999", "triangle"),
    "sticky-prefix": ("#e69f00", "circle"),
    "sticky-session": ("#e69f00", "square"),
    "approximate": ("#56b4e9", "circle"),
    "exact-default": ("#0072b2", "square"),
    "exact": ("#d55e00", "star"),
    "oracle": ("#000000", "triangle"),
}
_CAPTION = "Time to first token (99th percentile) against hit rate: better is to the right and down"


@dataclass(frozen=True, slots=True)
class Scale:
    """From a value to a place on an axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, here = self.low, self.high, value
        if self.log:
            low, high, here = log10(low), log10(high), log10(value)
        return self.start + (self.end - self.start) * (here - low) / (high - low)


def svg(rows: Sequence[Figures]) -> str:
    """The picture of these figures, any number of traces. REQUIRES: at least one."""
    traces = list(dict.fromkeys(each.trace for each in rows))
    columns = min(COLUMNS, len(traces))
    lines = -(-len(traces) // columns)
    width = max(columns * WIDTH, 2 * WIDTH)
    height = 30 + lines * HEIGHT + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f"<title>{_CAPTION}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{width / 2:g}" y="20" text-anchor="middle" font-size="14">{_CAPTION}</text>',
    ]
    for number, trace in enumerate(traces):
        left, top = number % columns * WIDTH, 30 + number // columns * HEIGHT
        parts.append(f'<g transform="translate({left},{top})">')
        parts += _panel([each for each in rows if each.trace == trace])
        parts.append("</g>")
    shown = [name for name in ROUTERS if any(each.router == name for each in rows)]
    parts += _legend(shown, width, height - LEGEND)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(rows: Sequence[Figures]) -> Iterator[str]:
    ideal = rows[0].ideal_tokens
    times = [max(each.ttft_p99, 1e-3) for each in rows]
    across = Scale(0.0, _ceiling(max([ideal, *(each.hit_tokens for each in rows)])), LEFT, WIDTH - RIGHT)
    up = Scale(min(times) / 1.3, max(times) * 1.3, HEIGHT - BOTTOM, TOP, log=True)
    yield (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{TOP - 22}" text-anchor="middle" font-size="12" '
        f'font-weight="bold">{escape(rows[0].trace)}</text>'
    )
    yield (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{TOP - 8}" text-anchor="middle" fill="#666666">'
        f"{rows[0].requests:,} requests, {rows[0].workers} workers</text>"
    )
    yield from _axes(across, up)
    yield (
        f'<line x1="{across.at(ideal):.1f}" x2="{across.at(ideal):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
        'stroke="#009e73" stroke-dasharray="4 3"/>'
    )
    yield (
        f'<text x="{across.at(ideal) - 4:.1f}" y="{TOP + 12}" text-anchor="end" fill="#009e73">'
        f"ideal {ideal:.1%}</text>"
    )
    points = [
        (each.router, across.at(each.hit_tokens), up.at(time)) for each, time in zip(rows, times, strict=True)
    ]
    yield from _marks(points, across.at(ideal))


def _axes(across: Scale, up: Scale) -> Iterator[str]:
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    yield (
        f'<rect x="{left}" y="{TOP}" width="{right - left}" height="{bottom - TOP}" fill="none" '
        'stroke="#444444"/>'
    )
    for value in _ticks(up.low, up.high):
        place = up.at(value)
        yield f'<line x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}" stroke="#e6e6e6"/>'
        yield f'<text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end">{value:g} s</text>'
    step = _step(across.high)
    for number in range(round(across.high / step) + 1):
        place = across.at(number * step)
        yield f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{bottom}" stroke="#e6e6e6"/>'
        yield (
            f'<text x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{100 * number * step:.0f} %</text>'
        )
    middle = (left + right) / 2
    yield f'<text x="{middle:g}" y="{bottom + 32}" text-anchor="middle">prompt tokens found cached</text>'
    height = (TOP + bottom) / 2
    yield (
        f'<text x="14" y="{height:g}" text-anchor="middle" transform="rotate(-90 14 {height:g})">'
        "time to first token, p99</text>"
    )


def _marks(points: Sequence[tuple[str, float, float]], line: float) -> Iterator[str]:
    """Each with its name beside it, where no other name or mark is near; if it can be, off the line across
    ``line`` too. A name that has no place is in the legend."""
    marks = {name: (x - 11, y - 8, x + 11, y + 8) for name, x, y in points}
    ruled: list[_Box] = [(line - 1, TOP, line + 1, HEIGHT - BOTTOM), (line - 70, TOP, line, TOP + 15)]
    names: list[_Box] = []
    for name, x, y in sorted(points, key=lambda point: point[0] != OURS):
        yield _mark(name, x, y)
        near = [box for other, box in marks.items() if other != name] + names
        place = _place(name, x, y, near + ruled) or _place(name, x, y, near)
        if place is None:
            continue
        dx, dy, anchor = place
        names.append(_box(name, x, y, place))
        weight = ' font-weight="bold"' if name == OURS else ""
        yield f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}"{weight}>{escape(name)}</text>'


def _place(name: str, x: float, y: float, near: Sequence[_Box]) -> _Place | None:
    """The first of ``_PLACES`` that is free."""
    for place in _PLACES:
        box = _box(name, x, y, place)
        if _inside(box) and not any(_cross(box, each) for each in near):
            return place
    return None


def _box(name: str, x: float, y: float, place: _Place) -> _Box:
    dx, dy, anchor = place
    wide = 6.0 * len(name)
    start = x + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return (start, y + dy - 9, start + wide, y + dy + 2)


_PLACES: tuple[_Place, ...] = (
    (9, 4, "start"),
    (-9, 4, "end"),
    (0, -10, "middle"),
    (0, 18, "middle"),
    (9, -9, "start"),
    (9, 16, "start"),
    (-9, -9, "end"),
    (-9, 16, "end"),
)


def _inside(box: _Box) -> bool:
    return box[0] > LEFT and box[2] < WIDTH - RIGHT and box[1] > TOP and box[3] < HEIGHT - BOTTOM


def _cross(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _mark(name: str, x: float, y: float) -> str:
    colour, shape = _LOOKS[name]
    fill = f'fill="{colour}" fill-opacity="0.85" stroke="#ffffff" stroke-width="0.8"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_MARK - 0.5}" {fill}/>'
    if shape == "square":
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" {fill}/>'
    corners = _STAR if shape == "star" else ((0, -1.15), (1.05, 0.8), (-1.05, 0.8))
    size = _MARK * (1.5 if shape == "star" else 1)
    path = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" {fill}/>'


_STAR = (
    (0, -1),
    (0.24, -0.32),
    (0.95, -0.31),
    (0.38, 0.12),
    (0.59, 0.81),
    (0, 0.4),
    (-0.59, 0.81),
    (-0.38, 0.12),
    (-0.95, -0.31),
    (-0.24, -0.32),
)


def _legend(names: Sequence[str], width: int, top: int) -> Iterator[str]:
    columns = min(5, len(names))
    wide = (width - 2 * LEFT) / columns
    for number, name in enumerate(names):
        x = LEFT + number % columns * wide
        y = top + 12 + number // columns * 18
        yield _mark(name, x, y)
        label = f"{name} (this project)" if name == OURS else name
        yield f'<text x="{x + 11:.1f}" y="{y + 4}">{escape(label)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in between."""
    powers = range(floor(log10(low)), floor(log10(high)) + 1)
    values = [round(lead * 10.0**power, 6) for power in powers for lead in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


def _step(high: float) -> float:
    return 0.05 if high <= 0.3 else 0.1 if high <= 0.6 else 0.2


def _ceiling(share: float) -> float:
    """A little more than ``share``, a whole number of steps."""
    wanted = min(1.0, share * 1.08 + 0.005)
    step = _step(wanted)
    return max(step, -(-wanted // step) * step)
