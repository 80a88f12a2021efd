"""The HBM tier of a node: one slab a GPU, given to the first trust domain whose engine asks for it.

    Hello with a GPU ──► admit: the slab of that GPU, made at first use ──► its descriptor, with Welcome
    written, time passes ──► cool: what is about to leave goes to host memory (``tiers.hbm_demote``)

A block that several GPUs hold is one to followers: they are told that it is gone when the last lets it go.

Invariants: a GPU has at most one arena in the life of the node, so the memory that the operator gave is never
exceeded; a lost one stays lost (its CUDA context is gone with it: the node must be restarted).

The sum: a slab is made in milliseconds, on the event loop (one of the CPU, which is for trying: 0.3 s a GiB).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvcache import wire
from kvcache.block import StorageKey
from kvcache.clock import NS_PER_MS, Clock
from kvcache.config import NodeConfig
from kvcache.errors import BadInput, Unavailable
from kvcache.leases import Owner
from kvcache.ledger import Change, Ledger
from kvcache.policy import MakePolicy
from kvcache.tiers.hbm_arena import HbmArena
from kvcache.tiers.hbm_demote import Below, HbmDemoter

if TYPE_CHECKING:
    from kvcache.device.served import Devices

log = logging.getLogger("kvcache.server")

NO_HBM = -1
REFUSALS_MAX = 16
HELD = ("blocks", "block_bytes", "orphans")


class Hbm:
    """One owner, the event loop's thread."""

    def __init__(
        self,
        config: NodeConfig,
        devices: Devices,
        make_policy: MakePolicy,
        clock: Clock,
        counters: Counter[str],
        watch: Callable[[Ledger], None],
    ) -> None:
        """``watch`` is told of each new ledger, for the patience that policies have."""
        self._size_bytes = config.hbm_bytes
        self._unit_bytes = config.hbm_unit_bytes
        self._quarantine_ns = config.quarantine_ms * NS_PER_MS
        self._devices = devices
        self._make_policy = make_policy
        self._clock = clock
        self._counters = counters
        self._watch = watch
        self._arenas: list[HbmArena] = []
        self._demoters: list[HbmDemoter] = []
        self._of_gpu: dict[bytes, HbmArena] = {}
        self._refusals: dict[bytes, str] = {}

    def __getitem__(self, number: int) -> HbmArena:
        return self._arenas[number]

    # --- who gets what --------------------------------------------------------------------------

    def admit(self, name: str, hello: wire.Hello, below: Below) -> int:
        """The number of the slab for an engine of this trust domain; ``NO_HBM``: none for it."""
        if hello.gpu not in self._of_gpu:
            self._make(name, hello.gpu, below)
        for gpu in (hello.gpu, *hello.joined):
            for number, arena in enumerate(self._arenas):
                if arena.serves(name, gpu):
                    return number
        self._counters["hbm_refused_maps"] += 1
        return NO_HBM

    def slab(self, number: int) -> wire.HbmSlab:
        """What Welcome says of it."""
        ticket = self._arenas[number].ticket
        return wire.HbmSlab(ticket.kind, ticket.size_bytes, ticket.uuid, ticket.incarnation)

    def _make(self, name: str, gpu: bytes, below: Below) -> None:
        memory = None
        try:
            memory = self._devices.arena(name, gpu, self._size_bytes, self._unit_bytes)
            outlet = self._devices.outlet(memory)
        except Unavailable as error:
            if memory is not None:
                memory.close()  # Its descriptor would hold the GPU's memory for good.
            self._refuse(gpu, f"no HBM of {gpu.hex() or 'the CPU'}: {error}")
            return
        self._refusals.pop(gpu, None)
        arena = HbmArena(memory, name, self._unit_bytes, self._make_policy)
        self._watch(arena.ledger)
        self._of_gpu[gpu] = arena
        self._arenas.append(arena)
        self._demoters.append(
            HbmDemoter(arena, outlet, below, self._clock, self._counters, self._quarantine_ns)
        )

    def _refuse(self, gpu: bytes, why: str) -> None:
        """Say so, once. An engine names what it likes as its GPU, as often as it likes."""
        is_known = gpu in self._refusals
        if (is_known or len(self._refusals) < REFUSALS_MAX) and self._refusals.get(gpu) != why:
            self._refusals[gpu] = why
            log.error("%s", why)

    # --- time and people ------------------------------------------------------------------------

    def disconnect(self, owner: Owner) -> bool:
        """The owner is gone. Are slots kept aside until ``writes_ended``? Who reserved has mapped them."""
        kept = 0
        for arena in self._arenas:
            kept += arena.ledger.disconnect(owner, writes_ended=False)
        return kept > 0

    def writes_ended(self, owner: Owner) -> None:
        for arena in self._arenas:
            arena.ledger.writes_ended(owner)

    def tick(self) -> None:
        """Called by the node's timer."""
        for number, arena in enumerate(self._arenas):
            arena.ledger.expire(self._clock.now_ns())
            self.cool(number)

    def cool(self, number: int) -> None:
        """Something was written there."""
        self._demoters[number].cool()

    def lose(self, number: int, why: str) -> None:
        """Its GPU failed or was reset."""
        self._demoters[number].lose(why)

    async def close(self) -> None:
        """Wait for what is copied, and let the memory go. May be called twice."""
        for demoter in self._demoters:
            await demoter.close()
        for arena in self._arenas:
            arena.close()

    # --- what it tells --------------------------------------------------------------------------

    def settle(self) -> None:
        """After every call of a ledger: memory follows."""
        for arena in self._arenas:
            arena.settle()

    def take_changes(self, below: Callable[[StorageKey], bool]) -> Iterator[Change]:
        """What can and cannot be found in HBM since the last call. ``below``: is it in a tier below?"""
        for arena in self._arenas:
            for change in arena.take_changes():
                if change.kind == "stored":
                    yield change
                    continue
                self._counters[f"hbm_removed_blocks:{change.reason}"] += len(change.keys)
                if change.reason == "evicted":
                    self._counters["hbm_dropped_blocks"] += sum(not below(key) for key in change.keys)
                gone = tuple([key for key in change.keys if not self._has(key)])
                if gone:
                    yield Change("removed", gone, None, change.reason)

    def _has(self, key: StorageKey) -> bool:
        return any(not arena.is_lost and arena.ledger.has(key) for arena in self._arenas)

    def stats(self) -> dict[str, float]:
        held = [arena.ledger.stats() for arena in self._arenas]
        capacity = sum(arena.capacity_bytes for arena in self._arenas)
        return {
            "capacity_bytes:hbm": float(capacity),
            "used_bytes:hbm": float(capacity - sum(arena.free_bytes for arena in self._arenas)),
            **{f"{name}:hbm": sum(each[name] for each in held) for name in HELD},
            **{f"hbm_{name}": sum(each[name] for each in held) for name in ("leases", "reservations")},
            "hbm_limbo_blocks": sum(each["limbo_blocks"] for each in held),
            "hbm_lost": float(sum(arena.is_lost for arena in self._arenas)),
        }

    def troubles(self) -> list[str]:
        """In plain words, what does not work as it should."""
        lost = [text for arena in self._arenas for text in arena.troubles()]
        return [f"{text}; restart the node when the GPU works again" for text in lost] + [
            f"{text}; give the tier less (hbm), or the engine" for text in self._refusals.values()
        ]

    def check(self) -> None:
        """Assert every invariant."""
        for arena in self._arenas:
            arena.check()
        assert len(self._of_gpu) == len(self._arenas)


def check_same(
    ledgers: Sequence[Ledger], keys: Sequence[StorageKey], checksums: Sequence[bytes], now_ns: int
) -> int:
    """These blocks are what the tiers below hold under these names, as far as they hold them. How many they
    do. RAISES BadInput (bad_block): one name must not stand for two contents."""
    known = 0
    for ledger in ledgers:
        held = ledger.borrow(keys, _OWNER, now_ns + 1)
        if not held.lease_id:
            continue
        ledger.release(held.lease_id, _OWNER, now_ns)
        if list(held.checksums) != list(checksums[: len(held.keys)]):
            raise BadInput(
                "bad_block",
                "these bytes are not those that the tiers below hold under the same names",
                "they were computed anew, and a little differently, or copied wrongly",
                "load the blocks instead; the reservation is still open",
            )
        known = max(known, len(held.keys))
    return known


_OWNER = "hbm-check"
