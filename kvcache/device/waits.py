"""How long a device is waited for: so long in all by one request, and then by nobody in this process.

    a request:  wait ─● done   wait ─● done   wait ─────── ``ANSWER_S`` of waiting in all: it is given up
    another:                                 wait ─────────┴► not done; nor is any that is asked from then on

What was asked of a device begins behind all that the engine had queued, so a wait may be long; but a GPU that
has let one request wait so long in all never ends it, and is of no use if it does.

The sum: two looks at the clock for a wait, and one at the device's owner every ``LOOK_S``.
"""

from __future__ import annotations

from typing import Final, Protocol

from kvcache.clock import NS_PER_S, Clock
from kvcache.device.streams import Event

ANSWER_S = 60.0
LOOK_S: Final = 0.05
"""Who waits learns so soon that another gave the device up."""


class Owner(Protocol):
    """Who maps memory on the device (``kvcache.device.engine``)."""

    is_stuck: bool
    clock: Clock

    def lose(self, why: str) -> None: ...

    def give_up(self, why: str) -> None: ...


class Waits:
    """Those of one request. Any thread."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._left_ns = int(ANSWER_S * NS_PER_S)

    def has_ended(self, event: Event) -> bool:
        """Block until it is done. Not, when the device answers nothing, whoever found that. RAISES
        Unavailable when it failed."""
        now_ns = self._owner.clock.now_ns
        end_ns = now_ns() + self._left_ns
        try:
            while not event.wait(self._look_s(end_ns - now_ns())):
                if self._owner.is_stuck:
                    return False
                if now_ns() >= end_ns:
                    self._owner.give_up(f"it has not answered for {ANSWER_S} s")
                    return False
            return True
        finally:
            self._left_ns = max(0, end_ns - now_ns())

    def _look_s(self, left_ns: int) -> float:
        return 0 if self._owner.is_stuck else max(0.0, min(LOOK_S, left_ns / NS_PER_S))
