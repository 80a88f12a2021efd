"""What a block is and what it is called. The only place that hashes token ids.

A *block* is the KV of ``block_tokens`` tokens, all layers, one rank. Its canonical axis order is

    [layer][part: K, V][kv head][token][head dim]        (C order, no padding)

so that any rank's heads are one contiguous range of each (layer, part) *plane*. An engine whose
pages are packed (ISA layouts, K and V interleaved) stores opaque planes: same size, order of the
interior named by the namespace's ``layout``. The bytes are summed in *chunks*: equal pieces of a
plane, each a whole number of heads or a part of one head, at most ``CHUNK_BYTES_MAX``.

A block has two names:

* its *prefix hash* (``BlockHash``, 16 bytes): keyed BLAKE2b-128 chained from the first token,
  ``hash(parent || tokens || extra)``, from a root that binds tenant, model, epoch, adapter and
  block length (``kvcache.namespace``). It does not depend on layout, dtype or rank, so routers can
  compare workers with it. Its low 64 bits are the *routing hint*.
* its *storage key* (``StorageKey``, 32 bytes): namespace id, then prefix hash.

The sum: BLAKE2b of 80 keyed bytes costs about 0.9 us from Python, so 128,000 tokens in blocks of
16 (8,000 blocks) take about 10 ms; the interpreter, not the hash, is the limit.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import isqrt
from typing import NewType

from kvcache.errors import BadInput

BlockHash = NewType("BlockHash", bytes)
StorageKey = NewType("StorageKey", bytes)
NamespaceId = NewType("NamespaceId", bytes)
Slot = NewType("Slot", int)

HASH_BYTES = 16
HINT_BYTES = 8
KEY_BYTES = 32
CHUNK_BYTES_MAX = 65_536
CHUNK_COUNT_MAX = 65_536
BLOCK_BYTES_MAX = 1 << 30
TOKEN_BYTES = 4
TENANT_KEY_BYTES = 32

_PERSON = b"kvcache.prefix.1"


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """The shape of one block: sizes only. RAISES BadInput when it describes no block.

    ``plane_count`` is layers times parts (2 where K and V lie apart, 1 where they are packed in
    one page); a plane is ``head_count`` heads of ``head_bytes`` bytes each.
    """

    block_tokens: int
    plane_count: int
    head_count: int
    head_bytes: int
    chunk_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes a chunk: the largest whole number of heads that fits, else the largest equal part of a head."""

    def __post_init__(self) -> None:
        for name in ("block_tokens", "plane_count", "head_count", "head_bytes"):
            if getattr(self, name) < 1:
                raise BadInput("bad_block", f"{name} is {getattr(self, name)}", "a block cannot be empty")
        if self.block_bytes > BLOCK_BYTES_MAX:
            raise BadInput(
                "too_large",
                f"a block of {self.block_bytes} bytes",
                f"the limit is {BLOCK_BYTES_MAX} bytes",
                "use fewer tokens a block",
            )
        object.__setattr__(self, "chunk_bytes", _chunk_bytes(self.head_count, self.head_bytes))
        if self.chunk_count > CHUNK_COUNT_MAX:
            raise BadInput(
                "bad_block",
                f"a block of {self.block_bytes} bytes in {self.chunk_count} chunks",
                f"the limit is {CHUNK_COUNT_MAX} chunks: many small planes, or a size that divides badly",
                "describe the block with fewer, larger planes, or heads of a rounder size",
            )

    @property
    def plane_bytes(self) -> int:
        return self.head_count * self.head_bytes

    @property
    def block_bytes(self) -> int:
        return self.plane_count * self.plane_bytes

    @property
    def chunk_count(self) -> int:
        return self.block_bytes // self.chunk_bytes


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32, the form that is hashed. RAISES BadInput for ids outside u32.

    Bytes are refused: whether they are ids or packed already, only the caller can know.
    """
    if isinstance(tokens, (bytes, bytearray)) or getattr(tokens, "itemsize", TOKEN_BYTES) == 1:
        raise BadInput("bad_prefix", "token ids given as bytes", "ids are integers", "pass a list of ids")
    try:
        packed = array("I", tokens)
    except (OverflowError, TypeError) as error:
        raise BadInput("bad_prefix", "a token id is not an unsigned 32-bit integer", str(error)) from error
    assert packed.itemsize == TOKEN_BYTES
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def chain(
    root: BlockHash,
    key: bytes,
    tokens: Sequence[int] | bytes,
    block_tokens: int,
    extra: Sequence[bytes] = (),
) -> list[BlockHash]:
    """The prefix hashes of every full block of ``tokens``, first to last.

    ``root`` is where the chain starts: a namespace's root, or the hash of the block before the
    first token. ``tokens`` are ids, or already packed by ``pack_tokens``. ``extra[i]`` binds what
    else block i depends on (a multimodal digest, a salt), already encoded by ``extra_keys``; fewer
    entries than blocks mean none for the rest. A trailing partial block has no name. RAISES BadInput.
    """
    if block_tokens < 1:
        raise BadInput("bad_block", f"block_tokens is {block_tokens}", "a block cannot be empty")
    if len(root) != HASH_BYTES or len(key) != TENANT_KEY_BYTES:
        raise BadInput(
            "bad_prefix",
            f"a root of {len(root)} bytes and a tenant key of {len(key)} bytes",
            f"they are {HASH_BYTES} and {TENANT_KEY_BYTES} bytes, so that no two chains are named alike",
        )
    packed = tokens if isinstance(tokens, bytes) else pack_tokens(tokens)
    if len(packed) % TOKEN_BYTES:
        raise BadInput("bad_prefix", f"{len(packed)} bytes of tokens", f"a token is {TOKEN_BYTES} bytes")
    step = block_tokens * TOKEN_BYTES
    hashes: list[BlockHash] = []
    parent: bytes = root
    for block_index, start in enumerate(range(0, len(packed) - step + 1, step)):
        message = parent + packed[start : start + step]
        if block_index < len(extra):
            message += extra[block_index]
        parent = blake2b(message, digest_size=HASH_BYTES, key=key, person=_PERSON).digest()
        hashes.append(BlockHash(parent))
    return hashes


def extra_keys(parts: Sequence[tuple[str, bytes]]) -> bytes:
    """Tagged, length-prefixed encoding of what a block depends on besides its tokens.

    ``parts`` are (tag, value) in the order given, for instance ("mm", digest) or ("salt", salt).
    No two different lists encode alike, and the empty list encodes as nothing. RAISES BadInput for a
    tag that is no valid text.
    """
    encoded = bytearray()
    for tag, value in parts:
        try:
            tag_bytes = tag.encode()
        except UnicodeEncodeError as error:
            raise BadInput("bad_prefix", "the tag of an extra key is no valid text", str(error)) from error
        encoded += len(tag_bytes).to_bytes(4, "little") + tag_bytes
        encoded += len(value).to_bytes(4, "little") + value
    return bytes(encoded)


def routing_hint(block: BlockHash) -> int:
    """The low 64 bits of the hash, read little-endian: what the locality index compares."""
    return int.from_bytes(block[:HINT_BYTES], "little")


def hints(blocks: Iterable[bytes]) -> bytes:
    """Their routing hints, joined: a buffer of u64."""
    return b"".join([block[:HINT_BYTES] for block in blocks])


def split_hints(joined: bytes) -> list[bytes]:
    """RAISES BadInput when the length is not a multiple of 8."""
    if len(joined) % HINT_BYTES:
        what = f"{len(joined)} bytes of routing hints"
        raise BadInput("bad_message", what, f"each has {HINT_BYTES} bytes")
    return [joined[at : at + HINT_BYTES] for at in range(0, len(joined), HINT_BYTES)]


def storage_key(namespace: NamespaceId, block: BlockHash) -> StorageKey:
    key = namespace + block
    assert len(key) == KEY_BYTES
    return StorageKey(key)


def split_hashes(joined: bytes) -> list[BlockHash]:
    """Hashes sent as one run of bytes. RAISES BadInput when the length is not a multiple of 16."""
    if len(joined) % HASH_BYTES:
        raise BadInput(
            "bad_prefix",
            f"a prefix of {len(joined)} bytes",
            f"block hashes are {HASH_BYTES} bytes each",
            "send whole hashes, joined without separators",
        )
    return [BlockHash(joined[at : at + HASH_BYTES]) for at in range(0, len(joined), HASH_BYTES)]


def _chunk_bytes(head_count: int, head_bytes: int) -> int:
    if head_bytes > CHUNK_BYTES_MAX:
        return _divisor(head_bytes, CHUNK_BYTES_MAX)
    return head_bytes * _divisor(head_count, CHUNK_BYTES_MAX // head_bytes)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``."""
    small = (low for low in range(1, isqrt(number) + 1) if number % low == 0)
    return max(divisor for low in small for divisor in (low, number // low) if divisor <= most)
