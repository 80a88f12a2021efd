"""Who may put bytes in flight, and when: bounds for one endpoint and for all, priorities, deadlines.

    hold ──fits──► in flight ──leaves──► done
      └─► waiting ── room, in the order of priority, then of coming ──► in flight
             ├── deadline ──► TransferLate       ├── gate closed ──► PeerLost      └── cancelled

* What is in flight never exceeds ``endpoint_bytes_max`` of one endpoint nor ``total_bytes_max`` in all;
  a transfer larger than a bound goes alone.
* Nobody overtakes his better at one endpoint, nor where all share the bound; an endpoint that is full
  holds up nobody else's.

For one loop. The sum: without waiting, 4 us a transfer; with n endpoints that wait, n more looks a grant.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvcache.clock import NS_PER_S, Clock
from kvcache.transport.base import Limits, PeerLost, Priority, TransferLate


@asynccontextmanager
async def until(deadline_ns: int, clock: Clock) -> AsyncIterator[None]:
    """What is inside is cancelled at the deadline. RAISES TransferLate then, and when it is past already."""
    left_ns = deadline_ns - clock.now_ns()
    if left_ns <= 0:
        raise TransferLate("the deadline was past before it began")
    try:
        async with asyncio.timeout(left_ns / NS_PER_S) as timer:
            yield
    except TimeoutError as error:
        if not timer.expired():
            raise
        raise TransferLate("the deadline is past") from error


class Flow:
    """All the endpoints of one transport."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._total_bytes = 0
        self._numbers = itertools.count()
        self._gates: set[Gate] = set()

    @property
    def total_bytes(self) -> int:
        """What is in flight now."""
        return self._total_bytes

    def gate(self) -> Gate:
        """For one endpoint, until it is closed."""
        gate = Gate(self, self._limits, self._clock)
        self._gates.add(gate)
        return gate

    def has_room(self, byte_count: int) -> bool:
        return self._total_bytes == 0 or self._total_bytes + byte_count <= self._limits.total_bytes_max

    def number(self) -> int:
        return next(self._numbers)

    def add(self, byte_count: int) -> None:
        self._total_bytes += byte_count

    def pump(self) -> None:
        """Grant what has room now."""
        while True:
            ready = [(head[:2], gate) for gate in self._gates if (head := gate.head()) is not None]
            if not ready:
                return
            gate = min(ready, key=lambda entry: entry[0])[1]
            if not self.has_room(gate.head_bytes()):
                return
            gate.grant()

    def remove(self, gate: Gate) -> None:
        self._gates.discard(gate)


class Gate:
    """One endpoint's share of the flow."""

    def __init__(self, flow: Flow, limits: Limits, clock: Clock) -> None:
        """Use ``Flow.gate``."""
        self._flow = flow
        self._endpoint_bytes_max = limits.endpoint_bytes_max
        self._clock = clock
        self._bytes = 0
        self._waiting: list[tuple[Priority, int, int, asyncio.Future[None]]] = []
        self._closed = ""

    @property
    def bytes_in_flight(self) -> int:
        return self._bytes

    @asynccontextmanager
    async def hold(self, byte_count: int, priority: Priority, deadline_ns: int) -> AsyncIterator[None]:
        """Inside, ``byte_count`` bytes are in flight, until the deadline at most.

        RAISES TransferLate, PeerLost: before, while waiting; TransferLate inside, by cancelling it.
        """
        async with until(deadline_ns, self._clock):
            await self._enter(byte_count, priority)
            try:
                yield
            finally:
                self._leave(byte_count)

    def close(self, why: str = "the endpoint is closed") -> None:
        """Whoever waits, and whoever comes, gets PeerLost. May be called twice."""
        self._closed = self._closed or why
        for *_, granted in self._waiting:
            if not granted.done():
                granted.set_exception(PeerLost(self._closed))
                granted.exception()  # Seen: a caller that was cancelled will not look at it.
        self._waiting.clear()
        self._flow.remove(self)
        self._flow.pump()

    def head(self) -> tuple[Priority, int, int, asyncio.Future[None]] | None:
        """Who goes next here, when this endpoint has room for him."""
        while self._waiting and self._waiting[0][3].done():
            heapq.heappop(self._waiting)
        if not self._waiting or not self._has_room(self._waiting[0][2]):
            return None
        return self._waiting[0]

    def head_bytes(self) -> int:
        """REQUIRES: there is a head."""
        return self._waiting[0][2]

    def grant(self) -> None:
        """REQUIRES: there is a head, and room for him."""
        _, _, byte_count, granted = heapq.heappop(self._waiting)
        self._take(byte_count)
        granted.set_result(None)

    async def _enter(self, byte_count: int, priority: Priority) -> None:
        if self._closed:
            raise PeerLost(self._closed)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, self._flow.number(), byte_count, granted))
        self._flow.pump()
        if granted.done():
            return granted.result()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._leave(byte_count)  # Granted and cancelled in one turn of the loop.
            else:
                self._flow.pump()  # He may have been in the way of others.
            raise

    def _leave(self, byte_count: int) -> None:
        self._bytes -= byte_count
        self._flow.add(-byte_count)
        self._flow.pump()

    def _take(self, byte_count: int) -> None:
        self._bytes += byte_count
        self._flow.add(byte_count)

    def _has_room(self, byte_count: int) -> bool:
        return self._bytes == 0 or self._bytes + byte_count <= self._endpoint_bytes_max
