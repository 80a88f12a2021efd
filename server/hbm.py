"""The HBM tier of a node: one slab a GPU, given to the first trust domain whose engine asks for it.

    Hello with a GPU ──► admit: the slab of that GPU, made at first use ──► its descriptor, with Welcome
                           └── in a thread; after ``WAIT_S``: host memory now, HBM at the next Hello
    written, time passes ──► cool: what is about to leave goes to host memory (``tiers.hbm_demote``)

A slab never changes hands, and what another process left in the GPU's memory is cleared before it is given.
What followers are told says ``hbm_telling``.

Invariants: a GPU has at most one arena in the life of the node, so the memory that the operator gave is never
exceeded; a lost one stays lost (its CUDA context is gone with it: the node must be restarted). A GPU that
answers nobody takes one thread and nothing of the others' time.

The sum: a slab is made once, in 1 to 5 s (CUDA's context, and torch's; of the CPU, for trying: 0.3 s a GiB).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvcache import wire
from kvcache.block import StorageKey
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.config import NodeConfig
from kvcache.errors import BadInput, Unavailable
from kvcache.leases import Owner
from kvcache.ledger import Change, Ledger
from kvcache.server.hbm_telling import HbmTelling
from kvcache.server.tuning import Tuning
from kvcache.tiers.hbm_arena import HbmArena
from kvcache.tiers.hbm_demote import Below, HbmDemoter
from kvcache.tiers.threads import Threads

if TYPE_CHECKING:
    from kvcache.device.served import Devices, Outlet
    from kvcache.tiers.hbm import HbmTier

log = logging.getLogger("kvcache.server")

NO_HBM = -1
REFUSALS_MAX = 16
"""So many GPUs of one trust domain are spoken of."""
MAKINGS_MAX = 16
"""Slabs that are being made at once: no host has more GPUs that hang."""
WAIT_S = wire.HBM_WAIT_MS / 1_000
CLOSE_S = 6.0
HELD = ("blocks", "block_bytes", "orphans")


class Hbm:
    """One owner, the event loop's thread."""

    def __init__(
        self,
        config: NodeConfig,
        devices: Devices,
        tuning: Tuning,
        clock: Clock,
        counters: Counter[str],
    ) -> None:
        """``tuning`` says what policy each new ledger has."""
        self._size_bytes = config.hbm_bytes
        self._unit_bytes = config.hbm_unit_bytes
        self._quarantine_ns = config.quarantine_ms * NS_PER_MS
        self._demote_bytes_s = config.hbm_demote_bytes_s
        self._devices = devices
        self._tuning = tuning
        self._clock = clock
        self._counters = counters
        self._arenas: list[HbmArena] = []
        self._demoters: list[HbmDemoter] = []
        self._of_gpu: dict[bytes, HbmArena] = {}
        self._refusals: dict[str, dict[bytes, str]] = {}  # Of each trust domain, and GPU.
        self.telling = HbmTelling(
            lambda number: self._arenas[number].is_lost,
            lambda number, key: self._arenas[number].ledger.has(key),
        )
        self._threads = Threads("kvcache-hbm-open", MAKINGS_MAX, clock, int(WAIT_S * NS_PER_S))
        self._making: dict[bytes, asyncio.Task[None]] = {}
        self._late: set[bytes] = set()  # Those of them that nobody waits for any more.
        self._is_closed = False
        self.is_stuck = False
        """After ``close``: a thread hangs in a GPU's driver still."""

    def __getitem__(self, number: int) -> HbmArena:
        return self._arenas[number]

    # --- who gets what --------------------------------------------------------------------------

    async def admit(self, name: str, hello: wire.Hello, below: Below) -> int:
        """The number of the slab for an engine of this trust domain; ``NO_HBM``: none for it, or not yet."""
        if hello.gpu not in self._of_gpu:
            await self._made(name, hello.gpu, below)
        for gpu in (hello.gpu, *hello.joined):
            for number, arena in enumerate(self._arenas):
                if arena.serves(name, gpu):
                    return number
        self._counters["hbm_refused_maps"] += 1
        return NO_HBM

    def find(self, name: str, gpu: bytes) -> int:
        """The number of the slab that engines of this trust domain on that GPU were given; ``NO_HBM``: none
        was, or it is lost."""
        arena = self._of_gpu.get(gpu)
        return self._arenas.index(arena) if arena is not None and arena.serves(name, gpu) else NO_HBM

    def slab(self, number: int) -> wire.HbmSlab:
        """What Welcome says of it."""
        ticket = self._arenas[number].ticket
        return wire.HbmSlab(ticket.kind, ticket.size_bytes, ticket.uuid, ticket.incarnation)

    async def _made(self, name: str, gpu: bytes, below: Below) -> None:
        """Wait until it is, or cannot be made, or for ``WAIT_S`` since that was begun; who is cancelled
        meanwhile leaves it to the next."""
        if self._is_closed or gpu in self._late:
            return
        if gpu not in self._making:
            if len(self._making) >= MAKINGS_MAX:
                return
            task = asyncio.get_running_loop().create_task(self._make(name, gpu, below))
            self._making[gpu] = task
            task.add_done_callback(lambda _: self._ended(gpu, task))
            task.get_loop().call_later(WAIT_S, self._is_late, name, gpu, task)
        await asyncio.wait([self._making[gpu]], timeout=WAIT_S)

    async def _make(self, name: str, gpu: bytes, below: Below) -> None:
        try:
            memory, outlet = await self._threads.run(lambda: self._take(name, gpu))
        except Unavailable as error:
            why = f"no HBM of {_named(gpu)}: {error}; give the tier less (hbm), or the engine"
            self._refuse(name, gpu, why)
            return
        if self._is_closed:
            if not self.is_stuck:  # Else the process ends, and the memory with it.
                await self._threads.run(memory.close)
            return
        for refused in self._refusals.values():
            refused.pop(gpu, None)
        arena = HbmArena(memory, name, self._unit_bytes, self._tuning.make(wire.HBM))
        self._tuning.join(wire.HBM, arena.ledger)
        self._of_gpu[gpu] = arena
        self._arenas.append(arena)
        self._demoters.append(
            HbmDemoter(
                arena, outlet, below, self._clock, self._counters, self._quarantine_ns, self._demote_bytes_s
            )
        )

    def _take(self, name: str, gpu: bytes) -> tuple[HbmTier, Outlet]:
        """In a thread. RAISES Unavailable: a new one, as the first one's frames hold what was mapped, and who
        lets go of that waits for the GPU."""
        try:
            memory = self._devices.arena(name, gpu, self._size_bytes, self._unit_bytes)
            try:
                return memory, self._devices.outlet(memory)
            except Unavailable:
                memory.close()  # Its descriptor would hold the GPU's memory for good.
                raise
        except Unavailable as error:
            failure = Unavailable(error.code, error.what, error.why, error.todo)
        raise failure

    def _ended(self, gpu: bytes, task: asyncio.Task[None]) -> None:
        del self._making[gpu]
        self._late.discard(gpu)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Our own code is wrong: as with any task of the node, the command ends the process.
            task.get_loop().call_exception_handler({"message": "making a slab", "exception": error})

    def _is_late(self, name: str, gpu: bytes, task: asyncio.Task[None]) -> None:
        if not task.done():
            self._late.add(gpu)
            why = f"no HBM of {_named(gpu)} yet: its driver does not answer; look for Xid in dmesg"
            self._refuse(name, gpu, why)

    def _refuse(self, name: str, gpu: bytes, why: str) -> None:
        """Say so, once. An engine names what it likes as its GPU, as often as it likes: it takes the room of
        its own trust domain alone."""
        refused = self._refusals.setdefault(name, {})
        if gpu not in refused and len(refused) >= REFUSALS_MAX:
            return
        is_said = any(each.get(gpu) == why for each in self._refusals.values())
        refused[gpu] = why
        if not is_said:
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

    def overrule(self, keys: Sequence[StorageKey], below: Ledger) -> None:
        """``below`` has been given these blocks: one name must not stand for two contents, and what all
        engines can read counts. It costs those on the GPU one copy."""
        for arena in self._arenas:
            count = arena.overrule(keys, below, self._clock.now_ns())
            self._counters["hbm_rejected_blocks:overruled"] += count
            arena.settle()

    def cool(self, number: int) -> None:
        """Something was written there."""
        self._demoters[number].cool()

    def lose(self, number: int, why: str) -> None:
        """Its GPU failed or was reset."""
        self._demoters[number].lose(why)

    async def close(self) -> None:
        """Wait for what is copied, and let the memory go; for a while. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            async with asyncio.timeout(CLOSE_S):
                if self._making:
                    await asyncio.wait(self._making.values())
                await asyncio.gather(*(demoter.close() for demoter in self._demoters))
                if any(demoter.is_stuck for demoter in self._demoters):
                    raise TimeoutError
                for arena in self._arenas:
                    await self._threads.run(arena.close)  # It waits for the GPU's work on it.
        except (TimeoutError, Unavailable):
            log.error("a GPU does not answer: the node leaves its memory as it is")
            self.is_stuck = True
        self._threads.close()

    # --- what it tells --------------------------------------------------------------------------

    def settle(self) -> None:
        """After every call of a ledger: memory follows."""
        for arena in self._arenas:
            arena.settle()

    def take_changes(self, below: Callable[[StorageKey], bool]) -> Iterator[Change]:
        """What followers are to be told since the last call. ``below``: is it in a tier below?"""
        return self.telling.changes(self._taken(below))

    def _taken(self, below: Callable[[StorageKey], bool]) -> list[Change]:
        changes = [change for arena in self._arenas for change in arena.take_changes()]
        for change in changes:
            if change.kind == "removed":
                self._counters[f"hbm_removed_blocks:{change.reason}"] += len(change.keys)
                if change.reason == "evicted":
                    self._counters["hbm_dropped_blocks"] += sum(not below(key) for key in change.keys)
        return changes

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
        refusals = dict.fromkeys(why for refused in self._refusals.values() for why in refused.values())
        return [*(f"{text}; restart the node when the GPU works again" for text in lost), *refusals]

    def check(self) -> None:
        """Assert every invariant."""
        for arena in self._arenas:
            arena.check()
        self.telling.check()
        assert len(self._of_gpu) == len(self._arenas) == len(self._demoters)
        assert self._late <= self._making.keys()
        assert not self._of_gpu.keys() & self._making.keys()


def _named(gpu: bytes) -> str:
    return f"GPU {gpu.hex()}" if gpu else "the CPU"


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
