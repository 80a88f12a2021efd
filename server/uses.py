"""Who, besides its writer, touches the slots of an open reservation: peers with a ticket, a push that reads.

    add ──► in use ── it ends by itself ──► remove
              ├── committed ──► keep: it holds by itself what it still needs
              └── aborted, or its connection has ended ──► stop, waited for ──► only then are the slots free

The slots of a writer that is gone are free when both have ended: his own copies, and what used his slots.

Invariants: a reservation whose uses are being stopped gets no new one; ``freed`` is called once an owner,
and never for one of whose uses it is not known that they have stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Protocol

from kvcache.leases import Owner


class Use(Protocol):
    """One of them."""

    def keep(self) -> None:
        """The reservation was committed just now: hold what is needed of its blocks, or need it no more."""

    async def stop(self) -> None:
        """When it returns, the slots are touched no more. May be called twice, and while it ends itself."""


class Uses:
    """Of one node. One owner, the event loop's thread."""

    def __init__(self, freed: Callable[[Owner], None]) -> None:
        """``freed`` is told the owner, which is gone, whose slots nobody touches any more."""
        self._freed = freed
        self._of: dict[int, tuple[Owner, set[Use]]] = {}
        self._leaving: dict[Owner, asyncio.Task[None]] = {}
        self._written: set[Owner] = set()

    def __len__(self) -> int:
        return sum(len(uses) for _, uses in self._of.values())

    def add(self, reservation_id: int, owner: Owner, use: Use) -> None:
        """REQUIRES: the reservation is open, the owner's, and not being stopped."""
        assert owner not in self._leaving, "a writer that is gone has nothing open"
        self._of.setdefault(reservation_id, (owner, set()))[1].add(use)

    def remove(self, reservation_id: int, use: Use) -> None:
        """It has ended. May be called twice."""
        _, uses = self._of.get(reservation_id, (None, set[Use]()))
        uses.discard(use)
        if not uses:
            self._of.pop(reservation_id, None)

    def any(self, reservation_id: int) -> bool:
        return reservation_id in self._of

    def keep(self, reservation_id: int) -> None:
        """The reservation was committed just now."""
        _, uses = self._of.pop(reservation_id, (None, set[Use]()))
        for use in uses:
            use.keep()

    async def stop(self, reservation_id: int) -> None:
        """When it returns, nobody but its writer touches the slots. REQUIRES: meanwhile none is added."""
        _, uses = self._of.get(reservation_id, (None, set[Use]()))
        await _all(use.stop() for use in uses)
        self._of.pop(reservation_id, None)

    def leave(self, owner: Owner) -> bool:
        """The owner is gone: stop what uses its slots. Is there anything? Then the ledger keeps the slots
        aside until ``freed``."""
        mine = [number for number, (of, _) in self._of.items() if of == owner]
        if not mine:
            return False
        task = self._leaving[owner] = asyncio.get_running_loop().create_task(self._stop_all(owner, mine))
        task.add_done_callback(_ended)
        return True

    def writes_ended(self, owner: Owner) -> None:
        """No copy of the owner, which is gone, is in flight any more. ``freed`` is called, now or later."""
        if owner in self._leaving:
            self._written.add(owner)
        else:
            self._freed(owner)

    async def close(self) -> None:
        """Wait for those that are being stopped, however that ends. May be called twice."""
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)

    async def _stop_all(self, owner: Owner, reservation_ids: list[int]) -> None:
        await _all(self.stop(number) for number in reservation_ids)
        del self._leaving[owner]
        if owner in self._written:
            self._written.discard(owner)
            self._freed(owner)


async def _all(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Also when one of them fails, the others have ended before that is raised."""
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        # Our own code is wrong: as with any task of the node, the command ends the process.
        task.get_loop().call_exception_handler({"message": "the uses of a reservation", "exception": error})
