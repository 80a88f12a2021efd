"""What leaf-first LRU would have found, told without running it; and how often to let recency decide instead.

Leaf-first LRU holds the blocks that were used last, as many as there is room for, and nothing else. So it
is enough to know of every use how many blocks were used since: uses are kept in their order, each with how
many of its blocks were not used again, and those from the *horizon* on are what it would hold. A block
that is asked for, and whose last use is within the horizon, would have been found, whoever holds it now.

What a policy found more than that, or less, is summed up, and fades, as does what was asked for. It may
fall behind by ``_SLACK_SHARE`` of what was asked, and some blocks more at first. The further it is, the
more often it is recency's turn to decide (``is_due``): hardly ever at half of the slack, as every turn
lets go what the policy keeps for later, and most dips are made good; always at its end. What goes wrong
costs about that share, and what turns out well has its turn again, as what was asked adds up or fades.

Exact where requests come one after the other, and whoever asks remembers the last use of what LRU would
hold. Requests that overlap may be off by what one of them has at the horizon.

Invariants (``check``): ``_blocks`` is what the uses within the horizon have left, with the request that
came last; the uses are at most twice as many as have blocks, and some.

The sum: 1 us a use and 100 bytes for each within the horizon; nothing is kept by block.
"""

from __future__ import annotations

from collections import deque

from kvcache.eviction.reuse_times import Use

_SLACK_SHARE = 0.0013
_SLACK_ROOM = 0.02
_SLACK_BLOCKS_MAX = 100
_STEEPNESS = 3
_SPARE_USES = 1_024


class LruBeside:
    def __init__(self) -> None:
        self._uses: deque[Use] = deque()
        self._uses_max = _SPARE_USES
        self._blocks = 0
        self._turns = 0  # of uses; each knows its own
        self._horizon = 1
        self._path: list[Use] = []  # Of the request that came last, first to last.
        self._declined: list[Use] = []  # What is behind it.
        self._ahead = self._asked = 0.0
        self._owed = 0.0

    def used(self, use: Use) -> None:
        """A request uses these blocks, which come behind those that it was told to use before."""
        self._path.append(use)
        self._blocks += use.count

    def declined(self, use: Use) -> None:
        """It would have used these, at the end of its path."""
        self._declined.append(use)
        self._blocks += use.count

    def end_request(self, room: int) -> None:
        """Of what a request used, the first goes last. There is room for so many blocks (0: for all)."""
        if not self._path and not self._declined:
            return
        uses = self._uses
        for use in reversed(self._path + self._declined):
            self._turns += 1
            use.turn = self._turns
            uses.append(use)
        self._path, self._declined = [], []
        while uses and (not uses[0].count or (room and self._blocks - uses[0].count >= room)):
            self._blocks -= uses.popleft().count
        self._horizon = uses[0].turn if uses else self._turns + 1
        if len(uses) > self._uses_max:
            self._uses = deque(use for use in uses if use.count)
            self._uses_max = 2 * len(self._uses) + _SPARE_USES

    def lost(self, use: Use, count: int) -> None:
        """So many blocks of it are used again, or remembered no longer. REQUIRES: they still count."""
        if use.turn >= self._horizon or not use.turn:
            self._blocks -= count

    def held(self, use: Use, count: int, room: int) -> int:
        """How many of these blocks, which were last used so, it would have. Of the oldest use, the last go
        first."""
        if use.turn < self._horizon:
            return 0 if use.turn else count
        if room and use is self._uses[0]:
            return min(count, max(0, room - (self._blocks - use.count)))
        return count

    def found(self, mine: int, lru: int, asked: int) -> None:
        """Of ``asked`` blocks the policy found ``mine``, and LRU would have found ``lru``."""
        self._ahead += mine - lru
        self._asked += asked

    def is_due(self, room: int) -> bool:
        """Is it recency's turn to decide?"""
        if self._ahead < 0:
            slack = _SLACK_SHARE * self._asked + min(_SLACK_BLOCKS_MAX, _SLACK_ROOM * room)
            self._owed += min(1.0, -self._ahead / slack) ** _STEEPNESS
        if self._owed < 1:
            return False
        self._owed -= 1
        return True

    def fade(self, rate: float) -> None:
        self._ahead *= rate
        self._asked *= rate

    def check(self) -> None:
        """Assert every invariant."""
        told = [*self._uses, *self._path, *self._declined]
        assert self._blocks == sum(use.count for use in told)
        assert all(use.turn >= self._horizon for use in self._uses)
        assert len(self._uses) <= self._uses_max
