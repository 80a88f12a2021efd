"""The peers of a node: which of them holds how much of a prefix, and whom to ask first.

    each peer ── its events ──► one locality index ── find(blocks) ──► candidates, best first
    a fetch that failed ──────► not asked for this block for a while ─┘

Whoever holds more of what is asked comes first; of those that hold as much, one whose word is current, then
one that has it in memory and not on a disk, then the one that would have it here soonest. The index may be
behind: a block that it names and the peer has not is a miss, a block that it does not name is not looked for,
but at the peer that a request names as its source.

Invariants: the index takes ``INDEX_BYTES_MAX`` at most, the blamed are ``BLAMED_MAX``; a peer that
is away, or this node itself, is no candidate; of those with one name one is followed.

The sum: a look-up takes some microseconds, however long the prefix; 30 bytes of memory a block held.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvcache.block import HASH_BYTES, NamespaceId, StorageKey, hints
from kvcache.clock import Clock
from kvcache.errors import NotAllowed
from kvcache.index import ALL_TIERS
from kvcache.locality import TIERS, LocalityIndex
from kvcache.peers.load import Load
from kvcache.peers.peer import Arrived, Here, Peer, Plane, Sums, Wanted
from kvcache.peers.replicate import Lack
from kvcache.transport.base import Priority
from kvcache.wire import Welcome

INDEX_BYTES_MAX = 64 << 20
BLAMED_MAX = 4_096
STATES = ("ok", "loading", "lost")

_HOST = TIERS.index("host")
_REACHED = ALL_TIERS & ~(1 << TIERS.index("hbm"))
"""What is only in a GPU's memory is for the engines on that GPU: a peer is not given it."""


class Giver(Protocol):
    """Where blocks are had: a peer, or several of which each gives a part (``kvcache.peers.cut``)."""

    load: Load
    turns: asyncio.Semaphore

    @property
    def address(self) -> str:
        """Unlike that of any other."""

    @property
    def name(self) -> str: ...

    @property
    def may_be_asked(self) -> bool: ...

    async def fetch(
        self, wanted: Wanted, into: Sequence[memoryview], deadline_ns: int, priority: Priority
    ) -> Arrived:
        """As ``Peer.fetch``."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that holds the leading ``blocks`` of what was asked for, ``in_memory`` of them not on disk."""

    peer: Giver
    blocks: int
    in_memory: int
    is_current: bool

    @property
    def on_disk(self) -> bool:
        """Some of them, and which is not said, have to be read from a disk there."""
        return self.in_memory < self.blocks

    def rank(self, start: int, count: int, block_bytes: int) -> tuple[int, bool, bool, float]:
        """To bring ``count`` blocks from ``start`` on: lowest first."""
        there = max(0, min(count, self.blocks - start))
        return -there, not self.is_current, self.on_disk, self.peer.load.queue_s(count * block_bytes)


