"""Public sequence hashes: the names of blocks that engines' events and other routers can agree on.

    tokens    t0 t1 ... | t16 t17 ...  | ...        u32, little-endian; only full blocks
    local     l0        | l1           | ...        XXH3-64 of a block's tokens, seed 1337
    sequence  s0 = l0   | s1 = X(s0,l1)| ...        XXH3-64 of both before, 8 bytes each, seed 1337

An engine's own hashes mean something to that engine only, so what its events tell is named anew from
the tokens: by the local hash and the hash of the sequence up to it that Dynamo's router and the
RFC 1403 interfaces use. A node names its blocks otherwise (``kvcache.block``), so a namespace of these names
has the layout ``PUBLIC``, and blocks of both never meet. Model, adapter, tenant and salt are not in these
hashes: they are in the namespace.

They are not safe against somebody who makes collisions on purpose: what is found by them is a hint.
``kvcache/_native/index`` (C++) computes them when it was built, else ``kvcache/sums_chain`` does.

The sum: 6 ns a block of 16 tokens by itself and 8 ns in sequence (C++); 0.7 us (Python).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcache import index, sums_chain
from kvcache.errors import BadInput
from kvcache.index_twin import items

if TYPE_CHECKING:
    from typing_extensions import Buffer

if index.NATIVE:
    from kvcache._native import index as native

PUBLIC = "public"
"""``Namespace.layout`` where blocks are named by sequence hashes."""


def sequence_hashes(
    tokens: Buffer, block_tokens: int, extra: Sequence[bytes] = (), parent: int | None = None
) -> memoryview:
    """The names (u64) of the full blocks of ``tokens`` (u32), first to last. ``extra``: bytes that the first
    blocks have beside their tokens, one for each, where an engine says so. ``parent``: the sequence hash
    of the block before the first, so that a prompt can be named part by part. RAISES BadInput."""
    if index.NATIVE:
        return native.sequence_hashes(tokens, block_tokens, extra, parent)
    return _view(sums_chain.chained_sums(_local(tokens, block_tokens, extra), parent))


def local_hashes(tokens: Buffer, block_tokens: int, extra: Sequence[bytes] = ()) -> memoryview:
    """The hashes (u64) of the full blocks of ``tokens``, each by itself. RAISES BadInput."""
    if index.NATIVE:
        return native.local_hashes(tokens, block_tokens, extra)
    return _view(_local(tokens, block_tokens, extra))


def chain_locals(local: Buffer, parent: int | None = None) -> memoryview:
    """The sequence hashes of blocks by their local ones (u64). RAISES BadInput."""
    if index.NATIVE:
        return native.chain_locals(local, parent)
    return _view(sums_chain.chained_sums(items(local, 8), parent))


def _local(tokens: Buffer, block_tokens: int, extra: Sequence[bytes]) -> list[int]:
    packed = array("I", items(tokens, 4)).tobytes()
    if block_tokens < 1 or not all(isinstance(each, bytes) for each in extra):
        raise BadInput(
            "bad_prefix",
            "a block of no tokens, or with something appended that is no bytes",
            "sequence hashes are of whole blocks of tokens",
            "nothing was changed; see kvcache.sequence",
        )
    return sums_chain.local_sums(packed, 4 * block_tokens, extra)


def _view(hashes: list[int]) -> memoryview:
    return memoryview(array("Q", hashes)).toreadonly()
