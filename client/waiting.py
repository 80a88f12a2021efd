"""How an operation waits for what the node reads from NVMe or writes to it, without standing in the way.

A node answers the calls of one connection in turn, and a blocking store has one call under way at a
time: whoever lets the node wait lets everybody behind it wait. So an operation that is alone lets the
node wait, in steps, because the node knows first; beside others it looks in now and then instead:

    alone       ask, up to ``ALONE_MS`` at the node; ask again
    beside      ask, up to ``BESIDE_MS`` at the node; pause; ask again

A pause is a quarter of the time waited so far, within limits: a wait of 2 s is about 25 calls, and ends at
most a quarter later than it could.

What the node does anew in each call, and gives up when the call's time is over (to sync a disk), would never
end in short steps: there each step is as long as all before it.
"""

from __future__ import annotations

from typing import Final

from kvcache.client.link import Context
from kvcache.client.steps import Operation, pause
from kvcache.clock import NS_PER_MS

ALONE_MS: Final = 200
BESIDE_MS: Final = 2
PAUSE_NS_MIN: Final = 2 * NS_PER_MS
PAUSE_NS_MAX: Final = 50 * NS_PER_MS


class Patience:
    """One operation's wait: ``next_ms`` before each call, ``rest`` after it unless ``over``."""

    def __init__(self, context: Context, wait_ms: int) -> None:
        self._clock = context.clock
        self._link = context.link
        self._began_ns = self._asked_ns = self._clock.now_ns()
        self._end_ns = self._began_ns + wait_ms * NS_PER_MS
        self._step_ms = 0

    def next_ms(self, most_ms: int) -> int:
        """How long the node may wait before it answers the call that is made now."""
        return self._next_ms(min(most_ms, ALONE_MS if self._alone() else BESIDE_MS))

    def growing_ms(self) -> int:
        """The same, for what the node begins anew in each call."""
        waited_ms = (self._clock.now_ns() - self._began_ns) // NS_PER_MS
        return self._next_ms(max(waited_ms, ALONE_MS))

    def over(self) -> bool:
        """There is less than a millisecond left."""
        return self._end_ns - self._clock.now_ns() < NS_PER_MS

    def used_up(self) -> bool:
        """Did the node wait as long as it might? If not, it has nothing to wait for."""
        return self._clock.now_ns() - self._asked_ns >= self._step_ms * NS_PER_MS

    def rest(self) -> Operation[None]:
        """Let others have the connection, and time pass if none passed at the node."""
        if self._alone() and self._step_ms and self.used_up():
            return
        now_ns = self._clock.now_ns()
        pause_ns = min(max((now_ns - self._began_ns) // 4, PAUSE_NS_MIN), PAUSE_NS_MAX)
        yield from pause(min(pause_ns, self._end_ns - now_ns))

    def _next_ms(self, most_ms: int) -> int:
        self._asked_ns = self._clock.now_ns()
        left_ms = max(0, self._end_ns - self._asked_ns) // NS_PER_MS
        self._step_ms = min(left_ms, most_ms)
        return self._step_ms

    def _alone(self) -> bool:
        return self._link.running <= 1
