"""Naming the blocks of a prompt for an index, in Python: what kvcache/_native/index_tokens.h does.

Each block's tokens (u32, little-endian) summed by XXH3-64, seeded with the name of the block before it.
"""

from __future__ import annotations

import xxhash


def chain_sums(tokens: bytes, block_bytes: int, root: int) -> list[int]:
    """The names of the full blocks, first to last; ``root`` stands for what is before the first."""
    made = []
    for end in range(block_bytes, len(tokens) + 1, block_bytes):
        root = xxhash.xxh3_64_intdigest(tokens[end - block_bytes : end], root)
        made.append(root)
    return made
