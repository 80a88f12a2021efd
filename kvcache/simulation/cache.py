"""A worker's cached blocks: which it has, which are in use, which go when room is wanted.

    begin ──► (what was found is held, the rest has room) ──commit──► all is cached ──finish──► not held

``TailLru`` is what engines do: a block that nobody uses any more queues behind all others, the last of a
prompt before those in front of it, and the queue's head goes first. Any policy of the registry stands in for
it in ``kvcache.simulation.policy_cache``.

Invariants (``check``): what is cached never exceeds ``capacity``, what is in use and the answers included; a
block in use never goes; with a block, all blocks before it are cached.

The sum: 0.3 us a block of a prompt, and a look-up is a bisection, as the cached part of a prompt leads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import Protocol


class BlockCache(Protocol):
    capacity: int

    def match(self, path: Sequence[int]) -> int:
        """How many leading blocks are cached."""

    def begin(self, path: Sequence[int], hit: int, answer_blocks: int, now_s: float) -> list[int] | None:
        """Hold the first ``hit`` blocks and take room for the rest and for an answer; what had to go, or None
        where what is in use leaves too little. REQUIRES: ``hit`` is ``match(path)``; no other was begun since
        that is not committed."""

    def commit(self, path: Sequence[int], hit: int, now_s: float) -> Sequence[int]:
        """What was begun is computed. The blocks that are cached from now on: those behind ``hit``."""

    def finish(self, path: Sequence[int], answer_blocks: int) -> None:
        """A request that was committed is over: its blocks stay, until their room is wanted."""

    def clear(self) -> None:
        """Nothing is cached or in use any more."""

    def content(self) -> Sequence[int]:
        """What is cached, in no order."""

    def used(self) -> int:
        """Blocks of room that are taken, by cached ones, those being computed, and answers."""

    def check(self) -> None: ...


def leading(cached: Container[int], path: Sequence[int]) -> int:
    """How many leading blocks of ``path`` there are. REQUIRES: with a block it has those before it."""
    low, high = 0, len(path)
    if not high or path[0] not in cached:
        return 0
    if path[-1] in cached:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if path[middle] in cached:
            low = middle
        else:
            high = middle
    return high


class TailLru:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._taken = 0  # Room for what is being computed, and for answers.

    def match(self, path: Sequence[int]) -> int:
        return leading(self._users, path)

    def begin(self, path: Sequence[int], hit: int, answer_blocks: int, now_s: float) -> list[int] | None:
        users, idle = self._users, self._idle
        wanted = len(path) - hit + answer_blocks
        found = [block for block in path[:hit] if not users[block]]
        over = len(users) + self._taken + wanted - self.capacity
        if over > len(idle) - len(found):
            return None
        for block in found:
            del idle[block]
        for block in path[:hit]:
            users[block] += 1
        self._taken += wanted
        gone = [idle.popitem(last=False)[0] for _ in range(over)]
        for block in gone:
            del users[block]
        return gone

    def commit(self, path: Sequence[int], hit: int, now_s: float) -> Sequence[int]:
        new = path[hit:]
        self._users.update(dict.fromkeys(new, 1))
        self._taken -= len(new)
        return new

    def finish(self, path: Sequence[int], answer_blocks: int) -> None:
        users, idle = self._users, self._idle
        self._taken -= answer_blocks
        for block in reversed(path):
            left = users[block] - 1
            users[block] = left
            if not left:
                idle[block] = None

    def clear(self) -> None:
        self._users.clear()
        self._idle.clear()
        self._taken = 0

    def content(self) -> Sequence[int]:
        return list(self._users)

    def used(self) -> int:
        return len(self._users) + self._taken

    def check(self) -> None:
        assert 0 <= self._taken <= self.used() <= self.capacity
        assert set(self._idle) == {block for block, users in self._users.items() if not users}
        assert min(self._users.values(), default=0) >= 0
