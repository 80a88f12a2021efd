"""The data plane of one node: the transports that carry its blocks, and connections to its peers'.

    start ── opens a transport a scheme, listens at each address ──► up ── close ──► gone
    endpoint(address) ── cached ───────────────────────────────► line ── lost, or idle for IDLE_NS ──► closed
                      └─ connecting, one try for all who ask ──┘
                              └── nobody answers: other addresses of the peer are preferred for AVOID_NS

A transport of a scheme that this node does not listen with is opened when a peer has no other: ``tcp://``
only, and only to connect. Addresses are opaque: they bear the node's key (``kvcache.transport.keys``).

Invariants: memory that was registered, and not forgotten since, is registered with every transport, whenever
it is opened, and no other; an address has one line; a line in which a call is in flight is not idle.

The sum: a line that is there costs 1 us; a connection is one round trip, an idle one four wake-ups a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput
from kvcache.transport.base import (
    Endpoint,
    Limits,
    Listener,
    PeerLost,
    Priority,
    Ticket,
    TransferLate,
    Transport,
)
from kvcache.transport.flow import until
from kvcache.transport.keys import new_key, shown
from kvcache.transport.table import KEYED, open_transport, scheme_of

IDLE_NS = 60 * NS_PER_S
CONNECT_NS = 5 * NS_PER_S
AVOID_NS = 30 * NS_PER_S
LINES_MAX = 1_024
ALWAYS = "tcp"
"""The scheme that every node can connect with."""

Opener = Callable[[str, Limits, Clock, bytes], Transport]
"""Scheme, limits, clock, and the key that those who connect must know, empty for none."""


@dataclass(frozen=True, slots=True)
class _Way:
    """A transport, and where it listens: nowhere when it was opened to connect only."""

    transport: Transport
    listeners: list[Listener] = field(default_factory=list)


class DataPlane:
    """One owner, the event loop. ``tick`` is called by the node's timer."""

    def __init__(
        self,
        addresses: Sequence[str],
        clock: Clock,
        limits: Limits | None = None,
        opener: Opener = open_transport,
    ) -> None:
        self._wanted = list(addresses)
        self._clock = clock
        self._limits = limits or Limits()
        self._opener = opener
        self._key = new_key()
        self._ways: dict[str, _Way] = {}
        self._memory: dict[int, memoryview] = {}  # By identity: two views of equal bytes are equal.
        self._lines: dict[str, _Line] = {}
        self._failed_ns: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(self) -> None:
        """Listen at each address. RAISES BadInput; ``close`` gives back what was opened."""
        for address in self._wanted:
            way = self._open(scheme_of(address))
            way.listeners.append(await way.transport.listen(address, lambda _: None, lambda *_: None))

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the ports that were really taken."""
        return [listener.address for way in self._ways.values() for listener in way.listeners]

    def register(self, memory: memoryview) -> None:
        """Blocks will be moved from and to this memory. REQUIRES: as ``Transport.register``."""
        self._memory[id(memory)] = memory
        for way in self._ways.values():
            way.transport.register(memory)

    def forget(self, memory: memoryview) -> None:
        """Its pages may go. REQUIRES: this view was registered; else as ``Transport.forget``."""
        del self._memory[id(memory)]
        for way in self._ways.values():
            way.transport.forget(memory)

    def transport(self, scheme: str) -> Transport | None:
        """The one that listens, if there is one."""
        way = self._ways.get(scheme)
        return way.transport if way is not None and way.listeners and not self._is_closed else None

    def address_of(self, scheme: str) -> str:
        """Where it listens. REQUIRES: ``transport`` has one."""
        return self._ways[scheme].listeners[0].address

    def usable(self, theirs: Sequence[str]) -> str:
        """Which of a peer's addresses to use: in the order of our own schemes, then ``tcp://``, the first
        that did not fail lately; the first at all when each did, none (empty) when no scheme fits."""
        ours = [scheme for scheme, way in self._ways.items() if way.listeners]
        fit = [each for scheme in [*ours, ALWAYS] for each in theirs if each.startswith(f"{scheme}://")]
        return next((each for each in fit if each not in self._failed_ns), fit[0] if fit else "")

    async def endpoint(self, address: str, deadline_ns: int) -> Endpoint:
        """The connection to what listens there, made if there is none. Ask anew for each transfer: one that
        is kept and not used may be closed.

        RAISES PeerLost, TransferLate; BadInput when no transport leads there."""
        if self._is_closed:
            raise PeerLost("this node is ending")
        line = self._lines.get(address)
        if line is None or line.is_lost:
            line = self._connect(address)
        line.used_ns = self._clock.now_ns()
        async with until(deadline_ns, self._clock):
            await asyncio.wait([line.connecting])
        line.check()
        return line

    def tick(self) -> None:
        """Close what is lost, and what nobody has used for ``IDLE_NS``."""
        now_ns = self._clock.now_ns()
        for address, line in list(self._lines.items()):
            if line.is_lost or (line.is_idle and line.used_ns + IDLE_NS <= now_ns):
                del self._lines[address]
                self._spawn(line.close())
        for address, failed_ns in list(self._failed_ns.items()):
            if failed_ns + AVOID_NS <= now_ns:
                del self._failed_ns[address]

    async def close(self) -> None:
        """End every connection and transport; then no memory is touched any more. May be called twice."""
        self._is_closed = True
        for line in self._lines.values():
            self._spawn(line.close())
        self._lines.clear()
        while self._tasks:
            await asyncio.wait(self._tasks)
        while self._ways:
            await self._ways.popitem()[1].transport.close()
        self._memory.clear()

    def _open(self, scheme: str) -> _Way:
        """RAISES BadInput."""
        way = self._ways.get(scheme)
        if way is None:
            key = self._key if scheme in KEYED else b""
            way = self._ways[scheme] = _Way(self._opener(scheme, self._limits, self._clock, key))
            for memory in self._memory.values():
                way.transport.register(memory)
        return way

    def _connect(self, address: str) -> _Line:
        """RAISES BadInput."""
        scheme = scheme_of(address)
        if scheme not in self._ways and scheme != ALWAYS:
            raise BadInput(
                "bad_config",
                f"no transport of this node leads to {shown(address)}",
                f"it has none for {scheme}://",
                f"start it with a data address of that scheme, or let the peer listen with {ALWAYS}://",
            )
        if len(self._lines) >= LINES_MAX:
            raise BadInput("too_large", f"{LINES_MAX} connections to peers are open", "", "use fewer peers")
        transport = self._open(scheme).transport
        deadline_ns = self._clock.now_ns() + CONNECT_NS
        line = _Line(transport.connect(address, deadline_ns, lambda *_: None), self._clock)
        line.connecting.add_done_callback(partial(self._tried, address))
        if old := self._lines.get(address):
            self._spawn(old.close())
        self._lines[address] = line
        return line

    def _tried(self, address: str, connecting: asyncio.Task[Endpoint]) -> None:
        """Its error is seen by those who wait for it, and by nobody when they are gone."""
        self._failed_ns.pop(address, None)
        if not connecting.cancelled() and connecting.exception() is not None:
            self._failed_ns[address] = self._clock.now_ns()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Line:
    """An endpoint that many use: it knows when nobody does. An ``Endpoint`` once it is connected."""

    def __init__(self, connecting: Coroutine[None, None, Endpoint], clock: Clock) -> None:
        self.connecting = asyncio.get_running_loop().create_task(connecting)
        self.used_ns = clock.now_ns()
        self._clock = clock
        self._call_count = 0

    @property
    def peer(self) -> str:
        return self._endpoint.peer

    @property
    def is_lost(self) -> bool:
        if not self.connecting.done():
            return False
        return (
            self.connecting.cancelled() or self.connecting.exception() is not None or self._endpoint.is_lost
        )

    def check(self) -> None:
        """RAISES PeerLost, BadInput when it could not be connected."""
        if self.connecting.cancelled():
            raise PeerLost("this node is ending")
        try:
            self.connecting.result()
        except TransferLate as error:  # Its own time, not that of who waited.
            raise PeerLost(f"it did not answer within {CONNECT_NS // NS_PER_S} s") from error

    @property
    def is_idle(self) -> bool:
        return self._call_count == 0 and self.connecting.done()

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        with self._in_use():
            await self._endpoint.read(ticket, into, deadline_ns, priority)

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        with self._in_use():
            await self._endpoint.write(ticket, pieces, deadline_ns, priority)

    async def notify(self, note: bytes, deadline_ns: int) -> None:
        with self._in_use():
            await self._endpoint.notify(note, deadline_ns)

    async def close(self) -> None:
        """Also while it is being connected."""
        self.connecting.cancel()
        await asyncio.wait([self.connecting])
        if not self.connecting.cancelled() and self.connecting.exception() is None:
            await self._endpoint.close()

    @property
    def _endpoint(self) -> Endpoint:
        return self.connecting.result()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        self._call_count += 1
        try:
            yield
        finally:
            self._call_count -= 1
            self.used_ns = self._clock.now_ns()


def with_host(address: str, host: str) -> str:
    """A data address that names every interface (0.0.0.0, ::) with the host that the peer was reached at."""
    scheme, _, rest = address.partition("://")
    for everywhere in ("0.0.0.0:", "[::]:"):
        if rest.startswith(everywhere):
            named = f"[{host}]" if ":" in host else host
            return f"{scheme}://{named}:{rest.removeprefix(everywhere)}"
    return address
