"""From a peer into host memory here: what is asked for, what is on its way, and whether it is worth it.

    ask ──► who holds it? ── nobody ──► a miss
              │ worth fetching? ── no ──► a miss, counted
              ▼
    group of blocks: slots reserved in the host tier, behind what comes before them
              │ a turn at the best peer; leased, read, summed and verified there and here (``peer``)
              │ failed, or less than all: the next best, while there is time
              ▼
    the leading good ones are committed in the host tier

Groups of one request go to several peers at once, and several to one. Ten who ask for one block cause one
transfer. Whoever waits has a deadline; the transfer goes on without him, and what it brought is there for
the next.

Invariants: a block that is coming belongs to exactly one group; a slot that is read into stays reserved until
the read has ended; with what comes from NVMe, at most a quarter of the host tier is on its way,
or one group.

The sum: see ``peer``; the ledger takes 50 us a group. Groups are ``GROUP_BYTES``, so that the trips to the
peer and the interpreter hide behind the bytes of others.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Protocol

from kvcache.block import BlockSpec, NamespaceId, StorageKey
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.errors import BadInput
from kvcache.ledger import Ledger, Reservation
from kvcache.peers.directory import Candidate, Giver
from kvcache.peers.peer import Arrived, FetchFailed, Wanted
from kvcache.peers.seldom import Seldom
from kvcache.policy import RequestContext
from kvcache.sums import SUM_BYTES
from kvcache.tiers.host import HostTier
from kvcache.tiers.promote import GROUP_BLOCKS_MAX, GROUP_BYTES, IN_FLIGHT_PARTS, OWNER
from kvcache.tiers.rates import worth_loading
from kvcache.transport.base import Priority
from kvcache.wire import BATCH_BLOCKS_MAX, BODY_BYTES_MAX

log = logging.getLogger("kvcache.peers")

WRONG_REST_NS = 60 * NS_PER_S
"""A peer whose bytes of a block were wrong is not asked for it for so long."""
GONE_REST_NS = 50 * NS_PER_MS
"""The same for a block that it should have had: it may be computing it, or its events are on their way."""
REFUSED_REST_NS = NS_PER_S

LOOK_BLOCKS_MAX = 16_384
"""So far is looked at once: ten peers that hold all of it take 20 ms of the event loop."""
UNTOLD_MAX = 256
"""Paths that were published and cannot be found, as the block before them did not come."""

BEHIND_MAX = BATCH_BLOCKS_MAX - GROUP_BLOCKS_MAX
SUMS_BYTES_MAX = BODY_BYTES_MAX // 2

_RESTS_NS = {"gone": GONE_REST_NS, "refused": REFUSED_REST_NS}

Good = tuple[bytes, bytes]


class Finder(Protocol):
    """Who knows where blocks are had (``directory.Directory``, ``cut.Cuts``)."""

    def find(self, keys: Sequence[StorageKey], source: str = "") -> list[Candidate]:
        """As ``Directory.find``."""

    def blame(self, peer: Giver, keys: Sequence[StorageKey], rest_ns: int) -> None:
        """As ``Directory.blame``."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody asks for, besides the keys. ``parent`` is the block before the first of them, None when
    it is the first of a prompt; ``source`` the name of a peer that has them, or computes them, and ``pushed``
    that a peer brings them by itself; ``prefill_tokens_s`` how fast they would be computed anew (0: unknown);
    ``context`` what is known of the request, for eviction policies.
    """

    tenant: str
    namespace: NamespaceId
    spec: BlockSpec
    arena: int
    parent: StorageKey | None = None
    prefill_tokens_s: int = 0
    source: str = ""
    pushed: bool = False
    priority: Priority = Priority.DECODE
    context: RequestContext | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What operators set. ``keep``: blocks of peers are held like all others; else they are not written to
    NVMe, and the policy is told that they are worth little."""

    wait_ns: int
    keep: bool


class _Group:
    """Blocks on their way. Its time counts from its first turn at a peer."""

    def __init__(self, reservation: Reservation, asked: Asked, behind: Sequence[StorageKey]) -> None:
        """``behind``: the blocks before them, as far as they are known."""
        self.reservation = reservation
        self.behind = behind
        self.asked = asked
        self.good: list[Good] = []
        self.tried: set[str] = set()
        self.deadline_ns = 0

    @property
    def rest(self) -> Sequence[StorageKey]:
        return self.reservation.keys[len(self.good) :]

    @property
    def rest_bytes(self) -> int:
        return len(self.rest) * self.reservation.block_bytes


