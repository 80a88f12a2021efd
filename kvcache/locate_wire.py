"""Bytes of the look-up service: how a router asks who holds a prompt's blocks, and what it is answered.

Fixed little-endian frames, because a look-up in the index takes 2 us and decoding a message would take more.
A connection carries one question at a time: whoever asks before the answer came is cut off.

    client ──► greeting   8 bytes "KVLOCATE", u16 version, u16 token bytes, u32 0, token
    server ──► WELCOME, or FAILURE and the end
    client ──► QUERY | PLACE | SOURCES | NAMES      server ──► ANSWER | DONE | TEXT | FAILURE     ... again

    frame   u32 body bytes, u16 kind, u16 first bytes, u32 tiers, u32 limit          16 bytes; then the body
    QUERY   first = selector, padded with zeros to 8; then the hints, u64 each
    PLACE   first = u16 name bytes, source's name, namespace id (16 bytes), padded to 8; then the hints
    ANSWER  u32 body bytes, u16 kind, u16 flags, u32 rows, u32 epoch; then ``rows`` times
            u32 source, u32 namespace, u32 blocks, u32 hbm, u32 host, u32 nvme, u32 placed; then as many
            u8 suspect; with AS_OF among the flags, then as many u64 incarnation, u64 seq, u32 age in ms

``tiers`` masks them (bit 0 hbm, 1 host, 2 nvme; 0: all), bit 31 asks for AS_OF. ``limit`` 0: all rows, else
so many, with most blocks. Another ``epoch`` than before: the numbers mean something new, which NAMES tells.
What TEXT and FAILURE carry is JSON. A selector is u16 model bytes, the model, u16 count, namespace ids;
empty: every namespace of the tenant.

The sum: 64 answers are 1,872 bytes; 8,192 hints are 64 KiB, which loopback carries in 30 us.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import msgspec

from kvcache.block import HASH_BYTES, HINT_BYTES
from kvcache.errors import CODES, BadInput, KVCacheError, NotAllowed, Unavailable
from kvcache.packing import PREFIX_BLOCKS_MAX

MAGIC: Final = b"KVLOCATE"
VERSION: Final = 1
GREETING = struct.Struct("<8sHHI")
FRAME = struct.Struct("<IHHII")
ANSWER = struct.Struct("<IHHII")
COUNT = struct.Struct("<H")

QUERY, PLACE, SOURCES, NAMES = 1, 2, 3, 4
WELCOME, ANSWERED, DONE, TEXT, FAILURE = 128, 129, 130, 131, 132
ASK_AS_OF: Final = 1 << 31
AS_OF: Final = 1

TIER_COUNT: Final = 3
COLUMNS: Final = 4 + TIER_COUNT
ROW_BYTES = 4 * COLUMNS + 1
AS_OF_BYTES = 8 + 8 + 4
ROWS_MAX = 1 << 20
FIRST_BYTES_MAX = 8_192
HINTS_BYTES_MAX = PREFIX_BLOCKS_MAX * HINT_BYTES
ASKED_BYTES_MAX = FIRST_BYTES_MAX + HINTS_BYTES_MAX
TEXT_BYTES_MAX = 64 << 20
TOKEN_BYTES_MAX = 512
NAMESPACES_MAX = 256

assert sys.byteorder == "little", "hints and answers are sent as they lie in memory"


@dataclass(frozen=True, slots=True)
class Asked:
    """The head of a question that is well formed."""

    kind: int
    first_bytes: int
    hint_bytes: int
    tiers: int
    as_of: bool
    limit: int


@dataclass(frozen=True, slots=True)
class Selector:
    """Which namespaces count: those of ``model``, and among ``namespaces``; empty ones forbid nothing."""

    model: str
    namespaces: frozenset[bytes]


class Spoken(msgspec.Struct, frozen=True):
    """An error as JSON."""

    code: str
    what: str
    why: str = ""
    todo: str = ""


def greeting(token: str) -> bytes:
    """What a client says first. RAISES BadInput for a token that none can be."""
    if len(token) > TOKEN_BYTES_MAX or not token.isascii():
        raise BadInput(
            "bad_credentials",
            "what was given as a token is none",
            f"it is at most {TOKEN_BYTES_MAX} characters of visible ASCII",
            "see KVCACHE_TOKEN",
        )
    return GREETING.pack(MAGIC, VERSION, len(token), 0) + token.encode()


def greeted(head: bytes | bytearray | memoryview) -> int:
    """Of the first bytes of a connection: how many bytes of token follow. RAISES BadInput."""
    magic, version, token_bytes, zero = GREETING.unpack_from(head)
    if magic != MAGIC or zero:
        raise BadInput("bad_frame", "what came is no greeting of the look-up service")
    if version != VERSION:
        raise BadInput(
            "bad_version",
            f"version {version} of the look-up service",
            f"this side speaks {VERSION}",
            "upgrade",
        )
    if token_bytes > TOKEN_BYTES_MAX:
        raise BadInput("bad_frame", "a token that is too long")
    return int(token_bytes)


def ask(
    kind: int, first: bytes = b"", hint_bytes: int = 0, tiers: int = 0, limit: int = 0, as_of: bool = False
) -> bytes:
    """Head of a question, and its first part; the hints follow. REQUIRES: ``first`` is padded."""
    marks = tiers | (ASK_AS_OF if as_of else 0)
    return FRAME.pack(len(first) + hint_bytes, kind, len(first), marks, limit) + first


def asked(head: bytes | bytearray | memoryview) -> Asked:
    """RAISES BadInput for what is no question, before anything of its body was read."""
    body, kind, first, marks, limit = FRAME.unpack_from(head)
    tiers = marks & ~ASK_AS_OF
    if not QUERY <= kind <= NAMES or tiers >> TIER_COUNT:
        raise BadInput("bad_frame", "a question that is not known here")
    if first > body or first % HINT_BYTES or (body - first) % HINT_BYTES:
        raise BadInput("bad_frame", "a question whose parts do not fit")
    if first > FIRST_BYTES_MAX or body - first > HINTS_BYTES_MAX or (body and kind >= SOURCES):
        raise BadInput("too_large", "a question that is too long", f"at most {PREFIX_BLOCKS_MAX:,} hints")
    return Asked(kind, first, body - first, tiers, bool(marks & ASK_AS_OF), limit)


def write_selector(model: str, namespaces: Collection[bytes]) -> bytes:
    """Padded; empty when it forbids nothing. RAISES BadInput."""
    if not model and not namespaces:
        return b""
    encoded = model.encode()
    if len(encoded) > 2_048 or len(namespaces) > NAMESPACES_MAX:
        raise BadInput("too_large", "a selector of too much", f"at most {NAMESPACES_MAX} namespaces")
    ids = sorted(namespaces)
    if any(len(each) != HASH_BYTES for each in ids):
        raise BadInput("bad_prefix", f"the id of a namespace has {HASH_BYTES} bytes")
    return _padded(COUNT.pack(len(encoded)) + encoded + COUNT.pack(len(ids)) + b"".join(ids))


def read_selector(raw: bytes) -> Selector:
    """RAISES BadInput."""
    if not raw:
        return Selector("", frozenset())
    try:
        model_bytes = COUNT.unpack_from(raw)[0]
        model = raw[2 : 2 + model_bytes].decode()
        count = COUNT.unpack_from(raw, 2 + model_bytes)[0]
    except (struct.error, UnicodeDecodeError) as error:
        raise _garbled("selector") from error
    start = 4 + model_bytes
    ids = raw[start : start + count * HASH_BYTES]
    if len(ids) != count * HASH_BYTES or any(raw[start + len(ids) :]):
        raise _garbled("selector")
    return Selector(model, frozenset(ids[at : at + HASH_BYTES] for at in range(0, len(ids), HASH_BYTES)))


def write_place(source: str, namespace: bytes) -> bytes:
    """Padded. RAISES BadInput."""
    encoded = source.encode()
    if len(namespace) != HASH_BYTES or not 0 < len(encoded) <= 1_024:
        raise BadInput("bad_prefix", "a placement without a source, or a namespace of another length")
    return _padded(COUNT.pack(len(encoded)) + encoded + namespace)


def read_place(raw: bytes) -> tuple[str, bytes]:
    """RAISES BadInput."""
    try:
        name_bytes = COUNT.unpack_from(raw)[0]
        name = raw[2 : 2 + name_bytes].decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise _garbled("placement") from error
    namespace = raw[2 + name_bytes : 2 + name_bytes + HASH_BYTES]
    if not name or len(namespace) != HASH_BYTES or any(raw[2 + name_bytes + HASH_BYTES :]):
        raise _garbled("placement")
    return name, namespace


def told(kind: int, body: bytes = b"") -> bytes:
    """A reply but ANSWERED, whole."""
    return ANSWER.pack(len(body), kind, 0, 0, 0) + body


def answer_head(rows: int, epoch: int, as_of: bool) -> bytes:
    """The rows follow."""
    return ANSWER.pack(answer_bytes(rows, as_of), ANSWERED, AS_OF if as_of else 0, rows, epoch & 0xFFFFFFFF)


def answer_bytes(rows: int, as_of: bool) -> int:
    """Of the rows."""
    return rows * (ROW_BYTES + (AS_OF_BYTES if as_of else 0))


def reply(head: bytes | bytearray | memoryview) -> tuple[int, int, int, int, int]:
    """Body bytes, kind, flags, rows, epoch. RAISES BadInput for what is no reply."""
    body, kind, flags, rows, epoch = ANSWER.unpack_from(head)
    if not WELCOME <= kind <= FAILURE or rows > ROWS_MAX:
        raise BadInput("bad_frame", "what came is no reply of the look-up service")
    if kind == ANSWERED and body != answer_bytes(rows, bool(flags & AS_OF)):
        raise BadInput("bad_frame", "a reply whose parts do not fit")
    if body > TEXT_BYTES_MAX:
        raise BadInput("too_large", "a reply that is too long", f"at most {TEXT_BYTES_MAX:,} bytes")
    return body, kind, flags, rows, epoch


def failure(error: KVCacheError) -> bytes:
    """The frame that tells of it."""
    return told(FAILURE, msgspec.json.encode(Spoken(error.code, error.what, error.why, error.todo)))


def failed(body: bytes | bytearray | memoryview) -> KVCacheError:
    """The error that was told of. RAISES BadInput when none can be made out."""
    try:
        spoken = msgspec.json.decode(body, type=Spoken)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _garbled("failure") from error
    kind = {"not_allowed": NotAllowed, "unavailable": Unavailable}.get(spoken.code, BadInput)
    code = spoken.code if spoken.code in CODES else "bad_message"
    return kind(code, spoken.what, spoken.why, spoken.todo)


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % HINT_BYTES)


def _garbled(what: str) -> BadInput:
    return BadInput("bad_message", f"a {what} that cannot be read", "", "run the same release on both sides")
