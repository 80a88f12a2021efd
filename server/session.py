"""One connection after its handshake: bytes in, frames out. Knows framing and order, decides nothing.

    frame arrives -> Responder.answer -> a Reply at once, or an Answer still to be waited for
    body, payload                        (meanwhile nothing more is read from this connection)

Replies leave in the order of their requests. A Write's payload goes from the socket straight into the
slots that the Responder names, a Read's payload straight out of them: the interpreter never loops over
block bytes. Frames are whole: an event that happens while a payload or a snapshot leaves waits behind it.

A peer that does not take its replies is not read from either, so its memory here is bounded by one
receive buffer and one reply; one that takes nothing for ``STALL_S`` is disconnected, so is a watcher that
lags by more than ``WATCH_BYTES_MAX``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from kvcache import wire
from kvcache.errors import KVCacheError

log = logging.getLogger("kvcache.server")

RECEIVE_BYTES = 64 << 10
STEP_BYTES = 256 << 10
TURN_BYTES = 2 << 20
"""After so many others on the loop have their turn, also when the peer takes all that comes."""
WATCH_BYTES_MAX = 16 << 20
DISCARD_BYTES = 64 << 10
TEXT_CHARS_MAX = 1_000
STALL_S = 60.0
CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A reply with a payload: these views, in order."""

    message: wire.Reply
    payload: Sequence[memoryview]


@dataclass(frozen=True, slots=True)
class Following:
    """Replies to one call, packed, in order; each is made when it is about to leave. What is pushed
    meanwhile comes after them."""

    messages: Iterable[bytes]


Answer = wire.Reply | Outgoing | Following
Later = Coroutine[None, None, Answer]


class Responder(Protocol):
    """What a session asks: the handlers, bound to this connection's identity."""

    def answer(self, call: int, request: wire.Request) -> Answer | Later:
        """RAISES KVCacheError when the request is refused."""

    def destination(self, request: wire.Write, payload_bytes: int) -> list[memoryview]:
        """Where a Write's payload goes. RAISES KVCacheError when it may not be written."""

    def refused(self, error: KVCacheError) -> None:
        """A request was refused with this error."""

    def lagged(self) -> None:
        """The peer did not take its events fast enough and was disconnected."""

    def ended(self) -> None:
        """The connection is gone."""


