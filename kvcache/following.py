"""Following a node: its events into an index, for as long as somebody wants it.

    apart ──connected──► loading ──snapshot taken──► following
      ▲   │                 │                            │
      │   └─ stop ──► over  │                            │
      └──── pause, doubling ┴──── lost, late, garbage ───┘

Two connections: one only for events, so that a reader that lags never holds up a reply. What the index
holds stays while the node is away, marked as suspect; a node with another name takes its place.

The sum: a probe a second, and what ``LocalityIndex.apply`` costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from kvcache.clock import Clock
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.locality import LOST, LocalityIndex
from kvcache.wire import EventBatch, Reply, Request, Welcome

log = logging.getLogger("kvcache.following")

PAUSE_S_MIN = 0.05
PAUSE_S_MAX = 0.9
"""With the time of a connection, so long after a network has healed its nodes may be apart: 3 s at most."""
POLL_S = 1.0


class Channel(Protocol):
    """What is asked of a connection to the node (``kvcache.channel.AsyncChannel``)."""

    @property
    def welcome(self) -> Welcome: ...

    async def call(self, request: Request, deadline_ns: int) -> Reply: ...

    def events(self) -> AsyncIterator[EventBatch]: ...

    def close(self) -> None: ...


class Watched(Protocol):
    """Who wants to know how it goes."""

    def met(self, welcome: Welcome) -> None:
        """A connection was made. RAISES KVCacheError when this node is not to be followed."""

    async def probe(self, calls: Channel) -> None:
        """Ask the node something. RAISES KVCacheError when it does not answer."""

    def parted(self, reason: str) -> None:
        """The connections ended."""


class Following:
    """``run`` follows until it is cancelled, or stopped. Everything else may be asked at any time."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], Awaitable[Channel]],
        index: LocalityIndex,
        watched: Watched,
        clock: Clock,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``name``: what the log calls the node."""
        self.node = ""
        self.incarnation = 0
        self.calls: Channel | None = None
        """While there is a connection."""
        self.trouble = "no connection was made yet"
        self._name = name
        self._connect = connect
        self._index = index
        self._watched = watched
        self._clock = clock
        self._pause = pause
        self._steady = False
        self._stopped = False
        self._said = ""

    def stop(self) -> None:
        """This node is never to be followed: ``run`` returns once its connections have ended."""
        self._stopped = True

    def forget(self) -> None:
        """What this node was, and all that it told: another has its name now. REQUIRES: ``calls`` is None."""
        self._index.forget(self.node)
        self.node, self.incarnation = "", 0

    async def run(self) -> None:
        pause_s = PAUSE_S_MIN
        while True:
            try:
                reason = await self._follow()
            except KVCacheError as error:
                reason, self.trouble = "connection", str(error)
            self._part(reason)
            if self._stopped:
                return
            pause_s = PAUSE_S_MIN if self._steady else min(pause_s * 2, PAUSE_S_MAX)
            if self.trouble != self._said:
                log.warning("following %s ended (%s): %s", self._name, reason, self.trouble)
                self._said = self.trouble
            await self._pause(pause_s)

    async def _follow(self) -> str:
        """One pair of connections, to its end. Returns why events must be asked for anew."""
        async with contextlib.AsyncExitStack() as stack:
            self._steady = False
            events = await self._connect()
            stack.callback(events.close)
            calls = await self._connect()
            stack.callback(calls.close)
            self._watched.met(events.welcome)
            self.calls = calls
            self._meet(events.welcome)
            poll = asyncio.get_running_loop().create_task(self._poll(events, calls))
            stack.push_async_callback(_ended, poll)
            async for batch in events.events():
                if batch.source != self.node:
                    raise BadInput(
                        "bad_message", f"events of {batch.source!r:.60}", f"{self.node} tells of itself only"
                    )
                applied = self._index.apply(batch, self._clock.now_ns())
                if applied in LOST:
                    self.trouble = f"events of {batch.source} were lost"
                    return applied.value
        raise Unavailable("unavailable", "the node ended the stream of events")

    def _meet(self, welcome: Welcome) -> None:
        if welcome.node != self.node or welcome.incarnation < self.incarnation:
            self._index.forget(self.node)  # Also when its clock went back: what it tells would be old.
        self.node, self.incarnation = welcome.node, welcome.incarnation

    def _part(self, reason: str) -> None:
        """The connections are closed: what the index holds is no longer known to be so."""
        self.calls = None
        self._watched.parted(reason)
        self._index.suspect(self.node)

    async def _poll(self, events: Channel, calls: Channel) -> None:
        """Prove that the node lives; without an answer, end the stream of events as well."""
        while True:
            asked_ns = self._clock.now_ns()
            try:
                await self._watched.probe(calls)
            except KVCacheError:
                self.trouble = "it does not answer"
                events.close()
                return
            self._index.heard(self.node, asked_ns)
            await self._pause(POLL_S)
            self._steady = True
            if self._said:
                log.info("following %s again", self._name)
                self._said = ""


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
