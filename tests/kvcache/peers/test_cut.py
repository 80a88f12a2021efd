"""Cuts over peers that are a few lines of test: who is asked, who is blamed, and that all ends."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import pytest

from kvcache.block import HASH_BYTES, BlockHash, NamespaceId, StorageKey, storage_key
from kvcache.clock import NS_PER_MS, NS_PER_S, SystemClock
from kvcache.namespace import Namespace
from kvcache.peers import cut
from kvcache.peers.cut import Cut, Cuts, copied
from kvcache.peers.directory import Candidate, Directory
from kvcache.peers.fetch import GONE_REST_NS, WRONG_REST_NS
from kvcache.peers.load import Load
from kvcache.peers.peer import Arrived, FetchFailed, Wanted
from kvcache.sums import block_checksum, sum_chunks
from kvcache.testing.sharded import ShardedModel
from kvcache.transport.base import Priority

MODEL = ShardedModel(plane_count=2, head_count=4, head_bytes=96)
WANTED = MODEL.namespace(1, 0)
HALVES = [MODEL.namespace(2, rank) for rank in range(2)]
COUNT = 5
HASHES = [BlockHash(number.to_bytes(HASH_BYTES, "big")) for number in range(COUNT)]
Hindrance = Callable[[Wanted], Awaitable[None]]


def keys_of(namespace: Namespace, hashes: Sequence[BlockHash] = HASHES) -> list[StorageKey]:
    return [storage_key(namespace.namespace_id(), name) for name in hashes]


def number_of(key: StorageKey) -> int:
    return int.from_bytes(key[HASH_BYTES:], "big")


class FakePeer:
    """Gives what each rank of the model has saved, after ``hindrance``."""

    def __init__(self, name: str, given: int = COUNT, wrong: Sequence[int] = ()) -> None:
        self.name = name
        self.address = f"tcp://{name}"
        self.load = Load()
        self.turns = asyncio.Semaphore(4)
        self.may_be_asked = True
        self.given = given
        self.wrong = wrong
        self.asked: list[Wanted] = []
        self.ended = 0
        self.hindrance: Hindrance | None = None

    async def fetch(
        self, wanted: Wanted, into: Sequence[memoryview], deadline_ns: int, priority: Priority
    ) -> Arrived:
        self.asked.append(wanted)
        try:
            if self.hindrance is not None:
                await self.hindrance(wanted)
        finally:
            self.ended += 1
        rank = next(at for at, each in enumerate(HALVES) if each.namespace_id() == wanted.namespace)
        stored = [memoryview(MODEL.block(number_of(key), 2, rank)) for key in wanted.keys]
        pieces = [piece for block in stored for piece in wanted.part.pieces(block)]
        for target, piece in zip(into, pieces, strict=True):
            target[:] = piece
        good = min([self.given, *self.wrong])
        return Arrived([(b"", b"")] * good, self.given, list(self.wrong))


class FakeDirectory:
    """Knows namespaces, and who has them."""

    def __init__(self, holders: dict[NamespaceId, list[Candidate]], known: Sequence[Namespace]) -> None:
        self.index = self
        self.holders = holders
        self.known = list(known)
        self.looked = 0
        self.blamed: list[tuple[str, tuple[StorageKey, ...], int]] = []
        self.sources: list[str] = []

    def known_namespaces(self) -> list[NamespaceId]:
        return [each.namespace_id() for each in self.known]

    def namespace(self, namespace_id: NamespaceId) -> Namespace | None:
        self.looked += 1
        return next((each for each in self.known if each.namespace_id() == namespace_id), None)

    def find(self, keys: Sequence[StorageKey], source: str = "") -> list[Candidate]:
        self.sources.append(source)
        return self.holders.get(NamespaceId(keys[0][:HASH_BYTES]), [])

    def blame(self, peer: FakePeer, keys: Sequence[StorageKey], rest_ns: int) -> None:
        self.blamed.append((peer.name, tuple(keys), rest_ns))


class World:
    """Two peers, each with one half of the heads."""

    def __init__(self) -> None:
        self.peers = [FakePeer("low"), FakePeer("high")]
        self.holders = {
            half.namespace_id(): [Candidate(peer, COUNT, COUNT, True)]
            for half, peer in zip(HALVES, self.peers, strict=True)
        }
        self.directory = FakeDirectory(self.holders, HALVES)
        self.counters: Counter[str] = Counter()
        clock = SystemClock()
        self.now_ns = clock.now_ns
        directory = cast(Directory, self.directory)
        self.cuts = Cuts(directory, self.namespace, self.sums, clock, self.counters)
        self.slots = [bytearray(MODEL.spec(1).block_bytes) for _ in range(COUNT)]

    def namespace(self, namespace_id: NamespaceId) -> Namespace | None:
        return WANTED if namespace_id == WANTED.namespace_id() else None

    async def sums(self, views: Sequence[memoryview], chunk_bytes: int) -> bytes:
        return sum_chunks(views, chunk_bytes)

    def found(self) -> Candidate:
        (candidate,) = self.cuts.find(keys_of(WANTED))
        assert isinstance(candidate.peer, Cut)
        return candidate

    async def fetch(self, wait_ms: int = 20_000) -> Arrived:
        spec = MODEL.spec(1)
        wanted = Wanted("", WANTED.namespace_id(), spec, keys_of(WANTED))
        views = [memoryview(slot) for slot in self.slots]
        deadline_ns = self.now_ns() + wait_ms * NS_PER_MS
        return await self.found().peer.fetch(wanted, views, deadline_ns, Priority.DECODE)

    def right(self) -> list[bool]:
        return [self.slots[at] == MODEL.block(at, 1, 0) for at in range(COUNT)]


def test_two_halves_make_blocks_with_sums_of_their_own() -> None:
    async def scenario() -> None:
        world = World()
        arrived = await world.fetch()
        assert world.right() == [True] * COUNT
        spec = MODEL.spec(1)
        for at, (checksum, sums) in enumerate(arrived.blocks):
            assert sums == sum_chunks([MODEL.block(at, 1, 0)], spec.chunk_bytes)
            key = keys_of(WANTED)[at]
            assert checksum == block_checksum(key, spec.block_bytes, spec.chunk_bytes, sums)
        assert (len(arrived.blocks), arrived.given, arrived.wrong) == (COUNT, COUNT, [])
        assert world.counters["peer_cut_blocks"] == COUNT
        assert world.directory.blamed == []
        for peer, half in zip(world.peers, HALVES, strict=True):
            (asked,) = peer.asked
            assert list(asked.keys) == keys_of(half)
            assert asked.behind == []

    asyncio.run(scenario())


def test_who_holds_what_is_wanted_is_asked_himself() -> None:
    async def scenario() -> None:
        world = World()
        direct = Candidate(FakePeer("direct"), 1, 1, True)
        world.holders[WANTED.namespace_id()] = [direct]
        assert world.cuts.find(keys_of(WANTED)) == [direct]

    asyncio.run(scenario())


def test_one_part_that_nobody_has_and_there_is_no_cut() -> None:
    async def scenario() -> None:
        world = World()
        del world.holders[HALVES[1].namespace_id()]
        assert world.cuts.find(keys_of(WANTED)) == []
        assert world.cuts.find(keys_of(MODEL.namespace(4, 0))) == [], "nobody opened it here"

    asyncio.run(scenario())


def test_it_goes_as_far_as_the_shorter_part_and_waits_for_the_slower_tier() -> None:
    async def scenario() -> None:
        world = World()
        disk = FakePeer("disk")
        world.holders[HALVES[1].namespace_id()] = [Candidate(disk, COUNT, 2, True)]
        world.holders[HALVES[0].namespace_id()] = [Candidate(world.peers[0], 3, 3, False)]
        found = world.found()
        assert (found.blocks, found.on_disk, found.is_current) == (3, True, False)
        await world.fetch()
        assert world.right() == [True] * COUNT
        assert world.peers[0].asked[0].behind == []

    asyncio.run(scenario())


def test_a_peer_that_reads_from_disk_is_told_what_comes_before() -> None:
    async def scenario() -> None:
        world = World()
        world.holders[HALVES[1].namespace_id()] = [Candidate(world.peers[1], COUNT, 2, True)]
        spec, keys = MODEL.spec(1), keys_of(WANTED)
        wanted = Wanted("", WANTED.namespace_id(), spec, keys[2:], behind=keys[:2])
        views = [memoryview(slot) for slot in world.slots[2:]]
        await world.found().peer.fetch(wanted, views, world.now_ns() + 20 * NS_PER_S, Priority.DECODE)
        assert list(world.peers[1].asked[0].behind) == keys_of(HALVES[1])[:2]
        assert list(world.peers[0].asked[0].behind) == []

    asyncio.run(scenario())


def test_the_best_peer_gives_each_part() -> None:
    async def scenario() -> None:
        world = World()
        better = FakePeer("better")
        world.holders[HALVES[0].namespace_id()] = [
            Candidate(world.peers[0], 2, 2, True),
            Candidate(better, COUNT, COUNT, True),
        ]
        await world.fetch()
        assert not world.peers[0].asked
        assert better.asked

    asyncio.run(scenario())


def test_a_source_is_asked_for_every_name() -> None:
    async def scenario() -> None:
        world = World()
        world.cuts.find(keys_of(WANTED), "prefill")
        assert world.directory.sources == ["prefill"] * 3

    asyncio.run(scenario())


def test_plans_are_made_once_until_more_is_known() -> None:
    async def scenario() -> None:
        world = World()
        for _ in range(5):
            world.found()
        assert world.directory.looked == 2
        world.directory.known.append(MODEL.namespace(4, 0))
        world.found()
        assert world.directory.looked == 5

    asyncio.run(scenario())


@pytest.mark.parametrize(("given", "wrong"), [(3, []), (COUNT, [2, 4]), (0, []), (COUNT, [0])])
def test_what_one_part_lacks_the_block_lacks(given: int, wrong: list[int]) -> None:
    async def scenario() -> None:
        world = World()
        world.peers[1].given, world.peers[1].wrong = given, wrong
        arrived = await world.fetch()
        good = min([given, *wrong])
        assert (len(arrived.blocks), arrived.given, arrived.wrong) == (good, given, wrong)
        assert world.right()[:good] == [True] * good
        assert world.counters["peer_cut_blocks"] == good
        stored = keys_of(HALVES[1])
        if wrong:
            assert world.directory.blamed == [("high", tuple(stored[at] for at in wrong), WRONG_REST_NS)]
        else:
            assert world.directory.blamed == [("high", (stored[given],), GONE_REST_NS)]
        world.cuts.blame(world.found().peer, keys_of(WANTED)[:1], 1)
        assert len(world.directory.blamed) == 1, "the cut itself is nobody"

    asyncio.run(scenario())


@pytest.mark.parametrize("reason", ["lost", "late", "refused", "gone"])
def test_when_one_part_fails_all_have_ended(reason: str) -> None:
    async def scenario() -> None:
        world = World()
        began = asyncio.Event()

        async def for_ever(wanted: Wanted) -> None:
            began.set()
            await asyncio.Event().wait()

        async def fail(wanted: Wanted) -> None:
            await began.wait()
            raise FetchFailed(reason, "of the test")

        world.peers[0].hindrance, world.peers[1].hindrance = for_ever, fail
        with pytest.raises(FetchFailed) as caught:
            await world.fetch()
        assert caught.value.reason == reason
        assert [peer.ended for peer in world.peers] == [1, 1]
        blamed = [("high", (keys_of(HALVES[1])[0],), GONE_REST_NS)] if reason in ("refused", "gone") else []
        assert world.directory.blamed == blamed
        assert all(not peer.turns.locked() for peer in world.peers)

    asyncio.run(scenario())


def test_when_it_is_cancelled_all_have_ended() -> None:
    async def scenario() -> None:
        world = World()
        began = asyncio.Semaphore(0)

        async def for_ever(wanted: Wanted) -> None:
            began.release()
            await asyncio.Event().wait()

        for peer in world.peers:
            peer.hindrance = for_ever
        fetching = asyncio.ensure_future(world.fetch())
        for _ in world.peers:
            await began.acquire()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        assert [peer.ended for peer in world.peers] == [1, 1]

    asyncio.run(scenario())


def test_a_peer_that_is_busy_for_too_long_is_late() -> None:
    async def scenario() -> None:
        world = World()
        for _ in range(4):
            await world.peers[0].turns.acquire()
        with pytest.raises(FetchFailed) as caught:
            await world.fetch(wait_ms=20)
        assert caught.value.reason == "late"

    asyncio.run(scenario())


def test_a_copy_ends_before_its_cancellation_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, ended = threading.Event(), threading.Event()

    def slow(sources: object, targets: object, chunk_bytes: int) -> bytes:
        may_end.wait(20)
        ended.set()
        return b""

    monkeypatch.setattr(cut, "copy_and_sum", slow)

    async def scenario() -> None:
        copying = asyncio.ensure_future(copied([], [], 1))
        await asyncio.sleep(0)
        for _ in range(3):
            copying.cancel()
            await asyncio.sleep(0)
            assert not copying.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await copying
        assert ended.is_set()

    asyncio.run(scenario())


def test_the_names_tell_whose_parts_they_are() -> None:
    async def scenario() -> None:
        peer = World().found().peer
        assert peer.name == "low (rank 0 of 2) + high (rank 1 of 2)"
        assert peer.address == "tcp://low (rank 0 of 2) + tcp://high (rank 1 of 2)"

    asyncio.run(scenario())
