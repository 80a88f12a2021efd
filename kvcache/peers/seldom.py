"""What happens many times at once, and is to be said once: a peer that goes away fails each of its groups.

Decides only: keeps no clock. Invariant: no more is remembered than what was said within ``EVERY_NS``.

The sum: 1 us a call.
"""

from __future__ import annotations

from kvcache.clock import NS_PER_S

EVERY_NS = 5 * NS_PER_S


class Seldom:
    """One owner."""

    def __init__(self) -> None:
        self._said_ns: dict[tuple[str, ...], int] = {}

    def may_say(self, now_ns: int, *what: str) -> bool:
        """It is to be said now, unless it was said a moment ago."""
        said = self._said_ns
        for oldest in [each for each, at_ns in said.items() if at_ns + EVERY_NS <= now_ns]:
            del said[oldest]
        if what in said:
            return False
        said[what] = now_ns
        return True
