"""How the HTTP process follows its node: events into the index, and numbers on request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.errors import KVCacheError, Unavailable
from kvcache.following import PAUSE_S_MAX, PAUSE_S_MIN, POLL_S, Channel, Following
from kvcache.locality import AsOf, LocalityIndex
from kvcache.metrics import HttpMetrics
from kvcache.wire import Stats, StatsReply, Tune, Tuned, Welcome

__all__ = ["PAUSE_S_MAX", "PAUSE_S_MIN", "POLL_S", "Channel", "Follower"]

CALL_NS = 2 * NS_PER_S


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
        self._troubles: list[str] = []
        self._following = Following("the node", connect, index, self, clock, pause, self._probe)
        self._metrics = metrics
        self._clock = clock
        self._values: dict[str, float] = {}
        self._values_ns = 0

    @property
    def node(self) -> str:
        return self._following.node

    @property
    def incarnation(self) -> int:
        return self._following.incarnation

    async def run(self) -> None:
        await self._following.run()

    @property
    def troubles(self) -> list[str]:
        """What the node said last of itself that does not work, and which engines are registered here and not
        followed; it serves all the same."""
        others = [state for state in self.index.sources() if state.source != self.node]
        return [*self._troubles, *(each for state in others for each in _wrong(state))]

    def degraded(self) -> list[str]:
        """What is wrong with the node, in plain words."""
        if self._following.calls is None:
            return [f"the node cannot be reached: {self._following.trouble}"]
        state = self.index.as_of(self.node)
        return _wrong(state) if state is not None else ["the index has not heard from the node yet"]

    async def stats(self) -> tuple[dict[str, float], int]:
        """The node's numbers, and how many milliseconds old they are: 0 unless it cannot be reached.

        RAISES Unavailable when it has never been reached."""
        asked_ns = self._clock.now_ns()
        calls = self._following.calls
        if calls is not None:
            with contextlib.suppress(KVCacheError):
                reply = await calls.call(Stats(), asked_ns + CALL_NS)
                assert isinstance(reply, StatsReply), reply
                self._values, self._values_ns = reply.values, asked_ns
                self._troubles = reply.troubles
                self._metrics.node.update(reply.values)
                return reply.values, 0
        if not self._values:
            raise Unavailable(
                "unavailable",
                "the node cannot be reached",
                self._following.trouble,
                "see /readyz, and the node's log",
            )
        return self._values, (asked_ns - self._values_ns) // NS_PER_MS

    async def tune(self, request: Tune) -> Tuned:
        """RAISES Unavailable, and what the node refuses."""
        calls = self._following.calls
        if calls is None:
            raise Unavailable("unavailable", "the node cannot be reached", self._following.trouble)
        reply = await calls.call(request, self._clock.now_ns() + CALL_NS)
        assert isinstance(reply, Tuned), reply
        return reply

    def show(self) -> None:
        """Bring the metrics of the index up to date."""
        states = self.index.sources()
        self._metrics.node_connected.set(self._following.calls is not None)
        self._metrics.index_synced.set(bool(states) and all(state.synced for state in states))
        self._metrics.index_entries.set(self.index.entries)
        self._metrics.index_bytes.set(self.index.bytes)
        self._metrics.count_refused(self.index.refused_blocks)

    # What ``Following`` tells and asks.

    def met(self, welcome: Welcome) -> None:
        """Any node will do: its address was given to us."""

    async def _probe(self, calls: Channel) -> None:
        _, age_ms = await self.stats()
        if age_ms:
            raise Unavailable("unavailable", "the node does not answer")

    def parted(self, reason: str) -> None:
        self._metrics.index_resyncs.labels(reason).inc()


def _wrong(state: AsOf) -> list[str]:
    found = [] if state.synced else [f"the index does not follow {state.source} yet"]
    return [*found, f"the index has no room for all of {state.source}"] if state.partial else found
