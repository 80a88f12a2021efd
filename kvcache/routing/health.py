"""Which workers do not answer: left alone for a while, then tried again.

    up ──failed──► down for DOWN_NS_MIN ──over──► tried ──failed──► down for twice as long, to DOWN_NS_MAX
                                                    └──succeeded──► up

One failure is enough: a request that has to be sent again costs its user more than a worker left alone for a
second. When all are down, all are tried: nobody is served by refusing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvcache.clock import NS_PER_S

DOWN_NS_MIN = NS_PER_S
DOWN_NS_MAX = 30 * NS_PER_S
WHY_CHARS_MAX = 200


@dataclass(slots=True)
class _Down:
    since_ns: int
    for_ns: int
    why: str


class Health:
    """One owner; every call returns at once; reads no clock."""

    def __init__(self) -> None:
        self._down: dict[str, _Down] = {}

    def failed(self, worker: str, why: str, now_ns: int) -> None:
        """It did not answer. While it is down already, nothing changes: that is one failure, seen by many."""
        known = self._down.get(worker)
        if known is None:
            self._down[worker] = _Down(now_ns, DOWN_NS_MIN, why[:WHY_CHARS_MAX])
        elif now_ns - known.since_ns >= known.for_ns:
            for_ns = min(2 * known.for_ns, DOWN_NS_MAX)
            self._down[worker] = _Down(now_ns, for_ns, why[:WHY_CHARS_MAX])

    def succeeded(self, worker: str) -> None:
        self._down.pop(worker, None)

    def why_down(self, worker: str, now_ns: int) -> str:
        """Why it is to be left alone now; empty when it is not."""
        known = self._down.get(worker)
        return known.why if known is not None and now_ns - known.since_ns < known.for_ns else ""

    def keep(self, workers: Iterable[str]) -> None:
        """Forget all others."""
        kept = set(workers)
        self._down = {worker: down for worker, down in self._down.items() if worker in kept}
