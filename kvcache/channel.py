"""One connection to a node, as the caller sees it: a request, a deadline, a reply.

    connecting --Welcome--> open --deadline missed, garbage, end, close()--> closed

A reply can never be taken for another's: every call has its own number, and a call that misses its
deadline closes the connection, because what it asked for may still happen. Refusals (``Failure``) are
raised and leave the connection open. ``ended_by`` says in one word why a connection is closed.

``BlockingChannel`` is for one thread at a time; ``AsyncChannel`` for many tasks of one loop. Both take
absolute deadlines on the clock's nanoseconds. Watch on a channel of its own: a reader of events that
falls behind holds up every reply on the same connection.

The sum: a round trip on a unix socket is about 25 us, of which a third is Python here.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Final, Self, cast

from kvcache.address import Address, connected_socket, parse
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock, SystemClock
from kvcache.errors import BadInput, KVCacheError, NotAllowed, Unavailable
from kvcache.frames import Arrival, FrameReader, failure_error
from kvcache.wire import PROTOCOL_VERSION, EventBatch, Failure, Hello, Reply, Request, Watch, Welcome, encode

_SYSTEM_CLOCK: Final = SystemClock()
_DESCRIPTORS_MAX = 4
_SEND_BUFFERS_MAX = 512
_SEND_PIECE_BYTES = 256 << 10
_EVENT_BATCHES_MAX = 256


def _gone(address: Address, why: str) -> Unavailable:
    return Unavailable(
        "unavailable", f"the node at {address} is gone", why, "the blocks are recomputed meanwhile"
    )


class BlockingChannel:
    """One thread at a time. ``slab_fd`` belongs to the channel and is closed with it."""

    def __init__(self, address: Address, sock: socket.socket, clock: Clock) -> None:
        """Use ``connect``. REQUIRES: ``sock`` is connected and does not block."""
        self.address = address
        self.welcome = Welcome(PROTOCOL_VERSION, "", 0, "", [], b"", 0)
        self.slab_fd: int | None = None
        self.ended_by = ""
        self._sock = sock
        self._clock = clock
        self._reader = FrameReader()
        self._calls = 0
        self._poll = select.poll()
        self._descriptors: list[int] = []
        self._wants_descriptor = False

    @classmethod
    def connect(
        cls, address: str, hello: Hello, deadline_ns: int, clock: Clock = _SYSTEM_CLOCK
    ) -> BlockingChannel:
        """RAISES Unavailable, and BadInput or NotAllowed when the node refuses or is none.

        A host name is looked up by the system, which has no deadline for that.
        """
        where = parse(address)
        try:
            sock = connected_socket(where, deadline_ns, clock)
        except OSError as error:
            raise _gone(where, str(error)) from error
        channel = cls(where, sock, clock)
        try:
            channel._greet(hello, deadline_ns)
        except BaseException:
            channel.close()
            raise
        return channel

    def call(
        self,
        request: Request,
        deadline_ns: int,
        payload: Sequence[memoryview] = (),
        into: Sequence[memoryview] = (),
    ) -> Reply:
        """Send and wait. ``into`` receives the reply's payload; its content is undefined on any error.

        REQUIRES: ``payload`` and ``into`` are flat byte views. RAISES BadInput or NotAllowed when the
        node refuses; Unavailable when it does not answer by the deadline or its answer is garbage, and
        then the channel is closed.
        """
        if self.ended_by:
            raise _gone(self.address, f"the connection ended before: {self.ended_by}")
        self._calls += 1
        frame = encode(self._calls, request, sum(map(len, payload)))
        self._reader.expect(self._calls, into)
        try:
            self._send([memoryview(frame), *payload], deadline_ns)
            arrival = self._receive(deadline_ns)
        except (BadInput, NotAllowed) as error:
            self._end("bad_frame")
            raise _gone(self.address, f"the stream is broken: {error}") from error
        except OSError as error:
            self._end("disconnected")
            raise _gone(self.address, str(error)) from error
        except BaseException:  # An interrupt, too, leaves a reply behind that nobody waits for.
            self._end("interrupted")
            raise
        if isinstance(arrival.reply, Failure):
            raise failure_error(arrival.reply)
        return arrival.reply

    def close(self) -> None:
        self._end("closed")

    def detach(self) -> tuple[socket.socket, FrameReader, int, int | None]:
        """Socket, reader, calls so far and slab descriptor go to the caller; this channel is closed."""
        taken = (self._sock, self._reader, self._calls, self.slab_fd)
        self._sock, self.slab_fd = socket.socket(), None
        self.close()
        return taken

    def _greet(self, hello: Hello, deadline_ns: int) -> None:
        self._wants_descriptor = True
        try:
            reply = self.call(hello, deadline_ns)
        except Unavailable as error:
            if isinstance(error.__cause__, BadInput | NotAllowed):  # Say what is there instead of a node.
                raise error.__cause__ from None
            raise
        finally:
            self._wants_descriptor = False
            descriptors, self._descriptors = self._descriptors, []
            self.slab_fd = descriptors.pop(0) if descriptors else None
            for extra in descriptors:
                os.close(extra)
        if not isinstance(reply, Welcome) or descriptors or (self.slab_fd is not None and not hello.map):
            raise BadInput("bad_message", "the node did not answer Hello with one Welcome", repr(reply)[:200])
        self.welcome = reply

    def _send(self, buffers: list[memoryview], deadline_ns: int) -> None:
        first = 0
        while first < len(buffers):
            try:
                sent = self._sock.sendmsg(buffers[first : first + _SEND_BUFFERS_MAX])
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline_ns)
                continue
            while first < len(buffers) and sent >= len(buffers[first]):
                sent -= len(buffers[first])
                first += 1
            if sent:
                buffers[first] = buffers[first][sent:]

    def _receive(self, deadline_ns: int) -> Arrival:
        while True:
            try:
                count = self._receive_into(self._reader.buffer())
            except BlockingIOError:
                self._wait(select.POLLIN, deadline_ns)
                continue
            if count == 0:
                raise ConnectionResetError("the node closed the connection")
            if arrivals := self._reader.received(count):
                if len(arrivals) > 1:
                    raise BadInput("bad_frame", "two replies to one call")
                if self._clock.now_ns() > deadline_ns:
                    self._miss()
                return arrivals[0]

    def _receive_into(self, buffer: memoryview) -> int:
        if not self._wants_descriptor:
            return self._sock.recv_into(buffer)
        count, ancillary, flags, _ = self._sock.recvmsg_into(
            [buffer], socket.CMSG_SPACE(_DESCRIPTORS_MAX * 4), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = memoryview(data)[: len(data) // 4 * 4]
                self._descriptors.extend(whole.cast("i"))
        if flags & socket.MSG_CTRUNC:
            raise BadInput("bad_frame", "the node sent too many descriptors")
        return count

    def _wait(self, event: int, deadline_ns: int) -> None:
        left_ns = deadline_ns - self._clock.now_ns()
        if left_ns <= 0:
            self._miss()
        self._poll.register(self._sock, event)
        self._poll.poll(-(-left_ns // NS_PER_MS))

    def _miss(self) -> None:
        self._end("deadline")
        raise _gone(self.address, "it did not answer in time")

    def _end(self, reason: str) -> None:
        self.ended_by = self.ended_by or reason
        self._sock.close()
        if self.slab_fd is not None:
            os.close(self.slab_fd)
            self.slab_fd = None


class AsyncChannel(asyncio.BufferedProtocol):
    """Many tasks of one loop may call at once; requests go out in the order of the calls."""

    def __init__(self, greeted: BlockingChannel, clock: Clock) -> None:
        """Use ``connect``."""
        self.address = greeted.address
        self.welcome = greeted.welcome
        self.ended_by = ""
        self._sock, self._reader, self._calls, self.slab_fd = greeted.detach()
        self._clock = clock
        self._why = ""
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[Arrival]] = {}
        self._sending = asyncio.Lock()
        self._drained = asyncio.Event()
        self._drained.set()
        self._watch: tuple[int, asyncio.Queue[EventBatch | None]] | None = None

    @classmethod
    async def connect(
        cls, address: str, hello: Hello, deadline_ns: int, clock: Clock = _SYSTEM_CLOCK
    ) -> AsyncChannel:
        """As ``BlockingChannel.connect``, which does it in a thread."""
        loop = asyncio.get_running_loop()
        greeting = loop.run_in_executor(None, BlockingChannel.connect, address, hello, deadline_ns, clock)
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

    async def events(self) -> AsyncIterator[EventBatch]:
        """Send Watch, then yield what comes; leaving the iteration closes the channel. Once a connection.

        RAISES BadInput or NotAllowed when refused, Unavailable when the connection ends. There is no
        deadline: nothing may happen for long.
        """
        assert self._watch is None, "one Watch a connection"
        queue: asyncio.Queue[EventBatch | None] = asyncio.Queue()
        number, answer = await self._start(Watch(), (), ())
        self._watch = (number, queue)
        answer.add_done_callback(lambda _: queue.put_nowait(None))  # Refused, or the connection ended.
        try:
            while (batch := await queue.get()) is not None:
                if queue.qsize() == _EVENT_BATCHES_MAX // 2 and self._transport is not None:
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
                raise _gone(self.address, f"the connection ended: {self._why or 'it never began'}")
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
        if self.slab_fd is not None:
            os.close(self.slab_fd)
            self.slab_fd = None
        self._drained.set()
        for number, answer in self._waiting.items():
            self._reader.abandon(number)
            if not answer.done():
                answer.set_exception(_gone(self.address, why))
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
            number, queue = self._watch
            if arrival.call == number:
                queue.put_nowait(arrival.reply)
                if queue.qsize() >= _EVENT_BATCHES_MAX and self._transport is not None:
                    self._transport.pause_reading()
                return
        answer = self._waiting.pop(arrival.call, None)
        if answer is not None and not answer.done():
            answer.set_result(arrival)


def _close_unwanted(greeting: asyncio.Future[BlockingChannel]) -> None:
    if not greeting.cancelled() and greeting.exception() is None:
        greeting.result().close()
