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

import typing
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from kvcache.errors import BadInput
from kvcache.packing import BODY_BYTES_MAX as BODY_BYTES_MAX
from kvcache.packing import PREFIX_BLOCKS_MAX as PREFIX_BLOCKS_MAX
from kvcache.packing import TEXT_CHARS_MAX as TEXT_CHARS_MAX
from kvcache.packing import unpack
from kvcache.wire_base import Message as Message
from kvcache.wire_base import OrNone as OrNone
from kvcache.wire_base import Unsigned as Unsigned
from kvcache.wire_events import BlockEvent as BlockEvent
from kvcache.wire_events import EventBatch as EventBatch
from kvcache.wire_events import Watch as Watch
from kvcache.wire_frame import HEADER as HEADER
from kvcache.wire_frame import MAGIC as MAGIC
from kvcache.wire_frame import PAYLOAD_BYTES_MAX as PAYLOAD_BYTES_MAX
from kvcache.wire_frame import PROTOCOL_VERSION as PROTOCOL_VERSION
from kvcache.wire_frame import FrameHeader as FrameHeader
from kvcache.wire_frame import decode_header as decode_header
from kvcache.wire_frame import frame as frame
from kvcache.wire_greeting import Hello as Hello
from kvcache.wire_greeting import Welcome as Welcome
from kvcache.wire_hbm import HBM as HBM
from kvcache.wire_hbm import HBM_WAIT_MS as HBM_WAIT_MS
from kvcache.wire_hbm import HOST as HOST
from kvcache.wire_hbm import NO_SLAB as NO_SLAB
from kvcache.wire_hbm import NOTHING_LEASED as NOTHING_LEASED
from kvcache.wire_hbm import HbmLeased as HbmLeased
from kvcache.wire_hbm import HbmSlab as HbmSlab
from kvcache.wire_peers import Advance as Advance
from kvcache.wire_peers import Export as Export
from kvcache.wire_peers import Exported as Exported
from kvcache.wire_peers import Follow as Follow
from kvcache.wire_peers import Followed as Followed
from kvcache.wire_peers import Post as Post
from kvcache.wire_peers import Posted as Posted
from kvcache.wire_record import Record as Record
from kvcache.wire_slices import PIECES_MAX as PIECES_MAX
from kvcache.wire_slices import SUMS_BYTES_MAX as SUMS_BYTES_MAX
from kvcache.wire_slices import ChunkSums as ChunkSums
from kvcache.wire_slices import Sums as Sums
from kvcache.wire_tuning import Tune as Tune
from kvcache.wire_tuning import Tuned as Tuned

BATCH_BLOCKS_MAX = 1_024

# --- requests -----------------------------------------------------------------------------------


class Open(Message, frozen=True, tag="open"):
    """Name a namespace by all its fields (``namespace.Namespace`` as a map). Idempotent."""

    namespace: dict[str, str | int]
    plane_count: Unsigned
    head_count: Unsigned
    head_bytes: Unsigned
    expect: bytes = b""


class Match(Message, frozen=True, tag="match", omit_defaults=True):
    """How many leading blocks of ``prefix`` are held? Takes no lease. What lies on NVMe starts to be read
    into memory, unless computing it anew at ``prefill_tokens_s`` (0: unknown) is faster. With ``hbm``, those
    count too that only the connection's slab of HBM holds."""

    namespace: bytes
    prefix: bytes
    prefill_tokens_s: Unsigned = 0
    hbm: bool = False


class TakeLease(Message, frozen=True, tag="lease", omit_defaults=True):
    """Hold the leading blocks of ``prefix``, after at most ``wait_ms`` for those that are read from NVMe or
    fetched from a peer first. With ``request``, the same lease for all who ask for it under this tenant,
    namespace and prefix, until each has released it. ``source`` is the node that has these blocks, or is
    computing them; with ``pushed`` it brings them here by itself. ``parent`` is the block before the first of
    ``prefix`` (empty: it is the first of the prompt, or not known). ``hint`` and what follows are for the
    eviction policy (``request_hints``). With ``hbm``, leading blocks that the connection's slab of HBM holds
    are leased there, and only those behind them otherwise."""

    namespace: bytes
    prefix: bytes
    request: str = ""
    duration_ms: Unsigned = 30_000
    wait_ms: Unsigned = 0
    prefill_tokens_s: Unsigned = 0
    source: str = ""
    pushed: bool = False
    parent: bytes = b""
    hint: str = "unknown"
    priority: int = 50
    session: OrNone = -1
    gap_ms: OrNone = -1
    keep_ms: OrNone = -1
    hbm: bool = False


