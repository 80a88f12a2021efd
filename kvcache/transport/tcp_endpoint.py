"""One peer over ``tcp://``: what this side asks of him, and what he asks of this side.

    asked here     read:  data come                    write: data go, DONE comes
    asked there    read:  data go out of an export     write: data come into a post, DONE goes

Each is forgotten at once when it ends, whoever ended it; data of a transfer that nobody knows go nowhere.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcache.clock import Clock
from kvcache.transport.base import (
    NOTE_BYTES_MAX,
    Endpoint,
    Limits,
    Note,
    PeerLost,
    Priority,
    Ticket,
    TransferRefused,
)
from kvcache.transport.flow import Gate, until
from kvcache.transport.tcp_frames import (
    DATA_OF,
    PIECES_MAX,
    REASON_BYTES_MAX,
    Head,
    Kind,
    Scatter,
    frame,
    pack_request,
    parse_request,
)
from kvcache.transport.tcp_stream import Outgoing, Stream
from kvcache.transport.tickets import TOKEN_BYTES, Book, Use

Name = tuple[Kind, int]
"""A transfer whose data come: READ_DATA and our number, or WRITE_DATA and his."""


class Incoming:
    """A transfer's data, as they come. ``whole`` is called when all have."""

    __slots__ = ("at", "scatter", "stream", "whole")

    def __init__(self, stream: Stream, pieces: Sequence[memoryview], whole: Callable[[], None]) -> None:
        self.stream = stream
        self.scatter = Scatter(pieces)
        self.whole = whole
        self.at = 0


@dataclass(frozen=True, slots=True)
class Parts:
    """What a transport gives each of its endpoints."""

    book: Book
    limits: Limits
    clock: Clock
    note: Note
    ended: Callable[[TcpEndpoint], None]


