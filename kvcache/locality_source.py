"""One source of the locality index: which of its batches count, and whether its word is current.

    unknown ──snapshot, whole──► synced ──batch in order──► synced
                                   │ a batch lost, the stream broken, late
                                   ▼
                                 suspect: serves what it last knew ──the batches behind it, in order──► synced
                                   │ digest differs
                                   ▼
                                 drifted: serves what it last knew, takes nothing but a snapshot
    any ──batch of a higher incarnation, or silent for three beats──► unknown: what was there is forgotten

``cursor`` is where the source's stream is to be taken up again; it stays while what is held is what the
source held then. A snapshot is loaded into shadow holders beside what is there, and replaces it once it is
whole and has the digest that was told. Only when there is no room for both, what was there goes first.

Invariants: ``seq`` grows within an incarnation, but by a snapshot after a drift; who is synced is known, has
everything up to the highest seq that was ever told of, and has the last digest that came with a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from kvcache.locality_view import Content, View
from kvcache.wire import EventBatch
from kvcache.wire_events import BEAT_NS as BEAT_NS

LATE_NS = BEAT_NS * 3 // 2
"""So long after its last word a source is suspect: a beat was missed."""
DROPPED_NS = BEAT_NS * 3
"""So long after its last word what it told is forgotten."""


class Applied(Enum):
    """What became of a batch. After any of ``LOST`` the follower leaves the stream, and asks anew from
    ``LocalityIndex.cursor``, or for a snapshot where that is None."""

    TAKEN = "taken"
    STALE = "stale"  # Of an older incarnation, or told before: ignored.
    GAP = "gap"  # Batches before it were lost: ignored.
    RESTARTED = "restarted"  # The source started anew: all it had is forgotten.
    DRIFT = "drift"  # The source holds something else than the index.


LOST = frozenset({Applied.GAP, Applied.RESTARTED, Applied.DRIFT})


@dataclass(frozen=True, slots=True)
class AsOf:
    """How far a source's batches were applied, and the last time at which that was all it had told.

    ``known`` is false until it has told everything once: then "nothing" is not an answer."""

    source: str
    incarnation: int
    seq: int
    heard_ns: int
    synced: bool
    known: bool
    partial: bool


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a source said it is (``EventBatch.load``), and when it was told."""

    values: Mapping[str, float]
    told_ns: int


@dataclass(slots=True)
class _Loading:
    """A snapshot on its way: ``left`` batches of it are still to come."""

    seq: int
    left: int
    view: View


