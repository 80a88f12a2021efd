"""Blocks that are brought to a peer while they are being written here, or once they are held.

    reserve names a peer ──► reserved there too ──► planes written there as they advance here
                                                      │ all planes, and committed here
                                                      ▼
                                            committed there, with the sums that were committed here
    aborted here, the writer gone, the peer lost or full ──► forgotten: the peer gives its slots back

What comes before them and the peer has not is copied first, as far as it is held here. A peer sums what
arrived before it publishes (``wire.Commit``). The writer here never waits for any of this, but that an abort
waits until its slots are not read any more.

Invariants: while bytes are read from a slot it holds its block: the reservation is open and knows of this use
(``stop``), or the blocks are borrowed (``keep``); at most ``PUSHES_MAX`` are on their way; one push a path at
a time, as the peer takes a block only behind the one before it.

The sum: two round trips and 100 us of the event loop for all planes that have advanced.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kvcache.block import HASH_BYTES, BlockSpec, NamespaceId, Slot, StorageKey
from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_S, Clock
from kvcache.ledger import Ledger, Reservation
from kvcache.namespace import Namespace
from kvcache.peers.outlet import Outlet
from kvcache.peers.peer import Peer
from kvcache.peers.stream import StreamFailed, translated
from kvcache.tiers.host import HostTier
from kvcache.transport.base import Priority
from kvcache.wire import Reserved

log = logging.getLogger("kvcache.peers")

PUSHES_MAX = 256
STALL_NS = 30 * NS_PER_S
HOLD_NS = 3_600 * NS_PER_S
COPY_BYTES = 32 << 20
COPY_BLOCKS_MAX = 256
OWNER = "push"


@dataclass(frozen=True, slots=True)
class Pushing:
    """What a Pusher works on. ``settle`` is called after every change of the ledger; ``known`` tells what a
    namespace's blocks are."""

    ledger: Ledger
    memory: HostTier
    clock: Clock
    counters: Counter[str]
    settle: Callable[[], None]
    named: Callable[[str], Peer | None]
    known: Callable[[NamespaceId], tuple[Namespace, BlockSpec] | None]


class Push:
    """One reservation on its way to a peer. It is a use of the reservation's slots (``server.uses``)."""

    def __init__(self, here: Pushing, reservation: Reservation, spec: BlockSpec, after: Push | None) -> None:
        self.reservation = reservation
        self.after = after
        self.planes = 0
        """So many leading planes of every block are written here."""
        self.sums: list[bytes] = []
        """Of each block, once they are committed here."""
        self.task: asyncio.Task[None] | None = None
        self._here = here
        self._spec = spec
        self._lease_id = 0
        self._changed = asyncio.Event()

    def advance(self, planes: int) -> None:
        self.planes = planes
        self._changed.set()

    def keep(self) -> None:
        """It was committed: hold the blocks for as long as it takes."""
        here, keys = self._here, self.reservation.keys
        lease = here.ledger.borrow(keys, OWNER, here.clock.now_ns() + HOLD_NS)
        self._lease_id = lease.lease_id
        if len(lease.keys) < len(keys):  # What comes before them was lost: they may go at any time.
            self._cancel()
            return
        self.sums = [here.ledger.chunk_sums(key) for key in keys]
        self.advance(self._spec.plane_count)

    async def stop(self) -> None:
        self._cancel()
        if self.task is not None:
            await asyncio.wait([self.task])

    async def beyond(self, planes: int) -> None:
        """Until more than so many are written; all of them: until they are committed.

        RAISES StreamFailed when that takes too long."""
        try:
            async with asyncio.timeout(STALL_NS / NS_PER_S):
                while self.planes <= planes and not self.sums:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise StreamFailed("stalled", f"nothing was written after {planes} planes") from error

    def over(self) -> None:
        """Nothing of it is read any more."""
        if self._lease_id:
            self._here.ledger.release(self._lease_id, OWNER, self._here.clock.now_ns())
            self._lease_id = 0
            self._here.settle()

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