class Session(asyncio.BufferedProtocol):
    """The asyncio side of one connection. Created after Hello was answered."""

    def __init__(self, responder: Responder, ended: Callable[[], None], *, stall_s: float = STALL_S) -> None:
        self._responder = responder
        self._ended = ended
        self._stall_s = stall_s
        self._transport: asyncio.Transport | None = None
        self._is_cut = False
        self._buffer = bytearray(RECEIVE_BYTES)
        self._have = 0
        self._incoming: _Incoming | None = None
        self._busy: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._streaming = False  # A payload or a snapshot is on its way out.
        self._events: list[bytes] = []  # What waits behind it,
        self._events_bytes = 0  # and how much that is.
        self._written_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    # --- called by the event loop ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name.
        if self._is_cut:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._writable.set()
        self._stop_timer()
        if self._busy is not None:
            self._busy.cancel()
        self._responder.ended()
        self._ended()

    def eof_received(self) -> None:
        """The peer asks nothing more, and what it asked is answered: the transport closes itself."""
        self._close()

    def pause_writing(self) -> None:
        self._writable.clear()
        if self._open():
            self._watch_stall(-1)
        self._regulate()

    def resume_writing(self) -> None:
        self._writable.set()
        if self._open():
            self._stop_timer()
        self._advance()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._incoming is not None:
            return self._incoming.room()
        return memoryview(self._buffer)[self._have :]

    def buffer_updated(self, count: int) -> None:
        if self._incoming is not None:
            self._incoming.filled(count)
        else:
            self._have += count
        self._advance()

    def cut(self) -> None:
        """Nothing is answered any more, and the connection ends. Also before it has begun."""
        self._is_cut = True
        if self._transport is not None:
            self._transport.abort()

    # --- frames ---------------------------------------------------------------------------------

    def push(self, packed: bytes, call: int) -> None:
        """One event batch to a watcher; a watcher that lags too far is disconnected, and asks for what it
        missed."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() + self._events_bytes > WATCH_BYTES_MAX:
            self._responder.lagged()
            log.warning("a watcher lags by over %d bytes; it is disconnected", WATCH_BYTES_MAX)
            self._transport.abort()
            return
        frame = wire.frame(call, packed)
        if self._streaming:
            self._events.append(frame)
            self._events_bytes += len(frame)
        else:
            self._write(frame)

    def _advance(self) -> None:
        """Take whole frames off the buffer until one must be waited for, or its reply would have to."""
        try:
            while self._busy is None and self._writable.is_set() and self._open():
                if self._incoming is not None:
                    if not self._incoming.complete:
                        break
                    finished, self._incoming = self._incoming, None
                    self._dispatch(finished.call, finished.request, finished.error)
                elif not self._take_frame():
                    break
        except KVCacheError as error:
            # The stream cannot be trusted from here on: say why, then close.
            self._write(wire.encode(0, self._failure(error)))
            self._close()
        self._regulate()

    def _open(self) -> bool:
        return self._transport is not None and not self._is_cut and not self._transport.is_closing()

    def _take_frame(self) -> bool:
        if self._have < wire.HEADER.size:
            return False
        header = wire.decode_header(memoryview(self._buffer)[: wire.HEADER.size])
        end = wire.HEADER.size + header.body_bytes
        if self._have < end:
            if end > len(self._buffer):
                grown = bytearray(end)  # A new one: the event loop still holds a view of the old.
                grown[: self._have] = memoryview(self._buffer)[: self._have]
                self._buffer = grown
            return False
        call, request = wire.decode_request(bytes(memoryview(self._buffer)[wire.HEADER.size : end]))
        if header.payload_bytes == 0 and not isinstance(request, wire.Write):
            self._consume(end)
            self._dispatch(call, request, None)
            return True
        self._incoming = self._expect(call, request, header.payload_bytes)
        early = min(self._have - end, header.payload_bytes)
        self._incoming.take(memoryview(self._buffer)[end : end + early])
        self._consume(end + early)
        return True

    def _expect(self, call: int, request: wire.Request, payload_bytes: int) -> _Incoming:
        try:
            if not isinstance(request, wire.Write):
                raise KVCacheError("bad_message", "a payload where none belongs", "only Write carries one")
            room = self._responder.destination(request, payload_bytes)
            return _Incoming(call, request, payload_bytes, room, None)
        except KVCacheError as error:
            return _Incoming(call, request, payload_bytes, [], error)

    def _consume(self, count: int) -> None:
        rest = self._have - count
        self._buffer[:rest] = self._buffer[count : self._have]
        self._have = rest
        if len(self._buffer) > RECEIVE_BYTES and rest <= RECEIVE_BYTES:
            self._buffer = self._buffer[:RECEIVE_BYTES]

    def _dispatch(self, call: int, request: wire.Request, error: KVCacheError | None) -> None:
        try:
            if error is not None:
                raise error
            answer = self._responder.answer(call, request)
        except KVCacheError as refused:
            answer = self._failure(refused)
        if isinstance(answer, wire.Message):
            self._write(self._frame(call, answer))
            return
        self._streaming = isinstance(answer, Outgoing | Following)
        task = asyncio.get_running_loop().create_task(self._finish(call, answer))
        task.add_done_callback(lambda ended: self._finished(ended, answer))
        self._busy = task

    async def _finish(self, call: int, answer: Outgoing | Following | Later) -> None:
        try:
            done = await answer if isinstance(answer, Coroutine) else answer
        except KVCacheError as refused:
            done = self._failure(refused)
        if isinstance(done, wire.Message):
            self._write(self._frame(call, done))
        else:
            await self._stream(call, done)
        self._busy = None
        self._advance()

    def _finished(self, task: asyncio.Task[None], answer: Outgoing | Following | Later) -> None:
        if isinstance(answer, Coroutine):
            answer.close()  # Cancelled before its first step, it would be missed as never awaited.
        error = None if task.cancelled() else task.exception()
        if error is not None:  # Our own code is wrong: what this connection would see next is unknown.
            task.get_loop().call_exception_handler({"message": "a request failed", "exception": error})
            if self._transport is not None:
                self._transport.abort()

    async def _stream(self, call: int, answer: Outgoing | Following) -> None:
        self._streaming = True
        if isinstance(answer, Outgoing):
            await self._send_payload(call, answer)
        else:
            for packed in answer.messages:
                await self._writable.wait()
                self._write(wire.frame(call, packed))
                await asyncio.sleep(0)
        for frame in self._events:
            self._write(frame)
        self._events.clear()
        self._events_bytes = 0
        self._streaming = False

    async def _send_payload(self, call: int, outgoing: Outgoing) -> None:
        total = sum(len(view) for view in outgoing.payload)
        self._write(wire.encode(call, outgoing.message, total))
        left = TURN_BYTES
        for view in outgoing.payload:
            for start in range(0, len(view), STEP_BYTES):
                await self._writable.wait()
                self._write(view[start : start + STEP_BYTES])
                left -= min(len(view), STEP_BYTES)
                if left <= 0:
                    left = TURN_BYTES
                    await asyncio.sleep(0)

    def _frame(self, call: int, message: wire.Reply) -> bytes:
        """A reply that cannot be sent as it is becomes the refusal that says so."""
        try:
            return wire.encode(call, message)
        except KVCacheError as error:
            return wire.encode(call, self._failure(error))

    def _failure(self, error: KVCacheError) -> wire.Failure:
        self._responder.refused(error)
        return failure(error)

    def _write(self, data: bytes | memoryview) -> None:
        if self._transport is not None:
            self._written_bytes += len(data)
            self._transport.write(data)

    # --- patience -------------------------------------------------------------------------------

    def _watch_stall(self, taken_before: int) -> None:
        """Look again in ``stall_s``: a peer that takes anything is slow, one that takes nothing is gone."""
        if self._transport is None:
            return
        taken = self._written_bytes - self._transport.get_write_buffer_size()
        if taken > taken_before:
            self._start_timer(self._stall_s, lambda: self._watch_stall(taken))
            return
        log.warning("a client took nothing for %.0f s; it is disconnected", self._stall_s)
        self._transport.abort()

    def _close(self) -> None:
        """Once the peer has taken what was said, and soon in any case."""
        if self._transport is not None:
            self._transport.close()
            self._start_timer(CLOSE_S, self._transport.abort)

    def _start_timer(self, delay_s: float, action: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(delay_s, action)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _regulate(self) -> None:
        """Read only while there is nothing to wait for and the peer takes its replies."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._busy is None and self._writable.is_set():
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()


