"""What the scheduler half of the vLLM connector asks of the store for one request: a lease a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from kvcache.block import BlockHash
from kvcache.client.connectors.handoff import Handoff
from kvcache.clock import NS_PER_MS, Clock
from kvcache.request_hints import RequestHints
from kvcache.wire_hbm import HBM

if TYPE_CHECKING:
    from kvcache.client.hbm import BlockingDeviceStore
    from kvcache.client.store import BlockingStore, Handle, Lease


@dataclass(frozen=True, slots=True)
class Asking:
    """Under the lease name ``name``; waiting ``wait_ns`` at most for blocks that are coming, for all ranks
    together; with ``hbm``, of HBM first, which takes a store that plans for the GPU."""

    name: str
    handoff: Handoff
    hints: RequestHints
    wait_ns: int
    hbm: bool

    def leases(
        self, store: BlockingStore, handles: Sequence[Handle], prefix: Sequence[BlockHash], clock: Clock
    ) -> list[Lease]:
        """In the order of the handles."""
        end_ns = clock.now_ns() + self.wait_ns
        take = cast("BlockingDeviceStore", store).lease_device if self.hbm else store.lease
        return [
            take(
                handle,
                prefix,
                self.name,
                wait_ms=max(0, end_ns - clock.now_ns()) // NS_PER_MS,
                source=self.handoff.source,
                pushed=self.handoff.pushed,
                hints=self.hints,
            )
            for handle in handles
        ]


def in_hbm(lease: Lease) -> int:
    """How many leading blocks of it."""
    count = 0
    for grant in lease.grants:
        if grant.tier != HBM or grant.start != count:
            break
        count += grant.count
    return count