class Directory:
    """One owner, the event loop's thread. ``start`` follows, ``close`` ends."""

    def __init__(self, addresses: Sequence[str], here: Here, plane: Plane, sums: Sums, clock: Clock) -> None:
        """RAISES BadInput when one of ``addresses`` is none of a control connection."""
        self.index = LocalityIndex(INDEX_BYTES_MAX)
        self.peers = [
            Peer(address, here, plane, self.index, sums, clock, self._admit) for address in addresses
        ]
        self._clock = clock
        self._blamed: dict[StorageKey, dict[str, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        for peer in self.peers:
            task = asyncio.get_running_loop().create_task(peer.run())
            self._tasks.add(task)
            task.add_done_callback(_ended)

    def tick(self) -> None:
        """Called by the node's timer."""
        self.index.tick(self._clock.now_ns())
        for peer in self.peers:
            peer.tick()

    async def close(self) -> None:
        """REQUIRES: nobody fetches any more. May be called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self.peers:
            await peer.close()

    def named(self, name: str) -> Peer | None:
        """The peer of this name, once it was reached."""
        return next((peer for peer in self.peers if name and peer.name == name and not peer.is_self), None)

    def find(self, keys: Sequence[StorageKey], source: str = "") -> list[Candidate]:
        """Who holds the first of ``keys``, and how many of those behind it. ``source`` names a peer that has
        them all, whatever the index says. REQUIRES: keys of one namespace, one at least."""
        namespace = NamespaceId(keys[0][:HASH_BYTES])
        found_at = self.index.match(_hints(keys), (namespace,), tiers=_REACHED).located()
        located = {each.source: each for each in found_at}
        current = {state.source for state in self.index.sources() if state.synced}
        blamed, now_ns = self._blamed_at(keys), self._clock.now_ns()
        found: list[Candidate] = []
        for peer in self.peers:
            if peer.is_self or not peer.may_be_asked:
                continue
            told = located.get(peer.name)
            blocks, in_memory = (told.blocks, told.tiers[_HOST]) if told is not None else (0, 0)
            if source and peer.name == source:
                in_memory += len(keys) - blocks
                blocks = len(keys)
            on_disk = in_memory < blocks
            first = next((at for at, until in blamed if until.get(peer.address, 0) > now_ns), blocks)
            blocks = min(first, blocks)
            if blocks:  # Which of them are on disk is not known.
                in_memory = min(in_memory, blocks - on_disk)
                found.append(Candidate(peer, blocks, in_memory, peer.name in current))
        return found

    def lacking(self, keys: Sequence[StorageKey]) -> list[Lack]:
        """Which peers, of those whose word is current, hold less than all of these. REQUIRES: keys of one
        namespace, from the first of a prompt on."""
        if not keys:
            return []
        namespace = NamespaceId(keys[0][:HASH_BYTES])
        located = self.index.match(_hints(keys), (namespace,), tiers=_REACHED).located()
        held = {each.source: each.blocks for each in located}
        current = {state.source for state in self.index.sources() if state.synced}
        return [
            Lack(peer.name, held.get(peer.name, 0))
            for peer in self.peers
            if peer.is_up and not peer.is_self and peer.name in current
            if held.get(peer.name, 0) < len(keys)
        ]

    def blame(self, peer: Giver, keys: Sequence[StorageKey], rest_ns: int) -> None:
        """Do not ask this peer for these blocks for so long."""
        until_ns = self._clock.now_ns() + rest_ns
        for key in keys:
            until = self._blamed.pop(key, {})
            until[peer.address] = until_ns
            self._blamed[key] = until
        while len(self._blamed) > BLAMED_MAX:
            del self._blamed[next(iter(self._blamed))]

    def state_of(self, peer: Peer) -> str:
        """One of ``STATES``."""
        if not peer.is_up:
            return "lost"
        return (
            "ok"
            if any(each.source == peer.name and each.synced for each in self.index.sources())
            else "loading"
        )

    def troubles(self) -> list[str]:
        found = [peer.trouble for peer in self.peers if peer.trouble]
        if any(state.partial for state in self.index.sources()):
            found.append(
                f"the peers hold more blocks than {INDEX_BYTES_MAX >> 20} MiB of index can name: "
                "some of them are not known here, and not fetched"
            )
        return found

    def stats(self) -> dict[str, float]:
        others = [peer for peer in self.peers if not peer.is_self]
        states = Counter(self.state_of(peer) for peer in others)
        return {
            **{f"peers:{state}": float(states[state]) for state in STATES},
            "peer_known_blocks": float(self.index.entries),
            "peer_coming_bytes": float(sum(peer.load.bytes for peer in others)),
            "peer_read_bytes_per_second": sum(peer.load.rate.value() or 0.0 for peer in others),
        }

    def _admit(self, peer: Peer, welcome: Welcome) -> None:
        """Two of one name would be one in the index, now this and now that. RAISES NotAllowed while another
        of that name is followed."""
        others = [each for each in self.peers if each is not peer and each.name == welcome.node]
        for other in others:
            if other.is_up:
                raise _namesakes(other, peer.address, welcome)
            other.forget()

    def _blamed_at(self, keys: Sequence[StorageKey]) -> list[tuple[int, dict[str, int]]]:
        """Where among these are blocks for which somebody was blamed, and until when each is not asked."""
        if not self._blamed:
            return []
        return [(at, self._blamed[key]) for at, key in enumerate(keys) if key in self._blamed]


def _hints(keys: Sequence[StorageKey]) -> bytes:
    return hints([key[HASH_BYTES:] for key in keys])


def _namesakes(followed: Peer, address: str, welcome: Welcome) -> NotAllowed:
    where, name = f"{followed.address} and {address}", welcome.node
    if followed.incarnation == welcome.incarnation:
        return NotAllowed(
            "bad_config",
            f"{where} lead to one node, {name}",
            "it is followed at the first of them",
            "name it once in peers",
        )
    return NotAllowed(
        "bad_config",
        f"the nodes at {where} are both called {name}",
        "peers are told apart by their names, so only the first of them is followed",
        "give each node a name of its own",
    )


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        # Our own code is wrong: as with any task of the node, the command ends the process.
        task.get_loop().call_exception_handler({"message": "following a peer", "exception": error})
