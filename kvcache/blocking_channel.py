"""The blocking half of ``kvcache.channel``, which says what a channel is; the greeting is made here for both.

The sum: a round trip is three system calls (send, poll, receive) and about 20 us of Python here.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator, Sequence
from typing import Final

from kvcache.address import Address, connected_socket, parse
from kvcache.clock import NS_PER_MS, Clock, SystemClock
from kvcache.errors import BadInput, NotAllowed, Unavailable, plainly
from kvcache.frames import Arrival, FrameReader, failure_error
from kvcache.wire import PROTOCOL_VERSION, Failure, Hello, Reply, Request, Welcome, encode

SYSTEM_CLOCK: Final = SystemClock()
_DESCRIPTORS_MAX = 4
_SEND_BUFFERS_MAX = 512


def gone(address: Address, why: str) -> Unavailable:
    return Unavailable(
        "unavailable", f"the node at {address} is gone", why, "the blocks are recomputed meanwhile"
    )


def _no_node(address: Address, answer: BadInput | NotAllowed) -> BadInput | NotAllowed:
    """Whatever answers there speaks another protocol, or another release of ours."""
    if answer.code != "bad_frame":
        return answer
    todo = "give a node's socket or its --tcp address; on its --http address it speaks HTTP"
    return BadInput("bad_frame", f"what answers at {address} is no kvcache node", answer.what, todo)


class BlockingChannel:
    """One thread at a time. ``slab_fd`` and ``hbm_fd`` belong to the channel and are closed with it."""

    def __init__(self, address: Address, sock: socket.socket, clock: Clock) -> None:
        """Use ``connect``. REQUIRES: ``sock`` is connected and does not block."""
        self.address = address
        self.welcome = Welcome(PROTOCOL_VERSION, "", 0, "", [], b"", 0)
        self.slab_fd: int | None = None
        self.hbm_fd: int | None = None
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
        cls, address: str, hello: Hello, deadline_ns: int, clock: Clock = SYSTEM_CLOCK
    ) -> BlockingChannel:
        """RAISES Unavailable, and BadInput or NotAllowed when the node refuses or is none.

        A host name is looked up by the system, which has no deadline for that.
        """
        where = parse(address)
        try:
            sock = connected_socket(where, deadline_ns, clock)
        except OSError as error:
            raise gone(where, plainly(error)) from error
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
        number, frame = self._next(request, sum(map(len, payload)))
        with self._ending():
            self._reader.expect(number, into)
            self._send([memoryview(frame), *payload], deadline_ns)
            arrival = self._receive(number, deadline_ns)
        if isinstance(arrival.reply, Failure):
            raise failure_error(arrival.reply)
        return arrival.reply

    def post(self, request: Request, deadline_ns: int) -> None:
        """Send, and let a later call throw the reply away. RAISES Unavailable as ``call``."""
        number, frame = self._next(request, 0)
        with self._ending():
            self._reader.expect(number)
            self._reader.abandon(number)
            self._send([memoryview(frame)], deadline_ns)

    def close(self) -> None:
        self._end("closed")

    def detach(self) -> tuple[socket.socket, FrameReader, int, int | None, int | None]:
        """Socket, reader, calls so far and the slabs' descriptors go to the caller; this channel is
        closed."""
        taken = (self._sock, self._reader, self._calls, self.slab_fd, self.hbm_fd)
        self._sock, self.slab_fd, self.hbm_fd = socket.socket(), None, None
        self.close()
        return taken

    def _next(self, request: Request, payload_bytes: int) -> tuple[int, bytes]:
        """Number and frame of the next call. RAISES BadInput when it cannot be encoded: nothing is sent."""
        if self.ended_by:
            raise gone(self.address, f"the connection ended before: {self.ended_by}")
        frame = encode(self._calls + 1, request, payload_bytes)
        self._calls += 1
        return self._calls, frame

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """What goes wrong within ends the channel; how, as what the caller is to know."""
        try:
            yield
        except (BadInput, NotAllowed) as error:
            self._end("bad_frame")
            raise gone(self.address, f"the stream is broken: {error}") from error
        except OSError as error:
            self._end("disconnected")
            raise gone(self.address, plainly(error)) from error
        except BaseException:  # An interrupt, too, leaves a reply behind that nobody waits for.
            self._end("interrupted")
            raise

    def _greet(self, hello: Hello, deadline_ns: int) -> None:
        self._wants_descriptor = True
        try:
            reply = self.call(hello, deadline_ns)
        except Unavailable as error:
            if isinstance(error.__cause__, BadInput | NotAllowed):  # Say what is there instead of a node.
                raise _no_node(self.address, error.__cause__) from None
            raise
        finally:
            self._wants_descriptor = False
            descriptors, self._descriptors = self._descriptors, []
            self.slab_fd = descriptors.pop(0) if descriptors else None
            self.hbm_fd = descriptors.pop(0) if descriptors else None
            for extra in descriptors:
                os.close(extra)
        unasked = (self.slab_fd is not None and not hello.map) or (self.hbm_fd is not None and not hello.hbm)
        if not isinstance(reply, Welcome) or descriptors or unasked:
            raise BadInput("bad_message", "the node did not answer Hello with one Welcome", repr(reply)[:200])
        if (self.hbm_fd is not None) != (reply.hbm.size_bytes > 0):
            raise BadInput("bad_message", "a Welcome with a slab of HBM and no descriptor, or without", "")
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

    def _receive(self, number: int, deadline_ns: int) -> Arrival:
        """The reply to this call. Replies to what was posted before are thrown away."""
        while True:
            try:
                count = self._receive_into(self._reader.buffer())
            except BlockingIOError:
                self._wait(select.POLLIN, deadline_ns)
                continue
            if count == 0:
                raise ConnectionResetError("the node closed the connection")
            for arrival in self._reader.received(count):
                if arrival.call == number:
                    if self._clock.now_ns() > deadline_ns:
                        self._miss()
                    return arrival

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
        raise gone(self.address, "it did not answer in time")

    def _end(self, reason: str) -> None:
        self.ended_by = self.ended_by or reason
        self._sock.close()
        for descriptor in (self.slab_fd, self.hbm_fd):
            if descriptor is not None:
                os.close(descriptor)
        self.slab_fd = self.hbm_fd = None
