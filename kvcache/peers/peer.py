"""One peer: the connections to it, what it holds as it tells it, and blocks that are brought from it.

    TakeLease ─► Leased, with checksums ─► Export ─► Exported, with a ticket       (control connection)
    read with the ticket, into slots reserved here                                  (transport)
    chunk sums of what arrived, in a thread ─► the checksum of the key that was asked for
    Release, with the positions whose bytes were wrong

The peer's word is taken for nothing but which checksum a block has, and that was made for its key: bytes of
another block, of another namespace, old or half ones do not pass.

Invariants: at most ``GROUPS_MAX`` groups are on their way at a time; when a fetch has returned or raised,
nothing touches its memory any more; a peer that was late or lost is left alone for a while.

The sum: two round trips (0.2 ms on a host) and 100 us of the event loop a group of 8 MiB; its bytes take
3 ms at 2.5 GB/s, summing them 0.5 ms in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcache.address import TcpAddress, parse
from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput, KVCacheError, NotAllowed, Unavailable
from kvcache.following import Following
from kvcache.locality import LocalityIndex
from kvcache.peers.dealing import Arrived as Arrived
from kvcache.peers.dealing import FetchFailed as FetchFailed
from kvcache.peers.dealing import Wanted as Wanted
from kvcache.peers.dealing import export, judge, nothing, take_lease
from kvcache.peers.lines import Lines
from kvcache.peers.load import Load
from kvcache.peers.plane import with_host
from kvcache.transport.base import Endpoint, PeerLost, Priority, Ticket, TransferLate, TransferRefused
from kvcache.transport.flow import until
from kvcache.transport.table import scheme_of
from kvcache.wire import PROTOCOL_VERSION, Hello, Leased, Release, Welcome

GROUPS_MAX = 4
STREAMS_MAX = 32
CONNECT_NS = 2 * NS_PER_S
RELEASE_NS = 2 * 86_400 * NS_PER_S
"""Longer than any lease is waited for: a Release that is late ends its connection, and with it the leases of
others, one of which it may be waiting behind. Where nobody answers, they end it, or ``Lines`` when idle."""

Sums = Callable[[Sequence[memoryview], int], Awaitable[bytes]]
"""The chunk sums of these views, computed where the event loop does not wait for them."""


class Plane(Protocol):
    """What is asked of ``kvcache.peers.plane.DataPlane``."""

    def usable(self, theirs: Sequence[str]) -> str: ...

    async def endpoint(self, address: str, deadline_ns: int) -> Endpoint: ...


@dataclass(frozen=True, slots=True)
class Here:
    """This node, as its peers need to know it. ``tenant_key`` makes the names of a tenant's blocks."""

    name: str
    incarnation: int
    token: str = field(repr=False)
    tenant_key: Callable[[str], bytes]


