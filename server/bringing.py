"""What a request can have beyond host memory: from NVMe, then from peers, brought by one hand.

    keys ──► in host memory ──► on NVMe: starts coming ──► at a peer: starts coming ──► a miss
             └──────────────── how many leading blocks are there, or will be ─────────┘

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
from kvcache.tiers.stack import Stack


class Bringing:
    """One owner, the event loop's thread. What brings is set once, by who puts the node together."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self.stack: Stack | None = None
        self.directory: Directory | None = None
        self.fetcher: Fetcher | None = None

    @property
    def is_able(self) -> bool:
        """Is there anything beside host memory to bring blocks from?"""
        return self.stack is not None or self.fetcher is not None

    def ask(self, keys: Sequence[StorageKey], asked: Asked, *, from_peers: bool) -> int:
        """How many leading blocks are in host memory, or will be if all goes well: they start coming."""
        if self.stack is None:
            there = self._ledger.match(keys)
        else:
            there = self.stack.ask(keys, asked.arena, asked.spec.block_tokens, asked.prefill_tokens_s)
        if self.fetcher is None or not from_peers or there == len(keys):
            return there
        return self.fetcher.ask(keys, there, asked)

    def coming(self, keys: Sequence[StorageKey]) -> int:
        """How many of these, leading, are on their way."""
        at = 0
        while at < len(keys):
            step = self.stack.coming(keys[at:]) if self.stack is not None else 0
            if self.fetcher is not None:
                step += self.fetcher.coming(keys[at + step :])
            if not step:
                break
            at += step
        return at

    async def wait(self, keys: Sequence[StorageKey], asked: Asked, wait_ns: int, *, from_peers: bool) -> None:
        """Until none of these is on its way, or the time is over. What there was no room to bring at first
        starts coming meanwhile."""
        end_ns = self._clock.now_ns() + wait_ns
        held = self._ledger.match(keys)
        while True:
            await self._wait(keys[held:], end_ns - self._clock.now_ns())
            before, held = held, self._ledger.match(keys)
            count = self.ask(keys, asked, from_peers=from_peers)
            if count <= held or held <= before or self._clock.now_ns() >= end_ns:
                return

    def touched(self, path: Sequence[StorageKey]) -> None:
        """A request was given these blocks of the host tier."""
        if self.stack is not None:
            self.stack.touched(path)

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
        """Nothing is fetched any more, and nobody followed. The stack is closed by who made it."""
        if self.fetcher is not None:
            await self.fetcher.close()
        if self.directory is not None:
            await self.directory.close()

    async def _wait(self, keys: Sequence[StorageKey], wait_ns: int) -> None:
        waits = [each.wait(keys, max(0, wait_ns)) for each in (self.stack, self.fetcher) if each is not None]
        await asyncio.gather(*waits)
