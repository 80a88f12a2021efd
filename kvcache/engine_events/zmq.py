"""Following an engine's own events over ZeroMQ, for as long as somebody wants it.

    apart ──handshake──► asking for what was before ──► following ──────┐
      ▲                                                    │ gap: asks  │ a second's silence: asks once,
      │                                                    ▼            ▼ whether something was lost
      └──── pause, doubling ◄──── disconnected, or no heartbeat for 3 s

A socket is one connection: it never connects again by itself, so what is read from it is of one process, and
``EngineFeed.connected`` asks whose. An idle engine tells nothing, so ZMTP heartbeats stand for beats: while
they are answered, the index hears of the source every second; after a disconnection it is suspect, and gone
when its lease is over.

The only file that imports zmq. The sum: 30 us a message, besides what the feed costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from kvcache.clock import NS_PER_MS, Clock
from kvcache.engine_events.decode import PAYLOAD_BYTES_MAX
from kvcache.engine_events.feed import EngineFeed
from kvcache.errors import KVCacheError, Unavailable
from kvcache.locality import LOST, Applied
from kvcache.wire import EventBatch

log = logging.getLogger("kvcache.engine_events")

Context = zmq.asyncio.Context

CONNECT_MS = 3_000
BEAT_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 3_000
CHECK_MS = 30_000
"""How often, in silence, it is asked whether something was lost. First after ``BEAT_MS``."""
REPLAY_IDLE_MS = 5_000
REPLAY_MESSAGES_MAX = 1 << 20
WAITING_MESSAGES_MAX = 100_000
DRAIN_MESSAGES = 16
"""Taken in one go before others get a turn."""
PAUSE_S_MIN = 0.05
PAUSE_S_MAX = 0.9
TOPIC_BYTES_MAX = 4_096

END_SEQ = (-1).to_bytes(8, "big", signed=True)
_SEQ_BYTES = 8
_HANDSHAKE = zmq.Event.HANDSHAKE_SUCCEEDED
_ENDED = (
    zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class Index(Protocol):
    """What is asked of ``kvcache.locality.LocalityIndex``."""

    def apply(self, batch: EventBatch, now_ns: int) -> Applied: ...

    def suspect(self, source: str) -> None: ...

    def heard(self, source: str, now_ns: int) -> None: ...


class EngineFollowing:
    """``run`` follows until it is cancelled. Everything else may be asked at any time."""

    def __init__(
        self,
        endpoint: str,
        replay: str,
        feed: EngineFeed,
        index: Index,
        clock: Clock,
        topic: str = "",
        context: Context | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``replay``: empty when the engine has none; ``feed`` was told the same. ``context``: of
        ``new_context``, for many of them; without it, one of its own."""
        self.feed = feed
        self.connected = False
        self.connections = 0
        self.trouble = "no connection was made yet"
        self.malformed = 0
        """Messages that were not of these frames."""
        self._endpoint = endpoint
        self._replay_endpoint = replay
        self._index = index
        self._clock = clock
        self._topic = topic.encode()
        self._context = context
        self._pause = pause
        self._heard_ns = 0
        self._said = ""

    async def run(self) -> None:
        if self._context is not None:
            return await self._run(self._context)
        context = new_context()
        try:
            await self._run(context)
        finally:
            context.destroy(linger=0)

    async def _run(self, context: Context) -> None:
        pause_s = PAUSE_S_MIN
        while True:
            before = self.connections
            try:
                await self._follow(context)
            except KVCacheError as error:
                self.trouble = str(error)
            except zmq.ZMQError as error:
                self.trouble = f"ZeroMQ: {error}"
            finally:
                self.connected = False
                self._index.suspect(self.feed.source)
            pause_s = PAUSE_S_MIN if self.connections > before else min(pause_s * 2, PAUSE_S_MAX)
            if self.trouble != self._said:
                log.warning("following the engine %s ended: %s", self.feed.source, self.trouble)
                self._said = self.trouble
            await self._pause(pause_s)

    async def _follow(self, context: Context) -> None:
        """One connection, to its end. RAISES Unavailable, ZMQError."""
        with contextlib.ExitStack() as stack:
            live = context.socket(zmq.SUB)
            stack.callback(live.close, linger=0)
            monitor = live.get_monitor_socket(_HANDSHAKE | _ENDED)
            stack.callback(monitor.close, linger=0)
            stack.callback(live.disable_monitor)
            _limit(live)
            live.rcvhwm = WAITING_MESSAGES_MAX
            live.subscribe(self._topic)
            live.connect(self._endpoint)
            await _handshake(monitor, self._endpoint)
            self.connections += 1
            self.connected = True
            if self._said:
                log.info("following the engine %s again", self.feed.source)
                self._said = ""
            self._apply(self.feed.connected())
            await self._catch_up(context)
            self._apply([self.feed.beat()])
            await self._read(context, live, monitor)

    async def _read(self, context: Context, live: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
        """Until the connection ends. What it sent and was not read by then is gone with it: who comes back
        replays it. RAISES Unavailable."""
        poller = zmq.asyncio.Poller()
        poller.register(live, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        quiet_ms = 0
        while True:
            ready = {socket for socket, _ in await poller.poll(BEAT_MS)}
            if monitor in ready and await _ended(monitor):
                raise Unavailable("unavailable", f"{self._endpoint} ended the connection")
            taken = live in ready and await self._drain(context, live)
            await asyncio.sleep(0)  # What is there already is taken without waiting.
            self._hear()
            if taken:
                quiet_ms = 0
            elif not ready:
                quiet_ms += BEAT_MS
                if quiet_ms == BEAT_MS or quiet_ms % CHECK_MS == 0:
                    self.feed.quiet()
                    await self._catch_up(context)

    async def _drain(self, context: Context, live: zmq.asyncio.Socket) -> bool:
        """Take some of what is there. Returns whether anything was."""
        for count in range(DRAIN_MESSAGES):
            try:
                frames = await live.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return count > 0
            await self._take(context, frames)
        return True

    async def _take(self, context: Context, frames: list[bytes]) -> None:
        found = message(frames)
        if found is None:
            self.malformed += 1
            self.trouble = f"a message of {len(frames)} frames that are no number and payload"
            return
        self._apply(self.feed.take(*found))
        await self._catch_up(context)

    async def _catch_up(self, context: Context) -> None:
        """Ask for as long as the feed wants to know more."""
        while (start := self.feed.wanted) is not None:
            answered = await self._replay(context, start)
            if not answered:
                self.trouble = f"{self._replay_endpoint} did not answer with all that was asked of it"
            self._apply(self.feed.replay_ended(answered))

    async def _replay(self, context: Context, start: int) -> bool:
        """One replay, each message as it comes. Returns whether it came to its end."""
        asking = context.socket(zmq.DEALER)
        try:
            _limit(asking)
            asking.connect(self._replay_endpoint)
            asking.sndtimeo = REPLAY_IDLE_MS
            await asking.send_multipart([b"", start.to_bytes(_SEQ_BYTES, "big")])
            idle_ms = 0
            for count in range(REPLAY_MESSAGES_MAX):
                if count % DRAIN_MESSAGES == 0:
                    await asyncio.sleep(0)
                while not await asking.poll(BEAT_MS):
                    self._hear()
                    idle_ms += BEAT_MS
                    if idle_ms >= REPLAY_IDLE_MS:
                        return False
                idle_ms = 0
                self._hear()
                frames = await asking.recv_multipart(zmq.NOBLOCK)
                if END_SEQ in frames[1:3]:
                    return True
                found = message(frames[1:])
                if found is None:
                    self.malformed += 1
                    return False
                self._apply(self.feed.replayed(*found))
            return False
        finally:
            asking.close(linger=0)

    def _apply(self, batches: Iterable[EventBatch]) -> None:
        """An index that lost its place is told everything."""
        for batch in batches:
            if self._index.apply(batch, self._clock.now_ns()) in LOST and not batch.snapshot:
                for page in self.feed.snapshot():
                    self._index.apply(page, self._clock.now_ns())

    def _hear(self) -> None:
        now_ns = self._clock.now_ns()
        if now_ns - self._heard_ns >= BEAT_MS * NS_PER_MS:
            self._heard_ns = now_ns
            self._index.heard(self.feed.source, now_ns)


def new_context() -> Context:
    """For many followings in one event loop. To be ended with ``destroy(linger=0)``."""
    return Context(io_threads=1)


def message(frames: list[bytes]) -> tuple[int, bytes] | None:
    """The number and the payload of a message: of [topic, number, payload], or of [number, payload] as older
    engines replay. None when it is neither."""
    if len(frames) not in (2, 3):
        return None
    number, payload = frames[-2:]
    if len(number) != _SEQ_BYTES or number[0] >= 0x80 or len(payload) > PAYLOAD_BYTES_MAX:
        return None
    return int.from_bytes(number, "big"), payload


def _limit(socket: zmq.asyncio.Socket) -> None:
    """One connection, bounded messages, and an end of waiting."""
    socket.linger = 0
    socket.maxmsgsize = PAYLOAD_BYTES_MAX
    socket.reconnect_ivl = -1
    socket.connect_timeout = CONNECT_MS
    socket.heartbeat_ivl = BEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS


async def _handshake(monitor: zmq.asyncio.Socket, endpoint: str) -> None:
    """RAISES Unavailable when there is no publisher."""
    if not await monitor.poll(CONNECT_MS):
        raise Unavailable("unavailable", f"{endpoint} does not answer")
    event = parse_monitor_message(await monitor.recv_multipart())["event"]
    if not event & _HANDSHAKE:
        raise Unavailable(
            "unavailable",
            f"no publisher of events is at {endpoint}",
            "an engine binds its endpoint only where that has a * in it, or is ipc",
            "see docs/engine-events.md",
        )


async def _ended(monitor: zmq.asyncio.Socket) -> bool:
    event: int = parse_monitor_message(await monitor.recv_multipart())["event"]
    return bool(event & _ENDED)