class Release(Message, frozen=True, tag="release", omit_defaults=True):
    """The reader is done. ``failed`` lists positions in the lease whose bytes failed their check. ``tier``:
    whose lease it is."""

    lease: Unsigned
    failed: list[Unsigned] = msgspec.field(default_factory=list)
    tier: str = HOST


class Reserve(Message, frozen=True, tag="reserve", omit_defaults=True):
    """Room for the blocks of ``prefix`` that are not held yet, behind ``parent`` (empty: the root).

    ``push`` is the node to which they are copied while they are written. ``hint``, ``priority``, ``session``,
    ``gap_ms`` and ``keep_ms`` are for the eviction policy (``request_hints``). ``tier`` is host or hbm, which
    needs a slab of HBM; ``parent`` must be held there."""

    namespace: bytes
    parent: bytes
    prefix: bytes
    hint: str = "unknown"
    priority: int = 50
    session: OrNone = -1
    gap_ms: OrNone = -1
    push: str = ""
    keep_ms: OrNone = -1
    tier: str = HOST


class Commit(Message, frozen=True, tag="commit", omit_defaults=True):
    """Publish: every reserved block has been written. ``sums`` are all chunk sums, in order."""

    reservation: Unsigned
    sums: bytes
    tier: str = HOST


class Abort(Message, frozen=True, tag="abort", omit_defaults=True):
    """The blocks will not be written after all, and no copy into them is in flight."""

    reservation: Unsigned
    tier: str = HOST


class Read(Message, frozen=True, tag="read"):
    """Send me the bytes of ``count`` blocks of the lease from position ``start``: the reply has a payload.
    Of every plane, ``length`` bytes from ``offset`` on (0: all), whole chunks."""

    lease: Unsigned
    start: Unsigned
    count: Unsigned
    offset: Unsigned = 0
    length: Unsigned = 0


class Write(Message, frozen=True, tag="write"):
    """The payload holds ``count`` whole blocks of the reservation from position ``start``."""

    reservation: Unsigned
    start: Unsigned
    count: Unsigned


class Persist(Message, frozen=True, tag="persist"):
    """Write the leading blocks of ``prefix`` to NVMe, and answer (``Matched``), after ``wait_ms`` at most,
    how many of them are durable: a crash or a power cut does not lose them."""

    namespace: bytes
    prefix: bytes
    wait_ms: Unsigned = 10_000


class Pin(Message, frozen=True, tag="pin"):
    """Keep these blocks until unpinned (role operator)."""

    namespace: bytes
    prefix: bytes


class Unpin(Message, frozen=True, tag="unpin"):
    namespace: bytes
    prefix: bytes


class Stats(Message, frozen=True, tag="stats"):
    """Counters and sizes of the node, as a map of plain numbers."""


class Scrub(Message, frozen=True, tag="scrub"):
    """Verify every block on NVMe, starting now (role operator). ``Stats`` tells how far it is."""


# --- replies ------------------------------------------------------------------------------------


class Opened(Message, frozen=True, tag="opened"):
    """``verdict`` says in plain words whether stored blocks fit, and if not which field differs."""

    namespace: bytes
    block_bytes: Unsigned
    chunk_bytes: Unsigned
    verdict: str


class Matched(Message, frozen=True, tag="matched"):
    count: Unsigned


class Leased(Message, frozen=True, tag="leased", omit_defaults=True):
    """``lease`` is 0 when ``count`` is 0. ``offsets`` are byte offsets in the mapped slab (empty for
    connections without one), -1 for a block that lies elsewhere and must be Read. ``checksums`` joins
    16 bytes a block. ``expires_ns`` is on CLOCK_MONOTONIC of the node's host; ``remaining_ms`` is the
    same for another host. ``coming`` more blocks right behind are on their way from NVMe or a peer: ask
    again. Before all these stand those of ``hbm``, with a lease of their own that ends at the same time."""

    lease: Unsigned
    count: Unsigned
    offsets: list[OrNone]
    generations: list[Unsigned]
    checksums: bytes
    expires_ns: Unsigned
    remaining_ms: Unsigned
    coming: Unsigned = 0
    hbm: HbmLeased = NOTHING_LEASED


class Released(Message, frozen=True, tag="released"):
    """``intact``: the lease still held its slots until now, so no byte can have changed under it."""

    intact: bool


class Reserved(Message, frozen=True, tag="reserved"):
    """Blocks ``start`` to ``start + count`` of the prefix are to be written; those before are held.
    ``reservation`` is 0 when ``count`` is 0; ``reason`` then says why (held, busy, full)."""

    reservation: Unsigned
    start: Unsigned
    count: Unsigned
    offsets: list[OrNone]
    generations: list[Unsigned]
    reason: str = ""


class Committed(Message, frozen=True, tag="committed"):
    count: Unsigned


