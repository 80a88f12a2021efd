"""One socket of a ``tcp://`` endpoint: frames out of it straight into memory, and out of memory into it.

The system scatters and gathers (``recvmsg_into``, ``sendmsg``); Python cuts views and never sees a byte of
data. A receive asks for what is left of a chunk and for the header behind it in one call. All of it happens
in callbacks of the loop that never wait: between two of them nobody holds a view of anybody's memory, so
letting go of memory is a matter of replacing the views that are left of one chunk, and done at once.

    to send: control frames, in order ─┐
             chunks, by priority ──────┴─► views of one batch ─► socket      stop(): filler, and no END
    socket ─► header ─► views of its body ─► header ...                      let_go(): the rest is thrown away

The sum: on loopback the sender's side of the system is the limit (2 to 3 GB/s, 0.4 ms a chunk of 1 MiB);
a chunk costs Python 10 us on either side.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from kvcache.clock import Clock
from kvcache.transport.base import Limits, PeerLost
from kvcache.transport.pulse import Pulse
from kvcache.transport.tcp_frames import (
    CHUNK_BYTES,
    DATA,
    END_OF,
    HEADER,
    Head,
    Kind,
    Scatter,
    advance,
    frame,
    pack_head,
    parse_head,
)

_TURN_BYTES = 2 << 20
"""After so many bytes others on the loop have their turn."""
_FILLER = memoryview(bytes(256 << 10))
_VIEWS_MAX = 512
_REPLY_BYTES_MAX = 1 << 20


class Outgoing:
    """A transfer's bytes to send. ``sent`` is called when the system has them all."""

    def __init__(
        self,
        kind: Kind,
        transfer: int,
        priority: int,
        pieces: Sequence[memoryview],
        sent: Callable[[], None],
    ) -> None:
        self.kind = kind
        self.transfer = transfer
        self.priority = priority
        self.scatter = Scatter(pieces)
        self.at = 0
        self.sent = sent
        self.is_over = False

    @property
    def left(self) -> int:
        return self.scatter.byte_count - self.at


class Owner(Protocol):
    """Who a stream belongs to; called from the loop."""

    def body_views(self, stream: Stream, head: Head) -> list[memoryview] | None:
        """Where the data of a chunk go; None: nowhere. RAISES PeerLost."""

    def told(self, stream: Stream, head: Head, body: bytes) -> None:
        """A control frame. RAISES PeerLost."""

    def broken(self, why: str) -> None:
        """The stream is of no use any more."""


