"""``kvcache/_native/index`` in Python: the fallback where nothing was compiled, and the oracle for what was.

The same structure (index_runs.h draws it) with lists, a dict and interned frozensets; every call holds
one lock. ``bytes`` is reckoned from what each thing takes in CPython, not measured. A block stored costs
0.4 us and 250 bytes, a match some microseconds and one more for each holder set on its way.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Literal

from kvcache.errors import BadInput
from kvcache.index_twin_runs import FREE, TIER_COUNT, Runs
from kvcache.sums_chain import chain_sums

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvcache.index import Match

ALL_TIERS = (1 << TIER_COUNT) - 1
ROWS_MAX = 1 << 20

_ROW_MASK = (1 << 32) - 1
_FORMATS: dict[int, Literal["H", "I", "Q"]] = {2: "H", 4: "I", 8: "Q"}


class Answers:
    """What ``match`` returns."""

    def __init__(self, answers: Sequence[tuple[int, ...]], ends: Sequence[int] = ()) -> None:
        self.table = memoryview(array("I", [value for answer in answers for value in answer])).toreadonly()
        self.ends = memoryview(array("I", ends)).toreadonly()

    def __len__(self) -> int:
        return len(self.table) // (3 + TIER_COUNT)

    @property
    def workers(self) -> memoryview:
        return self._column(0)

    @property
    def dp_ranks(self) -> memoryview:
        return self._column(1)

    @property
    def blocks(self) -> memoryview:
        return self._column(2)

    def tier(self, tier: int) -> memoryview:
        _check_tier(tier)
        return self._column(3 + tier)

    def as_dict(self) -> dict[tuple[int, int], int]:
        names = zip(self.workers, self.dp_ranks, strict=True)
        return dict(zip(names, self.blocks, strict=True))

    def _column(self, number: int) -> memoryview:
        return self.table[number :: 3 + TIER_COUNT]


class PrefixIndex:
    """As ``kvcache.index.Index`` says."""

    def __init__(self, bytes_max: int) -> None:
        self._lock = threading.Lock()
        self._runs = Runs(bytes_max)

    @property
    def bytes(self) -> int:
        with self._lock:
            return self._runs.bytes

    @property
    def bytes_max(self) -> int:
        return self._runs.bytes_max

    def open(self, worker: int, dp_rank: int = 0) -> int:
        with self._lock:
            row = self._opened(worker, dp_rank)
            self._runs.serve(row)
            return self._handle(row)

    def open_shadow(self, worker: int, dp_rank: int = 0) -> int:
        with self._lock:
            return self._handle(self._opened(worker, dp_rank))

    def serve(self, holder: int) -> None:
        with self._lock:
            self._runs.serve(self._row_of(holder))

    def close(self, holder: int) -> None:
        with self._lock:
            self._runs.retire(self._row_of(holder))

    def store(self, holder: int, tier: int, hashes: Buffer, parent: int | None = None) -> int:
        blocks = items(hashes, 8).tolist()
        with self._lock:
            return self._runs.store(self._holder_of(holder, tier), blocks, parent, linked=True)

    def store_loose(self, holder: int, tier: int, hashes: Buffer) -> int:
        blocks = items(hashes, 8).tolist()
        with self._lock:
            return self._runs.store(self._holder_of(holder, tier), blocks, None, linked=False)

    def store_runs(self, holder: int, tier: int, hashes: Buffer, lengths: Buffer) -> int:
        blocks, ends = items(hashes, 8).tolist(), list(accumulate(items(lengths, 2)))
        if (ends[-1] if ends else 0) != len(blocks):
            raise _refusal("bad_prefix", "the runs are not as long as the blocks")
        for start, end in pairwise((0, *ends, len(blocks))):
            with self._lock:
                row = self._holder_of(holder, tier)
                refused = self._runs.store(row, blocks[start:end], None, linked=True)
            if refused:
                return len(blocks) - end + refused
        return 0

    def remove(self, holder: int, tier: int, hashes: Buffer) -> int:
        blocks = items(hashes, 8).tolist()
        with self._lock:
            return self._runs.remove(self._holder_of(holder, tier), blocks)

    def clear(self, holder: int, tier: int) -> None:
        with self._lock:
            self._runs.clear(self._holder_of(holder, tier))

    def match(
        self,
        hashes: Buffer,
        tiers: int = ALL_TIERS,
        candidates: Buffer | None = None,
        limit: int | None = None,
    ) -> Match:
        query, chosen = items(hashes, 8), _chosen(candidates)
        with self._lock:
            found = self._runs.walk(query, tiers, chosen)
        return Answers(_best(found, limit))

    def match_tokens(
        self,
        tokens: Buffer,
        block_tokens: int,
        root: int = 0,
        tiers: int = ALL_TIERS,
        candidates: Buffer | None = None,
        limit: int | None = None,
    ) -> Match:
        return self.match(name_blocks(tokens, block_tokens, root), tiers, candidates, limit)

    def match_many(
        self,
        hashes: Buffer,
        ends: Buffer,
        tiers: int = ALL_TIERS,
        candidates: Buffer | None = None,
        limit: int | None = None,
    ) -> Match:
        queries, limits, chosen = items(hashes, 8), items(ends, 8), _chosen(candidates)
        for number, (last, end) in enumerate(pairwise((0, *limits))):
            if not last <= end <= len(queries):
                raise _refusal("bad_prefix", f"end {number} of a query is before the last, or too far")
        answers: list[tuple[int, ...]] = []
        ended = []
        for last, end in pairwise((0, *limits)):
            with self._lock:
                found = self._runs.walk(queries[last:end], tiers, chosen)
            answers += _best(found, limit)
            ended.append(len(answers))
        return Answers(answers, ended)

    def digest(self, holder: int, tier: int) -> tuple[int, int, int]:
        with self._lock:
            number = self._holder_of(holder, tier)
            return self._runs.rows[number // TIER_COUNT].digests[tier]

    def held(self, holder: int, tier: int) -> memoryview:
        with self._lock:
            return memoryview(array("Q", self._runs.held(self._holder_of(holder, tier)))).toreadonly()

    def runs(self, holder: int, tier: int) -> tuple[memoryview, memoryview]:
        with self._lock:
            runs = self._runs.pieces(self._holder_of(holder, tier))
        hashes = array("Q", chain.from_iterable(runs))
        return memoryview(hashes).toreadonly(), memoryview(array("H", map(len, runs))).toreadonly()

    def stats(self) -> dict[str, int]:
        with self._lock:
            return self._runs.stats()

    def check(self) -> None:
        with self._lock:
            self._runs.check()

    def _opened(self, worker: int, rank: int) -> int:
        if len(self._runs.rows) == ROWS_MAX and not self._runs.free_rows:
            raise _refusal("too_large", "more rows than an index can have")
        return self._runs.open(worker, rank)

    def _handle(self, row: int) -> int:
        return self._runs.rows[row].generation << 32 | row

    def _row_of(self, holder: int) -> int:
        number, generation = holder & _ROW_MASK, holder >> 32
        if number < len(self._runs.rows):
            row = self._runs.rows[number]
            if row.state != FREE and row.generation == generation:
                return number
        raise _refusal("bad_holder", f"holder {holder} is not open")

    def _holder_of(self, holder: int, tier: int) -> int:
        _check_tier(tier)
        return self._row_of(holder) * TIER_COUNT + tier


def name_blocks(tokens: Buffer, block_tokens: int, root: int = 0) -> memoryview:
    """As ``kvcache.index.name_blocks``."""
    packed = array("I", items(tokens, 4)).tobytes()
    if block_tokens < 1:
        raise _refusal("bad_prefix", "a block of no tokens")
    return memoryview(array("Q", chain_sums(packed, 4 * block_tokens, root))).toreadonly()


def _chosen(candidates: Buffer | None) -> frozenset[int] | None:
    return None if candidates is None else frozenset(items(candidates, 4))


def _best(found: list[tuple[int, ...]], limit: int | None) -> list[tuple[int, ...]]:
    if limit is None or len(found) <= limit:
        return found
    return sorted(found, key=lambda answer: (-answer[2], answer[0], answer[1]))[:limit]


def items(buffer: Buffer, size: int) -> memoryview:
    """The unsigned integers in a buffer of them, or in bytes. RAISES BadInput, TypeError."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise _refusal("bad_prefix", "the buffer is not contiguous")
    fits = view.format.lstrip("<@=") in ("B", "b", "c") and view.itemsize == 1
    fits = fits or (view.itemsize == size and view.format.lstrip("<@=") in tuple("QqLlIiHh"))
    if not fits or view.nbytes % size:
        raise _refusal("bad_prefix", f"the buffer is not of {8 * size}-bit integers")
    if not view.nbytes:
        return memoryview(array("Q"))
    return view.cast("B").cast(_FORMATS[size])


def _check_tier(tier: int) -> None:
    if not 0 <= tier < TIER_COUNT:
        raise _refusal("bad_holder", f"there is no tier {tier}")


def _refusal(code: str, what: str) -> BadInput:
    return BadInput(
        code,
        what,
        "the index takes u64 buffers, open holders and tiers 0 to 3",
        "nothing was changed; see kvcache.index",
    )
