"""Every ticket that this node has given out, and the end of each.

    out ── its time is over, its connection has ended, stop, close ──► ending ── withdrawn ──► over

* ``over`` of a ticket is called once, when no transfer touches its pieces any more, and never before: what
  holds their slots is given back there.
* A ticket that was used stays out until somebody stops it, or its time is over: who reads is not heard of
  again.

Invariants: ``len`` counts what is out or ending; nothing of it is left when ``close`` has returned; no
connection has more than ``CONNECTION_TICKETS_MAX``, all together at most ``TICKETS_MAX``.

The sum: 10 us a ticket, beside its pieces.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from kvcache.clock import NS_PER_MS, Clock
from kvcache.errors import BadInput
from kvcache.leases import Owner
from kvcache.peers.plane import DataPlane
from kvcache.transport.base import Ticket, Transport

CONNECTION_TICKETS_MAX = 256
TICKETS_MAX = 4_096


class Issued:
    """One ticket, as it was given to ``owner``, a connection. It is a ``uses.Use``."""

    def __init__(
        self, tickets: Tickets, owner: Owner, address: str, until_ns: int, over: Callable[[], None]
    ) -> None:
        """Use ``Tickets.export`` and ``Tickets.post``."""
        self.owner = owner
        self.address = address
        self.ticket = Ticket(b"")
        self.until_ns = until_ns
        self.over = over
        self.ending: asyncio.Task[None] | None = None
        self._tickets = tickets

    @property
    def remaining_ms(self) -> int:
        return self._tickets.remaining_ms(self.until_ns)

    def keep(self) -> None:
        """Whoever commits has stopped it before."""

    async def stop(self) -> None:
        """When it returns, no transfer touches its pieces any more, and ``over`` was called. May be called
        again, also when it is over; when it is cancelled, the ticket ends all the same."""
        await asyncio.wait([self._tickets.end(self)])


class Tickets:
    """Of one node. One owner, the event loop's thread. ``tick`` is called by the node's timer."""

    def __init__(self, plane: DataPlane, clock: Clock, counters: Counter[str]) -> None:
        self._plane = plane
        self._clock = clock
        self._counters = counters
        self._out: dict[Issued, Transport] = {}
        self._of: Counter[Owner] = Counter()

    def __len__(self) -> int:
        return len(self._out)

    def export(
        self,
        owner: Owner,
        via: str,
        pieces: Sequence[memoryview],
        until_ns: int,
        over: Callable[[], None],
    ) -> Issued:
        """Let the peer of this connection read. RAISES BadInput (bad_tier, too_large): then ``over`` is not
        called."""
        transport = self._admit(owner, via)
        issued = Issued(self, owner, self._plane.address_of(via), until_ns, over)
        issued.ticket = transport.export(pieces, until_ns)
        return self._enter(issued, transport)

    def post(
        self,
        owner: Owner,
        via: str,
        pieces: Sequence[memoryview],
        until_ns: int,
        filled: Callable[[], None],
        over: Callable[[], None],
    ) -> Issued:
        """Let him write. ``filled`` is called when he has, all of it, and before ``over``; the ticket then
        ends by itself. RAISES BadInput (bad_tier, too_large): then neither is called."""
        transport = self._admit(owner, via)
        issued = Issued(self, owner, self._plane.address_of(via), until_ns, over)

        def done() -> None:
            filled()
            self.end(issued)

        issued.ticket = transport.post(pieces, until_ns, done)
        return self._enter(issued, transport)

    def remaining_ms(self, until_ns: int) -> int:
        return max(0, until_ns - self._clock.now_ns()) // NS_PER_MS

    def check_via(self, via: str) -> None:
        """RAISES BadInput (bad_tier) unless this node listens with this scheme."""
        if self._plane.transport(via) is None:
            raise BadInput(
                "bad_tier",
                f"this node moves no blocks over {via!r:.20}",
                "it has no data address of that scheme",
                "start it with --data, for instance tcp://127.0.0.1:0",
            )

    def end(self, issued: Issued) -> asyncio.Task[None]:
        """Begin to end it, if that has not begun. The task ends when it is over."""
        if issued.ending is None:
            issued.ending = asyncio.get_running_loop().create_task(self._withdraw(issued))
            issued.ending.add_done_callback(_report)
        return issued.ending

    def leave(self, owner: Owner) -> None:
        """The connection has ended: so do its tickets."""
        if self._of[owner]:
            for issued in [each for each in self._out if each.owner == owner]:
                self.end(issued)

    def tick(self) -> None:
        """End those whose time is over."""
        now_ns = self._clock.now_ns()
        for issued in [each for each in self._out if each.until_ns <= now_ns and each.ending is None]:
            self._counters["tickets_expired"] += 1
            self.end(issued)

    async def close(self) -> None:
        """End all, and wait for it. REQUIRES: the plane is up. May be called twice."""
        if endings := [self.end(issued) for issued in self._out]:
            await asyncio.wait(endings)

    def _admit(self, owner: Owner, via: str) -> Transport:
        self.check_via(via)
        mine = self._of[owner]
        if mine >= CONNECTION_TICKETS_MAX or len(self._out) >= TICKETS_MAX:
            raise BadInput(
                "too_large",
                f"{mine} tickets of this connection are out, {len(self._out)} in all",
                f"the limits are {CONNECTION_TICKETS_MAX} and {TICKETS_MAX}",
                "release the leases that were read, or ask for more blocks with one ticket",
            )
        transport = self._plane.transport(via)
        assert transport is not None
        return transport

    def _enter(self, issued: Issued, transport: Transport) -> Issued:
        self._out[issued] = transport
        self._of[issued.owner] += 1
        return issued

    async def _withdraw(self, issued: Issued) -> None:
        await self._out[issued].withdraw(issued.ticket)
        del self._out[issued]
        self._of[issued.owner] -= 1
        if not self._of[issued.owner]:
            del self._of[issued.owner]
        issued.over()


def _report(ending: asyncio.Task[None]) -> None:
    """Whose slots a ticket that does not end holds is unknown: a bug of ours, and said at once."""
    if not ending.cancelled() and (error := ending.exception()) is not None:
        ending.get_loop().call_exception_handler({"message": "a ticket does not end", "exception": error})
