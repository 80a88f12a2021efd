"""A clock that goes when it is told to."""

from __future__ import annotations

from kvcache.clock import NS_PER_MS


class FakeClock:
    """A ``kvcache.clock.Clock``. Starts at one second, so that a time of 0 is always past."""

    def __init__(self, now_ns: int = 1_000 * NS_PER_MS) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance_ms(self, milliseconds: int) -> int:
        """The new time in ns. REQUIRES: not back."""
        assert milliseconds >= 0
        self._now_ns += milliseconds * NS_PER_MS
        return self._now_ns
