"""How the HTTP process follows its node: events into the index, numbers on request.

    apart ──connected──► loading ──snapshot taken──► following
      ▲                     │                            │
      └──── pause, doubling ┴──── lost, late, garbage ───┘

Two connections: one only for events, so that a reader that lags never holds up a reply. What the index
holds stays while the node is away, marked as suspect; a node with another name takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.errors import KVCacheError, Unavailable
from kvcache.locality import LOST, LocalityIndex
from kvcache.metrics import HttpMetrics
from kvcache.wire import EventBatch, Reply, Request, Stats, StatsReply, Welcome

log = logging.getLogger("kvcache.server.http")

PAUSE_S_MIN = 0.05
PAUSE_S_MAX = 2.0
POLL_S = 1.0
CALL_NS = 2 * NS_PER_S


class Channel(Protocol):
    """What is asked of a connection to the node (``kvcache.channel.AsyncChannel``)."""

    @property
    def welcome(self) -> Welcome: ...

    async def call(self, request: Request, deadline_ns: int) -> Reply: ...

    def events(self) -> AsyncIterator[EventBatch]: ...

    def close(self) -> None: ...


class Follower:
    """``run`` follows until it is cancelled. Everything else may be asked at any time."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Channel]],
        index: LocalityIndex,
        metrics: HttpMetrics,
        clock: Clock,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.index = index
        self.node = ""
        self.incarnation = 0
        self.troubles: list[str] = []
        """What the node said last of itself that does not work; it serves all the same."""
        self._connect = connect
        self._metrics = metrics
        self._clock = clock
        self._pause = pause
        self._calls: Channel | None = None
        self._sources: set[str] = set()
        self._steady = False
        self._trouble = "no connection was made yet"
        self._values: dict[str, float] = {}
        self._values_ns = 0

    async def run(self) -> None:
        pause_s, said = PAUSE_S_MIN, ""
        while True:
            try:
                reason = await self._follow()
            except KVCacheError as error:
                reason, self._trouble = "connection", str(error)
            self._part(reason)
            pause_s = PAUSE_S_MIN if self._steady else min(pause_s * 2, PAUSE_S_MAX)
            if self._trouble != said:
                log.warning("following the node ended (%s): %s", reason, self._trouble)
                said = self._trouble
            await self._pause(pause_s)

    def degraded(self) -> list[str]:
        """What is wrong, in plain words."""
        if self._calls is None:
            return [f"the node cannot be reached: {self._trouble}"]
        states = self.index.sources()
        found = [f"the index does not follow {state.source} yet" for state in states if not state.synced]
        found += [f"the index has no room for all of {state.source}" for state in states if state.partial]
        return found if states else ["the index has not heard from the node yet"]

    async def stats(self) -> tuple[dict[str, float], int]:
        """The node's numbers, and how many milliseconds old they are: 0 unless it cannot be reached.

        RAISES Unavailable when it has never been reached."""
        asked_ns = self._clock.now_ns()
        if self._calls is not None:
            with contextlib.suppress(KVCacheError):
                reply = await self._calls.call(Stats(), asked_ns + CALL_NS)
                assert isinstance(reply, StatsReply), reply
                self._values, self._values_ns = reply.values, asked_ns
                self.troubles = reply.troubles
                self._metrics.node.update(reply.values)
                return reply.values, 0
        if not self._values:
            raise Unavailable(
                "unavailable", "the node cannot be reached", self._trouble, "see /readyz, and the node's log"
            )
        return self._values, (asked_ns - self._values_ns) // NS_PER_MS

    def show(self) -> None:
        """Bring the metrics of the index up to date."""
        states = self.index.sources()
        self._metrics.node_connected.set(self._calls is not None)
        self._metrics.index_synced.set(bool(states) and all(state.synced for state in states))
        self._metrics.index_entries.set(self.index.entries)
        self._metrics.count_refused(self.index.refused_blocks)

    async def _follow(self) -> str:
        """One pair of connections, to its end. Returns why events must be asked for anew."""
        async with contextlib.AsyncExitStack() as stack:
            events = await self._connect()
            stack.callback(events.close)
            self._calls = await self._connect()
            stack.callback(self._calls.close)
            self._meet(events.welcome)
            self._steady = False
            poll = asyncio.get_running_loop().create_task(self._poll(events))
            stack.push_async_callback(_ended, poll)
            async for batch in events.events():
                self._sources.add(batch.source)
                applied = self.index.apply(batch, self._clock.now_ns())
                if applied in LOST:
                    self._trouble = f"events of {batch.source} were lost"
                    return applied.value
        raise Unavailable("unavailable", "the node ended the stream of events")

    def _meet(self, welcome: Welcome) -> None:
        if (welcome.node, welcome.incarnation) != (self.node, self.incarnation):
            for source in self._sources - {welcome.node}:
                self.index.forget(source)
            self._sources = set()
        self.node, self.incarnation = welcome.node, welcome.incarnation

    def _part(self, reason: str) -> None:
        """The connections are closed: what the index holds is no longer known to be so."""
        self._calls = None
        self._metrics.index_resyncs.labels(reason).inc()
        for source in self._sources:
            self.index.suspect(source)

    async def _poll(self, events: Channel) -> None:
        """Prove that the node lives; without an answer, end the stream of events as well."""
        while True:
            asked_ns = self._clock.now_ns()
            try:
                _, age_ms = await self.stats()
            except Unavailable:
                age_ms = -1
            if age_ms != 0:
                self._trouble = "it does not answer"
                events.close()
                return
            for source in self._sources:
                self.index.heard(source, asked_ns)
            await self._pause(POLL_S)
            self._steady = True


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
