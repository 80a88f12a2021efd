"""The reference: endpoints of one process, one loop and one ``Hub``; bytes are copied a slice a turn.

It keeps every rule of ``kvcache.transport.base`` with nothing underneath, so what the contract demands can
be read here, and a whole cluster can be tested in one process. Between two slices anything may happen: a
cancel, a withdrawal, a close; each slice looks before it copies.

The sum: one ``memcpy`` and one turn of the loop a slice: 256 KiB in 20 to 40 us.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvcache.clock import Clock, SystemClock
from kvcache.errors import BadInput
from kvcache.transport.base import (
    NOTE_BYTES_MAX,
    Endpoint,
    Limits,
    Note,
    PeerLost,
    Priority,
    Ticket,
    TransferRefused,
)
from kvcache.transport.flow import Flow, until
from kvcache.transport.pulse import Pulse
from kvcache.transport.tickets import Book, Use

SCHEME = "inproc"
_SLICE_BYTES = 256 << 10


class Hub:
    """The names that listeners have taken."""

    def __init__(self) -> None:
        self.listeners: dict[str, InprocListener] = {}


class InprocListener:
    """Use ``InprocTransport.listen``."""

    def __init__(
        self,
        transport: InprocTransport,
        address: str,
        accepted: Callable[[Endpoint], None],
        note: Note,
    ) -> None:
        self.transport = transport
        self.accepted = accepted
        self.note = note
        self._address = address

    @property
    def address(self) -> str:
        return self._address

    async def close(self) -> None:
        listeners = self.transport.hub.listeners
        if listeners.get(self._address) is self:
            del listeners[self._address]


class InprocEndpoint:
    """Use ``InprocTransport.connect``."""

    def __init__(self, transport: InprocTransport, peer: str, note: Note) -> None:
        self._transport = transport
        self._peer = peer
        self._note = note
        self._other: InprocEndpoint | None = None
        self._why_lost = ""
        self._lost = asyncio.Event()
        self._gate = transport.flow.gate()
        self._pulse = Pulse(transport.limits, transport.clock, self._beat, self.lose)

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def is_lost(self) -> bool:
        return bool(self._why_lost)

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        sizes = [len(view) for view in into]
        async with self._gate.hold(sum(sizes), priority, deadline_ns):
            use = (await self._answering()).book.take_export(ticket, sizes)
            use.when_stopped(use.end)  # Nothing is copied but after a look, so it may be over at once.
            try:
                await self._copy(use, use.pieces, into)
            finally:
                use.end()

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        sizes = [len(view) for view in pieces]
        async with self._gate.hold(sum(sizes), priority, deadline_ns):
            use = (await self._answering()).book.take_post(ticket, sizes)
            use.when_stopped(use.end)
            try:
                await self._copy(use, pieces, use.pieces)
                use.complete()
            finally:
                use.end()

    async def notify(self, note: bytes, deadline_ns: int) -> None:
        assert len(note) <= NOTE_BYTES_MAX, "a note is for few bytes"
        async with until(deadline_ns, self._transport.clock):
            await self._answering()
            asyncio.get_running_loop().call_soon(self._partner().hear, bytes(note))

    async def close(self) -> None:
        self.lose("this side closed it")

    def join(self, other: InprocEndpoint) -> None:
        self._other = other
        self._pulse.start()

    def hear(self, note: bytes) -> None:
        """The peer says ``note``."""
        if not self.is_lost:
            self._pulse.heard()
            self._note(self, note)

    def lose(self, why: str) -> None:
        """This side has lost the peer, who sees it soon. May be called twice."""
        if self._why_lost:
            return
        self._why_lost = why
        self._pulse.stop()
        self._lost.set()
        self._gate.close(why)
        self._transport.endpoints.discard(self)
        if self._other is not None and not self._transport.is_silent:
            asyncio.get_running_loop().call_soon(self._other.lose, "the peer closed it")

    def _beat(self) -> None:
        if not self._transport.is_silent:
            self._partner().alive()

    def alive(self) -> None:
        self._pulse.heard()

    def _partner(self) -> InprocEndpoint:
        assert self._other is not None, "an endpoint is joined before it is used"
        return self._other

    async def _answering(self) -> InprocTransport:
        """The peer's transport, when it answers. RAISES PeerLost."""
        await asyncio.sleep(0)
        self._look()
        if self._partner()._transport.is_silent:
            await self._lost.wait()
        self._look()
        return self._partner()._transport

    async def _copy(self, use: Use, sources: Sequence[memoryview], targets: Sequence[memoryview]) -> None:
        for source, target in zip(sources, targets, strict=True):
            for at in range(0, len(source), _SLICE_BYTES):
                await self._answering()
                if use.is_stopped:
                    raise TransferRefused("the ticket was withdrawn")
                target[at : at + _SLICE_BYTES] = source[at : at + _SLICE_BYTES]

    def _look(self) -> None:
        if self._why_lost:
            raise PeerLost(self._why_lost)
        if self._partner().is_lost and not self._partner()._transport.is_silent:
            raise PeerLost("the peer closed it")


