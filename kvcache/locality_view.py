"""What one source holds, in the native index: a holder a namespace, and the digest of each tier.

    source 3: namespace 0 ── holder (worker 3, rank 0): hbm, host, nvme ─┐
              namespace 5 ── holder (worker 3, rank 5): hbm, host, nvme ─┴─ folded: one digest a tier

A *view* is one generation of that. Another, of shadow holders, is loaded beside it and takes its place.

Invariants (``View.check``): the folded digests are those of the holders, but where a batch touched one since;
``Content.holders`` counts the holders of all views.

The sum: what the native index takes to store or remove (0.1 us a block), and 1 us for each holder and tier
that a batch touches.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from kvcache.block import HINT_BYTES, NamespaceId
from kvcache.index import Index
from kvcache.wire import BlockEvent
from kvcache.wire_events import run_lengths

TIERS = ("hbm", "host", "nvme")
NAMESPACES_MAX = 65_536
HOLDERS_MAX = 1_000_000

_TIER_NUMBERS = {tier: number for number, tier in enumerate(TIERS)}
_DIGEST = struct.Struct("<QQQ")
_MASK = (1 << 64) - 1
_ZERO = (0, 0, 0)
_NEW = -1  # No namespace has this number.
_EMPTY = _DIGEST.pack(*_ZERO)

Digest = tuple[int, int, int]
"""Count, xor and sum, the namespace's salt in it (``kvcache.events.Digest``)."""


