"""The last batches that a source told, for followers that missed some.

    add ──► [ 41 | 42 | ... | 97 ]      behind(95) ──► 96, 97     behind(12) ──► None: too long ago

Invariants (``check``): the numbers have no hole, so the first tells all others; ``bytes`` is of what is kept
and at most ``bytes_max``, but that the newest batch is always kept.

The sum: a batch of one event of 64 blocks is 0.8 KB, so 16 MiB are the last 20,000; adding one is 1 us.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from kvcache.wire import HEADER, EventBatch, decode_reply, frame, packed

RING_BYTES_MAX = 16 << 20
RING_BATCHES_MAX = 65_536

_BATCH_BYTES = 64  # What keeping one takes beside its own bytes.


class Told:
    """A batch, or itself packed; the other is made when it is asked for. To be shared by all followers."""

    __slots__ = ("_batch", "_packed")

    def __init__(self, batch: EventBatch | None = None, packed: bytes | None = None) -> None:
        """REQUIRES: one of them, or both."""
        self._batch = batch
        self._packed = packed

    @property
    def batch(self) -> EventBatch:
        if self._batch is None:
            assert self._packed is not None
            batch = decode_reply(frame(0, self._packed)[HEADER.size :])[1]
            assert isinstance(batch, EventBatch)
            self._batch = batch
        return self._batch

    @property
    def packed(self) -> bytes:
        """As ``wire.frame`` takes it."""
        if self._packed is None:
            assert self._batch is not None
            self._packed = packed(self._batch)
        return self._packed


class Ring:
    """One owner; every call returns at once."""

    def __init__(self, bytes_max: int = RING_BYTES_MAX, batches_max: int = RING_BATCHES_MAX) -> None:
        self.bytes = 0
        self.bytes_max = bytes_max
        self._batches_max = batches_max
        self._newest = 0
        self._batches: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, seq: int, batch: bytes) -> None:
        """``batch`` is packed. REQUIRES: ``seq`` is one more than that of the batch before."""
        assert seq == self._newest + 1, "a batch was not kept"
        self._newest = seq
        self._batches.append(batch)
        self.bytes += len(batch) + _BATCH_BYTES
        while len(self._batches) > 1 and (self.bytes > self.bytes_max or len(self) > self._batches_max):
            self.bytes -= len(self._batches.popleft()) + _BATCH_BYTES

    def behind(self, seq: int) -> list[bytes] | None:
        """Packed, what was told after ``seq``; None when not all of that is kept, or no ``seq`` was told."""
        first = self._newest - len(self) + 1
        if not first - 1 <= seq <= self._newest:
            return None
        return list(islice(self._batches, seq + 1 - first, None))

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is kept."""
        assert self.bytes == sum(len(batch) + _BATCH_BYTES for batch in self._batches)
        assert self.bytes <= self.bytes_max or len(self) == 1
        assert len(self) <= min(self._newest, self._batches_max)
