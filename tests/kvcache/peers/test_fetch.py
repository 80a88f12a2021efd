"""Fetches from peers that are a few lines of test: how far is looked, who is blamed, and what is kept."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps

import pytest

from kvcache.block import HASH_BYTES, BlockHash, NamespaceId, StorageKey, storage_key
from kvcache.clock import NS_PER_S
from kvcache.leaf_lru import LeafLru
from kvcache.ledger import Ledger
from kvcache.peers import fetch
from kvcache.peers.directory import Candidate, Giver
from kvcache.peers.fetch import Asked, Fetcher, Rules
from kvcache.peers.load import Load
from kvcache.peers.peer import Arrived, FetchFailed, Wanted
from kvcache.tiers.host import HostTier
from kvcache.tiers.space import Space
from kvcache.transport.base import Priority
from tests.server.talk import SIZE, SPEC

NAMESPACE = NamespaceId(bytes(HASH_BYTES))
KEYS = [storage_key(NAMESPACE, BlockHash(number.to_bytes(HASH_BYTES, "big"))) for number in range(1, 65)]
CAPACITY, UNIT = 64 * SIZE, 8 * SIZE
IN_FLIGHT_MAX = 16


def plays(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Run it in a loop of its own."""

    @wraps(test)
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    return run


class StoppedClock:
    def __init__(self) -> None:
        self.ns = NS_PER_S

    def now_ns(self) -> int:
        return self.ns


class FakePeer:
    """Gives everything but groups that begin with a block of ``lost``; those of ``late`` never come."""

    def __init__(self, name: str, holds: int) -> None:
        self.name = self.address = name
        self.holds = holds
        self.lost: set[StorageKey] = set()
        self.late: set[StorageKey] = set()
        self.load = Load()
        self.turns = asyncio.Semaphore(4)
        self.may_be_asked = True
        self.asked: list[Wanted] = []

    async def fetch(
        self, wanted: Wanted, into: Sequence[memoryview], deadline_ns: int, priority: Priority
    ) -> Arrived:
        self.asked.append(wanted)
        if wanted.keys[0] in self.lost:
            raise FetchFailed("gone", "as the test wants it")
        if wanted.keys[0] in self.late:
            await asyncio.Event().wait()
        return Arrived([(bytes(16), b"")] * len(wanted.keys), len(wanted.keys), [])


class Rig:
    """A fetcher of groups of two blocks, and what it works on. It is its own directory."""

    def __init__(self, *peers: FakePeer) -> None:
        self.peers = peers
        self.clock = StoppedClock()
        space, host = Space(CAPACITY, UNIT), HostTier(CAPACITY, UNIT)
        self.ledger, self.host = Ledger(space, LeafLru), host
        self.arena = space.add_arena()
        host.add_arena("a")
        self.counters: Counter[str] = Counter()
        self.looked: list[int] = []
        self.blamed: list[str] = []
        self.told: list[Sequence[StorageKey]] = []
        self.fetcher = Fetcher(
            self.ledger,
            host,
            self,
            Rules(NS_PER_S, keep=True),
            self.clock,
            self.counters,
            lambda: host.apply(space.take_moves()),
            self.told.append,
        )

    def find(self, keys: Sequence[StorageKey], source: str = "") -> list[Candidate]:
        self.looked.append(len(keys))
        first = KEYS.index(keys[0])
        held = [(peer, min(len(keys), peer.holds - first)) for peer in self.peers]
        return [Candidate(peer, count, count, True) for peer, count in held if count > 0]

    def blame(self, peer: Giver, keys: Sequence[StorageKey], rest_ns: int) -> None:
        self.blamed.append(peer.name)

    def ask(self, keys: Sequence[StorageKey], first: int = 0, parent: StorageKey | None = None) -> int:
        return self.fetcher.ask(keys, first, Asked("", NAMESPACE, SPEC, self.arena, parent))

    async def ended(self, keys: Sequence[StorageKey]) -> None:
        await self.fetcher.wait(keys, 5 * NS_PER_S)
        assert not self.fetcher.coming(keys)
        self.ledger.check()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "GROUP_BYTES", 2 * SIZE)
    monkeypatch.setattr(fetch, "UNTOLD_MAX", 3)


@plays
async def test_no_more_is_looked_for_than_can_be_on_its_way() -> None:
    """A prompt of 65,536 blocks that ten peers hold would else stop the node for a second."""
    rig = Rig(FakePeer("a", len(KEYS)))
    assert rig.ask(KEYS) == IN_FLIGHT_MAX
    assert rig.looked == [IN_FLIGHT_MAX]
    await rig.fetcher.close()


@plays
async def test_one_line_tells_of_many_groups_that_did_not_come() -> None:
    peer = FakePeer("a", len(KEYS))
    peer.lost.update(KEYS)
    rig = Rig(peer)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    fetch.log.addHandler(handler)
    fetch.log.setLevel(logging.INFO)
    try:
        rig.ask(KEYS[:8])
        await rig.ended(KEYS[:8])
    finally:
        fetch.log.removeHandler(handler)
        fetch.log.setLevel(logging.NOTSET)
    assert rig.counters["peer_failed_fetches:gone"] == 4
    [line] = said
    assert "the peer a (gone)" in line


@plays
async def test_a_peer_is_not_asked_when_the_time_is_over() -> None:
    """Nor is it its fault: others had their turns."""
    first, next_ = FakePeer("a", 2), FakePeer("b", 1)
    first.lost.add(KEYS[0])
    rig = Rig(first, next_)
    for _ in range(4):
        await next_.turns.acquire()
    assert rig.ask(KEYS[:2]) == 2
    while not rig.blamed:
        await asyncio.sleep(0)
    rig.clock.ns += NS_PER_S
    next_.turns.release()
    await rig.ended(KEYS[:2])
    assert next_.asked == []
    assert rig.blamed == ["a"]
    assert rig.counters["peer_failed_fetches:late"] == 1


@plays
async def test_what_came_and_can_not_be_found_is_not_remembered_for_ever() -> None:
    """The group before it failed; and something is always on its way."""
    peer = FakePeer("a", len(KEYS))
    rig = Rig(peer)
    peer.late.add(KEYS[-1])
    assert rig.ask(KEYS[-1:]) == 1
    for at in range(0, 20, 4):
        peer.lost.add(KEYS[at])
        assert rig.ask(KEYS[at : at + 4]) == 4
        await rig.ended(KEYS[at : at + 4])
    assert len(rig.fetcher._untold) == 3
    assert rig.told == []
    await rig.fetcher.close()
