"""What a node knows and decides: the ledger of its host tier, memory, events and counters.

Everything here is called from one thread, the event loop's, and returns at once; the only waiting is
for a thread that sums bytes (``verify``), and what it found is acted on by generation, so that nothing
is assumed to hold across the wait.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvcache.block import Slot, StorageKey, split_hashes, storage_key
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.events import TIER_HBM, TIER_HOST, TIER_NVME, Publisher
from kvcache.leases import Owner
from kvcache.ledger import Change, Lease, Ledger
from kvcache.peers.plane import DataPlane
from kvcache.policy import RequestContext
from kvcache.server.bringing import Bringing
from kvcache.server.hbm import Hbm
from kvcache.server.namespaces import Namespaces, Opened
from kvcache.server.progress import Progress
from kvcache.server.recording import Recording
from kvcache.server.telling import Telling
from kvcache.server.tickets import Tickets
from kvcache.server.tuning import Tuning
from kvcache.server.uses import Uses
from kvcache.sums import block_checksum, sum_chunks
from kvcache.tiers.host import HostTier
from kvcache.tiers.space import Space
from kvcache.tiers.stack import Stack

HELD_STATS = (
    "leases",
    "reservations",
    "limbo_blocks",
    "quarantined_blocks",
    "reclaimed_extents",
    "policy_faults",
)
HELD_STATS_OF_A_TIER = ("blocks", "block_bytes", "orphans")
ARENAS_MAX = 256
"""Each costs two descriptors and a map of the capacity's length for the node's life; peers name tenants."""
AHEAD_BLOCKS_MAX = 64
TOLD_AT_ONCE = 4_096


class Core:
    """The state of one node. ``ledger``, ``host`` and ``counters`` are for the handlers."""

    def __init__(
        self,
        config: NodeConfig,
        ledger: Ledger,
        space: Space,
        host: HostTier,
        publisher: Publisher,
        clock: Clock,
        plane: DataPlane,
    ) -> None:
        self.config = config
        self.ledger = ledger
        self.host = host
        self.clock = clock
        self._started_ns = clock.now_ns()
        self.counters: Counter[str] = Counter()
        self.plane = plane
        self.tickets = Tickets(plane, clock, self.counters)
        self._space = space
        self.telling = Telling(publisher, self.load)
        self.namespaces = Namespaces(config, self.telling.announce)
        self._telling = False
        self._untold: deque[tuple[str, Change]] = deque()
        self._newest_leases: dict[str, int] = {}
        self._arenas: dict[tuple[int, str], int] = {}
        self._summing = ThreadPoolExecutor(1, "kvcache-sum")
        self.uses = Uses(self._freed)
        self.progress = Progress()
        self.bringing = Bringing(ledger, clock)
        self.recording = Recording(clock)
        self.tuning = Tuning(clock)
        self.stack: Stack | None = None
        """Set once, before anything is asked, by who puts the node together; None: no NVMe tier."""
        self.hbm: Hbm | None = None
        """As ``stack``; None: no HBM tier."""

    # --- memory and names -----------------------------------------------------------------------

    def arena(self, uid: int, tenant: str) -> int:
        """The memory of one trust domain, made at its first use. RAISES BadInput when there are too many, or
        no memory."""
        arena = self._arenas.get((uid, tenant))
        if arena is None:
            self._check_arenas()
            arena = self.host.add_arena(f"{uid}-{tenant}")  # May be refused: then nothing has changed.
            made = self._space.add_arena()
            assert made == arena
            self._arenas[uid, tenant] = arena
        return arena

    def keys(self, opened: Opened, prefix: bytes, count_max: int) -> list[StorageKey]:
        """RAISES BadInput for a malformed or too long prefix."""
        blocks = split_hashes(prefix)
        if len(blocks) > count_max:
            raise BadInput(
                "too_large",
                f"a prefix of {len(blocks)} blocks",
                f"the limit of this call is {count_max}",
                "ask in several calls; the clients in kvcache.client do so by themselves",
            )
        return [storage_key(opened.namespace_id, block) for block in blocks]

    def _check_arenas(self) -> None:
        if len(self._arenas) >= ARENAS_MAX:
            raise BadInput(
                "too_large",
                f"{ARENAS_MAX} users and tenants have memory here",
                "that is the limit",
                "restart the node to forget old ones, or have fewer tenants use one node",
            )

    def count_lease(self, memory: str, lease_id: int, asked: int, held: int, block_tokens: int) -> bool:
        """Count a look-up once, however many share its lease (scheduler and workers do). Was it now?
        ``lease_id``: in the fastest memory that gave any; each GPU numbers its own."""
        if 0 < lease_id <= self._newest_leases.get(memory, 0):
            return False
        self.counters["lookup_tokens"] += asked * block_tokens
        self.counters["hit_tokens"] += held * block_tokens
        if lease_id:
            self._newest_leases[memory] = lease_id
            self.counters["leases_taken"] += 1
        return True

    # --- changes --------------------------------------------------------------------------------

    def settle(self) -> None:
        """After every call of the ledger: memory moves now; followers are told once replies are out."""
        moves = self._space.take_moves()
        if moves:
            self.host.apply(moves)
        if self.hbm is not None:
            self.hbm.settle()
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def make_room_later(self, arena: int, block_bytes: int, count: int) -> None:
        """While this writer copies, evict what its next reservation would have to wait for."""
        asyncio.get_running_loop().call_soon(
            self._make_room, arena, block_bytes, min(count, AHEAD_BLOCKS_MAX)
        )

    def cool_hbm(self, number: int) -> None:
        """While this writer copies into that slab, see to what would have to leave it next."""
        assert self.hbm is not None
        asyncio.get_running_loop().call_soon(self.hbm.cool, number)

    @property
    def below_hbm(self) -> list[Ledger]:
        """Of the tiers under the GPUs."""
        return [self.ledger] if self.stack is None else [self.ledger, self.stack.ledger]

    def is_below_hbm(self, key: StorageKey) -> bool:
        return any(ledger.has(key) for ledger in self.below_hbm)

    def _make_room(self, arena: int, block_bytes: int, count: int) -> None:
        context = RequestContext(now_ns=self.clock.now_ns())
        self.ledger.make_room(context, arena, block_bytes, count)
        if self.stack is not None:
            self.stack.cool()
        self.settle()

    def _tell(self) -> None:
        """Tell followers what has changed, ``TOLD_AT_ONCE`` blocks or so a turn: a device that comes back may
        have a million."""
        self._telling = False
        self._collect()
        self._tell_some()
        if self._untold and not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def tell_all(self) -> None:
        """Tell followers everything that has changed until now."""
        self._collect()
        while self._untold:
            self._tell_some()

    def _collect(self) -> None:
        for change in self.ledger.take_changes():
            self.counters[f"{change.kind}_blocks:{change.reason}"] += len(change.keys)
            self.progress.bell.ring(change.keys)
            self.bringing.arriving.bell.ring(change.keys)
            self._untold.append((TIER_HOST, change))
            if self.hbm is not None and change.kind == "stored":
                self.hbm.overrule(change.keys, self.ledger)
        for change in self.stack.take_changes() if self.stack is not None else ():
            if change.kind == "removed":
                self.counters[f"nvme_removed_blocks:{change.reason}"] += len(change.keys)
            self._untold.append((TIER_NVME, change))
        for change in self.hbm.take_changes(self.is_below_hbm) if self.hbm is not None else ():
            self._untold.append((TIER_HBM, change))

    def _tell_some(self) -> None:
        told = 0
        while self._untold and told < TOLD_AT_ONCE:
            tier = self._untold[0][0]
            changes: list[Change] = []
            while self._untold and self._untold[0][0] == tier and told < TOLD_AT_ONCE:
                changes.append(self._untold.popleft()[1])
                told += len(changes[-1].keys)
            if changes:
                self.counters["events"] += self.telling.publish(changes, tier)

    def _freed(self, owner: Owner) -> None:
        self.ledger.writes_ended(owner)
        if self.hbm is not None:
            self.hbm.writes_ended(owner)
        self.settle()

    def expire(self) -> None:
        """Called by the node's timer."""
        self.ledger.expire(self.clock.now_ns())
        for each in (self.tickets, self.plane, self.bringing, self.recording, self.tuning):
            each.tick()
        if self.stack is not None:
            self.stack.tick()
        if self.hbm is not None:
            self.hbm.tick()
        self.settle()
        self.telling.beat(self.clock.now_ns())

    # --- bytes ----------------------------------------------------------------------------------

    def checksums(self, opened: Opened, keys: Sequence[StorageKey], sums: Sequence[bytes]) -> list[bytes]:
        spec = opened.spec
        return [
            block_checksum(key, spec.block_bytes, spec.chunk_bytes, part)
            for key, part in zip(keys, sums, strict=True)
        ]

    async def sum_chunks(self, views: Sequence[memoryview], chunk_bytes: int) -> bytes:
        """Runs in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._summing, sum_chunks, views, chunk_bytes)

    async def slot_sums(self, opened: Opened, slots: Sequence[Slot]) -> list[bytes]:
        """The chunk sums of what lies in these slots just now. Runs in a thread."""
        views = [self.host.view(slot, opened.spec.block_bytes) for slot in slots]
        joined = await self.sum_chunks(views, opened.spec.chunk_bytes)
        step = len(joined) // len(views) if views else 1
        return [joined[at : at + step] for at in range(0, len(joined), step)]

    async def examine(self, opened: Opened, lease: Lease, positions: Sequence[int]) -> int:
        """A reader found these blocks wrong: look for ourselves, and quarantine those that are.

        Returns how many were. A reader whose own memory is bad so takes nothing from others."""
        found = await self.slot_sums(opened, [lease.slots[at] for at in positions])
        bad = 0
        until_ns = self.clock.now_ns() + self.config.quarantine_ms * NS_PER_MS
        for at, sums in zip(positions, found, strict=True):
            expected = lease.checksums[at]
            if self.checksums(opened, [lease.keys[at]], [sums]) == [expected]:
                self.counters["reader_disagreed_blocks"] += 1
            elif self.ledger.quarantine(lease.keys[at], lease.generations[at], until_ns):
                self.counters["rejected_blocks:checksum"] += 1
                bad += 1
        self.settle()
        return bad

    # --- the operator's view --------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """The numbers of ``metrics.STATS``, and no others."""
        held = self.ledger.stats()
        return {
            **self.bringing.stats(),
            **self.telling.stats(),
            **self.recording.stats(),
            **self.tuning.stats(),
            **(self.hbm.stats() if self.hbm is not None else {}),
            **{name: float(value) for name, value in self.counters.items()},
            **{name: held[name] for name in HELD_STATS},
            **{f"{name}:host": held[name] for name in HELD_STATS_OF_A_TIER},
            "used_bytes:host": self._space.capacity_bytes - held["free_bytes"],
            "capacity_bytes:host": float(self._space.capacity_bytes),
            "namespaces": float(len(self.namespaces)),
            "arenas": float(len(self._arenas)),
            "pins": float(self.host.pin_count),
            "ended_pins": float(self.host.ended_pins),
            "tickets": float(len(self.tickets)),
            "followers": float(self.progress.bell.waiting),
            "uptime_seconds": (self.clock.now_ns() - self._started_ns) / NS_PER_S,
        }

    def load(self) -> dict[str, float]:
        """The numbers of ``event_load.NODE_LOAD``, and no others."""
        held, coming = self.ledger.stats(), self.bringing.stats()
        return {
            "capacity_bytes": float(self._space.capacity_bytes),
            "free_bytes": float(held["free_bytes"]),
            "leases": float(held["leases"]),
            "reservations": float(held["reservations"]),
            "coming_bytes": coming.get("nvme_coming_bytes", 0.0) + coming.get("peer_coming_bytes", 0.0),
        }

    def troubles(self) -> list[str]:
        """In plain words, what of this node does not work as it should."""
        hbm = self.hbm.troubles() if self.hbm is not None else []
        others = [*filter(None, [self.recording.trouble]), *self.tuning.troubles()]
        return [*self.bringing.troubles(), *hbm, *others]

    def check(self) -> None:
        """Assert every invariant of what this node holds."""
        self.tell_all()
        if self.stack is not None:
            self.stack.check()
        if self.hbm is not None:
            self.hbm.check()
        self.ledger.check()
        self.progress.check()
        self._space.check()
        self.host.check()
        self.telling.check()
        self.tuning.shadowing.check()

    def close(self) -> None:
        self.recording.close()
        self._summing.shutdown(wait=True, cancel_futures=True)
        if self.hbm is None or not self.hbm.is_stuck:  # Else a copy may write to it until the process ends.
            self.host.close()
