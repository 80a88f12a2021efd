"""Who is asked for what, as far as the index and what went wrong lately say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from kvcache.block import HASH_BYTES, BlockHash, NamespaceId, StorageKey, storage_key
from kvcache.clock import NS_PER_S
from kvcache.following import Channel
from kvcache.peers import directory
from kvcache.peers.directory import Directory
from kvcache.peers.peer import Here
from kvcache.transport.base import Endpoint
from kvcache.wire import BlockEvent, EventBatch

NAMESPACE = NamespaceId(bytes(HASH_BYTES))
HASHES = [BlockHash(number.to_bytes(HASH_BYTES, "big")) for number in range(1, 9)]
KEYS = [storage_key(NAMESPACE, each) for each in HASHES]


class StoppedClock:
    def __init__(self) -> None:
        self.ns = NS_PER_S

    def now_ns(self) -> int:
        return self.ns


class NoPlane:
    def usable(self, theirs: Sequence[str]) -> str:
        raise NotImplementedError

    async def endpoint(self, address: str, deadline_ns: int) -> Endpoint:
        raise NotImplementedError


async def no_sums(views: Sequence[memoryview], chunk_bytes: int) -> bytes:
    raise NotImplementedError


class World:
    """Peers that are up, and have told what they hold."""

    def __init__(self, *names: str) -> None:
        self.clock = StoppedClock()
        here = Here("here", 1, "", lambda tenant: b"")
        addresses = [f"tcp://127.0.0.1:{number}" for number in range(1, len(names) + 1)]
        self.directory = Directory(addresses, here, NoPlane(), no_sums, self.clock)
        for peer, name in zip(self.directory.peers, names, strict=True):
            peer._following.node = name
            peer._following.calls = cast(Channel, object())

    def tell(self, name: str, **held: Sequence[BlockHash]) -> None:
        """By tier."""
        events = [
            BlockEvent("stored", NAMESPACE, tier, hashes=b"".join(hashes)) for tier, hashes in held.items()
        ]
        batch = EventBatch(name, 1, 1, True, events)
        self.directory.index.apply(batch, self.clock.now_ns())

    def find(self, keys: Sequence[StorageKey] = KEYS) -> dict[str, tuple[int, bool]]:
        """How many blocks each has, and whether some are on disk."""
        return {each.peer.name: (each.blocks, each.on_disk) for each in self.directory.find(keys)}


@pytest.fixture
def world() -> World:
    async def made() -> World:
        return World("a", "b")

    return asyncio.run(made())


def test_who_was_blamed_for_a_block_is_not_asked_for_it_for_a_while(world: World) -> None:
    a = world.directory.peers[0]
    for name in "ab":
        world.tell(name, host=HASHES)
    world.directory.blame(a, [KEYS[5], KEYS[3]], NS_PER_S)
    assert world.find() == {"a": (3, False), "b": (8, False)}
    assert world.find(KEYS[3:]) == {"b": (5, False)}
    assert world.find(KEYS[4:]) == {"a": (1, False), "b": (4, False)}
    world.clock.ns += NS_PER_S
    assert world.find() == {"a": (8, False), "b": (8, False)}


def test_only_so_many_blames_are_remembered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "BLAMED_MAX", 2)
    a, b = world.directory.peers
    world.tell("a", host=HASHES)
    for at in (1, 3, 5):
        world.directory.blame(a, [KEYS[at]], NS_PER_S)
        world.directory.blame(b, [KEYS[at]], NS_PER_S)
    assert world.find() == {"a": (3, False)}


def test_of_fewer_blocks_some_may_be_on_disk_too(world: World) -> None:
    """Such a peer is asked for them with those before them, which it needs to read them."""
    world.tell("a", nvme=HASHES[:2], host=HASHES[2:])
    assert world.find() == {"a": (8, True)}
    world.directory.blame(world.directory.peers[0], [KEYS[4]], NS_PER_S)
    assert world.find() == {"a": (4, True)}
