"""One connection to a node, as the caller sees it: a request, a deadline, a reply.

    connecting --Welcome--> open --deadline missed, garbage, end, close()--> closed

A reply can never be taken for another's: every call has its own number, and a call that misses its
deadline closes the connection, because what it asked for may still happen. Refusals (``Failure``) are
raised and leave the connection open. ``ended_by`` says in one word why a connection is closed.

``BlockingChannel`` is for one thread at a time; ``AsyncChannel`` for many tasks of one loop. Both take
absolute deadlines on the clock's nanoseconds. Watch on a channel of its own: a reader of events that
falls behind holds up every reply on the same connection.

The sum: a round trip to a node on a unix socket is about 80 us: 20 us of Python here, as much there,
and two switches of process between.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self, cast

from kvcache.blocking_channel import SYSTEM_CLOCK, BlockingChannel, gone
from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import KVCacheError
from kvcache.frames import Arrival, failure_error
from kvcache.wire import EventBatch, Failure, Hello, Reply, Request, Watch, encode

__all__ = ["AsyncChannel", "BlockingChannel"]

_SEND_PIECE_BYTES = 256 << 10
_EVENT_BATCHES_MAX = 256
_EVENT_BYTES_MAX = 8 << 20


class AsyncChannel(asyncio.BufferedProtocol):
    """Many tasks of one loop may call at once; requests go out in the order of the calls."""

    def __init__(self, greeted: BlockingChannel, clock: Clock) -> None:
        """Use ``connect``."""
        self.address = greeted.address
        self.welcome = greeted.welcome
        self.ended_by = ""
        self._sock, self._reader, self._calls, self.slab_fd, self.hbm_fd = greeted.detach()
        self._clock = clock
        self._why = ""
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[Arrival]] = {}
        self._sending = asyncio.Lock()
        self._drained = asyncio.Event()
        self._drained.set()
        self._watch: tuple[int, _Events] | None = None

    @classmethod
    async def connect(
        cls, address: str, hello: Hello, deadline_ns: int, clock: Clock = SYSTEM_CLOCK
    ) -> AsyncChannel:
        """As ``BlockingChannel.connect``, which does it in a thread of its own."""
        loop = asyncio.get_running_loop()
        greeting = _greeting(loop, lambda: BlockingChannel.connect(address, hello, deadline_ns, clock))
        try:
            greeted = await asyncio.shield(greeting)
        except asyncio.CancelledError:
            greeting.add_done_callback(_close_unwanted)
            raise
        channel = cls(greeted, clock)
        try:
            await loop.create_connection(lambda: channel, sock=channel._sock)
        except BaseException:
            channel.close()
            raise
        return channel

    async def call(
        self,
        request: Request,
        deadline_ns: int,
        payload: Sequence[memoryview] = (),
        into: Sequence[memoryview] = (),
    ) -> Reply:
        """As ``BlockingChannel.call``. When cancelled, the reply is thrown away and ``into`` left alone."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(deadline_ns - self._clock.now_ns(), 0) / NS_PER_S, self._miss)
        try:
            number, answer = await self._start(request, payload, into)
            try:
                arrival = await answer
            finally:
                self._waiting.pop(number, None)
                self._reader.abandon(number)
        finally:
            timer.cancel()
        if isinstance(arrival.reply, Failure):
            raise failure_error(arrival.reply)
        return arrival.reply

    async def events(self, incarnation: int = 0, seq: int = 0) -> AsyncIterator[EventBatch]:
        """Send Watch, then yield what comes; leaving the iteration closes the channel. Once a connection.
        Who has everything up to a batch names it, and is told what came behind it if that is still kept.

        RAISES BadInput or NotAllowed when refused, Unavailable when the connection ends. There is no
        deadline: a node that lives says so every second (``EventBatch.beat``); the caller sees to that.
        """
        assert self._watch is None, "one Watch a connection"
        events = _Events()
        number, answer = await self._start(Watch(incarnation, seq), (), ())
        self._watch = (number, events)
        answer.add_done_callback(lambda _: events.end())  # Refused, or the connection ended.
        try:
            while (batch := await events.get()) is not None:
                if events.is_full and events.has_room and self._transport is not None:
                    events.is_full = False
                    self._transport.resume_reading()
                yield batch
            arrival = await answer
        finally:
            self.close()
        assert isinstance(arrival.reply, Failure), arrival.reply
        raise failure_error(arrival.reply)

    def close(self) -> None:
        self._end("closed", "this side closed it")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _start(
        self, request: Request, payload: Sequence[memoryview], into: Sequence[memoryview]
    ) -> tuple[int, asyncio.Future[Arrival]]:
        """Send one request whole. When cancelled in the middle of a frame, the connection ends."""
        async with self._sending:
            if self.ended_by or self._transport is None:
                raise gone(self.address, f"the connection ended: {self._why or 'it never began'}")
            self._calls += 1
            number = self._calls
            frame = encode(number, request, sum(map(len, payload)))
            self._reader.expect(number, into)
            self._waiting[number] = answer = asyncio.get_running_loop().create_future()
            self._transport.write(frame)
            try:
                for view in payload:
                    for at in range(0, len(view), _SEND_PIECE_BYTES):
                        if self._transport.is_closing():
                            return number, answer
                        self._transport.write(view[at : at + _SEND_PIECE_BYTES])
                        await self._drained.wait()
            except asyncio.CancelledError:
                self._waiting.pop(number)
                self._end("interrupted", "a request was cancelled half way")
                raise
        return number, answer

    def _miss(self) -> None:
        self._end("deadline", "it did not answer in time")

    def _end(self, reason: str, why: str) -> None:
        if self.ended_by:
            return
        self.ended_by, self._why = reason, why
        if self._transport is not None:
            self._transport.abort()
        else:
            self._sock.close()
        for descriptor in (self.slab_fd, self.hbm_fd):
            if descriptor is not None:
                os.close(descriptor)
        self.slab_fd = self.hbm_fd = None
        self._drained.set()
        for number, answer in self._waiting.items():
            self._reader.abandon(number)
            if not answer.done():
                answer.set_exception(gone(self.address, why))
                answer.exception()  # Seen: a caller that was cancelled will not look at it.
        self._waiting.clear()

    # asyncio.BufferedProtocol: called by the transport only.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name.

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("disconnected", str(exc) if exc else "the node closed the connection")

    def pause_writing(self) -> None:
        self._drained.clear()

    def resume_writing(self) -> None:
        self._drained.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self.ended_by:
            return
        try:
            for arrival in self._reader.received(nbytes):
                self._deliver(arrival)
        except KVCacheError as error:
            self._end("bad_frame", f"the stream is broken: {error}")

    def _deliver(self, arrival: Arrival) -> None:
        if self._watch is not None and isinstance(arrival.reply, EventBatch):
            number, events = self._watch
            if arrival.call == number:
                events.put(arrival.reply)
                if events.is_full and self._transport is not None:
                    self._transport.pause_reading()
                return
        answer = self._waiting.pop(arrival.call, None)
        if answer is not None and not answer.done():
            answer.set_result(arrival)


