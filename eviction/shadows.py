"""Miniature caches beside a store: what other policies and sizes would have found of the same requests.

    look-up, save ──► the blocks that are in the sample ──► every cache ──► misses, by the minute
                       (a share of all, by name alone)                         │
                                     estimates, with their doubt ◄─────────────┘

Estimates are made of misses: those of the sample, blown up, over all that was asked. What very many share is
never missed, so it makes no difference whether the sample has it (SHARDS-adj: Waldspurger, Park, Garthwaite
and Ahmad, FAST 15). How large a share the sample is, is seen by what the store itself misses: all of that is
known, and what of it is in the sample (a ratio estimate). Where the cache that stands for the store itself is
among them, what it is wrong by is taken off all others (a control variate). The doubt is twice the standard
error over ``GROUPS`` parts of the sample, drawn by name too.

``LATELY`` slots of ``SLOT_NS`` are kept, and the oldest forgotten: estimates are of the last hour. After a
start they count from when the store's own stand-in has let something go, or the store has not either.

Bounds: ``CACHES_MAX`` caches; together they hold at most ``BLOCKS_MAX`` blocks, 1 KB each, and what their
policies remember of others. What would be more makes the sample smaller (``thin``), and all begins anew.

The sum: a look-up without a sampled block costs nothing here; one with some costs each cache 5 to 25 us.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S
from kvcache.errors import BadInput
from kvcache.eviction.choice import Choice
from kvcache.eviction.shadow import ShadowCache
from kvcache.guard import said
from kvcache.patience import Patience
from kvcache.policy import RequestContext

CACHES_MAX = 16
BLOCKS_MAX = 1 << 16
SLOT_NS = 300 * NS_PER_S
LATELY = 12
GROUPS = 8
BLOCKS_ENOUGH = 500
SAMPLE_MIN = 0.0002
_GROUP_BYTE = 8  # Of a name: the sample is drawn by those after it.


@dataclass(frozen=True, slots=True)
class Cell:
    """One cache: this policy at this size, as a share of the store's."""

    choice: Choice
    size: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """``hit_ratio`` of the tokens asked for, give or take ``doubt``; ``gain`` is how much more that is than
    what the store's own stand-in found, give or take ``gain_doubt``. ``sampled_ratio`` is ``hit_ratio``
    before the stand-in's error is taken off."""

    cell: Cell
    hit_ratio: float
    sampled_ratio: float
    doubt: float
    gain: float
    gain_doubt: float
    blocks: int
    is_full: bool
    fault: str


@dataclass(slots=True)
class _Slot:
    """What happened in a while. Misses are of tokens, by cell and group."""

    began_ns: int
    asked: int = 0
    found: int = 0  # by the store itself
    sampled_blocks: int = 0
    sampled_missed: int = 0  # by the store itself, of what is in the sample
    misses: dict[int, list[int]] = field(default_factory=dict)


