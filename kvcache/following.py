"""Following a node: its events into an index, for as long as somebody wants it.

    apart ──connected, from the index's cursor──► following ──batch, beat──► following
      ▲   │                                          │
      │   └─ stop ──► over                           │
      └──── pause, doubling ◄── lost, silent, garbage┘

The node is asked for what came behind the batch that the index has, and sends a snapshot where it cannot do
so. It says every second that it lives; one that is silent for three is left. What the index holds stays
meanwhile, marked as suspect, until the index drops it; a node with another name takes its place.

Who asks the node more than its events gives a ``probe``, and there is a second connection for that: a reader
of events that lags never holds up a reply.

The sum: what ``LocalityIndex.apply`` costs, and a task that wakes up twice a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.locality import LOST, LocalityIndex
from kvcache.wire import EventBatch, Reply, Request, Welcome
from kvcache.wire_events import BEAT_NS

log = logging.getLogger("kvcache.following")

PAUSE_S_MIN = 0.05
PAUSE_S_MAX = 0.9
"""With the time of a connection, so long after a network has healed its nodes may be apart: 3 s at most."""
POLL_S = 0.5
SILENT_POLLS_MAX = 3 * BEAT_NS // (NS_PER_S // 2)
"""Polls and not a clock: when it was we who stood still, what the node said meanwhile is still to be read."""


class Channel(Protocol):
    """What is asked of a connection to the node (``kvcache.channel.AsyncChannel``)."""

    @property
    def welcome(self) -> Welcome: ...

    async def call(self, request: Request, deadline_ns: int) -> Reply: ...

    def events(self, incarnation: int = 0, seq: int = 0) -> AsyncIterator[EventBatch]: ...

    def close(self) -> None: ...


class Watched(Protocol):
    """Who wants to know how it goes."""

    def met(self, welcome: Welcome) -> None:
        """A connection was made. RAISES KVCacheError when this node is not to be followed."""

    def parted(self, reason: str) -> None:
        """The connections ended."""


Probe = Callable[[Channel], Awaitable[None]]
"""Asks the node something. RAISES KVCacheError when it does not answer."""


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
        probe: Probe | None = None,
    ) -> None:
        """``name``: what the log calls the node. ``probe`` is called twice a second."""
        self.node = ""
        self.incarnation = 0
        self.calls: Channel | None = None
        """While there is a connection; to ask on it, give a ``probe``."""
        self.trouble = "no connection was made yet"
        self._name = name
        self._connect = connect
        self._index = index
        self._watched = watched
        self._clock = clock
        self._pause = pause
        self._probe = probe
        self._heard = 0  # Batches, on this connection.
        self._given_up = ""  # Why we ended this connection.
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
                reason = "silent" if self._given_up else "connection"
                self.trouble = self._given_up or str(error)
            self._part(reason)
            if self._stopped:
                return
            pause_s = PAUSE_S_MIN if self._steady else min(pause_s * 2, PAUSE_S_MAX)
            if self.trouble != self._said:
                log.warning("following %s ended (%s): %s", self._name, reason, self.trouble)
                self._said = self.trouble
            await self._pause(pause_s)

    async def _follow(self) -> str:
        """From connecting to the end of it. Returns why events must be asked for anew."""
        async with contextlib.AsyncExitStack() as stack:
            self._steady, self._given_up = False, ""
            channel = calls = await self._connect()
            stack.callback(channel.close)
            self._watched.met(channel.welcome)
            if self._probe is not None:
                calls = await self._connect()
                stack.callback(calls.close)
            self.calls = calls
            self._meet(channel.welcome)
            poll = asyncio.get_running_loop().create_task(self._poll(channel, calls))
            stack.push_async_callback(_ended, poll)
            self._heard = 0
            async for batch in channel.events(*self._index.cursor(self.node) or (0, 0)):
                self._heard += 1
                if batch.source != self.node:
                    raise BadInput(
                        "bad_message", f"events of {batch.source!r:.60}", f"{self.node} tells of itself only"
                    )
                applied = self._index.apply(batch, self._clock.now_ns())
                if applied in LOST:
                    self.trouble = f"events of {batch.source} were lost"
                    return applied.value
                if batch.snapshot:
                    await asyncio.sleep(0)  # A page takes milliseconds, and the next may be there already.
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
        """See that the node lives; when it does not, end the stream of events."""
        heard, silent = 0, 0
        while silent < SILENT_POLLS_MAX:
            try:
                if self._probe is not None:
                    await self._probe(calls)
            except KVCacheError:
                self._given_up = "it does not answer"
                break
            await self._pause(POLL_S)
            silent = silent + 1 if self._heard == heard else 0
            heard = self._heard
            self._settle()
        else:
            self._given_up = "nothing was heard of it for three beats"
        events.close()

    def _settle(self) -> None:
        """The connection has lasted."""
        self._steady = True
        if self._said:
            log.info("following %s again", self._name)
            self._said = ""


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
