"""Who is asked first for which blocks, and who is not asked at all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from kvcache.block import HASH_BYTES, BlockHash, NamespaceId, StorageKey, storage_key
from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.errors import BadInput, NotAllowed, Unavailable
from kvcache.events import TIER_HBM, TIER_HOST, TIER_NVME, Publisher
from kvcache.ledger import Change
from kvcache.namespace import Namespace
from kvcache.peers import directory as module
from kvcache.peers.directory import Directory
from kvcache.peers.peer import Here, Peer
from kvcache.testing.clock import FakeClock
from kvcache.transport.base import Endpoint, PeerLost
from kvcache.wire import Welcome
from tests.server.talk import HASHES, example

SPACE: Namespace = example(tenant="t")
NAMESPACE: NamespaceId = SPACE.namespace_id()
KEYS = [storage_key(NAMESPACE, BlockHash(block)) for block in HASHES]
KEY = b"key of the tenant"


class NoPlane:
    def usable(self, theirs: Sequence[str]) -> str:
        return theirs[0] if theirs else ""

    async def endpoint(self, address: str, deadline_ns: int) -> Endpoint:
        raise PeerLost("nobody")


async def no_sums(views: Sequence[memoryview], chunk_bytes: int) -> bytes:
    return b""


class World:
    """A directory whose peers are met, and tell, as the test says."""

    def __init__(self, *names: str) -> None:
        self.clock = FakeClock()
        here = Here("here", 7, "", lambda tenant: KEY)
        addresses = [f"tcp://127.0.0.1:{port}" for port in range(1, len(names) + 1)]
        self.directory = Directory(addresses, here, NoPlane(), no_sums, self.clock)
        self.publishers: dict[str, Publisher] = {}
        for peer, name in zip(self.directory.peers, names, strict=True):
            self.meet(peer, name)
            self.publishers[name] = Publisher(name, 1)
            self.publishers[name].announce(SPACE)
            for batch in self.publishers[name].snapshot():
                self.directory.index.apply(batch, 0)

    def meet(self, peer: Peer, name: str, incarnation: int = 1, data: str = "tcp://127.0.0.1:9") -> None:
        welcome = Welcome(1, name, incarnation, "t", [], KEY, 0, [data] if data else [])
        peer.met(welcome)
        peer._following.node, peer._following.incarnation = name, incarnation
        peer._following.calls = object()  # type: ignore[assignment]

    def tells(self, name: str, count: int, tier: str = TIER_HOST) -> None:
        """It holds so many leading blocks."""
        change = Change("stored", tuple(KEYS[:count]), None, "committed")
        for batch in self.publishers[name].publish([change], tier):
            self.directory.index.apply(batch, 0)

    def found(self, start: int = 0, end: int = 16, source: str = "") -> list[tuple[str, int]]:
        found = self.directory.find(KEYS[start:end], source)
        found.sort(key=lambda each: each.rank(0, end - start, 1 << 20))
        return [(each.peer.name, each.blocks) for each in found]

    def peer(self, name: str) -> Peer:
        found = self.directory.named(name)
        assert found is not None
        return found


def test_who_holds_more_is_asked_first() -> None:
    world = World("a", "b", "c")
    world.tells("a", 4)
    world.tells("b", 8)
    assert world.found() == [("b", 8), ("a", 4)]
    assert world.found(start=2, end=4) == [("a", 2), ("b", 2)]
    assert world.found(start=5) == [("b", 3)]
    assert world.found(start=8) == []


def test_of_those_that_hold_as_much_memory_goes_before_disk_and_the_idle_before_the_busy() -> None:
    world = World("a", "b", "c")
    for name, tier in (("a", TIER_NVME), ("b", TIER_HOST), ("c", TIER_HOST)):
        world.tells(name, 8, tier)
    world.peer("b").load.assign(1 << 20)
    assert [name for name, _ in world.found()] == ["c", "b", "a"]
    world.peer("c").load.assign(4 << 20)
    assert [name for name, _ in world.found()] == ["b", "c", "a"]
    for _ in range(8):
        world.peer("c").load.rate.add(10 << 30, NS_PER_S)
        world.peer("b").load.rate.add(1 << 20, NS_PER_S)
    assert [name for name, _ in world.found()] == ["c", "b", "a"], "it is busy, and fast"


def test_what_is_only_in_a_peers_gpu_is_not_asked_for() -> None:
    world = World("a", "b")
    world.tells("a", 8, TIER_HBM)
    assert world.found() == []
    world.tells("a", 3)
    assert world.found() == [("a", 3)]
    assert [(each.name, each.held) for each in world.directory.lacking(KEYS[:4])] == [("a", 3), ("b", 0)]


def test_one_whose_word_is_old_is_asked_last() -> None:
    world = World("a", "b")
    world.tells("a", 8)
    world.tells("b", 8)
    world.directory.index.suspect("a")
    assert [name for name, _ in world.found()] == ["b", "a"]
    assert world.directory.state_of(world.peer("a")) == "loading"


def test_one_that_is_away_or_rests_is_not_asked() -> None:
    world = World("a", "b")
    world.tells("a", 8)
    world.tells("b", 8)
    world.peer("a")._following.calls = None
    world.peer("b").load.rest(world.clock.now_ns())
    assert world.found() == []
    world.clock.advance_ms(1_000)
    assert [name for name, _ in world.found()] == ["b"]
    told = world.directory.stats()
    assert (told["peers:lost"], told["peers:ok"]) == (1, 1)
    assert len(world.directory.troubles()) == 1


def test_the_source_that_is_named_is_taken_to_have_all() -> None:
    world = World("a", "b")
    world.tells("a", 8)
    assert world.found(source="b") == [("b", 16), ("a", 8)]
    assert world.found(source="z") == [("a", 8)]


def test_who_is_blamed_for_a_block_is_not_asked_for_it_for_a_while() -> None:
    world = World("a", "b")
    world.tells("a", 8)
    world.tells("b", 8)
    world.directory.blame(world.peer("a"), KEYS[3:4], 100 * NS_PER_MS)
    assert world.found() == [("b", 8), ("a", 3)]
    assert world.found(start=3) == [("b", 5)]
    assert world.found(start=4) == [("a", 4), ("b", 4)]
    world.clock.advance_ms(101)
    assert world.found(start=3) == [("a", 5), ("b", 5)]


def test_what_is_blamed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLAMED_MAX", 4)
    world = World("a")
    world.tells("a", 8)
    world.directory.blame(world.peer("a"), KEYS[:8], NS_PER_S)
    assert len(world.directory._blamed) == 4
    assert world.found() == [("a", 4)]


def test_blocks_of_another_namespace_are_not_found() -> None:
    world = World("a")
    world.tells("a", 8)
    other = StorageKey(bytes(HASH_BYTES) + KEYS[0][HASH_BYTES:])
    assert world.directory.find([other]) == []


def test_a_node_that_meets_itself_or_its_namesake_does_not_follow() -> None:
    world = World("a")
    peer = world.directory.peers[0]
    with pytest.raises(Unavailable, match="this node itself"):
        world.meet(peer, "here", 7)
    assert peer.is_self and not peer.trouble and world.directory.named("a") is None
    with pytest.raises(NotAllowed, match="a name of its own"):
        world.meet(peer, "here", 8)
    assert not peer.is_self


def test_a_peer_without_a_way_to_its_bytes_is_a_trouble_until_it_has_one() -> None:
    world = World("a")
    peer = world.directory.peers[0]
    world.meet(peer, "a", data="")
    assert "has no data address that this node can use" in world.directory.troubles()[0]
    world.meet(peer, "a")
    assert world.directory.troubles() == []


def test_an_address_that_is_none_is_refused_at_the_start() -> None:
    for address in ("ucx://127.0.0.1:1", "tcp://nowhere", "x"):
        with pytest.raises(BadInput):
            Directory([address], Here("h", 1, "", lambda _: b""), NoPlane(), no_sums, FakeClock())


def test_a_full_index_is_a_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INDEX_BYTES_MAX", 1_000)
    world = World("a")
    world.tells("a", 8)
    assert any("are not known here" in text for text in world.directory.troubles())
    assert world.found() == []


def test_close_ends_what_start_began() -> None:
    async def work() -> None:
        world = World("a")
        world.directory.start()
        await asyncio.sleep(0)
        await world.directory.close()
        await world.directory.close()

    asyncio.run(work())


def test_of_two_peers_with_one_name_the_first_is_followed_and_the_second_told_of() -> None:
    world = World("a", "b")
    world.tells("a", 8)
    a, b = world.directory.peers
    with pytest.raises(NotAllowed, match=r":1 and tcp://127.0.0.1:2 are both called a .* name of its own"):
        world.meet(b, "a", incarnation=2)
    with pytest.raises(NotAllowed, match=r":1 and tcp://127.0.0.1:2 lead to one node, a .* name it once"):
        world.meet(b, "a", incarnation=1)
    assert world.found() == [("a", 8)]
    world.meet(a, "a", incarnation=5)  # It has started again: no other has its name.


def test_a_name_goes_over_to_another_when_its_node_is_away() -> None:
    world = World("a", "b")
    world.tells("a", 8)
    a, b = world.directory.peers
    a._following.calls = None
    b._following.calls = None
    world.meet(b, "a", incarnation=0)
    assert world.directory.named("a") is b
    assert [each.source for each in world.directory.index.sources()] == ["b"], (
        "what the other told is not its word"
    )
    with pytest.raises(NotAllowed):
        world.meet(a, "a")