class Content:
    """What all views share: the structure, the numbers of namespaces, and what did not fit.

    A number is never given twice, so that a reader who still has an old one names nothing else by it."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.refused_blocks = 0
        self.holders = 0
        self.ids: dict[int, NamespaceId] = {}
        """By number. Only grows; ``sweep`` puts another in its place, as of ``numbers``."""
        self.numbers: dict[bytes, int] = {}
        self._next = 0

    def number(self, namespace: bytes) -> int | None:
        """Its number, a new one if need be; None when there are ``NAMESPACES_MAX`` others."""
        number = self.numbers.get(namespace)
        if number is None and len(self.numbers) < NAMESPACES_MAX:
            number = self.numbers[namespace] = self._next
            self.ids[number] = NamespaceId(namespace)
            self._next += 1
        return number

    def sweep(self, used: Collection[int]) -> None:
        """Forget all other numbers."""
        self.ids = {number: namespace for number, namespace in self.ids.items() if number in used}
        self.numbers = {namespace: number for number, namespace in self.ids.items()}

    def has_room(self) -> bool:
        """For another holder."""
        return self.holders < HOLDERS_MAX and self.index.bytes < self.index.bytes_max


class View:
    """One generation of what a source holds. One owner; ``holders`` may be copied by anybody."""

    def __init__(self, content: Content, source: int, is_shadow: bool = False) -> None:
        self.holders: dict[int, int] = {}
        """By number of the namespace."""
        self.partial = False
        self._content = content
        self._source = source
        self._is_shadow = is_shadow
        self._touched: set[tuple[int, int]] = set()  # By namespace and tier: not folded yet.
        self._parts: dict[tuple[int, int], Digest] = {}  # By the same, salted.
        self._totals: list[Digest] = [_ZERO] * len(TIERS)

    def take(self, events: Iterable[BlockEvent], make_room: Callable[[], bool] | None = None) -> None:
        """REQUIRES: they make sense. ``make_room`` is called when blocks are refused, which are tried again
        if it returns true."""
        index, holders, numbers = self._content.index, self.holders, self._content.numbers
        for event in events:
            tier = _TIER_NUMBERS[event.tier]
            number = numbers.get(event.namespace, _NEW)
            holder = holders.get(number)
            if event.kind == "stored":
                if holder is None:
                    number, holder = self._open(event.namespace)
                refused = self._store(holder, tier, event)
                if refused and make_room is not None and make_room():
                    number, holder = self._open(event.namespace)
                    refused = self._store(holder, tier, event)
                if refused:
                    self.partial = True
                    self._content.refused_blocks += refused
            elif holder is not None and event.kind == "removed":
                index.remove(holder, tier, event.hashes)
            elif holder is not None:
                index.clear(holder, tier)
            if holder is not None:
                self._touched.add((number, tier))

    def serve_over(self, former: View) -> None:
        """From now on this one answers, and the former is gone. REQUIRES: this is a shadow."""
        for holder in self.holders.values():
            self._content.index.serve(holder)
        for number, holder in former.holders.items():
            if number not in self.holders:
                self._content.index.close(holder)
        self._content.holders -= len(former.holders)
        self._is_shadow = False

    def close(self) -> None:
        """It is gone with all it held. It may be used on, from nothing."""
        former, self.holders = self.holders, {}
        for holder in former.values():
            self._content.index.close(holder)
        self._content.holders -= len(former)
        self._touched.clear()
        self._parts.clear()
        self._totals = [_ZERO] * len(TIERS)
        self.partial = False

    def agrees(self, told: Mapping[str, bytes]) -> bool:
        """Whether each tier's digest is what the source told; what it did not tell of is empty."""
        self._fold()
        return all(
            told.get(tier, _EMPTY) == _DIGEST.pack(*self._totals[number]) for number, tier in enumerate(TIERS)
        )

    @property
    def entries(self) -> int:
        """How many blocks it holds, each counted once a namespace and tier. For its owner only."""
        self._fold()
        return sum(count for count, _, _ in self._totals)

    def entries_in(self, namespaces: Collection[int]) -> int:
        """Of these, those in namespaces of these numbers. For its owner only."""
        self._fold()
        return sum(part[0] for (number, _), part in self._parts.items() if number in namespaces)

    def check(self) -> None:
        """Assert every invariant."""
        self._fold()
        totals = [_ZERO] * len(TIERS)
        for number, holder in self.holders.items():
            for tier in range(len(TIERS)):
                part = self._part(number, holder, tier)
                assert part == self._parts.get((number, tier), _ZERO)
                totals[tier] = _joined(totals[tier], part, 1)
        assert totals == self._totals

    def _store(self, holder: int | None, tier: int, event: BlockEvent) -> int:
        """Returns how many blocks were refused."""
        if holder is None:
            return len(event.hashes) // HINT_BYTES
        if event.runs:
            return self._content.index.store_runs(holder, tier, event.hashes, run_lengths(event))
        parent = int.from_bytes(event.parent, "little") if event.parent else None
        return self._content.index.store(holder, tier, event.hashes, parent)

    def _open(self, namespace: bytes) -> tuple[int, int | None]:
        """The number of the namespace and its holder, made if need be; None: there is no room for another."""
        number = self._content.number(namespace)
        if number is None:
            return _NEW, None
        holder = self.holders.get(number)
        if holder is None and self._content.has_room():
            index = self._content.index
            open_one = index.open_shadow if self._is_shadow else index.open
            holder = self.holders[number] = open_one(self._source, number)
            self._content.holders += 1
        return number, holder

    def _fold(self) -> None:
        while self._touched:
            key = self._touched.pop()
            number, tier = key
            part = self._part(number, self.holders[number], tier)
            former = self._parts.get(key, _ZERO)
            self._totals[tier] = _joined(_joined(self._totals[tier], former, -1), part, 1)
            self._parts[key] = part

    def _part(self, number: int, holder: int, tier: int) -> Digest:
        count, joined_xor, total = self._content.index.digest(holder, tier)
        salt = int.from_bytes(self._content.ids[number][:HINT_BYTES], "little")
        return count, joined_xor ^ (salt if count & 1 else 0), (total + count * salt) & _MASK


def _joined(digest: Sequence[int], other: Sequence[int], sign: int) -> Digest:
    total = (digest[2] + sign * other[2]) & _MASK
    return digest[0] + sign * other[0], digest[1] ^ other[1], total