class Shadows:
    """One owner. ``sample`` is the share of the blocks that is told here. RAISES BadInput for too many
    caches, or a policy that cannot start."""

    def __init__(
        self,
        cells: Sequence[Cell],
        capacity_bytes: int,
        sample: float,
        *,
        declines: bool = True,
        patience: Patience | None = None,
    ) -> None:
        """``declines``: as of ``Choice.make``."""
        if len(cells) > CACHES_MAX:
            why = f"{CACHES_MAX} are the most"
            raise BadInput("bad_config", f"{len(cells)} shadow caches", why, "name fewer policies or sizes")
        self.cells = tuple(cells)
        self.sample = sample
        self._capacity_bytes = capacity_bytes
        self._declines = declines
        self._patience = patience
        self._slots: deque[_Slot] = deque(maxlen=LATELY)
        self._begin()

    def _begin(self) -> None:
        self._caches = [self._cache(cell) for cell in self.cells]
        self._slots.clear()
        self._counts = False

    def _cache(self, cell: Cell) -> ShadowCache:
        capacity_bytes = max(1, round(self._capacity_bytes * cell.size * self.sample))
        try:
            return ShadowCache(cell.choice.make(declines=self._declines), capacity_bytes, self._patience)
        except Exception as error:  # Others' code.
            what = f"a shadow of {cell.choice.said} cannot start"
            raise BadInput("bad_config", what, said(error)[:200], "leave this policy out") from error

    @property
    def block_count(self) -> int:
        return sum(map(len, self._caches))

    @property
    def is_counting(self) -> bool:
        return self._counts

    def thin(self) -> bool:
        """Sample half as much, and begin anew. False: less would say nothing."""
        if self.sample / 2 < SAMPLE_MIN:
            return False
        self.sample /= 2
        self._begin()
        return True

    # --- what happens -----------------------------------------------------------------------------

    def tick(self, now_ns: int, own: int | None, is_store_full: bool) -> None:
        """Time has passed. ``own``: the cell that stands for the store, if there is one."""
        if not self._counts:
            self._counts = own is None or self._caches[own].is_full or not is_store_full
        if not self._slots or now_ns - self._slots[-1].began_ns >= SLOT_NS:
            self._slots.append(_Slot(now_ns))

    def counted(self, asked_tokens: int, found_tokens: int) -> None:
        """A look-up, sampled or not: this much was asked of the store, and found there."""
        if self._counts and self._slots:
            self._slots[-1].asked += asked_tokens
            self._slots[-1].found += found_tokens

    def asked(
        self,
        context: RequestContext,
        before: StorageKey | None,
        path: Sequence[StorageKey],
        held: int,
        block_bytes: int,
        block_tokens: int,
    ) -> None:
        """A look-up of which these blocks are in the sample, ``before`` being the last of those before them
        that is. The store holds the leading ``held``: a cache that lacks them would be given them now."""
        slot = self._slots[-1] if self._counts and self._slots else None
        if slot is not None:
            slot.sampled_blocks += len(path)
            slot.sampled_missed += (len(path) - held) * block_tokens
        for at, cache in enumerate(self._caches):
            found = cache.asked(context, path)
            if found < held:
                cache.stored(context, path[found - 1] if found else before, path[found:held], block_bytes)
            if slot is not None and found < len(path):
                misses = slot.misses.get(at)
                if misses is None:
                    misses = slot.misses[at] = [0] * GROUPS
                for key in path[found:]:
                    misses[key[_GROUP_BYTE] % GROUPS] += block_tokens

    def stored(
        self,
        context: RequestContext,
        before: StorageKey | None,
        path: Sequence[StorageKey],
        block_bytes: int,
    ) -> None:
        """These are offered to the store, which lacks some of them."""
        for cache in self._caches:
            cache.stored(context, before, path, block_bytes)

    # --- what it says -----------------------------------------------------------------------------

    @property
    def found_ratio(self) -> float:
        """What the store itself found lately."""
        asked = sum(slot.asked for slot in self._slots)
        return sum(slot.found for slot in self._slots) / asked if asked else 0.0

    @property
    def asked_tokens(self) -> int:
        return sum(slot.asked for slot in self._slots)

    def seconds(self, now_ns: int) -> float:
        """How long "lately" is."""
        return (now_ns - self._slots[0].began_ns) / NS_PER_S if self._slots else 0.0

    def index_of(self, choice: Choice, size: float = 1.0) -> int | None:
        """The cell that stands for a store under this policy."""
        for at, cell in enumerate(self.cells):
            if cell.choice.said == choice.said and cell.size == size:
                return at
        return None

    def estimates(self, own: int | None) -> list[Estimate]:
        """Of every cell; none before anything was asked. ``own``: the one that stands for the store, if what
        the store found is what its own memory has."""
        asked = self.asked_tokens
        if not asked:
            return []
        misses = self._misses()
        blocks = sum(slot.sampled_blocks for slot in self._slots)
        scale = GROUPS / (self._share() * asked)  # From a group's misses to a ratio of all.
        error = 0.0
        if own is not None:
            error = self.found_ratio - _clipped(1 - sum(misses[own]) * scale / GROUPS)
        found: list[Estimate] = []
        for at, cell in enumerate(self.cells):
            sampled = _clipped(1 - sum(misses[at]) * scale / GROUPS)
            less = misses[own] if own is not None else [0] * GROUPS
            gains = [(of_own - mine) * scale for of_own, mine in zip(less, misses[at], strict=True)]
            found.append(
                Estimate(
                    cell=cell,
                    hit_ratio=_clipped(sampled + error),
                    sampled_ratio=sampled,
                    doubt=_doubt([each * scale for each in misses[at]] if own is None else gains),
                    gain=sum(gains) / GROUPS if own is not None else 0.0,
                    gain_doubt=_doubt(gains) if own is not None else 1.0,
                    blocks=blocks,
                    is_full=self._caches[at].is_full,
                    fault=self._caches[at].fault,
                )
            )
        return found

    def _share(self) -> float:
        """Which share of the blocks the sample really is."""
        missed = sum(slot.asked - slot.found for slot in self._slots)
        sampled = sum(slot.sampled_missed for slot in self._slots)
        if sum(slot.sampled_blocks for slot in self._slots) < BLOCKS_ENOUGH or not missed:
            return self.sample
        return min(max(sampled / missed, self.sample / 2), self.sample * 2)

    def _misses(self) -> Mapping[int, list[int]]:
        total = {at: [0] * GROUPS for at in range(len(self.cells))}
        for slot in self._slots:
            for at, misses in slot.misses.items():
                total[at] = [one + more for one, more in zip(total[at], misses, strict=True)]
        return total

    def check(self) -> None:
        for cache in self._caches:
            cache.check()


def _clipped(ratio: float) -> float:
    return min(max(ratio, 0.0), 1.0)


def _doubt(values: Sequence[float]) -> float:
    """Twice the standard error of their mean."""
    return 2 * stdev(values) / math.sqrt(len(values))
