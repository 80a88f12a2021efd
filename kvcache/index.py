"""The structure that a router asks: which worker holds how many leading blocks of a prompt, in which tier.

``kvcache/_native/index`` (C++) when it was built, otherwise ``kvcache/index_twin`` (Python): the same
answers, slower. ``KVCACHE_NATIVE=0`` in the environment chooses the twin.

    holder = one generation of a worker's rank:   open ──► serving ──close, or a newer one serves──► gone
                                          open_shadow ──► loading ──serve──► serving
    query  = hashes, first block first ──► (worker, rank, leading blocks, of these in each tier) ...

A hash is 64 bits of a block's name, which covers all blocks before it. So equal hashes mean equal prefixes,
a whole run is accepted by comparing its last hash, and neither holes and refills nor a child told before its
parent can make an answer wrong. Two blocks whose 64 bits agree cost a miss at the owner: an answer is a
hint, and the owner checks. A worker's blocks count wherever they are: its usable prefix ends at the first
block that none of its tiers has.

* Any thread may call. Many read at once; a writer goes first, and lets readers in every 256 blocks; a call
  that turns out long releases the interpreter's lock.
* ``bytes`` is what is taken now, and blocks that might not fit into ``bytes_max`` are refused. ``open`` and
  ``remove`` are not, and may go over it: by a row, and by what a hole costs, some 16 bytes a block of a run
  with holes everywhere and a set of holders for each block that others hold than those beside it. What lies
  free between is not in it: the process keeps a quarter more, and up to twice ``bytes`` (C++, measured at 64
  MiB) where runs of many lengths come and go.
* A prefix that a worker stores as one run has to be one: see ``Index.store``.

The sum (C++): 8 bytes of hash and 12 of table a block; a look-up is a cache miss in the table, one for the
chain and one for its hashes, so 0.3 us however long the run is. Figures: benchmarks/README.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from kvcache import index_twin, index_twin_chain, index_twin_runs

if TYPE_CHECKING:
    from typing_extensions import Buffer

ALL_TIERS = index_twin.ALL_TIERS
TIER_COUNT = index_twin_runs.TIER_COUNT
RUN_BLOCKS_MAX = index_twin_chain.RUN_BLOCKS_MAX


class Match(Protocol):
    """Who holds the first block, and how far. Columns of u32, one answer a line; none where nobody does.

    ``table`` is all of it, ``3 + TIER_COUNT`` values an answer: worker, dp_rank, blocks, then the
    blocks in each tier. ``ends``, of ``match_many`` only: where each query's answers end."""

    @property
    def table(self) -> memoryview: ...
    @property
    def workers(self) -> memoryview: ...
    @property
    def dp_ranks(self) -> memoryview: ...
    @property
    def blocks(self) -> memoryview: ...
    @property
    def ends(self) -> memoryview: ...

    def tier(self, tier: int) -> memoryview: ...

    def as_dict(self) -> dict[tuple[int, int], int]:
        """Blocks by worker and rank. Slower than the columns."""

    def __len__(self) -> int: ...


