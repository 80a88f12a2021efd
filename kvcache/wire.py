"""Messages between a node and its clients: frames, codec, and every message there is.

A frame is a header of 16 bytes, a body, and sometimes a payload of raw block bytes:

    magic "KV" | version u8 | zero u8 | body_bytes u32 | payload_bytes u64     (little-endian)

The body is MessagePack: ``[call, message]``. ``call`` is a number the caller chose; the reply
carries it back. ``message`` is a map with its ``type``. Decoding is msgpack with hard limits,
then typed validation; unknown fields, unknown types and trailing bytes are refused. Block bytes
never pass through the codec: they follow the body, as long as the header says.

Every request has exactly one reply, its own or ``Failure``, except ``Watch``, whose ``EventBatch``
replies go on until the connection ends. A connection starts with ``Hello``; anything before it is refused.

Hashes travel joined (16 bytes each, ``block.split_hashes``), sums joined (8 bytes a chunk).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeVar

import msgpack
import msgspec

from kvcache.errors import BadInput

PROTOCOL_VERSION = 1
HEADER = struct.Struct("<2sBBIQ")
MAGIC = b"KV"
BODY_BYTES_MAX = 4 << 20
PAYLOAD_BYTES_MAX = 1 << 30
PREFIX_BLOCKS_MAX = 65_536
BATCH_BLOCKS_MAX = 1_024
TEXT_CHARS_MAX = 4_096


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages."""


# --- requests -----------------------------------------------------------------------------------


class Hello(Message, tag="hello"):
    """First on every connection. ``map`` asks for the slab's descriptor (unix sockets only).

    ``writes_ended`` acknowledges that this process has no copy in flight from any connection it had
    before, so that slots reserved through those can be used again.
    """

    version: int
    token: str = ""
    map: bool = False
    client: str = ""
    writes_ended: bool = False


class Open(Message, tag="open"):
    """Name a namespace by all its fields (``namespace.Namespace`` as a map). Idempotent."""

    namespace: dict[str, str | int]
    plane_count: int
    head_count: int
    head_bytes: int
    expect: bytes = b""


class Match(Message, tag="match"):
    """How many leading blocks of ``prefix`` are held? Takes no lease, changes nothing."""

    namespace: bytes
    prefix: bytes


class TakeLease(Message, tag="lease"):
    """Hold the leading blocks of ``prefix``. With ``request``, the same lease for all who ask for it
    under this tenant, namespace and prefix, until each has released it."""

    namespace: bytes
    prefix: bytes
    request: str = ""
    duration_ms: int = 30_000


class Release(Message, tag="release"):
    """The reader is done. ``failed`` lists positions in the lease whose bytes failed their check."""

    lease: int
    failed: list[int] = []


class Reserve(Message, tag="reserve"):
    """Room for the blocks of ``prefix`` that are not held yet, behind ``parent`` (empty: the root).

    ``hint``, ``priority``, ``session`` and ``gap_ms`` are for the eviction policy
    (``policy.RequestContext``)."""

    namespace: bytes
    parent: bytes
    prefix: bytes
    hint: str = "unknown"
    priority: int = 50
    session: int = -1
    gap_ms: int = -1


class Commit(Message, tag="commit"):
    """Publish: every reserved block has been written. ``sums`` are all chunk sums, in order."""

    reservation: int
    sums: bytes


class Abort(Message, tag="abort"):
    """The blocks will not be written after all, and no copy into them is in flight."""

    reservation: int


class Read(Message, tag="read"):
    """Send me the bytes of ``count`` blocks of the lease from position ``start``: the reply has a payload."""

    lease: int
    start: int
    count: int


class Write(Message, tag="write"):
    """The payload holds ``count`` whole blocks of the reservation from position ``start``."""

    reservation: int
    start: int
    count: int


class Pin(Message, tag="pin"):
    """Keep these blocks until unpinned (role operator)."""

    namespace: bytes
    prefix: bytes


class Unpin(Message, tag="unpin"):
    namespace: bytes
    prefix: bytes


class Stats(Message, tag="stats"):
    """Counters and sizes of the node, as a map of plain numbers."""


class Watch(Message, tag="watch"):
    """Send the current content as events, then every event as it happens (roles router, operator)."""


# --- replies ------------------------------------------------------------------------------------


class Welcome(Message, tag="welcome"):
    """Answer to Hello. With a map, the slab's descriptor comes as ancillary data of this frame."""

    version: int
    node: str
    incarnation: int
    tenant: str
    roles: list[str]
    tenant_key: bytes
    slab_bytes: int


class Opened(Message, tag="opened"):
    """``verdict`` says in plain words whether stored blocks fit, and if not which field differs."""

    namespace: bytes
    block_bytes: int
    chunk_bytes: int
    verdict: str


class Matched(Message, tag="matched"):
    count: int


class Leased(Message, tag="leased"):
    """``lease`` is 0 when ``count`` is 0. ``offsets`` are byte offsets in the mapped slab (empty for
    connections without one). ``checksums`` joins 16 bytes a block. ``expires_ns`` is on
    CLOCK_MONOTONIC of the node's host; ``remaining_ms`` is the same for another host."""

    lease: int
    count: int
    offsets: list[int]
    generations: list[int]
    checksums: bytes
    expires_ns: int
    remaining_ms: int