class Stream:
    """REQUIRES: ``sock`` does not block. Closed by ``close``, never by itself."""

    def __init__(self, sock: socket.socket, owner: Owner, limits: Limits, clock: Clock) -> None:
        self._sock = sock
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._pulse = Pulse(limits, clock, self._beat, self._break)
        self._is_closed = False
        self._is_broken = False
        # Receiving: the body that is coming, and the header behind it.
        self._header = bytearray(HEADER.size)
        self._header_at = 0
        self._head: Head | None = None
        self._control = bytearray()
        self._into: list[memoryview] = []
        self._into_bytes = 0
        self._sink = memoryview(bytearray(0))
        # Sending: a batch of views, then what waits.
        self._views: list[memoryview] = []
        self._views_bytes = 0
        self._chunk: Outgoing | None = None
        self._chunk_bytes = 0
        self._after_batch: list[Callable[[], None]] = []
        self._frames: deque[tuple[bytes, Callable[[], None] | None]] = deque()
        self._reply_bytes = 0
        self._chunks: list[tuple[int, int, Outgoing]] = []
        self._numbers = itertools.count()
        self._is_waiting = False
        self.load_bytes = 0
        """For the owner: what is under way on this stream."""

    def start(self) -> None:
        self._loop.add_reader(self._sock, self._readable)
        self._pulse.start()

    def close(self) -> None:
        """No memory is touched any more. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._pulse.stop()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._views.clear()
        self._into.clear()
        self._chunks.clear()
        self._frames.clear()
        self._after_batch.clear()

    # Sending.

    def say(self, data: bytes, sent: Callable[[], None] | None = None) -> None:
        """Send a control frame before any data. ``sent`` is called when the system has it."""
        if not self._is_closed:
            self._frames.append((data, sent))
            self._pump()

    def reply(self, data: bytes) -> None:
        """As ``say``, for what the peer caused. It is bounded: who asks and never listens is broken off."""
        self._reply_bytes += len(data)
        if self._reply_bytes > _REPLY_BYTES_MAX:
            self._break("it asks and does not take the answers")
        else:
            self.say(data, partial(self._replied, len(data)))

    def send(self, outgoing: Outgoing, request: bytes = b"") -> None:
        """Send the data of a transfer, chunk by chunk, the best priority first; before them its request."""
        if self._is_closed:
            return
        if request:
            self._frames.append((request, None))
        heapq.heappush(self._chunks, (outgoing.priority, next(self._numbers), outgoing))
        self._pump()

    def stop(self, outgoing: Outgoing) -> None:
        """Touch its memory no more: what is left of the chunk on its way is filled up, and the transfer will
        not be whole, unless all of it has gone. Twice is fine."""
        if outgoing.is_over:
            return
        outgoing.is_over = True
        if self._chunk is not outgoing or self._is_closed:
            return
        end_bytes = 0 if outgoing.left else HEADER.size
        if self._views_bytes <= end_bytes:
            return
        left = min(self._chunk_bytes, self._views_bytes - end_bytes)
        self._views = Scatter(self._views).cut(0, self._views_bytes - end_bytes - left)
        self._views += _repeated(_FILLER, left)
        self._views_bytes -= end_bytes
        self._chunk = None

    def _pump(self) -> None:
        budget = _TURN_BYTES
        while not self._is_waiting and self._is_up() and (self._views or self._gather()):
            if budget <= 0 or not (sent := self._sendmsg()):
                self._wait_to_write()
                return
            budget -= sent
            self._views_bytes -= sent
            advance(self._views, sent)
            if not self._views:
                self._batch_sent()

    def _sendmsg(self) -> int:
        try:
            sent = self._sock.sendmsg(self._views[:_VIEWS_MAX])
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._break(str(error))
            return 0
        self._pulse.said()
        return sent

    def _wait_to_write(self) -> None:
        if self._is_up():
            self._is_waiting = True
            self._loop.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        self._is_waiting = False
        self._pump()
        if not self._is_waiting and not self._is_closed:
            self._loop.remove_writer(self._sock)

    def _gather(self) -> bool:
        """The next batch: all control frames, then one chunk. False when there is nothing to send."""
        while self._frames and len(self._views) < _VIEWS_MAX // 2:
            data, sent = self._frames.popleft()
            self._views.append(memoryview(data))
            if sent is not None:
                self._after_batch.append(sent)
        while self._chunks and self._chunks[0][2].is_over:
            heapq.heappop(self._chunks)
        if self._chunks:
            self._add_chunk(self._chunks[0][2])
        self._views_bytes = sum(map(len, self._views))
        return bool(self._views)

    def _add_chunk(self, outgoing: Outgoing) -> None:
        length = min(CHUNK_BYTES, outgoing.left)
        head = pack_head(outgoing.kind, length, outgoing.transfer, offset=outgoing.at)
        self._views.append(memoryview(head))
        self._views += outgoing.scatter.cut(outgoing.at, length)
        self._chunk, self._chunk_bytes = outgoing, length
        outgoing.at += length
        if not outgoing.left:
            self._views.append(memoryview(frame(END_OF[outgoing.kind], outgoing.transfer)))
            heapq.heappop(self._chunks)

    def _batch_sent(self) -> None:
        chunk, self._chunk = self._chunk, None
        after, self._after_batch = self._after_batch, []
        for sent in after:
            sent()
        if chunk is not None and not chunk.left and not chunk.is_over:
            chunk.is_over = True
            chunk.sent()

    def _replied(self, byte_count: int) -> None:
        self._reply_bytes -= byte_count

    def _beat(self) -> None:
        if not self._views and not self._frames:
            self.say(frame(Kind.BEAT))

    # Receiving.

    def let_go(self, kind: Kind, transfer: int) -> None:
        """Touch the memory of this transfer no more: what is left of the chunk on its way is thrown away."""
        head = self._head
        if head is not None and head.kind is kind and head.transfer == transfer:
            self._head = None
            self._into = self._thrown_away(self._into_bytes)

    def _readable(self) -> None:
        budget = _TURN_BYTES
        while budget > 0 and self._is_up():
            buffers = self._into[:_VIEWS_MAX]
            asked = sum(map(len, buffers))
            if asked == self._into_bytes:
                buffers.append(memoryview(self._header)[self._header_at :])
                asked += len(buffers[-1])
            try:
                count = self._sock.recvmsg_into(buffers)[0]
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._break(str(error))
                return
            if not count:
                self._break("the peer closed it")
                return
            self._pulse.heard()
            budget -= count
            try:
                self._received(count)
            except PeerLost as error:
                self._break(str(error))
            if count < asked and count > HEADER.size:
                return  # There was no more; when there is, the loop says so.

    def _received(self, count: int) -> None:
        of_body = min(count, self._into_bytes)
        if of_body:
            self._into_bytes -= of_body
            advance(self._into, of_body)
        try:
            if of_body and not self._into_bytes:
                self._body_done()
        finally:  # Whatever the owner's callbacks raise, the stream keeps its place.
            self._header_at += count - of_body
            if self._header_at == HEADER.size:
                self._header_at = 0
                self._begin(parse_head(self._header))

    def _begin(self, head: Head) -> None:
        self._into_bytes = head.length
        if head.kind in DATA:
            views = self._owner.body_views(self, head)
            self._head = head if views is not None else None
            self._into = self._thrown_away(head.length) if views is None else views
        else:
            self._head = head
            self._control = bytearray(head.length)
            self._into = [memoryview(self._control)] if head.length else []
        if not head.length:
            self._body_done()

    def _body_done(self) -> None:
        head, self._head = self._head, None
        if head is not None and head.kind is not Kind.BEAT and head.kind not in DATA:
            self._owner.told(self, head, bytes(self._control))

    def _thrown_away(self, byte_count: int) -> list[memoryview]:
        """Views of so many bytes that mean nothing to anybody: of one small buffer, over and over."""
        if not self._sink:
            self._sink = memoryview(bytearray(len(_FILLER)))
        return _repeated(self._sink, byte_count)

    def _is_up(self) -> bool:
        return not self._is_closed and not self._is_broken

    def _break(self, why: str) -> None:
        if self._is_up():
            self._is_broken = True
            self._owner.broken(why)


def _repeated(view: memoryview, byte_count: int) -> list[memoryview]:
    whole, rest = divmod(byte_count, len(view))
    return [view] * whole + ([view[:rest]] if rest else [])
