"""What one worker has still to compute of the prompts that were sent to it, as far as can be told from here.

    begin ──► waiting, in order ──first_token──► over
                  └─end, without one─► over

It is counted in tokens without context: one that has ``ATTENTION_TOKENS`` before it takes twice as long, so
that a prompt of 120,000 counts for 300,000. How fast a worker is, is seen from when its first tokens came;
from that, how far it must be with the prompt that it is at. Without that, what is nearly done looks as bad as
what has just begun, and requests leave a worker that would be free in a moment.

Invariants (``check``): the sum is that of those that wait; nothing is below 0.

The sum: under 1 us a call.
"""

from __future__ import annotations

import math

from kvcache.clock import NS_PER_S

ATTENTION_TOKENS = 40_000
"""After so many tokens, attending to them costs as much as all the rest of computing one: 30,000 to 55,000 in
dense models of 8 to 70 billion parameters."""
DONE_MAX = 0.95
"""No more than this share of a prompt is taken to be done before its first token comes."""
_KEPT = 0.99
"""What earlier prompts count for in a worker's speed, with each new one."""
_SEEN_S = 1.0
"""As long as fewer seconds of a worker's computing were seen, nothing is known of its speed."""


class Backlog:
    """One owner; every call returns at once; reads no clock. Numbers are the caller's, each used once."""

    def __init__(self) -> None:
        self._waiting: dict[int, float] = {}
        self._sum = 0.0
        self._since_ns = -1  # Since when it is at the first of them; -1: that cannot be told.
        self._seen_tokens = 0.0
        self._seen_s = 0.0

    def begin(self, number: int, uncached_tokens: int, prompt_tokens: int, now_ns: int) -> None:
        """A prompt was sent there, of which it must compute the last ``uncached_tokens``."""
        if not self._waiting:
            self._since_ns = now_ns
        work = work_tokens(uncached_tokens, prompt_tokens)
        self._waiting[number] = work
        self._sum += work

    def first_token(self, number: int, now_ns: int) -> None:
        """It is computed. A number that does not wait is ignored."""
        work = self._waiting.pop(number, None)
        if work is None:
            return
        self._sum = self._sum - work if self._waiting else 0.0
        if self._since_ns >= 0:
            self._seen_tokens = _KEPT * self._seen_tokens + work
            self._seen_s = _KEPT * self._seen_s + max(0, now_ns - self._since_ns) / NS_PER_S
        self._since_ns = now_ns

    def end(self, number: int) -> None:
        """It will not be computed. A number that does not wait is ignored."""
        work = self._waiting.pop(number, None)
        if work is not None:
            self._sum = self._sum - work if self._waiting else 0.0
            self._since_ns = -1

    def left(self, now_ns: int) -> float:
        """What there is still to compute, without what must be done by now."""
        if not self._waiting or self._since_ns < 0 or self._seen_s < _SEEN_S:
            return max(0.0, self._sum)
        first = next(iter(self._waiting.values()))
        passed_s = max(0, now_ns - self._since_ns) / NS_PER_S
        done = min(DONE_MAX * first, passed_s * self._seen_tokens / self._seen_s)
        return max(0.0, self._sum - done)

    def check(self) -> None:
        """Assert every invariant."""
        assert math.isclose(self._sum, sum(self._waiting.values()), rel_tol=1e-6, abs_tol=1e-3)
        assert min(self._seen_tokens, self._seen_s, *self._waiting.values(), 0.0) >= 0


def work_tokens(uncached_tokens: int, prompt_tokens: int) -> float:
    """The last ``uncached_tokens`` of a prompt, each with what is before it."""
    before = max(0.0, prompt_tokens - uncached_tokens / 2)
    return uncached_tokens * (1 + before / ATTENTION_TOKENS)