class _Incoming:
    """A payload on its way into its destination, or into nothing when it was refused."""

    def __init__(
        self,
        call: int,
        request: wire.Request,
        payload_bytes: int,
        room: list[memoryview],
        error: KVCacheError | None,
    ) -> None:
        assert error is not None or sum(len(view) for view in room) == payload_bytes
        self.call = call
        self.request = request
        self.error = error
        self._left = payload_bytes
        self._room = room
        self._discard = memoryview(bytearray(DISCARD_BYTES if error is not None else 0))

    @property
    def complete(self) -> bool:
        return self._left == 0

    def room(self) -> memoryview:
        if self.error is not None:
            return self._discard[: self._left]
        return self._room[0]

    def filled(self, count: int) -> None:
        self._left -= count
        if self.error is None:
            self._room[0] = self._room[0][count:]
            if not self._room[0]:
                self._room.pop(0)

    def take(self, early: memoryview) -> None:
        """What had already arrived together with the body: at most one receive buffer."""
        while early:
            room = self.room()
            count = min(len(room), len(early))
            room[:count] = early[:count]
            self.filled(count)
            early = early[count:]


def failure(error: KVCacheError) -> wire.Failure:
    texts = (text[:TEXT_CHARS_MAX] for text in (error.what, error.why, error.todo))
    return wire.Failure(error.code, *texts)