class Source:
    """One owner; ``as_of``, ``synced``, ``load`` and ``view.holders`` may be read by anybody."""

    def __init__(self, name: str, number: int, incarnation: int, content: Content) -> None:
        self.name = name
        self.number = number
        self.view = View(content, number)
        self.load: Load | None = None
        self._content = content
        self._stamp = (incarnation, 0, 0)  # Incarnation, seq and when heard of: one object, so never torn.
        self._ahead = 0  # The highest seq that was told of.
        self._alive_ns = 0
        self._known = self._drifted = self._broken = self._late = self._partial = False
        self._told: Mapping[str, bytes] = {}
        self._loading: _Loading | None = None
        self._left: tuple[int, int] | None = None  # Seq, and pages still to come, of one that was given up.

    @property
    def incarnation(self) -> int:
        return self._stamp[0]

    @property
    def seq(self) -> int:
        return self._stamp[1]

    @property
    def synced(self) -> bool:
        return self._in_order and not self._late and self.seq >= self._ahead

    @property
    def _in_order(self) -> bool:
        return self._known and not self._drifted and not self._broken

    @property
    def is_partial(self) -> bool:
        """It may hold more than is known here."""
        return self._partial or self.view.partial

    def cursor(self) -> tuple[int, int] | None:
        """The incarnation and the batch behind which the stream is to be taken up; None: from a snapshot."""
        return self._stamp[:2] if self._known and not self._drifted else None

    def as_of(self) -> AsOf:
        incarnation, seq, heard_ns = self._stamp
        return AsOf(self.name, incarnation, seq, heard_ns, self.synced, self._known, self.is_partial)

    # --- what it tells --------------------------------------------------------------------------

    def take(self, batch: EventBatch, now_ns: int) -> Applied:
        """REQUIRES: it makes sense, and is of this source."""
        if batch.incarnation < self.incarnation:
            return Applied.STALE
        self._alive_ns, self._late = max(self._alive_ns, now_ns), False
        restarted = batch.incarnation > self.incarnation
        if restarted:
            self._restart(batch.incarnation)
        if batch.load and batch.seq >= self.seq:
            self.load = Load(MappingProxyType(batch.load), now_ns)
        if batch.snapshot:
            return self._load(batch, now_ns)
        if restarted:
            self._ahead = batch.seq
            return Applied.RESTARTED
        return self._advance(batch, now_ns)

    def suspect(self) -> None:
        """Its stream broke."""
        self._broken = True
        self._leave_loading()

    def heard(self, now_ns: int) -> None:
        """It lives, and what it told up to then was applied."""
        self._alive_ns, self._late = max(self._alive_ns, now_ns), False
        self._hear(now_ns)

    def tick(self, now_ns: int, may_drop: bool) -> bool:
        """Returns whether what it told was forgotten for its silence just now."""
        silent_ns = now_ns - self._alive_ns
        self._late = silent_ns > LATE_NS
        if silent_ns <= DROPPED_NS or not may_drop or not (self._known or self._loading):
            return False
        self._forget_content()
        return True

    def close(self) -> None:
        """It is gone for good."""
        self._forget_content()

    def views(self) -> list[View]:
        """What it holds, and what is being loaded."""
        return [self.view] if self._loading is None else [self.view, self._loading.view]

    def check(self) -> None:
        """Assert every invariant."""
        for view in self.views():
            view.check()
        if self.synced and not self.view.partial and self._told:
            assert self.view.agrees(self._told)
        assert self._known or not self.view.holders, "who is unknown answers nothing"

    # --- batches --------------------------------------------------------------------------------

    def _advance(self, batch: EventBatch, now_ns: int) -> Applied:
        incarnation, seq, heard_ns = self._stamp
        told_seq = batch.seq
        if told_seq > self._ahead:
            self._ahead = told_seq
        if not self._known or self._drifted:
            return Applied.GAP
        if told_seq < seq or (told_seq == seq and not batch.beat):
            return Applied.STALE
        if told_seq != seq + (not batch.beat):
            return Applied.GAP
        if not batch.beat:
            self.view.take(batch.events)
        self._broken = False
        self._partial = self._partial or batch.partial
        self._stamp = (incarnation, told_seq, heard_ns)
        self._told = batch.digests
        self._drifted = not self._agrees(self.view, batch)
        if self._drifted:
            return Applied.DRIFT
        self._hear(now_ns)
        return Applied.TAKEN

    def _agrees(self, view: View, batch: EventBatch) -> bool:
        return not batch.digests or view.partial or view.agrees(batch.digests)

    def _hear(self, now_ns: int) -> None:
        if self.synced:
            incarnation, seq, heard_ns = self._stamp
            self._stamp = (incarnation, seq, max(heard_ns, now_ns))

    def _restart(self, incarnation: int) -> None:
        self._forget_content()
        self._stamp = (incarnation, 0, self._stamp[2])
        self._ahead = 0
        self._left = None
        self.load = None

    def _forget_content(self) -> None:
        self._leave_loading()
        self._known = self._drifted = self._broken = self._partial = False
        self._told = {}
        self.view.close()

    # --- snapshots ------------------------------------------------------------------------------

    def _load(self, batch: EventBatch, now_ns: int) -> Applied:
        loading = self._loading
        if self._is_old(batch):
            if loading is not None and loading.seq == batch.seq:
                self._leave_loading()
            return Applied.STALE
        self._ahead = max(self._ahead, batch.seq)
        if loading is None:
            left, self._left = self._left, None
            if left is not None and batch.seq == left[0] and batch.left < left[1]:
                return Applied.GAP  # The rest of one whose beginning was given up.
            view = View(self._content, self.number, is_shadow=True)
            loading = self._loading = _Loading(batch.seq, batch.left + 1, view)
        if (loading.seq, loading.left) == (batch.seq, batch.left):
            return Applied.STALE
        if (loading.seq, loading.left) != (batch.seq, batch.left + 1):
            self.suspect()
            return Applied.GAP
        loading.left = batch.left
        loading.view.take(batch.events, self._make_room)
        if batch.left:
            self._broken = True  # What is there gets older until this is whole.
            return Applied.TAKEN
        if not self._agrees(loading.view, batch):
            self.suspect()
            return Applied.DRIFT
        self._take_over(loading, batch, now_ns)
        return Applied.TAKEN

    def _is_old(self, batch: EventBatch) -> bool:
        """What is there is as good, or better."""
        if not self._known or self._drifted:
            return False
        return batch.seq < self.seq or (batch.seq == self.seq and self.synced and not self.view.partial)

    def _make_room(self) -> bool:
        """No room for both: better nothing for a moment than a part for long."""
        if not self.view.holders:
            return False
        self._known = False
        self.view.close()
        return True

    def _take_over(self, loading: _Loading, batch: EventBatch, now_ns: int) -> None:
        loading.view.serve_over(self.view)
        self.view, self._loading = loading.view, None
        self._known, self._drifted, self._broken = True, False, False
        self._partial = batch.partial
        self._told = batch.digests
        self._stamp = (batch.incarnation, batch.seq, self._stamp[2])
        self._hear(now_ns)

    def _leave_loading(self) -> None:
        if self._loading is not None:
            self._left = self._loading.seq, self._loading.left
            self._loading.view.close()
            self._loading = None
