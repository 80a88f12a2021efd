"""Which planes of which reserved blocks have come over the wire, on one connection.

A commit publishes what was written, and all of it: until every plane of every block has come, it is refused.
Of a reservation that a local engine fills over the map nothing is known here, and it vouches for itself.
"""

from __future__ import annotations

from kvcache.ledger import Reservation


class Written:
    """By reservation, while it is open. A set of planes is the bits of a number."""

    def __init__(self) -> None:
        self._of: dict[int, list[int]] = {}

    def __contains__(self, reservation_id: int) -> bool:
        """Does any of it come over the wire?"""
        return reservation_id in self._of

    def begin(self, reservation: Reservation) -> list[int]:
        """Some of it will come over the wire: then all of it must."""
        return self._of.setdefault(reservation.reservation_id, [0] * len(reservation.keys))

    def mark(self, reservation: Reservation, blocks: range, planes: range) -> None:
        """REQUIRES: ranges within it, in steps of one."""
        bits = ((1 << len(planes)) - 1) << planes.start
        of = self.begin(reservation)
        for at in blocks:
            of[at] |= bits

    def missing(self, reservation: Reservation, plane_count: int) -> int:
        """How many blocks are not written whole."""
        whole = (1 << plane_count) - 1
        return sum(
            bits != whole for bits in self._of.get(reservation.reservation_id, [0] * len(reservation.keys))
        )

    def forget(self, reservation_id: int) -> None:
        """It has ended, or was never known."""
        self._of.pop(reservation_id, None)