class Peer:
    """One owner, the event loop's thread. ``run`` follows it until cancelled; never itself."""

    def __init__(
        self,
        address: str,
        here: Here,
        plane: Plane,
        index: LocalityIndex,
        sums: Sums,
        clock: Clock,
        admit: Callable[[Peer, Welcome], None],
    ) -> None:
        """``admit`` RAISES NotAllowed when what answers here is not to be followed. RAISES BadInput when
        ``address`` is none of a control connection."""
        where = parse(address)
        self.address = address
        self.load = Load()
        self.turns = asyncio.Semaphore(GROUPS_MAX)
        """Whoever fetches holds one, and its time counts from there."""
        self._host = where.host if isinstance(where, TcpAddress) else "127.0.0.1"
        self._here = here
        self._plane = plane
        self._sums = sums
        self._clock = clock
        self._admit = admit
        self._following = Following(address, self._connect, index, self, clock)
        self._lines: dict[str, Lines] = {}
        self._streams: dict[str, Lines] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_self = False
        self._no_data = ""
        self._data: list[str] = []

    # --- what is known of it --------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What it calls itself; empty before it was reached once."""
        return self._following.node

    @property
    def incarnation(self) -> int:
        """Larger each time that it has started."""
        return self._following.incarnation

    @property
    def is_self(self) -> bool:
        """The address is this node's own: it may stand in a list that is the same for all nodes."""
        return self._is_self

    @property
    def is_up(self) -> bool:
        """It answered a moment ago."""
        return self._following.calls is not None

    @property
    def may_be_asked(self) -> bool:
        return self.is_up and not self.load.is_resting(self._clock.now_ns())

    @property
    def trouble(self) -> str:
        """In plain words, what does not work; empty while it does."""
        if self._is_self:
            return ""
        if self.is_up:
            return self._no_data
        why = self._following.trouble
        return f"the peer {self.name or '(unnamed)'} at {self.address} is not followed: {why}"

    async def run(self) -> None:
        await self._following.run()

    def forget(self) -> None:
        """Another has its name now. REQUIRES: it is not up."""
        self._following.forget()

    def tick(self) -> None:
        """Called by the node's timer."""
        for lines in (*self._lines.values(), *self._streams.values()):
            lines.tick()

    async def close(self) -> None:
        """REQUIRES: nobody fetches any more. May be called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lines in (*self._lines.values(), *self._streams.values()):
            lines.close()

    # --- what ``Following`` asks and tells ------------------------------------------------------

    def met(self, welcome: Welcome) -> None:
        here = self._here
        self._is_self = (welcome.node, welcome.incarnation) == (here.name, here.incarnation)
        if self._is_self:
            self._following.stop()
            raise Unavailable("unavailable", f"{self.address} is this node itself", "it needs no peer")
        if welcome.node == here.name:
            raise NotAllowed(
                "bad_config",
                f"the node at {self.address} is called {here.name}, as this one",
                "peers are told apart by their names",
                "give each node a name of its own",
            )
        self._admit(self, welcome)
        try:
            self.data_address(welcome)
            self._no_data = ""
        except BadInput as error:
            self._no_data = f"no blocks come from the peer {welcome.node}: {error}"

    def parted(self, reason: str) -> None:
        """What it holds is suspect now; the index knows."""

    # --- connections ----------------------------------------------------------------------------

    def lines(self, tenant: str) -> Lines:
        """The connections on which is asked for this tenant."""
        if tenant not in self._lines:
            self._lines[tenant] = Lines(lambda: self._connect(tenant), self._clock)
        return self._lines[tenant]

    def streams(self, tenant: str) -> Lines:
        """Those on which blocks are streamed: one is held for as long as they are being written."""
        if tenant not in self._streams:
            self._streams[tenant] = Lines(lambda: self._connect(tenant), self._clock, STREAMS_MAX)
        return self._streams[tenant]

    def data_address(self, welcome: Welcome) -> str:
        """Where its bytes are had. RAISES BadInput when it has no such address that leads there from here."""
        self._data = [with_host(each, self._host) for each in welcome.data]
        address = self._plane.usable(self._data)
        if not address:
            raise BadInput(
                "bad_config",
                f"the peer {welcome.node} has no data address that this node can use",
                f"it has {', '.join(scheme_of(each) for each in welcome.data) or 'none'}",
                "start it with --data tcp://HOST:0",
            )
        return address

    async def endpoint(self, address: str, deadline_ns: int) -> Endpoint:
        """To where a ticket is good that the peer gave with this data address: at any of its addresses of
        that scheme, the one that does not fail. RAISES PeerLost, TransferLate, BadInput."""
        told = with_host(address, self._host)
        if told in self._data:  # Else they are those of the node before this one.
            alike = [each for each in self._data if scheme_of(each) == scheme_of(told)]
            told = self._plane.usable(alike) or told
        return await self._plane.endpoint(told, deadline_ns)

    async def _connect(self, tenant: str = "") -> AsyncChannel:
        here = self._here
        hello = Hello(
            PROTOCOL_VERSION, token=here.token, client=f"node {here.name}", tenant=tenant, node=here.name
        )
        channel = await AsyncChannel.connect(
            self.address, hello, self._clock.now_ns() + CONNECT_NS, self._clock
        )
        try:
            self._check_key(channel.welcome)
            if tenant and channel.welcome.tenant != tenant:
                raise NotAllowed(
                    "not_allowed",
                    f"the peer {channel.welcome.node} acts for another tenant than {tenant}",
                    "the credential that this node has there is not allowed to name one",
                    "give it the role peer there",
                )
        except BaseException:
            channel.close()
            raise
        return channel

    def _check_key(self, welcome: Welcome) -> None:
        if welcome.tenant_key != self._here.tenant_key(welcome.tenant):
            raise NotAllowed(
                "bad_credentials",
                f"the peer {welcome.node} names the blocks of {welcome.tenant} by another key",
                "its credentials have another master key, so no block of one would be found at the other",
                "give all nodes the same master key",
            )

    # --- bringing blocks ------------------------------------------------------------------------

    async def fetch(
        self, wanted: Wanted, into: Sequence[memoryview], deadline_ns: int, priority: Priority
    ) -> Arrived:
        """Bring the leading blocks of ``wanted`` that it has. Their bytes are verified; those of others in
        ``into`` are undefined. RAISES FetchFailed. REQUIRES: a turn (``turns``) is held; ``into`` are the
        ``part.pieces`` of all these blocks, in order."""
        self.load.begin(self._clock.now_ns())
        arrived = 0
        try:
            async with until(deadline_ns, self._clock):
                found = await self._fetch(wanted, into, deadline_ns, priority)
            arrived = found.given * wanted.part.block_bytes
            return found
        except TransferLate as error:
            raise self._failed("late", error) from error
        except (PeerLost, Unavailable) as error:
            raise self._failed("lost", error) from error
        except TransferRefused as error:
            raise self._failed("refused", error) from error
        except KVCacheError as error:
            reason = "gone" if error.code == "unknown_namespace" else "refused"
            raise self._failed(reason, error) from error
        finally:
            self.load.end(arrived, self._clock.now_ns())

    def _failed(self, reason: str, error: Exception) -> FetchFailed:
        if reason in ("late", "lost"):
            self.load.rest(self._clock.now_ns())
        return FetchFailed(reason, str(error))

    async def _fetch(
        self, wanted: Wanted, into: Sequence[memoryview], deadline_ns: int, priority: Priority
    ) -> Arrived:
        wrong: list[int] = []
        async with self.lines(wanted.tenant).turn(deadline_ns) as channel:
            via = scheme_of(self.data_address(channel.welcome))
            leased = await take_lease(channel, wanted, self._clock.now_ns(), deadline_ns)
            try:
                exported = await export(channel, wanted, leased, via, deadline_ns)
            except KVCacheError:
                self._release(channel, leased, wrong)
                raise
        given = leased.count - len(wanted.behind)
        try:
            if exported is None:
                raise nothing(leased)
            endpoint = await self.endpoint(exported.address, deadline_ns)
            views = into[: given * wanted.part.piece_count]
            await endpoint.read(Ticket(exported.ticket), views, deadline_ns, priority)
            came = await self._sums(views, wanted.spec.chunk_bytes)
            arrived = judge(wanted, leased, exported, came)
            wrong = arrived.wrong
            return arrived
        finally:
            self._release(channel, leased, [len(wanted.behind) + at for at in wrong])

    def _release(self, channel: AsyncChannel, leased: Leased, wrong: list[int]) -> None:
        """Behind everybody's back: if it cannot be said, the lease ends by itself."""
        if not leased.lease:
            return
        task = asyncio.get_running_loop().create_task(self._let_go(channel, Release(leased.lease, wrong)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _let_go(self, channel: AsyncChannel, release: Release) -> None:
        with contextlib.suppress(KVCacheError):
            await channel.call(release, self._clock.now_ns() + RELEASE_NS)
