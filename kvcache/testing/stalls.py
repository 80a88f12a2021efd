"""How long this machine stood still, so that who holds a deadline is not late for that.

    every TICK_S a thread looks at the clock ── LEAST_NS and more have passed ──► what nobody used is a stall

What this process used of its processors meanwhile is no stall: a thread that waits for another of ours is
not the machine's fault.

The sum: a look is 20 us, 0.4 % of a processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Lock, Thread
from types import TracebackType

from kvcache.clock import NS_PER_MS, Clock, SystemClock

TICK_S = 0.005
LEAST_NS = 12 * NS_PER_MS


class Stalls:
    """Use as a context manager, around what is timed. Any thread may ask, at any time."""

    def __init__(self, clock: Clock | None = None, used_ns: Callable[[], int] = time.process_time_ns) -> None:
        self._clock = clock or SystemClock()
        self._used_ns = used_ns
        self._lock = Lock()
        self._over = Event()
        self._thread = Thread(target=self._watch, name="stalls", daemon=True)
        self._looked_ns, self._had_used_ns = self._clock.now_ns(), used_ns()
        self._stood: list[tuple[int, int, int]] = []
        """From when, until when, and for how long of it."""

    def __enter__(self) -> Stalls:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def stood_ns(self, since_ns: int, until_ns: int) -> int:
        """For how long of this time it stood still. REQUIRES: it has passed."""
        self.look()
        with self._lock:
            return sum(
                max(0, min(stood_ns, min(end_ns, until_ns) - max(began_ns, since_ns)))
                for began_ns, end_ns, stood_ns in self._stood
            )

    def awake_ns(self) -> int:
        """A clock that does not go while the machine stands still."""
        now_ns = self._clock.now_ns()
        return now_ns - self.stood_ns(0, now_ns)

    def look(self) -> None:
        """What the thread does, over and over."""
        with self._lock:
            now_ns, used_ns = self._clock.now_ns(), self._used_ns()
            idle_ns = now_ns - self._looked_ns - (used_ns - self._had_used_ns)
            if idle_ns >= LEAST_NS:
                self._stood.append((self._looked_ns, now_ns, idle_ns))
            self._looked_ns, self._had_used_ns = now_ns, used_ns

    def _watch(self) -> None:
        while not self._over.wait(TICK_S):
            self.look()
