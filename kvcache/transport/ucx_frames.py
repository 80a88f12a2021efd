"""What two ends of ``ucx://`` say to each other beside the bytes: small frames on one ordered lane.

    initiator                        the other
    READ credit ticket sizes ──►     data ... END           (the initiator is the sink)
    WRITE ticket sizes ──►           CREDIT ... FIN         (the initiator is the source)

    sink ─ CREDIT n, STOP, FIN ─► source           source ─ data, END ─► sink

* A credit is a posted receive: for each one the source sends exactly one message, bytes or, after an end that
  was no success, an empty one. So a sink can end a transfer without cancelling a receive.
* A chunk is at most ``CHUNK_BYTES`` of one piece; both sides cut the same sizes into the same chunks.
* All is little-endian. A frame that does not parse is a broken peer.

The sum: a frame is 24 bytes and more, 5 us to pack or parse; a transfer of 32 MiB takes 10 of them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from kvcache.transport.base import NOTE_BYTES_MAX, TICKET_BYTES_MAX, PeerLost

VERSION = 1
CHUNK_BYTES = 2 << 20
PIECES_MAX = 16_384
WHY_BYTES_MAX = 1_000

_HEAD = struct.Struct("<B3xIIIQ")
_HELLO = struct.Struct("<8sHHIQ16s")
HELLO_BYTES = _HELLO.size
_MAGIC = b"kvcache\x01"
_TRANSFER_BITS = 24

FRAME_BYTES_MAX = _HEAD.size + max(NOTE_BYTES_MAX, 4 + TICKET_BYTES_MAX + 8 * PIECES_MAX)
TRANSFERS_MAX = 1 << _TRANSFER_BITS
CONTROL = 0
"""The transfer number of the frames themselves."""
LIFE = TRANSFERS_MAX - 1
"""The transfer number under which nothing is ever sent: who waits for it learns that the lane broke."""


class Kind(IntEnum):
    BEAT = 1
    NOTE = 2
    BYE = 3
    READ = 4
    WRITE = 5
    CREDIT = 6
    STOP = 7
    END = 8
    FIN = 9


@dataclass(frozen=True, slots=True)
class Frame:
    """``value``: the credit of READ and CREDIT; 1 for success in END and FIN, whose payload says why not."""

    kind: Kind
    transfer: int = CONTROL
    value: int = 0
    payload: bytes = b""
    lane: int = 0


@dataclass(frozen=True, slots=True)
class Hello:
    """Who connects says with ``lane`` 0 that he is a new peer, else that this is lane number ``lane`` of the
    peer to whom ``session`` was said. What is sent to who says it carries ``tag_base`` in its upper bits."""

    lane: int
    tag_base: int
    session: bytes


def pack(frame: Frame) -> bytes:
    head = _HEAD.pack(frame.kind, frame.transfer, frame.lane, len(frame.payload), frame.value)
    return head + frame.payload


def parse(message: memoryview) -> Frame:
    """The frame at the front of ``message``, which may be longer. RAISES PeerLost."""
    kind, transfer, lane, length, value = _HEAD.unpack_from(message)
    if length > len(message) - _HEAD.size or transfer >= TRANSFERS_MAX:
        raise PeerLost("it sent a frame that is none")
    try:
        known = Kind(kind)
    except ValueError as error:
        raise PeerLost(f"it sent a frame of an unknown kind, {kind}") from error
    return Frame(known, transfer, value, bytes(message[_HEAD.size : _HEAD.size + length]), lane)


def pack_request(ticket: bytes, sizes: Sequence[int]) -> bytes:
    """The payload of READ and WRITE."""
    assert len(ticket) <= TICKET_BYTES_MAX, "a ticket is short"
    assert len(sizes) <= PIECES_MAX, "a transfer has a written limit of pieces"
    return struct.pack(f"<I{len(sizes)}Q", len(ticket), *sizes) + ticket


def parse_request(payload: bytes) -> tuple[bytes, list[int]]:
    """RAISES PeerLost."""
    if len(payload) < 4:
        raise PeerLost("it sent a request that is none")
    (ticket_length,) = struct.unpack_from("<I", payload)
    sizes_length = len(payload) - 4 - ticket_length
    if sizes_length < 0 or sizes_length % 8:
        raise PeerLost("it sent a request that is none")
    sizes = struct.unpack_from(f"<{sizes_length // 8}Q", payload, 4)
    return payload[4 + sizes_length :], list(sizes)


def pack_hello(hello: Hello) -> bytes:
    return _HELLO.pack(_MAGIC, VERSION, 0, hello.lane, hello.tag_base, hello.session)


def parse_hello(message: bytes) -> Hello:
    """RAISES PeerLost when the peer speaks another version, or no such thing at all."""
    if len(message) != _HELLO.size:
        raise PeerLost("what answers there is not a kvcache transport")
    magic, version, _, lane, base, session = _HELLO.unpack(message)
    if magic != _MAGIC:
        raise PeerLost("what answers there is not a kvcache transport")
    if version != VERSION:
        raise PeerLost(f"it speaks version {version} of ucx://, and this side {VERSION}")
    return Hello(lane, base, session)


def new_tag_base(random_bits: int) -> int:
    """REQUIRES: ``random_bits`` from a good source: a tag is matched whoever sent it."""
    return (random_bits << _TRANSFER_BITS) & ((1 << 64) - 1)


def why_bytes(why: str) -> bytes:
    return why.encode()[:WHY_BYTES_MAX]


def cut(pieces: Sequence[memoryview]) -> list[memoryview]:
    """The chunks of a transfer, in order."""
    return [piece[at : at + CHUNK_BYTES] for piece in pieces for at in range(0, len(piece), CHUNK_BYTES)]
