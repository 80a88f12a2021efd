"""Messages by which a reader of parts of blocks verifies them (``kvcache.slices``).

    TakeLease ─► Leased, with a checksum a block ─► Sums ─► ChunkSums ─► Read, or a copy over the map

A lease's checksum vouches for the sums of all chunks of its block, these for the chunks that were taken.

The sum: 8 bytes a chunk of at most 64 KiB, one round trip for up to 2 MiB of them.
"""

from __future__ import annotations

from kvcache.wire_base import Message, Unsigned

PIECES_MAX = 65_536
"""Of one payload: a part of a block is one piece a plane."""

SUMS_BYTES_MAX = 2 << 20
"""Of one answer, unless a single block has more."""


class Sums(Message, frozen=True, tag="sums"):
    """What are the chunk sums of ``count`` blocks of the lease from position ``start``?"""

    lease: Unsigned
    start: Unsigned
    count: Unsigned


class ChunkSums(Message, frozen=True, tag="chunk_sums"):
    """All chunk sums of each of these blocks, in order; zeros for a block that was withdrawn meanwhile."""

    sums: bytes
