"""How fast this engine prefills, measured from its steps, so that the node can tell loads that do not pay.

A step takes from when it was planned, or from when the one before it ended if that was later, until the
workers report it. That holds where the engine plans steps ahead of the running one, too, because steps end
in the order of their plans. A step is timed only if it is nearly all prefill and not a small one: what
it has to do besides then does not count. What a timed step reports is its number, so that a step of which
nothing is heard shifts no other's time.
"""

from __future__ import annotations

from kvcache.tiers.rates import Rate

TOKENS_MIN = 128
DECODE_SHARE = 10  # At most one token in so many may be generated.
SAMPLES_MIN = 3
HALF_LIFE_SAMPLES = 16
PENDING_MAX = 8


class PrefillMeter:
    """Decides only: it is told the time. The engine's scheduler calls it, from one thread."""

    def __init__(self) -> None:
        self._rate = Rate(SAMPLES_MIN, HALF_LIFE_SAMPLES)
        self._pending: dict[int, tuple[int, int]] = {}  # step -> (when planned, its prefill tokens)
        self._steps = 0
        self._ended_ns = 0

    @property
    def tokens_s(self) -> float:
        """0 until there were steps enough."""
        return self._rate.value() or 0.0

    def planned(self, now_ns: int, prefill_tokens: int, token_count: int) -> int:
        """A step of ``token_count`` tokens begins. Returns its number if it is timed, else 0."""
        generated = token_count - prefill_tokens
        if prefill_tokens < TOKENS_MIN or generated * DECODE_SHARE > token_count:
            return 0
        self._steps += 1
        self._pending[self._steps] = (now_ns, prefill_tokens)
        if len(self._pending) > PENDING_MAX:
            del self._pending[min(self._pending)]
        return self._steps

    def ended(self, now_ns: int, step: int) -> None:
        """A step has ended; ``step`` is its number, 0 for one that was not timed."""
        if timed := self._pending.pop(step, None):
            planned_ns, tokens = timed
            self._rate.add(tokens, now_ns - max(planned_ns, self._ended_ns))
        self._ended_ns = now_ns