class InprocTransport:
    """One node of a ``Hub``."""

    def __init__(self, hub: Hub, limits: Limits | None = None, clock: Clock | None = None) -> None:
        self.hub = hub
        self.limits = limits or Limits()
        self.clock = clock or SystemClock()
        self.flow = Flow(self.limits, self.clock)
        self.book = Book(self.clock)
        self.endpoints: set[InprocEndpoint] = set()
        self.is_silent = False
        """For tests: it says and answers nothing any more, like a process that was stopped."""
        self._listeners: list[InprocListener] = []

    @property
    def scheme(self) -> str:
        return SCHEME

    async def listen(self, address: str, accepted: Callable[[Endpoint], None], note: Note) -> InprocListener:
        _check(address)
        if address in self.hub.listeners:
            raise BadInput("address_in_use", f"{address} is taken", "", "choose another name")
        listener = InprocListener(self, address, accepted, note)
        self.hub.listeners[address] = listener
        self._listeners.append(listener)
        return listener

    async def connect(self, address: str, deadline_ns: int, note: Note) -> InprocEndpoint:
        _check(address)
        async with until(deadline_ns, self.clock):
            await asyncio.sleep(0)
            listener = self.hub.listeners.get(address)
            if listener is None:
                raise PeerLost(f"nobody listens at {address}")
            if listener.transport.is_silent:
                await asyncio.get_running_loop().create_future()
        mine = InprocEndpoint(self, address, note)
        theirs = InprocEndpoint(listener.transport, f"{SCHEME}://", listener.note)
        mine.join(theirs)
        theirs.join(mine)
        self.endpoints.add(mine)
        listener.transport.endpoints.add(theirs)
        listener.accepted(theirs)
        return mine

    def register(self, memory: memoryview) -> None:
        """There is nothing to prepare."""

    def forget(self, memory: memoryview) -> None:
        """There is nothing to undo."""

    def export(self, pieces: Sequence[memoryview], until_ns: int) -> Ticket:
        return self.book.export(pieces, until_ns)

    def post(self, pieces: Sequence[memoryview], until_ns: int, filled: Callable[[], None]) -> Ticket:
        return self.book.post(pieces, until_ns, filled)

    async def withdraw(self, ticket: Ticket) -> None:
        await self.book.withdraw(ticket)

    async def close(self) -> None:
        for listener in self._listeners:
            await listener.close()
        for endpoint in list(self.endpoints):
            await endpoint.close()
        await self.book.close()


def _check(address: str) -> None:
    if not address.startswith(f"{SCHEME}://") or address == f"{SCHEME}://":
        raise BadInput("bad_config", f"{address!r} is no address", "", f"write {SCHEME}://name")
