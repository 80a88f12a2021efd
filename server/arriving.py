"""Blocks that a peer brings here by himself: which, and who waits for them.

    a node reserves ──► arriving ── it commits, aborts, or is gone ──► over: who waits looks again

Whoever was told that blocks will be pushed waits for them also before that has begun; for all others they
are on their way from then on.

The sum: 0.1 us a block to begin and to end.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.block import StorageKey
from kvcache.clock import Clock
from kvcache.leases import Owner
from kvcache.ledger import Ledger, Reservation
from kvcache.server.bell import Bell


class Arriving:
    """One owner, the event loop's thread."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._of: dict[int, tuple[Owner, tuple[StorageKey, ...]]] = {}
        self._keys: set[StorageKey] = set()
        self.bell = Bell()

    def __len__(self) -> int:
        """How many blocks."""
        return len(self._keys)

    def begin(self, reservation: Reservation, owner: Owner) -> None:
        """A node has reserved them."""
        self._of[reservation.reservation_id] = owner, reservation.keys
        self._keys.update(reservation.keys)
        self.bell.ring(reservation.keys)

    def end(self, reservation_id: int) -> None:
        """It has committed or aborted. Nothing of one that never began."""
        _, keys = self._of.pop(reservation_id, (None, ()))
        self._keys.difference_update(keys)
        self.bell.ring(keys)

    def leave(self, owner: Owner) -> None:
        """The owner is gone, and what it had open."""
        for number in [number for number, (of, _) in self._of.items() if of == owner]:
            self.end(number)

    def coming(self, keys: Sequence[StorageKey]) -> int:
        """How many of these, leading, are on their way."""
        return next((at for at, key in enumerate(keys) if key not in self._keys), len(keys))

    async def wait(self, keys: Sequence[StorageKey], wait_ns: int, *, for_begin: bool) -> None:
        """Until these are here, or are not on their way (any more), or the time is over. With ``for_begin``
        one that is not on its way yet is waited for."""
        end_ns = self._clock.now_ns() + wait_ns
        begun: StorageKey | None = None
        while (at := self._ledger.match(keys)) < len(keys):
            key, left_ns = keys[at], end_ns - self._clock.now_ns()
            is_coming = key in self._keys
            if left_ns <= 0 or (not is_coming and (begun == key or not for_begin)):
                return
            begun = key if is_coming else begun
            await self.bell.wait(key, left_ns)
