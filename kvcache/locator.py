"""Asking an index that runs elsewhere: a blocking client that never raises and never waits for long.

    apart ──a call, pause over──► connecting ──► ready ──match, place, sources──► ready
      ▲                                │           │
      └── pause, doubling to 1 s ◄─────┴── trouble ┘

Fail-open: on any trouble (no index, no answer within ``timeout_ms``, a refusal, garbage) a call returns None,
``trouble`` says why, and for the length of a pause every further call returns None at once: a router goes on
without locality, and its requests pay nothing for an index that is away. A connection that the index closed
while nobody asked is opened anew within the same call.

For one thread at a time. A caller with an event loop may call it there: it is 25 us on a unix socket, and
``timeout_ms`` at worst, once a pause. (The name of a host is looked up by the system, without a deadline:
give numbers.)

The sum: 4 us of Python; the rest is two system calls and waking the other side.
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import msgspec

from kvcache import locate_wire as wire
from kvcache.address import connected_socket, parse
from kvcache.block import HINT_BYTES
from kvcache.clock import NS_PER_MS, Clock, SystemClock
from kvcache.errors import BadInput, KVCacheError, Unavailable

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAUSE_NS_MIN = 50 * NS_PER_MS
PAUSE_NS_MAX = 1_000 * NS_PER_MS
_FIRST_BYTES = 64 << 10

T = TypeVar("T")


class Source(msgspec.Struct, frozen=True):
    """One source, as the index knows it. ``load`` is what it told of itself, ``load_age_ms`` ago (-1: never).

    ``state``: synced; suspect: what it held when its stream broke; unknown: it has not told yet."""

    source: str
    number: int
    state: Literal["synced", "suspect", "unknown"]
    partial: bool
    incarnation: int
    seq: int
    age_ms: int
    blocks: int
    load: dict[str, float]
    load_age_ms: int


class Space(msgspec.Struct, frozen=True):
    """A namespace that the caller may see, by all its fields."""

    number: int
    id: str
    fields: dict[str, str | int]


class Names(msgspec.Struct, frozen=True):
    """What the numbers in an answer mean. ``workers``: the sources that each worker loads from."""

    epoch: int
    sources: dict[int, str]
    namespaces: list[Space]
    workers: dict[str, list[str]] = {}


@dataclass(frozen=True, slots=True)
class Matches:
    """An answer: columns of ``rows`` values, a row a source and namespace that hold the first block.

    ``blocks``: how many leading ones are somewhere there; ``tiers``: of these, in each tier; ``placed``: how
    many more are predicted, since a request was sent there just now; ``suspect``: 1 where the source's word
    is not current. ``incarnation``, ``seq`` and ``age_ms`` are empty unless asked for."""

    rows: int
    sources: memoryview
    namespaces: memoryview
    blocks: memoryview
    tiers: tuple[memoryview, memoryview, memoryview]
    placed: memoryview
    suspect: memoryview
    incarnation: array[int]
    seq: array[int]
    age_ms: array[int]
    names: Names

    def source(self, row: int) -> str:
        return self.names.sources[self.sources[row]]


class Locator:
    """One connection, made when it is first needed. Nothing but the constructor raises."""

    def __init__(
        self, address: str, token: str = "", timeout_ms: int = 20, clock: Clock | None = None
    ) -> None:
        """RAISES BadInput for what is no address, or no token. ``token``: ``$KVCACHE_TOKEN`` when empty."""
        self.address = parse(address)
        self.trouble = ""
        """Why the last call returned None; empty when it did not."""
        self._greeting = wire.greeting(token or os.environ.get("KVCACHE_TOKEN", ""))
        self._timeout_ns = timeout_ms * NS_PER_MS
        self._clock = SystemClock() if clock is None else clock
        self._sock: socket.socket | None = None
        self._buffer = memoryview(bytearray(_FIRST_BYTES))
        self._names: Names | None = None
        self._selectors: dict[tuple[str, frozenset[bytes]], bytes] = {}
        self._pause_ns = PAUSE_NS_MIN
        self._paused_until_ns = 0
        self._why = ""

    def match(
        self,
        hints: Buffer,
        model: str = "",
        namespaces: Collection[bytes] = (),
        tiers: int = 0,
        limit: int = 0,
        as_of: bool = False,
    ) -> Matches | None:
        """Who holds how many of the first of ``hints`` (u64): of all namespaces of the tenant, or only of
        those of ``model``, and among ``namespaces``; with ``limit``, the so many that hold most."""
        try:
            first = self._selector(model, frozenset(namespaces))
            view = memoryview(hints).cast("B")
            head = wire.ask(wire.QUERY, first, len(view), tiers, limit, as_of)
            rows, epoch, body = self._call(wire.ANSWERED, head, view)
            kept = memoryview(bytes(body))  # The buffer is used again.
            names = self._names
            if names is None or names.epoch != epoch:
                asked = self._sock
                names = self._names = self._ask_names()
                if self._sock is not asked:
                    raise _silent("it began anew before it said what its numbers mean")
            return _columns(rows, kept, as_of, names)
        except KVCacheError as error:
            self.trouble = str(error)
            return None

    def place(self, source: str, namespace: bytes, hints: Buffer) -> bool:
        """Say that ``source`` is about to hold these, since a request was sent there. False: not told."""
        try:
            view = memoryview(hints).cast("B")
            first = wire.write_place(source, namespace)
            self._call(wire.DONE, wire.ask(wire.PLACE, first, len(view)), view)
            return True
        except KVCacheError as error:
            self.trouble = str(error)
            return False

    def sources(self) -> list[Source] | None:
        """Each source with its state, how far it was followed, and its load."""
        try:
            return self._text(wire.SOURCES, list[Source])
        except KVCacheError as error:
            self.trouble = str(error)
            return None

    def names(self) -> Names | None:
        """What numbers mean now, and which sources each worker has."""
        try:
            self._names = self._ask_names()
            return self._names
        except KVCacheError as error:
            self.trouble = str(error)
            return None

    def close(self) -> None:
        """May be called twice; a call after it connects anew."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask_names(self) -> Names:
        return self._text(wire.NAMES, Names)

    def _text(self, kind: int, type_: type[T]) -> T:
        _, _, body = self._call(wire.TEXT, wire.ask(kind), memoryview(b""))
        try:
            return msgspec.json.decode(body, type=type_, strict=False)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadInput("bad_message", "a reply that cannot be read", str(error)[:200]) from error

    def _selector(self, model: str, namespaces: frozenset[bytes]) -> bytes:
        key = model, namespaces
        found = self._selectors.get(key)
        if found is None:
            if len(self._selectors) > 1_000:
                self._selectors.clear()
            found = self._selectors[key] = wire.write_selector(model, namespaces)
        return found

    def _call(self, expected: int, head: bytes, hints: memoryview) -> tuple[int, int, memoryview]:
        """Rows, epoch, and the body of the reply, valid until the next call. RAISES KVCacheError: a refusal
        leaves the connection open, anything else ends it and begins a pause."""
        if len(hints) > wire.HINTS_BYTES_MAX or len(hints) % HINT_BYTES:
            raise BadInput("too_large", f"hints of {len(hints):,} bytes", f"at most {wire.HINTS_BYTES_MAX:,}")
        try:
            kind, rows, epoch, body = self._ask(head, hints, self._clock.now_ns() + self._timeout_ns)
            if kind not in (wire.FAILURE, expected):
                raise BadInput("bad_frame", "a reply to something else")
            refusal = wire.failed(body) if kind == wire.FAILURE else None
        except OSError as error:
            gone = _silent(f"{error.strerror or error}")
            self._part(gone)
            raise gone from error
        except KVCacheError as error:  # An answer that comes later must not be taken for another's.
            self._part(error)
            raise
        self.trouble, self._pause_ns = "", PAUSE_NS_MIN
        if refusal is not None:
            raise refusal
        return rows, epoch, body

    def _ask(self, head: bytes, hints: memoryview, deadline_ns: int) -> tuple[int, int, int, memoryview]:
        """RAISES KVCacheError, OSError."""
        if self._sock is not None:
            if (answer := self._once(self._sock, head, hints, deadline_ns)) is not None:
                return answer
            self.close()  # The index closed it while nobody asked.
        self._sock = self._connect(deadline_ns)
        self._names = None  # Perhaps it is another index, which counts its epochs and numbers from the start.
        answer = self._once(self._sock, head, hints, deadline_ns)
        if answer is None:
            raise _silent("it closed the connection")
        return answer

    def _once(
        self, sock: socket.socket, head: bytes, hints: memoryview, deadline_ns: int
    ) -> tuple[int, int, int, memoryview] | None:
        """None: it closed the connection before it said anything. RAISES KVCacheError, OSError."""
        try:
            self._send(sock, head, hints, deadline_ns)
            got = self._receive(sock, 0)
        except (BrokenPipeError, ConnectionResetError):
            return None
        if not got:
            return None
        got = self._filled(sock, got, wire.ANSWER.size, deadline_ns)
        body_bytes, kind, _, rows, epoch = wire.reply(self._buffer)
        whole = wire.ANSWER.size + body_bytes
        if whole > len(self._buffer):
            bigger = memoryview(bytearray(whole))
            bigger[:got] = self._buffer[:got]
            self._buffer = bigger
        if self._filled(sock, got, whole, deadline_ns) > whole:
            raise BadInput("bad_frame", "more came than was asked for")
        return kind, rows, epoch, self._buffer[wire.ANSWER.size : whole]

    def _connect(self, deadline_ns: int) -> socket.socket:
        if self._clock.now_ns() < self._paused_until_ns:
            raise Unavailable("unavailable", "the index was away a moment ago", self._why)
        sock = connected_socket(self.address, deadline_ns, self._clock)
        try:
            sock.setblocking(True)
            self._limit(sock)
            sock.sendall(self._greeting)
            got = self._filled(sock, 0, wire.ANSWER.size, deadline_ns)
            body_bytes, kind, *_ = wire.reply(self._buffer)
            if body_bytes > len(self._buffer) - wire.ANSWER.size or kind not in (wire.WELCOME, wire.FAILURE):
                raise BadInput("bad_frame", "the other side is no index")
            whole = wire.ANSWER.size + body_bytes
            self._filled(sock, got, whole, deadline_ns)
            if kind == wire.FAILURE:
                raise wire.failed(self._buffer[wire.ANSWER.size : whole])
        except BaseException:
            sock.close()
            raise
        return sock

    def _limit(self, sock: socket.socket) -> None:
        """By the system: Python's own timeouts would poll before each call."""
        seconds, rest_ns = divmod(self._timeout_ns, 1_000_000_000)
        span = struct.pack("ll", seconds, max(rest_ns // 1_000, 1))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, span)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)

    def _send(self, sock: socket.socket, head: bytes, hints: memoryview, deadline_ns: int) -> None:
        sent = sock.sendmsg((head, hints))
        if sent == len(head) + len(hints):
            return
        left = memoryview(head + hints)[sent:]
        while left:
            self._check(deadline_ns)
            left = left[sock.send(left) :]

    def _receive(self, sock: socket.socket, got: int) -> int:
        try:
            return sock.recv_into(self._buffer[got:] if got else self._buffer)
        except BlockingIOError as error:
            raise _silent("it did not answer in time") from error

    def _filled(self, sock: socket.socket, got: int, wanted: int, deadline_ns: int) -> int:
        while got < wanted:
            self._check(deadline_ns)
            more = self._receive(sock, got)
            if not more:
                raise _silent("it closed the connection")
            got += more
        return got

    def _check(self, deadline_ns: int) -> None:
        if self._clock.now_ns() > deadline_ns:
            raise _silent("it did not answer in time")

    def _part(self, error: KVCacheError) -> None:
        """A call within a pause does not make it longer."""
        self.close()
        now_ns = self._clock.now_ns()
        if now_ns >= self._paused_until_ns:
            self._why = str(error)
            self._paused_until_ns = now_ns + self._pause_ns
            self._pause_ns = min(self._pause_ns * 2, PAUSE_NS_MAX)


def _columns(rows: int, kept: memoryview, as_of: bool, names: Names) -> Matches:
    words = kept[: rows * 4 * wire.COLUMNS].cast("I")
    column = [words[at :: wire.COLUMNS] for at in range(wire.COLUMNS)]
    after = rows * wire.ROW_BYTES
    extra = array("Q"), array("Q"), array("I")
    if as_of:
        for values, size in zip(extra, (8, 8, 4), strict=True):
            values.frombytes(kept[after : after + rows * size])
            after += rows * size
    return Matches(
        rows,
        column[0],
        column[1],
        column[2],
        (column[3], column[4], column[5]),
        column[6],
        kept[rows * (wire.ROW_BYTES - 1) : rows * wire.ROW_BYTES],
        *extra,
        names,
    )


def _silent(why: str) -> Unavailable:
    return Unavailable(
        "unavailable", "the index does not answer", why, "see kvcache index, and docs/index.md"
    )