class Pusher:
    """One owner, the event loop's thread."""

    def __init__(self, here: Pushing) -> None:
        self._here = here
        self._pushes: dict[int, Push] = {}
        self._by_tip: dict[StorageKey, Push] = {}
        self._is_closed = False

    def __len__(self) -> int:
        """How many are on their way."""
        return len(self._pushes)

    def begin(self, name: str, reservation: Reservation, ended: Callable[[Push], None]) -> Push | None:
        """Bring these blocks to the peer of this name; None when that cannot be begun, which is counted.
        ``ended`` is called when nothing of their slots is read any more. REQUIRES: the reservation is open;
        the caller calls ``keep`` or ``stop`` at its end."""
        here = self._here
        peer = here.named(name)
        known = here.known(NamespaceId(reservation.keys[0][:HASH_BYTES]))
        if peer is None or not peer.is_up or known is None:
            self._count("unknown", f"no peer {name!r:.60} is up")
            return None
        if self._is_closed or len(self._pushes) >= PUSHES_MAX:
            self._count("queue", f"{len(self._pushes)} pushes are on their way")
            return None
        namespace, spec = known
        path = self._before(reservation.keys[0])
        push = Push(here, reservation, spec, self._by_tip.get(path[-1]) if path else None)
        push.task = asyncio.get_running_loop().create_task(self._run(push, peer, namespace, spec))
        self._pushes[reservation.reservation_id] = self._by_tip[reservation.keys[-1]] = push
        push.task.add_done_callback(partial(self._ended, push, ended))
        return push

    def advance(self, reservation_id: int, planes: int) -> None:
        """So many leading planes of every block are written. Nothing when it is not being pushed."""
        push = self._pushes.get(reservation_id)
        if push is not None:
            push.advance(planes)

    async def copy(
        self, name: str, path: Sequence[StorageKey], first: int, priority: Priority = Priority.REPLICATE
    ) -> int:
        """Bring the held blocks of a path from position ``first`` on to this peer, which has those before.

        How many of them it has then."""
        peer = self._here.named(name)
        known = self._here.known(NamespaceId(path[0][:HASH_BYTES])) if path else None
        if peer is None or not peer.is_up or known is None:
            self._count("unknown", f"no peer {name!r:.60} is up")
            return 0
        namespace, spec = known
        done = [first]
        try:
            async with translated(), peer.streams(namespace.tenant).turn() as channel:
                outlet = self._outlet(peer, channel, namespace, spec, priority)
                await self._copy(outlet, path, done, spec)
        except StreamFailed as error:
            self._count(error.reason, f"a copy to {name}: {error}")
        return done[0] - first

    async def close(self) -> None:
        """Nothing is read for a push any more. May be called twice."""
        self._is_closed = True
        await asyncio.gather(*(push.stop() for push in self._pushes.values()))

    # --- one push -------------------------------------------------------------------------------

    def _before(self, key: StorageKey) -> list[StorageKey]:
        """The blocks before it that are held here, first to last."""
        return list(self._here.ledger.ancestors(key))[:0:-1]

    def _outlet(
        self, peer: Peer, channel: AsyncChannel, namespace: Namespace, spec: BlockSpec, priority: Priority
    ) -> Outlet:
        namespace_id = namespace.namespace_id()
        return Outlet(peer, channel, namespace_id, namespace, spec, self._here.clock, priority)

    async def _run(self, push: Push, peer: Peer, namespace: Namespace, spec: BlockSpec) -> None:
        try:
            if push.after is not None and push.after.task is not None:
                await asyncio.wait([push.after.task])
            async with translated(), peer.streams(namespace.tenant).turn() as channel:
                outlet = self._outlet(peer, channel, namespace, spec, Priority.DECODE)
                await self._push(outlet, push, spec)
        except StreamFailed as error:
            self._count(error.reason, f"a push to {peer.name}: {error}")

    async def _push(self, outlet: Outlet, push: Push, spec: BlockSpec) -> None:
        reserved = await self._reserve(outlet, push.reservation.keys, spec)
        if not reserved.count:
            if reserved.start < len(push.reservation.keys):
                raise _no_room(reserved)
            return  # It has them all.
        mine = slice(reserved.start, reserved.start + reserved.count)
        blocks = self._views(push.reservation.slots[mine], spec)
        plane = 0
        while plane < spec.plane_count:
            await push.beyond(plane)
            end = push.planes
            await outlet.write(reserved, blocks, plane, end)
            plane = end
        await push.beyond(plane)
        await outlet.commit(reserved, push.sums[mine])
        self._pushed(reserved.count, spec)

    async def _reserve(self, outlet: Outlet, keys: Sequence[StorageKey], spec: BlockSpec) -> Reserved:
        path = self._before(keys[0])
        try:
            return await outlet.reserve(keys, path[-1] if path else None)
        except StreamFailed as error:
            if error.reason != "parent" or not path:
                raise
        await self._copy(outlet, path, [0], spec)
        return await outlet.reserve(keys, path[-1])

    async def _copy(
        self, outlet: Outlet, path: Sequence[StorageKey], done: list[int], spec: BlockSpec
    ) -> None:
        """``done[0]`` grows to how many leading blocks of the path the peer has. RAISES StreamFailed."""
        step = max(1, min(COPY_BLOCKS_MAX, COPY_BYTES // spec.block_bytes))
        while (at := done[0]) < len(path):
            keys = path[at : at + step]
            reserved = await outlet.reserve(keys, path[at - 1] if at else None)
            if reserved.count:
                first = at + reserved.start
                await self._copy_group(outlet, reserved, path[first : first + reserved.count], spec)
            elif reserved.start < len(keys):
                raise _no_room(reserved)
            done[0] = at + reserved.start + reserved.count

    async def _copy_group(
        self, outlet: Outlet, reserved: Reserved, keys: Sequence[StorageKey], spec: BlockSpec
    ) -> None:
        ledger, clock = self._here.ledger, self._here.clock
        lease = ledger.borrow(keys, OWNER, clock.now_ns() + HOLD_NS)
        try:
            if len(lease.keys) < len(keys):
                raise StreamFailed("gone", "a block is not held here any more")
            sums = [ledger.chunk_sums(key) for key in keys]
            await outlet.write(reserved, self._views(lease.slots, spec), 0, spec.plane_count)
            await outlet.commit(reserved, sums)
        finally:
            if lease.lease_id:
                ledger.release(lease.lease_id, OWNER, clock.now_ns())
            self._here.settle()
        self._pushed(reserved.count, spec)

    def _views(self, slots: Sequence[Slot], spec: BlockSpec) -> list[memoryview]:
        return [self._here.memory.view(slot, spec.block_bytes) for slot in slots]

    def _pushed(self, count: int, spec: BlockSpec) -> None:
        self._here.counters["pushed_blocks"] += count
        self._here.counters["pushed_bytes"] += count * spec.block_bytes

    def _count(self, reason: str, why: str) -> None:
        self._here.counters[f"push_failures:{reason}"] += 1
        log.info("blocks were not pushed (%s): %s", reason, why)

    def _ended(self, push: Push, ended: Callable[[Push], None], task: asyncio.Task[None]) -> None:
        """However it ended, and even if it never began."""
        del self._pushes[push.reservation.reservation_id]
        tip = push.reservation.keys[-1]
        if self._by_tip.get(tip) is push:
            del self._by_tip[tip]
        push.over()
        ended(push)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Our own code is wrong: as with any task of the node, the command ends the process.
            task.get_loop().call_exception_handler({"message": "a push to a peer", "exception": error})


def _no_room(reserved: Reserved) -> StreamFailed:
    return StreamFailed("busy" if reserved.reason == "busy" else "full", f"there: {reserved.reason}")