class Done(Message, frozen=True, tag="done"):
    """Done, nothing to say."""


class Blocks(Message, frozen=True, tag="blocks"):
    """Answer to Read. The payload holds what was asked for of ``count`` blocks, block after block, plane
    after plane."""

    count: Unsigned


class StatsReply(Message, frozen=True, tag="stats_reply"):
    """``troubles`` says in plain words what of the node does not work as it should, and what to do."""

    values: dict[str, float]
    troubles: list[str] = msgspec.field(default_factory=list)


class Failure(Message, frozen=True, tag="failure"):
    """The request was refused. Nothing stored was changed by it."""

    code: str
    what: str
    why: str = ""
    todo: str = ""


_Asking = Hello | Open | Match | TakeLease | Release | Read | Sums | Stats | Watch
_Changing = Reserve | Commit | Abort | Write | Pin | Unpin | Persist | Scrub | Record | Tune
_Moving = Export | Post | Advance | Follow
Request = _Asking | _Changing | _Moving

_Answer = Welcome | Opened | Matched | Leased | Released | Reserved | Committed | Done | Blocks | StatsReply
_Moved = Exported | Posted | Followed | ChunkSums | Tuned
Reply = _Answer | _Moved | EventBatch | Failure


def encode(call: int, message: Message, payload_bytes: int = 0) -> bytes:
    """Header and body of one frame. The payload, if any, is written after it by the caller.

    RAISES BadInput for text that is not valid Unicode, numbers over 64 bits, and what is too large.
    """
    try:
        return frame(call, packed(message), payload_bytes)
    except (ValueError, OverflowError) as error:
        raise _unsendable(message, error) from error


def packed(message: Message) -> bytes:
    """The message as ``frame`` takes it, for who sends it in many. RAISES BadInput as ``encode``."""
    try:
        return _ENCODER.encode(message)
    except (ValueError, OverflowError) as error:
        raise _unsendable(message, error) from error


def _unsendable(message: Message, error: Exception) -> BadInput:
    return BadInput("bad_message", f"a {type(message).__name__} that cannot be sent", _printable(error))


_ENCODER = msgspec.msgpack.Encoder()
# Batches come by the thousand, so straight into their types, at a seventh of the time. Their fields bound
# what that takes; a body that is written in another order goes the way of all others.
_BATCH_DECODER = msgspec.msgpack.Decoder(tuple[int, EventBatch])
_BATCH_MARK = b"\xa4type\xabevent_batch"
_BATCH_MARK_WITHIN = 14 + len(_BATCH_MARK)  # Behind the list, the longest number and the map.

_Decoded = TypeVar("_Decoded")
# By tag, because converting to a union costs 15 us more a message than converting to one of its members.
_REQUESTS: dict[str, type[Request]] = {
    str(kind.__struct_config__.tag): kind for kind in typing.get_args(Request)
}
_REPLIES: dict[str, type[Reply]] = {str(kind.__struct_config__.tag): kind for kind in typing.get_args(Reply)}


def _decode(body: bytes | memoryview, kinds: Mapping[str, type[_Decoded]]) -> tuple[int, _Decoded]:
    try:
        plain = unpack(body)
        if not isinstance(plain, list) or len(plain) != 2 or type(plain[0]) is not int:
            raise BadInput("bad_message", "a body that is not [call, message]", "see kvcache/wire.py")
        tag = plain[1].get("type") if isinstance(plain[1], dict) else None
        kind = kinds.get(tag) if isinstance(tag, str) else None
        if kind is None:
            raise BadInput("bad_message", f"a message of the type {tag!r:.80}", "no such type goes this way")
        return plain[0], msgspec.convert(plain[1], kind, builtin_types=(bytes,))
    except ValueError as error:  # msgspec.ValidationError is one.
        raise BadInput("bad_message", "a body that is no known message", _printable(error)) from error


def _printable(error: Exception) -> str:
    """The peer's text may be inside: one short line of it, never a control character."""
    text = str(error)[:200] or type(error).__name__
    return "".join(char if char.isprintable() else "?" for char in text)


def decode_request(body: bytes | memoryview) -> tuple[int, Request]:
    """RAISES BadInput for anything that is not a request."""
    return _decode(body, _REQUESTS)


def decode_reply(body: bytes | memoryview) -> tuple[int, Reply]:
    """RAISES BadInput for anything that is not a reply."""
    if _BATCH_MARK in bytes(body[:_BATCH_MARK_WITHIN]):
        try:
            return _BATCH_DECODER.decode(body)
        except ValueError as error:  # msgspec's are.
            raise BadInput("bad_message", "a body that is no event batch", _printable(error)) from error
    return _decode(body, _REPLIES)
