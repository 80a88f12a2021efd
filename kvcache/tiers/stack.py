"""Host memory and NVMe together: what a request can have, where it is brought from, where it goes.

    match, lease ──► host ledger ── not all there ──► Promoter: NVMe -> host memory, while somebody waits
    commit ────────► host ledger ───────────────────► Demoter: host memory -> NVMe, behind everybody's back
    tick ──────────► drives: late, hung, fenced, healed; the scrubber; blocks that have cooled

The host tier and the NVMe tier have a ledger each, with the same rules. A fenced drive's blocks leave
the NVMe ledger at once, and come back when it has been opened and read again, as at the start. A path may
lie on several drives: what continues blocks of one that is not read yet is kept apart until it is.
Without a drive that works, a node is a node with host memory only: everything here then answers "nothing".

Invariants: every block in the NVMe ledger has its entry at its drive; the event loop never waits for a
disk; every wait for one has a deadline, and past it is a miss.

The sum: taking back 300,000 blocks takes a second, at once while nobody is served yet; later in slices of
``RESTORED_AT_ONCE``, 10 ms of the event loop each and 2 s in all, what was written first before what
continues it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from kvcache.block import HASH_BYTES, NamespaceId, Slot, StorageKey
from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput
from kvcache.ledger import Change, Ledger, Restored
from kvcache.policy import MakePolicy, RequestContext
from kvcache.tiers.demote import Demoter, Rules, SpecOf
from kvcache.tiers.drive import PROBE_S_MAX, PROBE_S_MIN, Drive, NamespaceMap, Place, State
from kvcache.tiers.host import HostTier
from kvcache.tiers.nvme import DeviceFault
from kvcache.tiers.nvme_format import PARENT_ROOT, Entry, stride_of
from kvcache.tiers.promote import Promoter
from kvcache.tiers.scrub import Scrubber, ScrubSettings
from kvcache.tiers.scrub_target import Shelves
from kvcache.tiers.space import NVME_LAYOUT, Space, make_slot, slot_arena, slot_offset

log = logging.getLogger("kvcache.nvme")

CLOSE_S = 6.0
WITHDRAWN_AT_ONCE = 4_096
RESTORED_AT_ONCE = 2_048
RELAPSES = 8
"""So many times ``PROBE_S_MAX`` lie between two tries of a drive that works only when it is tried."""
_GENERATION = Entry._fields.index("generation")
STATES: tuple[State, ...] = ("ok", "read_only", "fenced", "loading")


@dataclass(frozen=True, slots=True)
class StackRules:
    """What operators set, for all drives."""

    places: Sequence[Place]
    demote: Rules
    wall_hour: Callable[[], int]
    scrub: ScrubSettings


class Stack:
    """One owner, the event loop's thread. Made once; ``start`` reads the drives, ``close`` ends."""

    def __init__(
        self,
        rules: StackRules,
        host: Ledger,
        memory: HostTier,
        make_policy: MakePolicy,
        spec_of: SpecOf,
        clock: Clock,
        counters: Counter[str],
        settle: Callable[[], None],
    ) -> None:
        self._host = host
        self._clock = clock
        self._counters = counters
        self._settle = settle
        self._space = Space(
            sum(place.capacity_bytes for place in rules.places),
            rules.places[0].segment_bytes,
            NVME_LAYOUT,
        )
        self.ledger = Ledger(self._space, make_policy)
        self.drives = [
            Drive(self._space.add_arena(place.capacity_bytes), place, clock, rules.wall_hour, self._lost)
            for place in rules.places
        ]
        self._promoter = Promoter(host, self.ledger, memory, self.drives, clock, counters, settle)
        self._demoter = Demoter(
            host,
            self.ledger,
            memory,
            spec_of,
            rules.demote,
            clock,
            counters,
            settle,
            self._space.capacity_bytes,
        )
        shelves = Shelves(self.ledger, self.drives, clock, counters, settle, self._is_busy)
        self._scrubber = Scrubber(shelves.target(), clock, asyncio.sleep, rules.scrub)
        self._tasks: set[asyncio.Task[None]] = set()
        self._spec_of = spec_of
        self._apart: dict[Slot, Entry] = {}
        self._leaving: dict[int, asyncio.Task[None]] = {}
        self._serving = False

    # --- its life -------------------------------------------------------------------------------

    async def start(self, known: Callable[[NamespaceMap], None], wait_s: float) -> None:
        """Open every drive; go on after ``wait_s`` with those that are read by then. ``known`` is told of
        the namespaces found, before their blocks. RAISES BadInput when another node has a directory."""
        self._known = known
        loading = [self._spawn(self._load(drive)) for drive in self.drives]
        await asyncio.wait(loading, timeout=wait_s)
        self._serving = True
        for drive in self.drives:
            if drive.refusal is not None and drive.refusal.code == "address_in_use":
                raise drive.refusal
        for drive in self.drives:
            self._spawn(self._demoter.serve(drive))
            self._spawn(self._watch_over(drive))
        self._spawn(self._scrubber.run())

    async def close(self) -> None:
        """Wait for the disks, for a while. May be called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        closing = [self._promoter.close(), *(drive.close() for drive in self.drives)]
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.gather(*closing)
        except TimeoutError:
            log.error("a device does not answer: the node leaves it as it is")

    @property
    def is_stuck(self) -> bool:
        """Does a thread hang in a device that does not answer? Then the process cannot end by itself."""
        return any(drive.state != "closed" for drive in self.drives)

    # --- requests -------------------------------------------------------------------------------

    def ask(
        self,
        keys: Sequence[StorageKey],
        arena: int,
        block_tokens: int,
        prefill_tokens_s: int,
        context: RequestContext | None = None,
    ) -> int:
        """How many leading blocks can be had: from host memory now, or from NVMe soon (they start coming).
        ``context``: what is known of the request."""
        self._demoter.asked(keys)
        count = self._promoter.ask(keys, arena, block_tokens, prefill_tokens_s)
        if count:
            self.ledger.touch(keys[:count], context or RequestContext(now_ns=self._clock.now_ns()))
        return count

    def coming(self, keys: Sequence[StorageKey]) -> int:
        """How many of these, leading, are on their way from NVMe."""
        return self._promoter.coming(keys)

    async def wait(self, keys: Sequence[StorageKey], wait_ns: int) -> None:
        """Until none of these is on its way, or the time is over."""
        await self._promoter.wait(keys, wait_ns)

    def committed(self, path: Sequence[StorageKey]) -> None:
        """Blocks were published in the host tier."""
        self._demoter.committed(path)

    def touched(self, path: Sequence[StorageKey]) -> None:
        """A request was given these blocks of the host tier."""
        self._demoter.touched(path)

    async def persist(self, keys: Sequence[StorageKey], wait_ns: int) -> int:
        """Write the leading blocks that are held. How many are durable then; 0 when time is over."""
        try:
            async with asyncio.timeout(wait_ns / NS_PER_S):
                await self._persist(keys)
                written = self.ledger.match(keys)  # What comes while drives are synced is not.
                for drive in self.drives:
                    if drive.readable:
                        await drive.sync()
                return min(written, self.ledger.match(keys))
        except (TimeoutError, DeviceFault):
            return 0

    def scrub(self) -> None:
        """Verify everything that is on NVMe, from the first slot, starting now."""
        self._scrubber.start_now()

    def cool(self) -> None:
        """The host tier is about to let something go."""
        self._demoter.cool()

    async def _persist(self, keys: Sequence[StorageKey]) -> None:
        held = self._host.match(keys)
        if held > self.ledger.match(keys) and any(drive.writable for drive in self.drives):
            await self._demoter.persist(keys[held - 1])
        while self._demoter.is_writing(keys):
            await self._demoter.batch_ended()

    # --- what it tells --------------------------------------------------------------------------

    def take_changes(self) -> list[Change]:
        """What can and cannot be found on NVMe since the last call."""
        return self.ledger.take_changes()

    def troubles(self) -> list[str]:
        """In plain words, what does not work as it should."""
        found = [drive.trouble for drive in self.drives if drive.trouble]
        found += [
            f"the daily write budget of {drive.place.path} is used up: new blocks stay in memory only; "
            "raise nvme_writes_a_day, or choose more with nvme_admission"
            for drive in self.drives
            if drive.budget.left() < max(drive.short_bytes, stride_of(1))
        ]
        return found

    def stats(self) -> dict[str, float]:
        held = self.ledger.stats()
        states = Counter(drive.state for drive in self.drives)
        rates = [drive.rate.value() or 0.0 for drive in self.drives]
        return {
            "capacity_bytes:nvme": float(self._space.capacity_bytes),
            "used_bytes:nvme": self._space.capacity_bytes - held["free_bytes"],
            **{f"{name}:nvme": held[name] for name in ("blocks", "block_bytes", "orphans")},
            **{f"nvme_devices:{state}": float(states[state]) for state in STATES},
            "nvme_fences": float(sum(drive.fences for drive in self.drives)),
            "nvme_wanted_blocks": float(self._demoter.wanted_count),
            "nvme_coming_bytes": float(self._promoter.in_flight_bytes),
            "nvme_read_bytes_per_second": sum(rates),
            "nvme_budget_spent_bytes": float(sum(drive.budget.spent() for drive in self.drives)),
            **self._scrubber.values(),
        }

    def check(self) -> None:
        """Assert every invariant."""
        self.ledger.check()

    # --- drives ---------------------------------------------------------------------------------

    def tick(self) -> None:
        """Called by the node's timer."""
        for drive in self.drives:
            drive.tick()
        self.ledger.expire(self._clock.now_ns())
        if any(drive.writable for drive in self.drives):
            self._demoter.cool()
            self._demoter.wake()
        else:
            self._demoter.give_up()
        self._settle()

    async def _load(self, drive: Drive) -> None:
        """What is wrong with it, if anything, is the drive's own trouble."""
        try:
            entries = await drive.open()
        except (BadInput, DeviceFault):
            log.error("%s: not used: %s", drive.place.path, drive.why)
            return
        await self._restore(drive, entries)

    async def _restore(self, drive: Drive, entries: Sequence[Entry]) -> None:
        """What the drive holds can be found again; and what others hold that continues it."""
        try:
            for namespace in await drive.namespaces():
                self._known(namespace)
        except DeviceFault as fault:
            drive.ready()
            drive.failed(fault)
            return
        usable = await asyncio.to_thread(usable_entries, entries, self._spec_of)
        if len(usable) < len(entries):
            lost = len(entries) - len(usable)
            self._counters["nvme_unknown_blocks"] += lost
            log.error("%s: %d blocks are of namespaces that are not known any more", drive.place.path, lost)
        self.ledger.expire(self._clock.now_ns())
        step = RESTORED_AT_ONCE if self._serving else max(1, len(usable))
        for at in range(0, len(usable), step):
            self._take_back(_restored(drive.number, usable[at : at + step]))
            await asyncio.sleep(0)
        drive.ready()
        apart, self._apart = self._still(self._apart), {}
        self._take_back(
            [each for slot, entry in apart.items() for each in _restored(slot_arena(slot), [entry])]
        )
        if all(each.readable for each in self.drives):  # Then nothing will come that they continue.
            for slot, entry in self._still(self._apart).items():
                self.drives[slot_arena(slot)].forget(entry)
            self._apart = {}
        self._demoter.wake()

    def _take_back(self, blocks: Sequence[Restored]) -> None:
        """Find them again, as far as what they continue is found; else they are kept apart."""
        if not blocks:
            return
        refused = self.ledger.restore(blocks)
        self._counters["nvme_restored_blocks"] += len(blocks) - len(refused)
        for slot in (each.slot for each in refused):
            self._apart[slot] = self.drives[slot_arena(slot)].entries[slot_offset(slot)]
        self._settle()

    def _still(self, apart: Mapping[Slot, Entry]) -> dict[Slot, Entry]:
        """Those that their drives have still."""
        return {
            slot: entry
            for slot, entry in apart.items()
            if self.drives[slot_arena(slot)].entries.get(slot_offset(slot)) is entry
        }

    def _is_busy(self) -> bool:
        return any(drive.is_busy for drive in self.drives)

    def _lost(self, drive: Drive) -> None:
        self._leaving[drive.number] = self._spawn(self._withdraw(drive))

    async def _withdraw(self, drive: Drive) -> None:
        """Its blocks leave the ledger, a part a turn: there may be a million. Those that are still in it are
        not read, as their drive is not."""
        while self.ledger.withdraw_arena(drive.number, self._clock.now_ns(), WITHDRAWN_AT_ONCE):
            self._settle()
            await asyncio.sleep(0)

    async def _watch_over(self, drive: Drive) -> None:
        """Try again and again to bring back a drive that is not as it should be."""
        pause_s = patience_s = PROBE_S_MIN
        while True:
            await asyncio.sleep(pause_s)
            if drive.state not in ("read_only", "fenced"):
                pause_s = patience_s = max(PROBE_S_MIN, patience_s / 2)
                continue
            try:
                entries = await drive.heal()
            except (BadInput, DeviceFault) as error:
                drive.still(error)
                pause_s = min(2 * pause_s, max(PROBE_S_MAX, patience_s))
                continue
            # One that fails as soon as it is used is not read again and again, all it holds, every second.
            pause_s, patience_s = patience_s, min(2 * patience_s, RELAPSES * PROBE_S_MAX)
            if entries is not None:
                await self._restore(drive, entries)
            self._demoter.wake()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Our own code is wrong: as with any task of the node, the command ends the process.
            task.get_loop().call_exception_handler({"message": "a task of the NVMe tier", "exception": error})


