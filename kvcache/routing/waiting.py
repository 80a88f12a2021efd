"""What waits for its first token, and is told to the index again until it has come.

A placement ends by itself (``kvcache.locality_placed``), sooner than a long queue does. But what waits at a
worker will be cached there, however long that takes; were it forgotten, what continues it would go elsewhere
and be computed again, which makes the queues longer still. With the first token it is told once more, as the
worker's own event is still on its way.

    begin ──► waiting ──every AGAIN_NS: due──► waiting ──first_token, once more──► over
                                             end ──► over

Bounded: ``REQUESTS_MAX`` requests, each for at most ``REQUEST_NS_MAX``.

The sum: 1 us a call, and what telling costs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvcache.clock import NS_PER_S
from kvcache.routing.telemetry import REQUEST_NS_MAX, REQUESTS_MAX

AGAIN_NS = 4 * NS_PER_S
"""Less than ``PLACE_NS``, for which a placement lasts at least."""
DUE_MAX = 64

Placement = TypeVar("Placement")


@dataclass(frozen=True, slots=True)
class _Request(Generic[Placement]):
    placements: Sequence[Placement]
    began_ns: int
    told_ns: int


class Waiting(Generic[Placement]):
    """One owner. Numbers are the caller's; one that is not known is passed over."""

    def __init__(self) -> None:
        self._requests: OrderedDict[int, _Request[Placement]] = OrderedDict()  # By ``told_ns``.

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, number: int, placements: Sequence[Placement], now_ns: int) -> None:
        """Its placements were just told."""
        if placements and len(self._requests) < REQUESTS_MAX:
            self._requests[number] = _Request(placements, now_ns, now_ns)

    def due(self, now_ns: int) -> list[Placement]:
        """What is to be told again, of ``DUE_MAX`` requests at most; it counts as told."""
        told: list[Placement] = []
        for _ in range(min(DUE_MAX, len(self._requests))):
            number, request = next(iter(self._requests.items()))
            if now_ns - request.told_ns < AGAIN_NS:
                break
            del self._requests[number]
            if now_ns - request.began_ns < REQUEST_NS_MAX:
                self._requests[number] = _Request(request.placements, request.began_ns, now_ns)
                told += request.placements
        return told

    def first_token(self, number: int) -> Sequence[Placement]:
        """It waits no more; what is to be told once more."""
        request = self._requests.pop(number, None)
        return request.placements if request is not None else ()

    def end(self, number: int) -> None:
        """It waits no more."""
        self._requests.pop(number, None)
