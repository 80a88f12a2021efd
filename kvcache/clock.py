"""Time, as something that is handed in. Monotonic only: a wall clock that jumps must not end a lease."""

from __future__ import annotations

import time
from typing import Protocol

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


class Clock(Protocol):
    def now_ns(self) -> int:
        """Nanoseconds on a clock that never goes back. On one host all processes share its zero."""


class SystemClock:
    """CLOCK_MONOTONIC, which every process on a Linux host reads the same."""

    def now_ns(self) -> int:
        return time.monotonic_ns()
