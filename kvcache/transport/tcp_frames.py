"""What ``tcp://`` says on the wire: a header of 24 bytes, then so many bytes as it tells.

    u8 kind · u8 priority · u16 zero · u32 length · u64 transfer · u64 offset          little-endian

Transfers are numbered by who asks, so READ and WRITE have numbers of their own on each side. A read is
READ ─► READ_DATA ..., READ_END; a write WRITE, WRITE_DATA ..., WRITE_END ─► DONE. REFUSED and STOP end
either, from the side that serves and from the side that asks. Data come in order of their offset; whoever no
longer knows a transfer throws its data away. All of a transfer goes over one stream.

Only its END makes a transfer whole: a chunk that has begun is filled up, with anything, when its memory is
given back, and the last chunk of a transfer can be such a one.

Before that each stream is greeted: ``Hello`` ─► ``Challenge``, proof ─► proof (``kvcache.transport.keys``).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate

from kvcache.transport.base import NOTE_BYTES_MAX, PeerLost
from kvcache.transport.keys import NONCE_BYTES
from kvcache.transport.tickets import TOKEN_BYTES

HEADER = struct.Struct("<BBHIQQ")
HELLO = struct.Struct(f"<8sHBB16s{NONCE_BYTES}s")
CHALLENGE = struct.Struct(f"<8sH{NONCE_BYTES}s")
MAGIC = b"kvctcp\r\n"
VERSION = 2
CHUNK_BYTES = 1 << 20
BODY_BYTES_MAX = 1 << 20
PIECES_MAX = (BODY_BYTES_MAX - TOKEN_BYTES) // 8
STREAMS_MAX = 64
REASON_BYTES_MAX = 200


class Kind(IntEnum):
    READ = 1
    READ_DATA = 2
    READ_REFUSED = 3
    READ_STOP = 4
    WRITE = 5
    WRITE_DATA = 6
    WRITE_REFUSED = 7
    WRITE_STOP = 8
    WRITE_DONE = 9
    NOTE = 10
    BEAT = 11
    READ_END = 12
    WRITE_END = 13


DATA = frozenset({Kind.READ_DATA, Kind.WRITE_DATA})
END_OF = {Kind.READ_DATA: Kind.READ_END, Kind.WRITE_DATA: Kind.WRITE_END}
DATA_OF = {end: data for data, end in END_OF.items()}
_KINDS = {int(kind): kind for kind in Kind}
_BODY_MAX = {
    Kind.READ: BODY_BYTES_MAX,
    Kind.WRITE: BODY_BYTES_MAX,
    Kind.READ_DATA: CHUNK_BYTES,
    Kind.WRITE_DATA: CHUNK_BYTES,
    Kind.READ_REFUSED: REASON_BYTES_MAX,
    Kind.WRITE_REFUSED: REASON_BYTES_MAX,
    Kind.NOTE: NOTE_BYTES_MAX,
}


@dataclass(frozen=True, slots=True)
class Head:
    kind: Kind
    priority: int
    length: int
    transfer: int
    offset: int


def pack_head(kind: Kind, length: int, transfer: int = 0, priority: int = 0, offset: int = 0) -> bytes:
    return HEADER.pack(kind, priority, 0, length, transfer, offset)


def parse_head(data: bytearray) -> Head:
    """RAISES PeerLost: what follows cannot be understood any more."""
    number, priority, _, length, transfer, offset = HEADER.unpack(data)
    kind = _KINDS.get(number)
    if kind is None or length > _BODY_MAX.get(kind, 0):
        raise PeerLost(f"it broke the protocol: a frame of kind {number} and {length} bytes")
    return Head(kind, priority, length, transfer, offset)


def frame(kind: Kind, transfer: int = 0, body: bytes = b"", priority: int = 0) -> bytes:
    return pack_head(kind, len(body), transfer, priority) + body


def pack_request(ticket: bytes, sizes: Sequence[int]) -> bytes:
    """REQUIRES: a ticket of ``TOKEN_BYTES``, at most ``PIECES_MAX`` pieces."""
    return ticket + struct.pack(f"<{len(sizes)}Q", *sizes)


def parse_request(body: bytes) -> tuple[bytes, tuple[int, ...]]:
    """RAISES PeerLost."""
    count, odd = divmod(len(body) - TOKEN_BYTES, 8)
    if count < 1 or odd:
        raise PeerLost("it broke the protocol: a request of a wrong length")
    return body[:TOKEN_BYTES], struct.unpack_from(f"<{count}Q", body, TOKEN_BYTES)


@dataclass(frozen=True, slots=True)
class Hello:
    """Who opens a connection says so first. ``session`` joins the streams of one endpoint; it is random, so
    that nobody else can join them. The nonce is good for one stream."""

    session: bytes
    stream: int
    stream_count: int
    nonce: bytes

    def pack(self) -> bytes:
        return HELLO.pack(MAGIC, VERSION, self.stream, self.stream_count, self.session, self.nonce)

    @classmethod
    def parse(cls, data: bytes) -> Hello:
        """RAISES PeerLost."""
        magic, version, stream, stream_count, session, nonce = HELLO.unpack(data)
        _check_version(magic, version)
        if not 0 <= stream < stream_count <= STREAMS_MAX:
            raise PeerLost("it broke the protocol: a stream that cannot be")
        return cls(session, stream, stream_count, nonce)


def pack_challenge(nonce: bytes) -> bytes:
    """Who listens answers a hello with it."""
    return CHALLENGE.pack(MAGIC, VERSION, nonce)


def check_challenge(data: bytes) -> None:
    """RAISES PeerLost. Its nonce counts as a part of what was said."""
    magic, version, _ = CHALLENGE.unpack(data)
    _check_version(magic, version)


def _check_version(magic: bytes, version: int) -> None:
    if magic != MAGIC:
        raise PeerLost("it is no transport of this kind")
    if version != VERSION:
        raise PeerLost(f"it speaks version {version}, this side {VERSION}")


class Scatter:
    """Pieces, addressed as if they were one."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = pieces
        self._ends = list(accumulate(len(piece) for piece in pieces))
        self.byte_count = self._ends[-1] if self._ends else 0

    def cut(self, offset: int, length: int) -> list[memoryview]:
        """The views of ``length`` bytes from ``offset``. REQUIRES: there are so many."""
        views: list[memoryview] = []
        at = bisect_right(self._ends, offset)
        while length:
            piece = self._pieces[at]
            start = len(piece) - (self._ends[at] - offset)
            view = piece[start : start + length]
            views.append(view)
            offset += len(view)
            length -= len(view)
            at += 1
        return views


def advance(views: list[memoryview], count: int) -> None:
    """Take the first ``count`` bytes off ``views``."""
    done = 0
    for view in views:
        if count < len(view):
            break
        count -= len(view)
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]
