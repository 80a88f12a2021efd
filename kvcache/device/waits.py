"""How long a device is waited for: so long in all by one request, and then by nobody in this process.

    a request:  wait ─● done   wait ─● done   wait ─────── ``ANSWER_S`` of waiting in all: it is given up
    another:                                 wait ─────────┴► not done; nor is any that is asked from then on

What was asked of a device begins behind all that the engine had queued, so a wait may be long; but a GPU that
has let one request wait so long in all never ends it, and is of no use if it does.

The sum: every ``LOOK_S`` of a wait two looks at the clock and one at the device's owner.
"""

from __future__ import annotations

from typing import Final, Protocol

from kvcache.clock import NS_PER_S, Clock
from kvcache.device.streams import Event

ANSWER_S = 60.0
LOOK_S: Final = 0.05
"""Who waits learns so soon that another gave the device up."""
LOOK_NS_MAX: Final = NS_PER_S
"""A look that took longer counts as this: it is the process that was stopped, perhaps with the device."""


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
        while True:
            begun_ns = now_ns()
            try:
                if event.wait(self._look_s()):
                    return True
            finally:
                self._left_ns -= min(now_ns() - begun_ns, LOOK_NS_MAX)
            if self._owner.is_stuck:
                return False
            if self._left_ns <= 0:
                self._owner.give_up(f"it has not answered for {ANSWER_S} s")
                return False

    def _look_s(self) -> float:
        return 0 if self._owner.is_stuck else max(0.0, min(LOOK_S, self._left_ns / NS_PER_S))
