"""Copying the bytes of blocks and summing them, a whole batch a call, both in one pass.

``kvcache/_native/core`` (C++) does it when it was built; otherwise ``kvcache/sums_twin`` (Python) does
the same, slower. ``KVCACHE_NATIVE=0`` in the environment chooses the twin. Sums are XXH3-64 with seed
0, so what one wrote the other verifies. They find corruption; they do not stop a forger.

* Bad input is refused before a byte is written.
* A source byte is read once and the sum is of the bytes written, so a source that changes meanwhile
  may give a block that nobody meant, but never a sum that vouches for other bytes.
* The interpreter's lock is released for the whole batch (by the twin: for each chunk's copy).

The sum: a copy reads each byte once and writes it once, so memory is the limit, not arithmetic (XXH3
sums some 30 GB/s, a core copies 7 to 20 GB/s from memory). At 18 GB/s a block of 2 MiB takes 0.12 ms,
in which the sum hides; a second pass would add a quarter to a half. A write through the caches also
reads its target's lines first, so it moves 3 bytes a byte where one past the caches moves 2: batches of
256 KiB and more are written so. Figures: benchmarks/README.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import xxhash

from kvcache import sums_twin
from kvcache.errors import BadInput

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvcache.block import StorageKey

_copy_and_sum = sums_twin.copy_and_sum
_sum_chunks = sums_twin.sum_chunks
_native = False
if os.environ.get("KVCACHE_NATIVE") != "0":
    try:
        from kvcache._native import core
    except ImportError:
        pass
    else:
        _copy_and_sum, _sum_chunks, _native = core.copy_and_sum, core.sum_chunks, True

NATIVE: bool = _native
"""Whether the C++ module is in use."""

SUM_BYTES = 8

_BLOCK_TAG = b"kvcache.block.1"


def copy_and_sum(sources: Sequence[Buffer], targets: Sequence[Buffer], chunk_bytes: int) -> bytes:
    """Copies each source to its target; returns the sum of every chunk, sources in order.

    ``sources[i]`` and ``targets[i]`` are contiguous, equally long, and a multiple of ``chunk_bytes``.
    The result is the XXH3-64 (seed 0) of each chunk as little-endian u64, joined. Any thread may call.
    RAISES BadInput, and then nothing was written: lengths that do not fit, a target that is read-only
    or overlaps a source or another target, a buffer that is not contiguous.
    """
    try:
        return _copy_and_sum(sources, targets, chunk_bytes)
    except ValueError as error:
        raise _refusal(error) from error


def sum_chunks(buffers: Sequence[Buffer], chunk_bytes: int) -> bytes:
    """The sums that ``copy_and_sum`` would return, without a copy. RAISES BadInput."""
    try:
        return _sum_chunks(buffers, chunk_bytes)
    except ValueError as error:
        raise _refusal(error) from error


def block_checksum(key: StorageKey, block_bytes: int, chunk_bytes: int, sums: bytes) -> bytes:
    """The 16 bytes that vouch for a block: XXH3-128 over its key, its shape and its chunks' sums."""
    shape = block_bytes.to_bytes(8, "little") + chunk_bytes.to_bytes(4, "little")
    return xxhash.xxh3_128_digest(_BLOCK_TAG + key + shape + sums)


def guard_sum(data: Buffer) -> bytes:
    """The 8 bytes that vouch for a record of ours (a header on disk, an entry of an index): its XXH3-64."""
    return xxhash.xxh3_64_digest(data)


def _refusal(error: ValueError) -> BadInput:
    return BadInput(
        "bad_block",
        str(error),
        "a copy needs contiguous pairs of equal length, whole chunks, and targets of their own",
        "nothing was written; pass the pieces of whole blocks and their slots",
    )
