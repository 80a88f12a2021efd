"""Naming blocks by their tokens, in Python: what kvcache/_native/index_names.h does.

``chain_sums`` is of ``kvcache.index.name_blocks``, the rest of ``kvcache.sequence``. Tokens are u32,
little-endian; every sum is XXH3-64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

PUBLIC_SEED = 1337


def chain_sums(tokens: bytes, block_bytes: int, root: int) -> list[int]:
    """The names of the full blocks, first to last, each seeded with the one before; ``root`` stands for what
    is before the first."""
    made = []
    for end in range(block_bytes, len(tokens) + 1, block_bytes):
        root = xxhash.xxh3_64_intdigest(tokens[end - block_bytes : end], root)
        made.append(root)
    return made


def local_sums(tokens: bytes, block_bytes: int, extra: Sequence[bytes]) -> list[int]:
    """The sums of the full blocks, each by itself, with what is appended to the first of them."""
    made = []
    for number in range(len(tokens) // block_bytes):
        block = tokens[number * block_bytes : (number + 1) * block_bytes]
        made.append(xxhash.xxh3_64_intdigest(block + b"".join(extra[number : number + 1]), PUBLIC_SEED))
    return made


def chained_sums(local: Iterable[int], parent: int | None) -> list[int]:
    """The sums of all up to each of these, behind ``parent``; that of the very first is itself."""
    made = []
    for each in local:
        if parent is not None:
            pair = parent.to_bytes(8, "little") + each.to_bytes(8, "little")
            each = xxhash.xxh3_64_intdigest(pair, PUBLIC_SEED)
        parent = each
        made.append(each)
    return made