class TcpEndpoint:
    """Use ``TcpTransport.connect``."""

    def __init__(self, parts: Parts, gate: Gate, peer: str, socks: Sequence[socket.socket]) -> None:
        """REQUIRES: the sockets do not block, and hellos were said on all of them."""
        self._parts = parts
        self._gate = gate
        self._peer = peer
        self._why_lost = ""
        self._number = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._incoming: dict[Name, Incoming] = {}
        self._sending: dict[Name, tuple[Stream, Outgoing]] = {}
        self._uses: dict[Name, Use] = {}
        self._streams = [Stream(sock, self, parts.limits, parts.clock) for sock in socks]
        for stream in self._streams:
            stream.start()

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def is_lost(self) -> bool:
        return bool(self._why_lost)

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        sizes = _sizes(into)
        async with self._gate.hold(sum(sizes), priority, deadline_ns):
            number, stream, answer = self._ask(ticket, sum(sizes))
            name = (Kind.READ_DATA, number)
            self._incoming[name] = Incoming(stream, into, lambda: _settle(answer))
            try:
                stream.say(frame(Kind.READ, number, pack_request(ticket, sizes), priority))
                await answer
            except asyncio.CancelledError:
                stream.say(frame(Kind.READ_STOP, number))
                raise
            finally:
                self._end_asked(number, stream, sum(sizes))
                self._forget_incoming(name)

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        sizes = _sizes(pieces)
        async with self._gate.hold(sum(sizes), priority, deadline_ns):
            number, stream, answer = self._ask(ticket, sum(sizes))
            outgoing = Outgoing(Kind.WRITE_DATA, number, priority, pieces, lambda: None)
            try:
                stream.send(outgoing, frame(Kind.WRITE, number, pack_request(ticket, sizes), priority))
                await answer
            except asyncio.CancelledError:
                stream.say(frame(Kind.WRITE_STOP, number))
                raise
            finally:
                self._end_asked(number, stream, sum(sizes))
                stream.stop(outgoing)

    async def notify(self, note: bytes, deadline_ns: int) -> None:
        assert len(note) <= NOTE_BYTES_MAX, "a note is for few bytes"
        async with until(deadline_ns, self._parts.clock):
            self._look()
            number, answer = self._wait()
            try:
                self._streams[0].say(frame(Kind.NOTE, 0, note), lambda: _settle(answer))
                await answer
            finally:
                self._waiting.pop(number, None)

    async def close(self) -> None:
        self.broken("this side closed it")

    # Called by the streams.

    def broken(self, why: str) -> None:
        """The peer is lost. May be called twice."""
        if self._why_lost:
            return
        self._why_lost = why
        for stream in self._streams:
            stream.close()
        self._incoming.clear()
        self._sending.clear()
        for use in list(self._uses.values()):
            use.end()
        self._uses.clear()
        self._gate.close(why)
        for answer in self._waiting.values():
            _settle(answer, PeerLost(why))
        self._waiting.clear()
        self._parts.ended(self)

    def body_views(self, stream: Stream, head: Head) -> list[memoryview] | None:
        incoming = self._incoming.get((head.kind, head.transfer))
        if incoming is None:
            return None
        left = incoming.scatter.byte_count - incoming.at
        if incoming.stream is not stream or head.offset != incoming.at or head.length > left:
            raise PeerLost("it broke the protocol: data where none belong")
        incoming.at += head.length
        return incoming.scatter.cut(head.offset, head.length)

    def told(self, stream: Stream, head: Head, body: bytes) -> None:
        match head.kind:
            case Kind.READ_END | Kind.WRITE_END:
                self._arrived(stream, (DATA_OF[head.kind], head.transfer))
            case Kind.READ:
                self._serve_read(stream, head, body)
            case Kind.WRITE:
                self._serve_write(stream, head, body)
            case Kind.READ_STOP:
                self._end_served((Kind.READ_DATA, head.transfer))
            case Kind.WRITE_STOP:
                self._end_served((Kind.WRITE_DATA, head.transfer))
            case Kind.WRITE_DONE:
                self._answered(head.transfer)
            case Kind.READ_REFUSED | Kind.WRITE_REFUSED:
                self._answered(head.transfer, TransferRefused(body.decode(errors="replace")))
            case Kind.NOTE:
                self._parts.note(self, body)

    def _arrived(self, stream: Stream, name: Name) -> None:
        """All data of a transfer have come. RAISES PeerLost."""
        incoming = self._incoming.get(name)
        if incoming is None:
            return
        if incoming.stream is not stream or incoming.at != incoming.scatter.byte_count:
            raise PeerLost("it broke the protocol: an end where none belongs")
        del self._incoming[name]
        incoming.whole()

    # What this side asks.

    def _ask(self, ticket: Ticket, byte_count: int) -> tuple[int, Stream, asyncio.Future[None]]:
        self._look()
        if len(ticket) != TOKEN_BYTES:
            raise TransferRefused("it is no ticket of this transport")
        number, answer = self._wait()
        stream = min(self._streams, key=lambda stream: stream.load_bytes)
        stream.load_bytes += byte_count
        return number, stream, answer

    def _end_asked(self, number: int, stream: Stream, byte_count: int) -> None:
        self._waiting.pop(number, None)
        stream.load_bytes -= byte_count

    def _wait(self) -> tuple[int, asyncio.Future[None]]:
        self._number += 1
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[self._number] = answer
        return self._number, answer

    def _answered(self, number: int, error: TransferRefused | None = None) -> None:
        if (answer := self._waiting.get(number)) is not None:
            _settle(answer, error)

    def _look(self) -> None:
        if self._why_lost:
            raise PeerLost(self._why_lost)

    def _forget_incoming(self, name: Name) -> None:
        if (incoming := self._incoming.pop(name, None)) is not None:
            incoming.stream.let_go(*name)

    # What the peer asks.

    def _serve_read(self, stream: Stream, head: Head, body: bytes) -> None:
        name, number = (Kind.READ_DATA, head.transfer), head.transfer
        use = self._use(name, stream, body, self._parts.book.take_export)
        if use is None:
            return

        def sent() -> None:
            self._sending.pop(name, None)
            if self._uses.pop(name, None) is not None:
                use.complete()

        outgoing = Outgoing(Kind.READ_DATA, number, _priority(head), use.pieces, sent)
        self._sending[name] = (stream, outgoing)
        stream.send(outgoing)

    def _serve_write(self, stream: Stream, head: Head, body: bytes) -> None:
        name, number = (Kind.WRITE_DATA, head.transfer), head.transfer
        use = self._use(name, stream, body, self._parts.book.take_post)
        if use is None:
            return

        def whole() -> None:
            if self._uses.pop(name, None) is not None:
                use.complete()
                stream.reply(frame(Kind.WRITE_DONE, number))

        self._incoming[name] = Incoming(stream, use.pieces, whole)

    def _use(
        self, name: Name, stream: Stream, body: bytes, take: Callable[[bytes, Sequence[int]], Use]
    ) -> Use | None:
        """What the peer's request is good for; refused, when it is not. RAISES PeerLost."""
        if name in self._uses:
            raise PeerLost("it broke the protocol: a number that it uses already")
        ticket, sizes = parse_request(body)
        refusal = Kind.READ_REFUSED if name[0] is Kind.READ_DATA else Kind.WRITE_REFUSED
        try:
            use = take(ticket, sizes)
        except TransferRefused as error:
            stream.reply(frame(refusal, name[1], str(error).encode()[:REASON_BYTES_MAX]))
            return None
        self._uses[name] = use

        def withdrawn() -> None:
            self._end_served(name)
            stream.reply(frame(refusal, name[1], b"the ticket was withdrawn"))

        use.when_stopped(withdrawn)
        return use

    def _end_served(self, name: Name) -> None:
        """A transfer that the peer asked for ends here, whatever state it is in."""
        if (served := self._sending.pop(name, None)) is not None:
            served[0].stop(served[1])
        use = self._uses.pop(name, None)
        if use is not None:
            if name[0] is Kind.WRITE_DATA:
                self._forget_incoming(name)
            use.end()


def _sizes(pieces: Sequence[memoryview]) -> list[int]:
    assert 0 < len(pieces) <= PIECES_MAX, "a transfer has some pieces, and not too many"
    sizes = [len(piece) for piece in pieces]
    assert all(sizes), "no piece is empty"
    return sizes


def _priority(head: Head) -> int:
    return min(head.priority, max(Priority))


def _settle(answer: asyncio.Future[None], error: Exception | None = None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(None)
        return
    answer.set_exception(error)
    answer.exception()  # Seen: a caller that was cancelled will not look at it.


_: type[Endpoint] = TcpEndpoint
