"""The frame around every message: header, body, payload (``kvcache.wire`` says what they are)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvcache.errors import BadInput
from kvcache.packing import BODY_BYTES_MAX, pack

PROTOCOL_VERSION = 1
HEADER = struct.Struct("<2sBBIQ")
MAGIC = b"KV"
PAYLOAD_BYTES_MAX = 1 << 30

_PAIR = b"\x92"  # MessagePack's list of two.


@dataclass(frozen=True, slots=True)
class FrameHeader:
    body_bytes: int
    payload_bytes: int


def frame(call: int, packed: bytes, payload_bytes: int = 0) -> bytes:
    """Header and body of one frame; ``packed`` is a message as MessagePack. RAISES BadInput for what is too
    large, ValueError or OverflowError for a call number that no frame can carry."""
    number = pack(call)
    body_bytes = len(_PAIR) + len(number) + len(packed)
    check_sizes(body_bytes, payload_bytes)
    header = HEADER.pack(MAGIC, PROTOCOL_VERSION, 0, body_bytes, payload_bytes)
    return b"".join((header, _PAIR, number, packed))


def decode_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """RAISES BadInput when these are not the ``HEADER.size`` bytes of a header of this protocol."""
    if len(data) != HEADER.size:
        raise BadInput("bad_frame", f"a header of {len(data)} bytes", f"headers are {HEADER.size} bytes")
    magic, version, zero, body_bytes, payload_bytes = HEADER.unpack(data)
    if magic != MAGIC or zero != 0:
        start = bytes(data[:4])
        raise BadInput("bad_frame", f"a frame starts with {start!r}", f"frames start with {MAGIC!r}")
    if version != PROTOCOL_VERSION:
        raise BadInput(
            "bad_version",
            f"the peer speaks protocol version {version}",
            f"this side speaks version {PROTOCOL_VERSION}",
            "run the same release of kvcache on both sides",
        )
    check_sizes(body_bytes, payload_bytes)
    return FrameHeader(body_bytes, payload_bytes)


def check_sizes(body_bytes: int, payload_bytes: int) -> None:
    """RAISES BadInput for a frame that is too large."""
    if body_bytes > BODY_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        raise BadInput(
            "too_large",
            f"a frame of {body_bytes} + {payload_bytes} bytes",
            f"the limits are {BODY_BYTES_MAX} + {PAYLOAD_BYTES_MAX} bytes",
            "send fewer blocks a call",
        )
