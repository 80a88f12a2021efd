"""The structure itself, in Python: what kvcache/_native/index_runs.h draws, of lists, dicts and frozensets.

Nothing here locks or looks at buffers: kvcache/index_twin.py does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from kvcache.index_twin_chain import Chain, Holders

TIER_COUNT = 4
BLOCK_BYTES = 250
CHAIN_BYTES = 500
SPAN_BYTES = 48
SET_BYTES = 400
HOLDER_BYTES = 80
ROW_BYTES = 1_500
STORE_BYTES_MAX = 2_000  # What one step of ``store`` adds at most, sets of many holders apart.
FREE, SHADOW, SERVING = range(3)

_OFFSET_BITS = 18
_CHAIN_BLOCKS_MAX = (1 << _OFFSET_BITS) - 1
_LOOSE_BLOCKS_MAX = 64
_MASK = (1 << 64) - 1
_EMPTY: Holders = frozenset()


class Row:
    """One generation of a worker's rank. ``chains``: by tier, at least those in which it holds something."""

    def __init__(self) -> None:
        self.worker = self.rank = self.generation = 0
        self.state = FREE
        self.chains: list[set[int]] = [set() for _ in range(TIER_COUNT)]
        self.digests = [(0, 0, 0)] * TIER_COUNT


class Runs:
    """Rows and what they hold. A row is retired before it is freed; a freed one holds nothing."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._places: dict[int, int] = {}  # By hash: the chain's number and the offset in it.
        self._chains: dict[int, Chain] = {}
        self._next_chain = 1
        self._sets: dict[Holders, Holders] = {}
        self._references: dict[Holders, int] = {}
        self._holders = 0  # In all sets.
        self._spans = 0
        self._ghosts = 0
        self.rows: list[Row] = []
        self.free_rows: list[int] = []
        self._answering: dict[tuple[int, int], int] = {}

    def stats(self) -> dict[str, int]:
        return {
            "blocks": len(self._places) - self._ghosts,
            "ghosts": self._ghosts,
            "members": sum(count for row in self.rows for count, _, _ in row.digests),
            "chains": len(self._chains),
            "spans": self._spans,
            "sets": len(self._sets),
            "rows": sum(row.state != FREE for row in self.rows),
        }

    @property
    def bytes(self) -> int:
        per = ((len(self._places), BLOCK_BYTES), (len(self._chains), CHAIN_BYTES), (self._spans, SPAN_BYTES))
        sets = ((len(self._sets), SET_BYTES), (self._holders, HOLDER_BYTES), (len(self.rows), ROW_BYTES))
        return sum(count * each for count, each in (*per, *sets))

    def check(self) -> None:
        references: dict[Holders, int] = {}
        ghosts = blocks = 0
        for number, chain in self._chains.items():
            dead = sum(end - start for start, end, holders in chain.spans() if not holders)
            assert chain.sets[-1], "a chain ends with a block that is held"
            assert chain.ends == sorted(set(chain.ends)) and chain.ends[-1] == len(chain.hashes)
            assert all(one != next_one for one, next_one in pairwise(chain.sets)), "spans are maximal"
            assert dead == chain.ghosts <= len(chain.hashes) // 2, "ghosts are counted, and at most half"
            for offset, block in enumerate(chain.hashes):
                assert self._places[block] == number << _OFFSET_BITS | offset
            for holders in chain.sets:
                references[holders] = references.get(holders, 0) + 1
            ghosts, blocks = ghosts + dead, blocks + len(chain.hashes)
        references.pop(_EMPTY, None)
        assert references == self._references and references.keys() == self._sets.keys()
        assert (ghosts, blocks) == (self._ghosts, len(self._places))
        for number, row in enumerate(self.rows):
            for tier in range(TIER_COUNT):
                held = self.held(number * TIER_COUNT + tier)
                assert row.digests[tier] == _digested((0, 0, 0), held, 1), "a digest is of what is held"

    def open(self, worker: int, rank: int) -> int:
        if not self.free_rows:
            self.free_rows.append(len(self.rows))
            self.rows.append(Row())
        number = self.free_rows.pop()
        row = self.rows[number]
        row.worker, row.rank, row.state = worker, rank, SHADOW
        row.generation += 1
        return number

    def serve(self, number: int) -> None:
        row = self.rows[number]
        former = self._answering.get((row.worker, row.rank), number)
        if former != number:
            self.retire(former)
        self._answering[row.worker, row.rank] = number
        row.state = SERVING

    def retire(self, number: int) -> None:
        row = self.rows[number]
        if row.state == SERVING:
            del self._answering[row.worker, row.rank]
        row.generation += 1
        for tier in range(TIER_COUNT):
            self.clear(number * TIER_COUNT + tier)
        row.state = FREE
        self.free_rows.append(number)

    def clear(self, holder: int) -> None:
        chains = self.rows[holder // TIER_COUNT].chains[holder % TIER_COUNT]
        while chains:
            number = chains.pop()
            if number in self._chains:
                self._change(number, 0, len(self._chains[number].hashes), holder, held=False)
                self._settle(number)

    def held(self, holder: int) -> list[int]:
        return [block for piece in self.pieces(holder) for block in piece]

    def pieces(self, holder: int) -> list[list[int]]:
        """What it holds as runs of blocks that follow one another, as long as can be."""
        pieces: list[list[int]] = []
        for number in sorted(self.rows[holder // TIER_COUNT].chains[holder % TIER_COUNT]):
            chain = self._chains.get(number)
            if chain is not None:
                pieces += chain.pieces(holder)
        return pieces

    def store(self, holder: int, blocks: Sequence[int], parent: int | None, linked: bool) -> int:
        """Returns how many of the last were refused."""
        tail = None if parent is None else self._places.get(parent)
        at = 0
        while at < len(blocks):
            room = (self.bytes_max - self.bytes - STORE_BYTES_MAX) // BLOCK_BYTES
            if room < 1:
                return len(blocks) - at
            place = self._places.get(blocks[at])
            if place is None:
                number, run = self._append(tail, blocks, at, room, holder, linked)
                tail = number << _OFFSET_BITS | len(self._chains[number].hashes) - 1
            else:
                there, offset = place >> _OFFSET_BITS, place & _CHAIN_BLOCKS_MAX
                run = self._chains[there].equal_run(offset, blocks, at, exact=True)
                self._change(there, offset, offset + run, holder, held=True)
                tail = place + run - 1
            at += run
        return 0

    def remove(self, holder: int, blocks: Sequence[int]) -> int:
        removed = at = 0
        while at < len(blocks):
            place = self._places.get(blocks[at])
            if place is None:
                at += 1
                continue
            number, offset = place >> _OFFSET_BITS, place & _CHAIN_BLOCKS_MAX
            run = self._chains[number].equal_run(offset, blocks, at, exact=True)
            removed += self._change(number, offset, offset + run, holder, held=False)
            self._settle(number)
            at += run
        return removed

    def _append(
        self, tail: int | None, blocks: Sequence[int], at: int, room: int, holder: int, linked: bool
    ) -> tuple[int, int]:
        """Puts new blocks behind ``tail`` if a chain ends there and takes more, else into a chain of their
        own. Returns the chain's number and how many: all up to one that is known, or as many as fit."""
        number = tail >> _OFFSET_BITS if tail is not None else 0
        chain = self._chains.get(number)
        longest = _CHAIN_BLOCKS_MAX if linked else _LOOSE_BLOCKS_MAX
        ends = chain is not None and tail is not None and len(chain.hashes) - 1 == tail & _CHAIN_BLOCKS_MAX
        if chain is None or not ends or chain.linked != linked or len(chain.hashes) >= longest:
            number, chain = self._new_chain(linked)
        start = len(chain.hashes)
        for block in blocks[at : at + min(room, longest - start)]:
            if block in self._places:
                break
            self._places[block] = number << _OFFSET_BITS | len(chain.hashes)
            chain.hashes.append(block)
        spans = list(zip(chain.ends, chain.sets, strict=True))
        self._set_spans(chain, [*spans, (len(chain.hashes), frozenset({holder}))])
        self._own(number, holder, chain.hashes[start:], 1)
        return number, len(chain.hashes) - start

    def _new_chain(self, linked: bool) -> tuple[int, Chain]:
        number = self._next_chain
        self._next_chain += 1
        chain = self._chains[number] = Chain(linked)
        return number, chain

    def _own(self, number: int, holder: int, blocks: Sequence[int], sign: int) -> None:
        row, tier = self.rows[holder // TIER_COUNT], holder % TIER_COUNT
        row.digests[tier] = _digested(row.digests[tier], blocks, sign)
        if sign > 0:
            row.chains[tier].add(number)
        if row.digests[tier][0] == 0:
            row.chains[tier].clear()

    def _change(self, number: int, first: int, last: int, holder: int, held: bool) -> int:
        """Puts the holder into the sets of the blocks from ``first`` to ``last``, or takes it out."""
        chain = self._chains[number]
        spans: list[tuple[int, Holders]] = []
        changed: list[int] = []
        for start, end, holders in list(chain.spans()):
            low, high = max(start, first), min(end, last)
            if low >= high or (holder in holders) == held:
                spans.append((end, holders))
                continue
            joined = holders | {holder} if held else holders - {holder}
            ghosts = (high - low) * ((not joined) - (not holders))
            chain.ghosts += ghosts
            self._ghosts += ghosts
            changed += chain.hashes[low:high]
            spans += [(low, holders)] * (low > start) + [(high, joined)] + [(end, holders)] * (high < end)
        if changed:
            self._set_spans(chain, spans)
            self._own(number, holder, changed, 1 if held else -1)
        return len(changed)

    def _set_spans(self, chain: Chain, spans: Sequence[tuple[int, Holders]]) -> None:
        former = chain.sets
        self._spans -= len(former)
        chain.ends, chain.sets = [], []
        for end, holders in spans:
            if chain.sets and chain.sets[-1] == holders:
                chain.ends[-1] = end
            else:
                chain.ends.append(end)
                chain.sets.append(self._kept(holders))
        self._spans += len(chain.sets)
        for holders in former:
            self._release(holders)

    def _kept(self, holders: Holders) -> Holders:
        if not holders:
            return _EMPTY
        if holders not in self._sets:
            self._sets[holders] = holders
            self._references[holders] = 0
            self._holders += len(holders)
        self._references[holders] += 1
        return self._sets[holders]

    def _release(self, holders: Holders) -> None:
        if not holders:
            return
        self._references[holders] -= 1
        if not self._references[holders]:
            del self._references[holders], self._sets[holders]
            self._holders -= len(holders)

    def _settle(self, number: int) -> None:
        """Cuts ghosts off the chain's end, and all of them out where they are too many."""
        chain = self._chains[number]
        if not chain.sets[-1]:
            length = chain.ends[-2] if len(chain.ends) > 1 else 0
            for block in chain.hashes[length:]:
                del self._places[block]
            chain.ghosts -= len(chain.hashes) - length
            self._ghosts -= len(chain.hashes) - length
            del chain.hashes[length:], chain.ends[-1], chain.sets[-1]
            self._spans -= 1
        if not chain.hashes:
            del self._chains[number]
        elif chain.ghosts > len(chain.hashes) // 2:
            self._split(number)

    def _split(self, number: int) -> None:
        whole = self._chains.pop(number)
        piece: Chain | None = None
        at = 0
        for start, end, holders in whole.spans():
            if not holders:
                piece = None
                for block in whole.hashes[start:end]:
                    del self._places[block]
                continue
            if piece is None:
                at, piece = self._new_chain(whole.linked)
            for block in whole.hashes[start:end]:
                self._places[block] = at << _OFFSET_BITS | len(piece.hashes)
                piece.hashes.append(block)
            spans = list(zip(piece.ends, piece.sets, strict=True))
            self._set_spans(piece, [*spans, (len(piece.hashes), holders)])
            for holder in holders:
                self.rows[holder // TIER_COUNT].chains[holder % TIER_COUNT].add(at)
        self._ghosts -= whole.ghosts
        self._set_spans(whole, [])

    def walk(
        self, query: Sequence[int], tiers: int, workers: frozenset[int] | None = None
    ) -> list[tuple[int, ...]]:
        """Chain by chain and span by span, as index_walk.h does."""
        live: dict[int, int] = {}  # By row: the tiers that have the block now.
        counts: dict[int, list[int]] = {}  # By row: blocks in all, and in each tier.
        place, former = 0, _EMPTY
        while place < len(query):
            at = self._places.get(query[place])
            if at is None:
                break
            chain, offset = self._chains[at >> _OFFSET_BITS], at & _CHAIN_BLOCKS_MAX
            last = offset + chain.equal_run(offset, query, place, exact=False)
            for number in range(bisect_right(chain.ends, offset), len(chain.ends)):
                if offset >= last:
                    break
                if not place or chain.sets[number] is not former:
                    former = chain.sets[number]
                    live = self._going_on(former, tiers, live if place else None)
                    if workers is not None and not place:
                        live = {row: mask for row, mask in live.items() if self.rows[row].worker in workers}
                run = min(chain.ends[number], last) - offset
                for row, mask in live.items():
                    of_row = counts.setdefault(row, [0] * (1 + TIER_COUNT))
                    of_row[0] += run
                    for tier in range(TIER_COUNT):
                        of_row[1 + tier] += run * (mask >> tier & 1)
                place, offset = place + run, offset + run
                if not live:
                    break
            if not live:
                break
        return [(self.rows[row].worker, self.rows[row].rank, *counts[row]) for row in sorted(counts)]

    def _going_on(self, holders: Holders, tiers: int, live: dict[int, int] | None) -> dict[int, int]:
        """The rows among ``live`` (None: any that serves) that have a block with these holders."""
        masks: dict[int, int] = {}
        for holder in holders:
            row, tier = divmod(holder, TIER_COUNT)
            known = self.rows[row].state == SERVING if live is None else row in live
            if known and tiers >> tier & 1:
                masks[row] = masks.get(row, 0) | 1 << tier
        return masks


def _digested(digest: tuple[int, int, int], blocks: Sequence[int], sign: int) -> tuple[int, int, int]:
    count, joined_xor, total = digest
    for block in blocks:
        joined_xor ^= block
    return count + sign * len(blocks), joined_xor, (total + sign * sum(blocks)) & _MASK
