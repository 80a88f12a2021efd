"""Seconds to the first token by tier and prompt as one self-contained SVG, both axes logarithmic.

Written by hand, so that the same figures give the same file without a plotting library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 744, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 214, 56, 56

# Colours that differ for colour-blind eyes too (Okabe and Ito), from the slowest to the nearest.
LOOKS = {
    "recompute": ("#000000", "computed again"),
    "node_nvme": ("#d55e00", "NVMe, through the node"),
    "node_host": ("#e69f00", "host memory, through the node"),
    "node_hbm": ("#cc79a7", "HBM, through the node"),
    "host": ("#0072b2", "host memory, by the GPU"),
    "hbm": ("#009e73", "HBM"),
}


def svg(times: Mapping[str, Sequence[tuple[int, float]]], caption: str) -> str:
    """``times``: of each tier, (tokens, seconds). REQUIRES: at least one, all above 0."""
    everything = [point for points in times.values() for point in points]
    across = _Scale([tokens for tokens, _ in everything], LEFT, WIDTH - RIGHT)
    up = _Scale([seconds for _, seconds in everything], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" font-size="11">',
        "<title>Time to the first token by tier</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14">Time to the first token, by where the KV came from</text>',
        f'<text x="{LEFT}" y="40" fill="#666666">{escape(caption[:110])}</text>',
        *_axes(across, up, sorted({tokens for tokens, _ in everything})),
    ]
    shown = [tier for tier in LOOKS if tier in times]
    for number, tier in enumerate(shown):
        parts += _line(across, up, times[tier], *LOOKS[tier], TOP + 14 + 20 * number)
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """From a value to a place, logarithmic, with some room on both sides."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = log10(min(values)) - 0.1, log10(max(values)) + 0.1
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        return self._start + (self._end - self._start) * (log10(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        decades = range(floor(self.low), floor(self.high) + 1)
        each = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        return [value for value in each if self.low <= log10(value) <= self.high]


def _axes(across: _Scale, up: _Scale, tokens: Sequence[int]) -> Iterator[str]:
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    yield (
        f'<rect x="{left}" y="{TOP}" width="{right - left}" height="{bottom - TOP}" fill="none" '
        'stroke="#444444"/>'
    )
    for value in up.ticks():
        place = up.at(value)
        words = f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"
        yield f'<line x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}" stroke="#e6e6e6"/>'
        yield f'<text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end">{words}</text>'
    for value in tokens:
        place = across.at(value)
        yield f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{bottom}" stroke="#e6e6e6"/>'
        yield f'<text x="{place:.1f}" y="{bottom + 16}" text-anchor="middle">{value:,}</text>'
    middle = (left + right) / 2
    yield f'<text x="{middle:g}" y="{bottom + 36}" text-anchor="middle">tokens of the prompt</text>'


def _line(
    across: _Scale, up: _Scale, points: Sequence[tuple[int, float]], colour: str, name: str, legend_y: int
) -> Iterator[str]:
    places = [(across.at(tokens), up.at(seconds)) for tokens, seconds in sorted(points)]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for x, y in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    x = WIDTH - RIGHT + 12
    yield f'<circle cx="{x}" cy="{legend_y - 4}" r="4" fill="{colour}"/>'
    yield f'<text x="{x + 10}" y="{legend_y}">{escape(name)}</text>'