class Released(Message, tag="released"):
    """``intact``: the lease still held its slots until now, so no byte can have changed under it."""

    intact: bool


class Reserved(Message, tag="reserved"):
    """Blocks ``start`` to ``start + count`` of the prefix are to be written; those before are held.
    ``reservation`` is 0 when ``count`` is 0; ``reason`` then says why (held, busy, full)."""

    reservation: int
    start: int
    count: int
    offsets: list[int]
    generations: list[int]
    reason: str = ""


class Committed(Message, tag="committed"):
    count: int


class Done(Message, tag="done"):
    """Done, nothing to say."""


class Blocks(Message, tag="blocks"):
    """Answer to Read. The payload holds ``count`` whole blocks."""

    count: int


class StatsReply(Message, tag="stats_reply"):
    values: dict[str, float]


class BlockEvent(Message, tag="block_event"):
    """One change: ``kind`` is stored, removed or cleared. ``hashes`` are joined; ``parent`` (stored only)
    is the hash before the first, empty for the root. ``tier`` is hbm, host or nvme."""

    kind: str
    namespace: bytes
    tier: str
    parent: bytes = b""
    hashes: bytes = b""


class EventBatch(Message, tag="event_batch"):
    """Events of one source, in order. ``seq`` grows by one a batch; ``snapshot`` marks the batches
    that describe what was there already."""

    source: str
    incarnation: int
    seq: int
    snapshot: bool
    events: list[BlockEvent]


class Failure(Message, tag="failure"):
    """The request was refused. Nothing stored was changed by it."""

    code: str
    what: str
    why: str = ""
    todo: str = ""


Request = (
    Hello
    | Open
    | Match
    | TakeLease
    | Release
    | Reserve
    | Commit
    | Abort
    | Read
    | Write
    | Pin
    | Unpin
    | Stats
    | Watch
)
Reply = (
    Welcome
    | Opened
    | Matched
    | Leased
    | Released
    | Reserved
    | Committed
    | Done
    | Blocks
    | StatsReply
    | EventBatch
    | Failure
)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    body_bytes: int
    payload_bytes: int


def encode(call: int, message: Message, payload_bytes: int = 0) -> bytes:
    """Header and body of one frame. The payload, if any, is written after it by the caller."""
    body = msgpack.packb([call, msgspec.to_builtins(message, builtin_types=(bytes,))], use_bin_type=True)
    assert isinstance(body, bytes)
    assert len(body) <= BODY_BYTES_MAX, f"{type(message).__name__} of {len(body)} bytes"
    assert payload_bytes <= PAYLOAD_BYTES_MAX
    return HEADER.pack(MAGIC, PROTOCOL_VERSION, 0, len(body), payload_bytes) + body


def decode_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """REQUIRES: ``HEADER.size`` bytes. RAISES BadInput when they are not a header of this protocol."""
    magic, version, zero, body_bytes, payload_bytes = HEADER.unpack(data)
    if magic != MAGIC or zero != 0:
        raise BadInput("bad_frame", f"a frame starts with {bytes(data[:4])!r}", f"frames start with {MAGIC!r}")
    if version != PROTOCOL_VERSION:
        raise BadInput(
            "bad_version",
            f"the peer speaks protocol version {version}",
            f"this side speaks version {PROTOCOL_VERSION}",
            "run the same release of kvcache on both sides",
        )
    if body_bytes > BODY_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        raise BadInput(
            "too_large",
            f"a frame of {body_bytes} + {payload_bytes} bytes",
            f"the limits are {BODY_BYTES_MAX} + {PAYLOAD_BYTES_MAX} bytes",
            "send fewer blocks a call",
        )
    return FrameHeader(body_bytes, payload_bytes)


_Decoded = TypeVar("_Decoded")


def _decode(body: bytes | memoryview, kind: type[_Decoded]) -> tuple[int, _Decoded]:
    try:
        plain = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_str_len=TEXT_CHARS_MAX,
            max_bin_len=BODY_BYTES_MAX,
            max_array_len=PREFIX_BLOCKS_MAX,
            max_map_len=TEXT_CHARS_MAX,
            max_ext_len=0,
        )
        if not isinstance(plain, list) or len(plain) != 2 or type(plain[0]) is not int:
            raise BadInput("bad_message", "a body that is not [call, message]", "see kvcache/wire.py")
        return plain[0], msgspec.convert(plain[1], kind, builtin_types=(bytes,))
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        # msgspec.ValidationError and msgpack's size errors are ValueErrors.
        raise BadInput("bad_message", "a body that is no known message", str(error)[:200]) from error


def decode_request(body: bytes | memoryview) -> tuple[int, Request]:
    """RAISES BadInput for anything that is not a request."""
    return _decode(body, Request)  # type: ignore[arg-type]  # mypy has no type form for unions


def decode_reply(body: bytes | memoryview) -> tuple[int, Reply]:
    """RAISES BadInput for anything that is not a reply."""
    return _decode(body, Reply)  # type: ignore[arg-type]  # mypy has no type form for unions
