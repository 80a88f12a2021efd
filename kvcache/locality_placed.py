"""What was just sent somewhere, and will be stored there soon: placements, a router's own predictions.

Between a choice and the event of what it stored lies the prefill, and whoever asks meanwhile should hear of
it. So a placement predicts the blocks of a prompt, for a while: it is in one of two generations, which begin
in turn every ``PLACE_NS``, each emptied when it begins.

    now in:   even ── PLACE_NS ──► odd ── PLACE_NS ──► even: emptied first
    placed:     │◄── known for PLACE_NS to twice that ──►│

What the source then tells goes before: blocks it holds are not predicted (``kvcache.locality_found``), and
blocks that it removed are no more.

The sum: 1 us a placement and 0.1 us a block; memory is bounded by ``bytes_max``, over which blocks are not
predicted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from kvcache.block import HINT_BYTES
from kvcache.clock import NS_PER_S
from kvcache.index import ALL_TIERS, Index, Match
from kvcache.wire import BlockEvent

if TYPE_CHECKING:
    from typing_extensions import Buffer

PLACE_NS = 5 * NS_PER_S
HOLDERS_MAX = 16_384

Numbers = Mapping[bytes, int]

_TIERS = (0, 1)  # The generations are tiers of the index.


class Placements:
    """Any thread may call."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._turn = 0
        self._holders: dict[tuple[int, int], int] = {}  # By numbers of source and namespace.

    @property
    def bytes(self) -> int:
        return self._index.bytes

    def namespaces(self) -> set[int]:
        """The numbers of those in which something is predicted."""
        with self._lock:
            return {namespace for _, namespace in self._holders}

    def place(self, source: int, namespace: int, hints: Buffer, now_ns: int) -> int:
        """Returns how many blocks are not predicted for want of room."""
        with self._lock:
            self._begin(now_ns // PLACE_NS)
            holder = self._holders.get((source, namespace))
            if holder is None:
                if len(self._holders) == HOLDERS_MAX or self._index.bytes >= self._index.bytes_max:
                    return memoryview(hints).nbytes // HINT_BYTES
                holder = self._holders[source, namespace] = self._index.open(source, namespace)
            return self._index.store(holder, self._turn % 2, hints)

    def tick(self, now_ns: int) -> None:
        """Ends what is over."""
        with self._lock:
            self._begin(now_ns // PLACE_NS)

    def match(self, hints: Buffer, sources: Buffer | None) -> Match | None:
        """What is predicted: by numbers of source and namespace, how many leading blocks. ``sources``:
        only of these numbers. None: nothing is."""
        if not self._holders:
            return None
        found = self._index.match(hints, ALL_TIERS, sources)
        return found if len(found) else None

    @property
    def is_active(self) -> bool:
        """Something may be predicted."""
        return bool(self._holders)

    def told(self, source: int, events: Iterable[BlockEvent], numbers: Numbers) -> None:
        """The source told this of itself; ``numbers`` are those of namespaces."""
        with self._lock:
            for event in events:
                if event.kind == "stored":
                    continue
                holder = self._holders.get((source, numbers.get(event.namespace, -1)))
                if holder is not None:
                    self._end(holder, event)

    def forget(self, source: int) -> None:
        """Nothing is predicted of it any more."""
        with self._lock:
            self._close([key for key in self._holders if key[0] == source])

    def check(self) -> None:
        """Assert every invariant."""
        self._index.check()

    def _begin(self, turn: int) -> None:
        """Turns only go on, whatever the time."""
        if turn <= self._turn:
            return
        ended = _TIERS if turn > self._turn + 1 else (turn % 2,)
        self._turn = turn
        for holder in self._holders.values():
            for tier in ended:
                self._index.clear(holder, tier)
        empty = [key for key, holder in self._holders.items() if not self._count(holder)]
        self._close(empty)

    def _end(self, holder: int, event: BlockEvent) -> None:
        for tier in _TIERS:
            if event.kind == "removed":
                self._index.remove(holder, tier, event.hashes)
            else:
                self._index.clear(holder, tier)

    def _count(self, holder: int) -> int:
        return sum(self._index.digest(holder, tier)[0] for tier in _TIERS)

    def _close(self, keys: Iterable[tuple[int, int]]) -> None:
        for key in keys:
            self._index.close(self._holders.pop(key))