class _Events:
    """Batches that came and were not taken yet. Bounded by who asks ``is_full`` and reads no more."""

    def __init__(self) -> None:
        self.is_full = False
        self._bytes = 0
        self._queue: asyncio.Queue[EventBatch | None] = asyncio.Queue()

    @property
    def has_room(self) -> bool:
        """Half of what makes it full is gone."""
        return self._queue.qsize() <= _EVENT_BATCHES_MAX // 2 and self._bytes <= _EVENT_BYTES_MAX // 2

    def put(self, batch: EventBatch) -> None:
        self._queue.put_nowait(batch)
        self._bytes += _size(batch)
        full = self._queue.qsize() >= _EVENT_BATCHES_MAX or self._bytes >= _EVENT_BYTES_MAX
        self.is_full = self.is_full or full

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def get(self) -> EventBatch | None:
        """None: no more will come."""
        batch = await self._queue.get()
        if batch is not None:
            self._bytes -= _size(batch)
        return batch


def _size(batch: EventBatch) -> int:
    return sum([len(event.hashes) for event in batch.events])


def _greeting(
    loop: asyncio.AbstractEventLoop, connect: Callable[[], BlockingChannel]
) -> asyncio.Future[BlockingChannel]:
    """Those of the loop's pool are few, and everything that waits for one would wait for nodes that do not
    answer. And the process ends without waiting for a look-up of a host's name, which has no deadline."""
    greeting: asyncio.Future[BlockingChannel] = loop.create_future()

    def tell(greeted: BlockingChannel | BaseException) -> None:
        if isinstance(greeted, BlockingChannel):
            greeting.set_result(greeted)
        else:
            greeting.set_exception(greeted)

    def say(greeted: BlockingChannel | BaseException) -> None:
        try:
            loop.call_soon_threadsafe(tell, greeted)
        except RuntimeError:  # The loop is closed: nobody wants it any more.
            if isinstance(greeted, BlockingChannel):
                greeted.close()

    def work() -> None:
        try:
            say(connect())
        except KVCacheError as error:
            say(error)
        except BaseException as error:  # Our own code is wrong; but nobody must wait for ever.
            say(error)
            raise

    threading.Thread(target=work, name="kvcache-connect", daemon=True).start()
    return greeting


def _close_unwanted(greeting: asyncio.Future[BlockingChannel]) -> None:
    if not greeting.cancelled() and greeting.exception() is None:
        greeting.result().close()
