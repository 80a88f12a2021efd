"""How busy a peer is, how fast what comes from it comes, and whether to ask it at all.

    may be asked ── late, or lost ──► rests, longer each time ── its time is over ──► may be asked
                                                                   └── something came: a short rest again

Decides only: keeps no clock. The sum: 1 us a call.
"""

from __future__ import annotations

from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.tiers.rates import Rate

REST_NS_MIN = 250 * NS_PER_MS
REST_NS_MAX = 2 * NS_PER_S
RATE_GUESS = 1e9
"""Bytes a second, while nothing was measured: enough to share between peers."""


class Load:
    """``bytes`` are meant to come from this peer, or are coming."""

    def __init__(self) -> None:
        self.bytes = 0
        self.rate = Rate()
        self._running = 0
        self._since_ns = 0
        self._rest_ns = REST_NS_MIN
        self._rests_until_ns = 0

    def assign(self, size: int) -> None:
        self.bytes += size

    def free(self, size: int) -> None:
        """They have come, or will not."""
        self.bytes -= size

    def begin(self, now_ns: int) -> None:
        """A transfer begins."""
        if not self._running:
            self._since_ns = now_ns
        self._running += 1

    def end(self, arrived: int, now_ns: int) -> None:
        """It ended, with so many bytes. All transfers that run share the time."""
        self._running -= 1
        if arrived:
            self.rate.add(arrived, now_ns - self._since_ns)
            self._since_ns = now_ns
            self._rest_ns = REST_NS_MIN

    def rest(self, now_ns: int) -> None:
        """It was late, or lost: leave it alone for a while. What fails while it rests began before, and says
        nothing new: several at once are one failure."""
        if self.is_resting(now_ns):
            return
        self._rests_until_ns = now_ns + self._rest_ns
        self._rest_ns = min(2 * self._rest_ns, REST_NS_MAX)

    def is_resting(self, now_ns: int) -> bool:
        return now_ns < self._rests_until_ns

    def queue_s(self, more_bytes: int = 0) -> float:
        """Until all that is meant to come, and so much more, is here."""
        return (self.bytes + more_bytes) / (self.rate.value() or RATE_GUESS)
