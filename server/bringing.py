"""What a request can have beyond host memory: from NVMe, then from peers, brought by one hand.

    keys ──► in host memory ──► on NVMe: starts coming ──► at a peer: starts coming ──► a miss
             └──────────────── how many leading blocks are there, or will be ─────────┘

Who names a peer that computes them is given them while they are written; who says that a peer brings them is
given them when they have come.

A node that asks gets what is here, on NVMe too, but nothing is fetched for it: two nodes that lack a block
would ask each other for ever.

The sum: nothing where there is neither tier nor peer; else what ``Promoter.ask`` and ``Fetcher.ask`` cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvcache.block import StorageKey
from kvcache.clock import Clock
from kvcache.ledger import Ledger
from kvcache.peers.directory import Directory
from kvcache.peers.fetch import Asked, Fetcher
from kvcache.peers.push import Pusher
from kvcache.peers.receive import Receiver
from kvcache.peers.replicate import Replicator
from kvcache.server.arriving import Arriving
from kvcache.tiers.stack import Stack


class Bringing:
    """One owner, the event loop's thread. What brings is set once, by who puts the node together."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self.stack: Stack | None = None
        self.directory: Directory | None = None
        self.fetcher: Fetcher | None = None
        self.receiver: Receiver | None = None
        self.pusher: Pusher | None = None
        self.replicator: Replicator | None = None
        self.arriving = Arriving(ledger, clock)

    @property
    def is_able(self) -> bool:
        """Is there anything beside host memory to bring blocks from?"""
        return self.stack is not None or self.fetcher is not None

    def ask(self, keys: Sequence[StorageKey], asked: Asked, *, from_peers: bool) -> int:
        """How many leading blocks are in host memory, or will be if all goes well: they start coming."""
        if self.stack is None:
            there = self._ledger.match(keys)
        else:
            there = self.stack.ask(
                keys, asked.arena, asked.spec.block_tokens, asked.prefill_tokens_s, asked.context
            )
        if asked.pushed:
            return len(keys)
        if asked.source:
            there += self.arriving.coming(keys[there:])
        if self.receiver is not None and from_peers and there < len(keys):
            there = self.receiver.ask(keys, there, asked)
        if self.fetcher is not None and from_peers and there < len(keys):
            there = self.fetcher.ask(keys, there, asked)
        return there

    def coming(self, keys: Sequence[StorageKey], *, with_pushes: bool) -> int:
        """How many of these, leading, are on their way; with what peers bring by themselves, or without."""
        ways = [each.coming for each in (self.stack, self.receiver, self.fetcher) if each is not None]
        if with_pushes:
            ways.append(self.arriving.coming)
        at = 0
        while at < len(keys):
            step = max((way(keys[at:]) for way in ways), default=0)
            if not step:
                break
            at += step
        return at

    def awaits(self, key: StorageKey) -> bool:
        """May it come from a peer that has only been named for it?"""
        return self.receiver is not None and self.receiver.awaits(key)

    async def wait(self, keys: Sequence[StorageKey], asked: Asked, wait_ns: int, *, from_peers: bool) -> None:
        """Until none of these is on its way, or the time is over. What there was no room to bring at first
        starts coming meanwhile."""
        end_ns = self._clock.now_ns() + wait_ns
        held = self._ledger.match(keys)
        while True:
            await self._wait(keys[held:], asked, end_ns - self._clock.now_ns())
            before, held = held, self._ledger.match(keys)
            count = self.ask(keys, asked, from_peers=from_peers)
            if count <= held or held <= before or self._clock.now_ns() >= end_ns:
                return

    def touched(self, path: Sequence[StorageKey], *, by_engine: bool) -> None:
        """A request was given these blocks of the host tier."""
        if self.stack is not None:
            self.stack.touched(path)
        if self.replicator is not None and by_engine and path:
            self.replicator.used(path)

    def tick(self) -> None:
        """Called by the node's timer."""
        if self.directory is not None:
            self.directory.tick()
        if self.replicator is not None:
            self.replicator.tick()

    def committed(self, path: Sequence[StorageKey]) -> None:
        """Blocks of a peer were published in the host tier."""
        if self.stack is not None:
            self.stack.committed(path)

    def stats(self) -> dict[str, float]:
        return {
            name: value
            for each in (self.stack, self.directory)
            if each is not None
            for name, value in each.stats().items()
        }

    def troubles(self) -> list[str]:
        """In plain words, what does not work as it should."""
        return [text for each in (self.stack, self.directory) if each is not None for text in each.troubles()]

    def start(self) -> None:
        """Follow the peers. REQUIRES: a running loop."""
        if self.directory is not None:
            self.directory.start()

    async def close(self) -> None:
        """Nothing is fetched or pushed any more, and nobody followed. The stack is closed by who made it."""
        for each in (self.replicator, self.receiver, self.pusher, self.fetcher):
            if each is not None:
                await each.close()
        if self.directory is not None:
            await self.directory.close()

    async def _wait(self, keys: Sequence[StorageKey], asked: Asked, wait_ns: int) -> None:
        ways = [each.wait for each in (self.stack, self.receiver, self.fetcher) if each is not None]
        waits = [way(keys, max(0, wait_ns)) for way in ways]
        if asked.pushed or asked.source:
            waits.append(self.arriving.wait(keys, wait_ns, for_begin=asked.pushed))
        await asyncio.gather(*waits)
