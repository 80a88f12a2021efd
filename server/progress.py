"""How far the blocks have come that are being written layer by layer, and who waits to hear of it.

    open reservation ── advance ──► its leading planes and their sums are known ── advance ...
                                       └── committed, aborted, writer gone ──► forgotten

Blocks are found by key, waiters too: a key may be waited for before anybody writes it. What is told here
was promised to peers, so a commit must say the same sums (``check_promised``).

Invariants: a block is in at most one reservation here; each has all sums of its leading planes, no more.

The sum: an advance of 64 blocks of 2 MiB and 32 planes takes 10 us; 8 bytes are kept for 64 KiB.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.block import BlockSpec, StorageKey
from kvcache.errors import BadInput
from kvcache.leases import Owner
from kvcache.ledger import Reservation
from kvcache.server.bell import Bell
from kvcache.sums import SUM_BYTES


class Advanced:
    """One reservation, of which the leading ``planes`` planes of each block are written."""

    def __init__(
        self, reservation: Reservation, owner: Owner, spec: BlockSpec, parent: StorageKey | None
    ) -> None:
        self.reservation = reservation
        self.owner = owner
        self.spec = spec
        self.parent = parent
        """The block before the first, if there was one when it began to advance."""
        self.planes = 0
        self.sums: list[bytes] = [b""] * len(reservation.keys)

    def check_promised(self, sums: Sequence[bytes]) -> None:
        """RAISES BadInput (bad_block) unless these sums of whole blocks begin with what was promised."""
        if not all(whole.startswith(told) for whole, told in zip(sums, self.sums, strict=True)):
            raise BadInput(
                "bad_block",
                "the sums differ from those that were told while the blocks were written",
                "peers may have read them by those",
                "commit what was advanced, or abort; the reservation is still open",
            )


class Progress:
    """All of one node. One owner, the event loop's thread."""

    def __init__(self) -> None:
        self._open: dict[int, Advanced] = {}
        self._at: dict[StorageKey, tuple[Advanced, int]] = {}
        self.bell = Bell()
        """Rung for a block when something happens to it."""

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self, reservation: Reservation, owner: Owner, spec: BlockSpec, parent: StorageKey | None
    ) -> Advanced:
        """What is known of an open reservation: nothing yet, at the first time."""
        known = self._open.get(reservation.reservation_id)
        return known or Advanced(reservation, owner, spec, parent)

    def advance(self, advanced: Advanced, planes: int, sums: bytes) -> None:
        """``sums`` are those of the new planes, block after block. RAISES BadInput (bad_block)."""
        fresh = planes - advanced.planes
        if not 0 < fresh <= advanced.spec.plane_count - advanced.planes:
            raise BadInput(
                "bad_block",
                f"{planes} planes after {advanced.planes}, of {advanced.spec.plane_count}",
                "each time there are more, up to all of them",
                "say how many leading planes of every reserved block are written now",
            )
        step = fresh * advanced.spec.plane_bytes // advanced.spec.chunk_bytes * SUM_BYTES
        if len(sums) != step * len(advanced.sums):
            raise BadInput(
                "bad_block",
                f"{len(sums)} bytes of sums for {fresh} planes of {len(advanced.sums)} blocks",
                f"they have {step} bytes of sums a block",
                "send the sum of every chunk of the new planes, block after block",
            )
        for at, told in enumerate(advanced.sums):
            advanced.sums[at] = told + sums[at * step : (at + 1) * step]
        advanced.planes = planes
        if advanced.reservation.reservation_id not in self._open:
            self._open[advanced.reservation.reservation_id] = advanced
            for at, key in enumerate(advanced.reservation.keys):
                self._at[key] = advanced, at
        self.bell.ring(advanced.reservation.keys)

    def of(self, reservation_id: int) -> Advanced | None:
        return self._open.get(reservation_id)

    def find(self, key: StorageKey) -> tuple[Advanced | None, int]:
        """Where a block is being written that has advanced, and which of its reservation's it is."""
        return self._at.get(key, (None, 0))

    def forget(self, reservation_id: int) -> None:
        """It ends, if it ever advanced: nothing more is told of it. Who waits for its blocks looks again."""
        advanced = self._open.pop(reservation_id, None)
        if advanced is not None:
            for key in advanced.reservation.keys:
                del self._at[key]
            self.bell.ring(advanced.reservation.keys)

    def leave(self, owner: Owner) -> None:
        """The owner is gone, and what it had open."""
        for advanced in [each for each in self._open.values() if each.owner == owner]:
            self.forget(advanced.reservation.reservation_id)

    def check(self) -> None:
        """Assert every invariant."""
        assert len(self._at) == sum(len(each.reservation.keys) for each in self._open.values())
        for advanced in self._open.values():
            step = advanced.planes * advanced.spec.plane_bytes // advanced.spec.chunk_bytes * SUM_BYTES
            assert all(len(told) == step for told in advanced.sums)
            for at, key in enumerate(advanced.reservation.keys):
                assert self._at[key] == (advanced, at)
