"""Charts as inline SVG: lines over a logarithmic or plain axis, and bars. Colours come from the page's style,
so that they follow light and dark; every text is escaped.

Series are told apart by colour and by dash, and the legend names both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 6
Down = Callable[[float], float]
_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 34
_BAR_HEIGHT, _BAR_GAP, _BAR_LEFT = 20, 8, 130
_CHAR = 7  # About as wide as a character of a label.


@dataclass(frozen=True, slots=True)
class Series:
    """REQUIRES: points rise in x."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """``ticks`` are (where, what is written there). ``mark`` is a place to draw a line at, with its name."""

    ticks: Sequence[tuple[float, str]]
    title: str
    logarithmic: bool = False
    mark: tuple[float, str] | None = None


def line_chart(title: str, series: Sequence[Series], axis: Axis) -> str:
    """Shares, 0 upwards. REQUIRES: some series has a point; on a logarithmic axis, all x are over 0."""
    xs = [x for each in series for x, _ in each.points]
    top = _round_up(max(y for each in series for _, y in each.points))
    low, high = min(xs), max(xs)

    def across(x: float) -> float:
        at = (_scaled(x, axis) - _scaled(low, axis)) / max(_scaled(high, axis) - _scaled(low, axis), 1e-9)
        return _LEFT + at * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_grid(top, down), _ticks([(across(x), text) for x, text in axis.ticks if low <= x <= high])]
    if axis.mark is not None and low <= axis.mark[0] <= high:
        parts.append(_mark(across(axis.mark[0]), axis.mark[1]))
    for at, each in enumerate(series):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in each.points)
        parts.append(f'<polyline class="line c{at % COLOURS}"{_dash(each)} points="{path}"/>')
        parts += [
            f'<circle class="dot c{at % COLOURS}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.5">'
            f"<title>{escape(each.name)}: {y:.1%}</title></circle>"
            for x, y in each.points
        ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_text(middle, _HEIGHT - 2, axis.title, "middle"))
    return _figure(title, _HEIGHT, parts) + _legend(series)


def bar_chart(title: str, bars: Sequence[tuple[str, float]]) -> str:
    """Shares of a whole, one under the other."""
    widest = max((share for _, share in bars), default=0.0) or 1.0
    room = _WIDTH - _BAR_LEFT - 60
    parts = []
    for at, (label, share) in enumerate(bars):
        y, length = at * (_BAR_HEIGHT + _BAR_GAP), room * share / widest
        base = y + _BAR_HEIGHT - 5
        parts += [
            _text(_BAR_LEFT - 8, base, label, "end"),
            f'<rect class="bar" x="{_BAR_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR_HEIGHT}"/>',
            _text(_BAR_LEFT + length + 6, base, f"{share:.1%}", "start"),
        ]
    return _figure(title, max(1, len(bars)) * (_BAR_HEIGHT + _BAR_GAP), parts)


def _figure(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<div class="wide"><svg viewBox="0 0 {_WIDTH} {height}" class="chart" role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg></div>'
    )


def _legend(series: Sequence[Series]) -> str:
    items = []
    for at, each in enumerate(series):
        key = f'<line class="line c{at % COLOURS}"{_dash(each)} x1="0" x2="24" y1="4" y2="4"/>'
        shown = f'<svg viewBox="0 0 24 8" class="key" aria-hidden="true">{key}</svg>'
        items.append(f"<li>{shown}{escape(each.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _dash(each: Series) -> str:
    return ' stroke-dasharray="5 4"' if each.dashed else ""


def _grid(top: float, down: Down) -> str:
    lines = []
    for step in range(5):
        y = down(top * step / 4)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(
            _text(_LEFT - 6, y + 4, f"{top * step / 4:.3g}" if top < 0.04 else f"{top * step / 4:.0%}", "end")
        )
    return "".join(lines)


def _ticks(places: Sequence[tuple[float, str]]) -> str:
    """As many as there is room for."""
    shown, end = [], -math.inf
    for x, text in places:
        half = len(text) * _CHAR / 2
        x = min(x, _WIDTH - half)
        if x - half > end:
            shown.append(_text(x, _HEIGHT - _BOTTOM + 15, text, "middle"))
            end = x + half + _CHAR
    return "".join(shown)


def _mark(x: float, name: str) -> str:
    anchor, shift = ("end", -5) if x > _WIDTH / 2 else ("start", 5)
    return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>' + _text(
        x + shift, _TOP + 12, name, anchor
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _scaled(x: float, axis: Axis) -> float:
    return math.log(x) if axis.logarithmic else x


def _round_up(share: float) -> float:
    return next((top for top in (0.02, 0.04, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if share <= top), 1.0)
