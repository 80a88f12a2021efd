"""How far a long command is, on standard error, where a person watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

_WIDTH = 24
_STEP_S = 0.1
_CLEAR = "\r\x1b[2K"


class Bar:
    """Call it with how much is done. Draws at most ten times a second, and clears itself at the end."""

    def __init__(self, label: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._label = label
        self._total = max(total, 1)
        self._clock = clock
        self._start = self._drawn = clock()

    def __call__(self, done: int) -> None:
        if done >= self._total:
            click.echo(_CLEAR, nl=False, err=True)
            return
        if done & 63:
            return
        now = self._clock()
        if now - self._drawn >= _STEP_S:
            self._drawn = now
            click.echo(_CLEAR + self.line(done, now), nl=False, err=True)

    def line(self, done: int, now: float) -> str:
        share = done / self._total
        filled = int(share * _WIDTH)
        left_s = (now - self._start) * (1 - share) / share if share else 0.0
        return f"{self._label} [{'#' * filled}{'.' * (_WIDTH - filled)}] {share:4.0%} {left_s:4.0f} s left"


def bar(label: str, total: int) -> Bar | None:
    """None where nobody watches."""
    return Bar(label, total) if sys.stderr.isatty() else None
