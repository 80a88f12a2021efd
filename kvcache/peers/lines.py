"""Control connections to one peer for one tenant, each for one question at a time.

    turn ── an idle connection, else a new one while there are fewer than there may be, else wait ──► asked
              ▲                                                                                     │
              └──────────────── answered, or refused in words ◄─────────────────────────────────────┤
                                       closed ◄── cut off, given up, or idle for IDLE_NS (tick) ◄────┘

A node answers one connection's questions in turn, and a lease may wait for a disk: who asks on a connection
where somebody waits, waits too. What need not be answered at once (a Release) may go between.

Invariants: at most ``most`` connections, ``IDLE_MAX`` that nobody uses, and none for long; a peer that cannot
be reached is not tried again before its time, and whoever asks meanwhile hears so at once.

The sum: a turn costs 2 us, a connection three round trips and a thread for as long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.errors import BadInput, KVCacheError, NotAllowed, Unavailable

LINES_MAX = 4
IDLE_MAX = LINES_MAX
"""More are closed: a node takes so many connections in all, and each tenant of each peer has some."""
IDLE_NS = 60 * NS_PER_S
BACKOFF_NS_MIN = 50 * NS_PER_MS
BACKOFF_NS_MAX = 2_000 * NS_PER_MS


class Lines:
    """One owner, the event loop's thread."""

    def __init__(
        self, connect: Callable[[], Awaitable[AsyncChannel]], clock: Clock, most: int = LINES_MAX
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._turns = asyncio.Semaphore(most)
        self._idle: list[AsyncChannel] = []
        self._open: dict[AsyncChannel, int] = {}
        """Until when each is needed."""
        self._retry_ns = 0
        self._delay_ns = BACKOFF_NS_MIN
        self._why = ""

    @property
    def is_full(self) -> bool:
        """Would who asks now have to wait for a turn?"""
        return self._turns.locked()

    @asynccontextmanager
    async def turn(self, until_ns: int = 0) -> AsyncIterator[AsyncChannel]:
        """A connection on which nobody's question waits; what the peer gives on it is needed until then. What
        ends inside with anything but a refusal closes it, and with it all that the peer gave on it. RAISES
        KVCacheError when there is no connection."""
        async with self._turns:
            channel = await self._take()
            self._open[channel] = max(until_ns, self._open.get(channel, 0))
            try:
                yield channel
            except (BadInput, NotAllowed):
                self._give_back(channel)
                raise
            except BaseException:
                self._open.pop(channel, None)
                channel.close()
                raise
            self._give_back(channel)

    def tick(self) -> None:
        """Close those that nobody has needed for ``IDLE_NS``."""
        now_ns = self._clock.now_ns()
        for channel in list(self._idle):
            if self._open[channel] + IDLE_NS <= now_ns:
                self._idle.remove(channel)
                del self._open[channel]
                channel.close()

    def close(self) -> None:
        """Leases and reservations had on these connections end with them. May be called twice."""
        for channel in self._open:
            channel.close()
        self._open.clear()
        self._idle.clear()

    async def _take(self) -> AsyncChannel:
        while self._idle:
            channel = self._idle.pop()
            if not channel.ended_by:
                return channel
            del self._open[channel]
        if self._clock.now_ns() < self._retry_ns:
            raise Unavailable("unavailable", "the peer could not be reached a moment ago", self._why)
        try:
            channel = await self._connect()
        except KVCacheError as error:
            self._why = str(error)
            self._retry_ns = self._clock.now_ns() + self._delay_ns
            self._delay_ns = min(2 * self._delay_ns, BACKOFF_NS_MAX)
            raise
        self._delay_ns = BACKOFF_NS_MIN
        return channel

    def _give_back(self, channel: AsyncChannel) -> None:
        if channel in self._open and not channel.ended_by and len(self._idle) < IDLE_MAX:
            self._open[channel] = max(self._open[channel], self._clock.now_ns())
            self._idle.append(channel)
            return
        self._open.pop(channel, None)
        channel.close()
