"""What a transport is: the contract between nodes that move blocks and whatever carries the bytes.

One-sided and batched. A node *exports* pieces of its memory under a *ticket*, tells the ticket to its peer
over the control channel (which has authenticated him), and the peer reads them straight into memory of his
own; or it *posts* memory to be filled, and the peer writes there. A ticket says nothing about addresses or
paths, is good once, for one peer's one transfer, and not after its time.

    owner   export(pieces) ─► ticket ... (control channel) ... ─► peer   read(ticket, into)
    owner   post(pieces)   ─► ticket ...                       ─► peer   write(ticket, pieces)
    owner   withdraw(ticket): when it returns, nothing touches these pieces any more

    connect ─► endpoint up ── bytes, or a heartbeat at least, within its time ──► up
                  └── peer gone, silent, or close ──► lost: every call ends with PeerLost, for good

Whatever carries the bytes may lose, repeat, cut or reorder them: nobody here vouches for what arrived. Who
reads verifies (``kvcache.sums``) before he believes.

Rules that every transport keeps, and ``kvcache.testing.transports`` tests:

* a call ends by its deadline, 250 ms at most past it; then, and when it is cancelled, no byte is
  written into its memory any more once it has returned;
* a transfer is whole or raises; what a transfer that raised has left in its memory is undefined;
* no silence is trusted: a peer that sends nothing for ``Limits.silence_ns`` is lost, whatever the system
  says;
* bytes in flight are bounded, an endpoint's and all together; what waits goes by ``Priority``, then in order.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NewType, Protocol

from kvcache.clock import NS_PER_MS, NS_PER_S

Ticket = NewType("Ticket", bytes)

TICKET_BYTES_MAX = 64 << 10
NOTE_BYTES_MAX = 64 << 10


class Priority(IntEnum):
    """What waits goes in this order."""

    DECODE = 0
    """A request waits for it."""
    PREFETCH = 1
    REPLICATE = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """``heartbeat_ns``: an idle side says so often that it lives. ``silence_ns``: a peer that said
    nothing for so long is lost."""

    endpoint_bytes_max: int = 64 << 20
    total_bytes_max: int = 256 << 20
    heartbeat_ns: int = 500 * NS_PER_MS
    silence_ns: int = 2 * NS_PER_S


class PeerLost(Exception):
    """The peer is gone, silent, or broke the protocol. The endpoint is of no use any more."""


class TransferRefused(Exception):
    """The peer does not know the ticket: used, withdrawn, expired, another's, or of other sizes."""


class TransferLate(Exception):
    """The deadline is past. The endpoint goes on."""


class Endpoint(Protocol):
    """A connection to one peer. For one event loop; calls may overlap."""

    @property
    def peer(self) -> str:
        """Where the other side is, in words."""

    @property
    def is_lost(self) -> bool: ...

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        """Fill ``into[i]`` with piece i of what the peer exported: all pieces, each of the same length.

        RAISES PeerLost, TransferRefused, TransferLate. REQUIRES: flat, writable byte views, not empty; one at
        least."""

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        """Fill what the peer posted, piece by piece. When it returns, the bytes are there, and the peer's
        ``filled`` was called. When it raises, the peer may have been filled all the same.
        RAISES PeerLost, TransferRefused, TransferLate. REQUIRES: flat byte views, not empty; one at least."""

    async def notify(self, note: bytes, deadline_ns: int) -> None:
        """Tell the peer something, at most ``NOTE_BYTES_MAX``, in order with other notes. RAISES PeerLost,
        TransferLate."""

    async def close(self) -> None:
        """Nothing of what was handed in is touched any more. The peer sees it lost. May be called twice."""


Note = Callable[[Endpoint, bytes], None]
"""Called on the event loop when the peer has told something."""


class Listener(Protocol):
    @property
    def address(self) -> str:
        """Where peers connect to: scheme, the port that was really taken, and the key that they must know, if
        there is one (``kvcache.transport.keys``): never for a log."""

    async def close(self) -> None:
        """Accept nobody any more; endpoints stay. May be called twice."""


class Transport(Protocol):
    """One way of moving bytes, for one event loop. ``scheme`` is that of its addresses."""

    @property
    def scheme(self) -> str: ...

    async def listen(self, address: str, accepted: Callable[[Endpoint], None], note: Note) -> Listener:
        """RAISES BadInput when the address cannot be had."""

    async def connect(self, address: str, deadline_ns: int, note: Note) -> Endpoint:
        """RAISES PeerLost when nobody answers, TransferLate, BadInput for what is no address."""

    def register(self, memory: memoryview) -> None:
        """This memory will be exported from, posted and read into: prepare it (pin it, map it), in the
        background. Until then, and without it, everything works, slower.

        REQUIRES: it keeps its pages until ``forget`` or ``close``; none of it is registered already."""

    def forget(self, memory: memoryview) -> None:
        """Its pages may go: what begins from now on knows nothing of those it had, also when it is registered
        again. They are let go soon, in the background. Nothing when it is not registered.

        REQUIRES: as it was registered; no ticket is out for any of it, and nothing is being read into it."""

    def export(self, pieces: Sequence[memoryview], until_ns: int) -> Ticket:
        """One peer may read these, once; he must have begun by then. REQUIRES: as ``Endpoint.write``."""

    def post(self, pieces: Sequence[memoryview], until_ns: int, filled: Callable[[], None]) -> Ticket:
        """One peer may fill these, once; he must have begun by then. ``filled`` is called when he has, all of
        them. REQUIRES: as ``Endpoint.read``."""

    def withdraw(self, ticket: Ticket) -> Awaitable[None]:
        """The ticket is good no more; when this returns, no transfer touches its pieces. A transfer that runs
        is ended, or waited for where it cannot be. Of a ticket that is used or expired, the same: so it ends
        every ticket's life."""

    async def close(self) -> None:
        """End every endpoint and listener; then no memory is touched any more. May be called twice."""