class Index(Protocol):
    """All of it RAISES BadInput, and then nothing was changed: ``bad_prefix`` for a buffer that is not
    of u64 (or bytes), ``bad_holder`` for a holder that is not open or a tier that does not exist.
    Hashes are any contiguous buffer of 64-bit integers: an ``array``, numpy, bytes.

    MemoryError, where the system has none: a change was left half done, and now every call raises it."""

    def open(self, worker: int, dp_rank: int = 0) -> int:
        """A new holder, empty, that answers from now on; the one before is gone with all it held."""

    def open_shadow(self, worker: int, dp_rank: int = 0) -> int:
        """A new holder that does not answer yet, to be loaded beside the one that does."""

    def serve(self, holder: int) -> None:
        """From now on this one answers for its rank; the one before is gone."""

    def close(self, holder: int) -> None:
        """It is gone with all it held, at once for whoever asks."""

    def store(self, holder: int, tier: int, hashes: Buffer, parent: int | None = None) -> int:
        """It holds these too, in this order. Returns how many of the last were refused for want of room.

        REQUIRES: ``hashes`` are blocks of one prefix that follow one another, and ``parent``, when known,
        is the block before the first (it need not be held, nor told yet). A prefix that diverges from what
        was so told is found out by its hashes; a run that is none can credit blocks that nobody holds."""

    def store_runs(self, holder: int, tier: int, hashes: Buffer, lengths: Buffer) -> int:
        """``store`` of many runs, which lie in ``hashes`` one behind the other; ``lengths`` is of u16. After
        the first block that is refused nothing is stored."""

    def store_loose(self, holder: int, tier: int, hashes: Buffer) -> int:
        """As ``store``, for blocks in any order; each is compared in each match, so this is slower."""

    def remove(self, holder: int, tier: int, hashes: Buffer) -> int:
        """It holds these no more, in any order. Returns how many it held."""

    def clear(self, holder: int, tier: int) -> None:
        """It holds nothing any more in this tier."""

    def match(
        self,
        hashes: Buffer,
        tiers: int = ALL_TIERS,
        candidates: Buffer | None = None,
        limit: int | None = None,
    ) -> Match:
        """Who holds how many of the first blocks, in the tiers of the mask ``tiers`` (bit 0: tier 0).

        ``candidates`` (u32): only these workers, with all their ranks. ``limit``: if there are more answers,
        only so many, best first: those with the most blocks, of equals the lowest worker and rank."""

    def match_tokens(
        self,
        tokens: Buffer,
        block_tokens: int,
        root: int = 0,
        tiers: int = ALL_TIERS,
        candidates: Buffer | None = None,
        limit: int | None = None,
    ) -> Match:
        """``match`` of ``name_blocks``, for sources that name their blocks so."""

    def match_many(
        self,
        hashes: Buffer,
        ends: Buffer,
        tiers: int = ALL_TIERS,
        candidates: Buffer | None = None,
        limit: int | None = None,
    ) -> Match:
        """Query i is ``hashes[ends[i - 1]:ends[i]]``, ``limit`` is of each. Others may write between two of
        them."""

    def digest(self, holder: int, tier: int) -> tuple[int, int, int]:
        """Of what it holds: count, xor of the hashes, and their sum modulo 2 ** 64."""

    def held(self, holder: int, tier: int) -> memoryview:
        """What it holds, as u64 in no order."""

    def runs(self, holder: int, tier: int) -> tuple[memoryview, memoryview]:
        """What it holds as runs for ``store_runs``: all the hashes (u64), and how many are in each run (u16),
        at most RUN_BLOCKS_MAX. Blocks that were stored behind one another are in one run, first block first;
        the runs are in no order, those of ``store_loose`` are of one block each."""

    def stats(self) -> dict[str, int]:
        """Counts: blocks, ghosts (kept, though nobody holds them), members, chains, spans, sets, rows.
        Takes time in proportion to the chains."""

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is held."""

    @property
    def bytes(self) -> int: ...
    @property
    def bytes_max(self) -> int: ...


_native = False
if os.environ.get("KVCACHE_NATIVE") != "0":
    try:
        from kvcache._native import index as native
    except ImportError:
        pass
    else:
        _native = True

NATIVE: bool = _native
"""Whether the C++ module is in use."""


def make_index(bytes_max: int) -> Index:
    """An empty one that takes at most ``bytes_max`` bytes."""
    return native.PrefixIndex(bytes_max) if NATIVE else index_twin.PrefixIndex(bytes_max)


def name_blocks(tokens: Buffer, block_tokens: int, root: int = 0) -> memoryview:
    """The names (u64) of the full blocks of ``tokens`` (u32): each the XXH3-64 of its tokens, seeded with
    the name before, the first with ``root``, which stands for the model, an adapter, a salt. They are not
    the hashes by which a node names blocks (``kvcache.block.chain``): those are keyed, these are fast.
    RAISES BadInput."""
    if NATIVE:
        return native.name_blocks(tokens, block_tokens, root)
    return index_twin.name_blocks(tokens, block_tokens, root)