class Fetcher:
    """One owner, the event loop's thread. ``settle`` is called after every change of the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        memory: HostTier,
        directory: Finder,
        rules: Rules,
        clock: Clock,
        counters: Counter[str],
        settle: Callable[[], None],
        committed: Callable[[Sequence[StorageKey]], None],
    ) -> None:
        """``committed`` is told of a path that was published, and is to be kept."""
        self._ledger = ledger
        self._memory = memory
        self._directory = directory
        self._rules = rules
        self._clock = clock
        self._counters = counters
        self._settle = settle
        self._committed = committed
        self._groups: dict[StorageKey, asyncio.Task[None]] = {}
        self._untold: list[tuple[StorageKey, ...]] = []
        self._bytes_max = memory.capacity_bytes // IN_FLIGHT_PARTS
        self._is_closed = False
        self._seldom = Seldom()

    def ask(self, keys: Sequence[StorageKey], first: int, asked: Asked) -> int:
        """How many leading blocks are in host memory, or will be if all goes well, given that the leading
        ``first`` are. Starts fetching those behind them that a peer holds, unless that takes longer than
        computing them anew."""
        at = self._past_coming(keys, first)
        if at == len(keys) or self._is_closed:
            return at
        most = min(LOOK_BLOCKS_MAX, max(1, self._bytes_max // asked.spec.block_bytes))
        found = self._directory.find(keys[at : at + most], asked.source)
        reach = max((each.blocks for each in found), default=0)
        if not reach:
            return at
        if not self._is_worth(found, reach, asked):
            self._counters["peer_declined_fetches"] += 1
            return at
        start, end = at, at + reach
        while at < end:
            taken = self._start(keys, at, end, [(each, start) for each in found], asked)
            if not taken:
                break
            at = self._past_coming(keys, at + taken)
        return at

    def coming(self, keys: Sequence[StorageKey]) -> int:
        """How many of these, leading, are on their way."""
        return self._past_coming(keys, 0)

    async def wait(self, keys: Sequence[StorageKey], wait_ns: int) -> None:
        """Until none of these is on its way any more, or the time is over."""
        groups = {self._groups[key] for key in keys if key in self._groups}
        if groups:
            _, late = await asyncio.wait(groups, timeout=wait_ns / NS_PER_S)
            self._counters["peer_late_fetches"] += bool(late)

    async def close(self) -> None:
        """Give up what is on its way: then no transfer touches host memory. May be called twice."""
        self._is_closed = True
        groups = set(self._groups.values())
        for group in groups:
            group.cancel()
        await asyncio.gather(*groups, return_exceptions=True)

    # --- one group ------------------------------------------------------------------------------

    def _past_coming(self, keys: Sequence[StorageKey], at: int) -> int:
        while at < len(keys) and keys[at] in self._groups:
            at += 1
        return at

    def _is_worth(self, found: Sequence[Candidate], blocks: int, asked: Asked) -> bool:
        if not asked.prefill_tokens_s:
            return True
        rates = [each.peer.load.rate.value() for each in found]
        rate = sum(each or 0.0 for each in rates) if all(rates) else None
        queue_ns = int(sum(each.peer.load.bytes for each in found) * NS_PER_S / rate) if rate else 0
        size, tokens = blocks * asked.spec.block_bytes, blocks * asked.spec.block_tokens
        return worth_loading(size, rate, queue_ns, tokens, asked.prefill_tokens_s)

    def _start(
        self,
        keys: Sequence[StorageKey],
        first: int,
        end: int,
        found: Sequence[tuple[Candidate, int]],
        asked: Asked,
    ) -> int:
        """Reserve for a group from ``first`` on and begin to fetch it. How many blocks are taken care of."""
        block_bytes = asked.spec.block_bytes
        names = self._cut(keys, first, end, asked.spec)
        size = len(names) * block_bytes
        if not names or (self._groups and self._memory.coming_bytes + size > self._bytes_max):
            return 0
        before = keys[first - 1] if first else asked.parent
        context = RequestContext(now_ns=self._clock.now_ns(), priority=50 if self._rules.keep else 0)
        try:
            reservation = self._ledger.reserve(asked.arena, before, names, block_bytes, OWNER, context)
        except BadInput:
            return 0  # What comes before it has left the host tier meanwhile.
        self._settle()
        if reservation.reservation_id:
            best = min(found, key=lambda each: each[0].rank(first - each[1], len(names), block_bytes))
            end = first + reservation.start
            self._begin(_Group(reservation, asked, keys[max(0, end - BEHIND_MAX) : end]), best[0])
        return reservation.start + len(reservation.keys)

    def _begin(self, group: _Group, best: Candidate) -> None:
        peer = best.peer
        self._memory.coming_bytes += group.rest_bytes
        peer.load.assign(group.rest_bytes)
        task = asyncio.get_running_loop().create_task(self._bring(group, best))
        task.add_done_callback(partial(self._ended, group, peer))
        self._groups.update(dict.fromkeys(group.reservation.keys, task))

    def _cut(self, keys: Sequence[StorageKey], first: int, end: int, spec: BlockSpec) -> list[StorageKey]:
        """As many as make a group, by their bytes and by the sums that a reply can hold; one at least."""
        most = min(GROUP_BYTES // spec.block_bytes, SUMS_BYTES_MAX // (spec.chunk_count * SUM_BYTES))
        end = min(end, first + max(1, min(most, GROUP_BLOCKS_MAX)))
        return list(takewhile(lambda key: key not in self._groups, keys[first:end]))

    async def _bring(self, group: _Group, first: Candidate) -> None:
        """Ask one peer after another, each once. What is in ``group.good`` at the end has come."""
        best: Candidate | None = first
        while best is not None:
            async with best.peer.turns:
                await self._try(group, best)
            best = self._next(group)

    async def _try(self, group: _Group, best: Candidate) -> None:
        peer = best.peer
        now_ns = self._clock.now_ns()
        group.deadline_ns = group.deadline_ns or now_ns + self._rules.wait_ns
        group.tried.add(peer.address)
        if not peer.may_be_asked:  # It was when this was decided.
            self._counters["peer_failed_fetches:lost"] += 1
            return
        left_ns = group.deadline_ns - now_ns
        if left_ns <= 0:  # It went by while others had their turns there.
            self._counters["peer_failed_fetches:late"] += 1
            return
        deadline_ns = now_ns + (left_ns // 2 if self._next(group) is not None else left_ns)
        asked, rest = group.asked, group.rest
        behind = (*group.behind, *group.reservation.keys[: len(group.good)]) if best.on_disk else ()
        wanted = Wanted(asked.tenant, asked.namespace, asked.spec, rest, behind=behind)
        slots = group.reservation.slots[len(group.good) :]
        views = [self._memory.view(slot, asked.spec.block_bytes) for slot in slots]
        try:
            arrived = await peer.fetch(wanted, views, deadline_ns, asked.priority)
        except FetchFailed as error:
            self._counters[f"peer_failed_fetches:{error.reason}"] += 1
            if self._seldom.may_say(self._clock.now_ns(), peer.name, error.reason):
                log.info("blocks did not come from the peer %s (%s): %s", peer.name, error.reason, error)
            if error.reason in _RESTS_NS:
                self._directory.blame(peer, rest[:1], _RESTS_NS[error.reason])
            return
        group.good += arrived.blocks
        self._judge(peer, rest, arrived)

    def _judge(self, peer: Giver, rest: Sequence[StorageKey], arrived: Arrived) -> None:
        if arrived.wrong:
            self._counters["peer_rejected_blocks:checksum"] += len(arrived.wrong)
            log.error("%d blocks of the peer %s were not what they should be", len(arrived.wrong), peer.name)
            self._directory.blame(peer, [rest[at] for at in arrived.wrong], WRONG_REST_NS)
        elif arrived.given < len(rest):
            self._counters["peer_failed_fetches:gone"] += 1
            self._directory.blame(peer, [rest[arrived.given]], GONE_REST_NS)

    def _next(self, group: _Group) -> Candidate | None:
        """Who else has what is still missing, while there is time."""
        if not group.rest or group.deadline_ns <= self._clock.now_ns():
            return None
        found = self._directory.find(group.rest, group.asked.source)
        others = [each for each in found if each.peer.address not in group.tried]
        block_bytes = group.asked.spec.block_bytes
        return min(others, key=lambda each: each.rank(0, len(group.rest), block_bytes), default=None)

    def _ended(self, group: _Group, first: Giver, task: asyncio.Task[None]) -> None:
        """However it ended, and even if it never began: nothing is read into the slots any more."""
        reservation, count = group.reservation, len(group.good)
        size = len(reservation.keys) * reservation.block_bytes
        self._memory.coming_bytes -= size
        first.load.free(size)
        for key in reservation.keys:
            del self._groups[key]
        if count < len(reservation.keys):
            reservation = self._ledger.shorten(reservation.reservation_id, OWNER, count)
        if count:
            checksums, sums = zip(*group.good, strict=True)
            self._ledger.commit(reservation.reservation_id, OWNER, checksums, sums)
            self._counters["peer_fetched_blocks"] += count
            self._counters["peer_fetched_bytes"] += count * reservation.block_bytes
            if self._rules.keep:
                self._untold.append(reservation.keys)
        self._tell()
        self._settle()
        if not task.cancelled() and (error := task.exception()) is not None:
            # Our own code is wrong: as with any task of the node, the command ends the process.
            task.get_loop().call_exception_handler({"message": "a fetch from a peer", "exception": error})

    def _tell(self) -> None:
        """Of what can be found now. A group may be here before those that it stands behind."""
        waiting, self._untold = self._untold, []
        for path in waiting:
            if self._ledger.has(path[-1]):
                self._committed(path)
            elif self._groups:
                self._untold.append(path)
        del self._untold[:-UNTOLD_MAX]