def usable_entries(entries: Sequence[Entry], spec_of: SpecOf) -> list[Entry]:
    """Those of namespaces that are known, oldest first. The others are of no use to anybody, and stay where
    they are until their slots are needed. Any thread."""
    kinds = {(key[:HASH_BYTES], block, chunk) for _, key, _, block, chunk, _, _, _ in entries}
    wrong = {kind for kind in kinds if not _is_known(*kind, spec_of)}
    usable = list(entries)
    if wrong:
        usable = [
            entry
            for entry in entries
            if (entry.key[:HASH_BYTES], entry.block_bytes, entry.chunk_bytes) not in wrong
        ]
    usable.sort(key=itemgetter(_GENERATION))
    return usable


def _is_known(name: bytes, block_bytes: int, chunk_bytes: int, spec_of: SpecOf) -> bool:
    spec = spec_of(NamespaceId(name))
    return spec is not None and (spec[0].block_bytes, spec[0].chunk_bytes) == (block_bytes, chunk_bytes)


def _restored(number: int, entries: Sequence[Entry]) -> list[Restored]:
    """In places and not by name: there are hundreds of thousands."""
    first = make_slot(number, 0)
    return [
        Restored(
            key,
            None if parent == PARENT_ROOT else StorageKey(key[:HASH_BYTES] + parent),
            Slot(first + offset),
            block_bytes,
            checksum,
        )
        for offset, key, parent, block_bytes, _, _, checksum, _ in entries
    ]
