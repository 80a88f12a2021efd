"""What a follower is told first, and that it then misses nothing."""

from __future__ import annotations

import pytest

from kvcache import wire
from kvcache.block import StorageKey
from kvcache.config import NodeConfig
from kvcache.event_load import NODE_LOAD
from kvcache.event_ring import Ring, Told
from kvcache.events import TIER_HOST, Publisher
from kvcache.ledger import Change
from kvcache.locality import Applied, LocalityIndex
from kvcache.namespace import Namespace
from kvcache.server.node import Node
from kvcache.server.telling import Telling
from kvcache.testing.clock import FakeClock
from kvcache.wire import EventBatch
from kvcache.wire_events import BEAT_NS
from tests.server.talk import HASHES, example

SPACE = example()
ID = SPACE.namespace_id()


class World:
    """A node's telling, and a follower that applies all it is told."""

    def __init__(self) -> None:
        self.telling = Telling(Publisher("node", 7), lambda: {"free_bytes": 1.0})
        self.telling.announce(SPACE)
        self.index = LocalityIndex(1 << 22)
        self.told: list[EventBatch] = []

    def store(self, *numbers: int) -> None:
        for number in numbers:
            key = StorageKey(ID + HASHES[number])
            self.telling.publish([Change("stored", (key,), None, "committed")], TIER_HOST)

    def watch(self, owner: int = 1) -> list[EventBatch]:
        """Returns what comes first."""
        incarnation, seq = self.index.cursor("node") or (0, 0)
        first = [told.batch for told in self.telling.watch(owner, self._tell, incarnation, seq)]
        for batch in first:
            self.index.apply(batch, 0)
        return first

    def part(self) -> None:
        self.telling.unwatch(1)
        self.index.suspect("node")

    def agrees(self) -> bool:
        self.telling.check()
        [state] = self.index.sources()
        return state.synced and self.index.apply(self.telling._publisher.beat(), 0) is Applied.TAKEN

    def _tell(self, told: Told) -> None:
        self.told.append(told.batch)
        assert self.index.apply(told.batch, 0) is Applied.TAKEN


@pytest.fixture
def world() -> World:
    return World()


def test_a_new_follower_gets_everything_and_then_each_batch(world: World) -> None:
    world.store(0, 1)
    names, blocks = world.watch()
    assert (names.snapshot, names.left, blocks.snapshot, blocks.left) == (True, 1, True, 0)
    assert [Namespace.from_map(fields) for fields in names.namespaces] == [SPACE]
    world.store(2)
    assert [batch.seq for batch in world.told] == [4], "one for the namespace, one for each block"
    assert world.agrees()


def test_a_follower_that_comes_back_gets_exactly_what_it_missed(world: World) -> None:
    world.store(0, 1)
    world.watch()
    world.part()
    world.store(2, 3, 4)
    assert not world.index.sources()[0].synced
    *batches, beat = world.watch()
    assert [(batch.seq, batch.snapshot) for batch in batches] == [(4, False), (5, False), (6, False)]
    assert beat.beat and beat.seq == 6
    assert world.agrees()


def test_one_that_missed_nothing_gets_a_beat(world: World) -> None:
    world.store(0)
    world.watch()
    world.part()
    [beat] = world.watch()
    assert (beat.beat, beat.seq, beat.load) == (True, 2, {"free_bytes": 1.0})
    assert world.agrees()


def test_one_that_missed_more_than_is_kept_gets_everything(world: World) -> None:
    world.telling._ring = Ring(batches_max=3)
    world.watch()
    world.part()
    world.store(*range(4))
    pages = world.watch()
    assert all(page.snapshot for page in pages)
    assert world.agrees()


def test_a_source_that_started_anew_says_so_at_once(world: World) -> None:
    world.store(0, 1)
    world.watch()
    world.part()
    world.telling = Telling(Publisher("node", 8), dict)
    world.telling.announce(SPACE)
    world.store(2, 3, 4)
    assert all(page.snapshot and page.incarnation == 8 for page in world.watch())
    assert world.agrees() and world.index.entries == 3


def test_a_seq_that_was_never_told_is_answered_with_everything(world: World) -> None:
    world.store(0)
    [_, page] = list(world.telling.watch(1, lambda told: None, 7, 99))
    assert page.batch.snapshot


def test_followers_that_come_together_share_one_snapshot(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[int] = []
    capture = Publisher.capture

    def counted(publisher: Publisher) -> object:
        captures.append(publisher.seq)
        return capture(publisher)

    monkeypatch.setattr(Publisher, "capture", counted)
    world.store(0, 1)
    slow = iter(world.telling.watch(2, lambda told: None, 0, 0))
    next(slow)
    world.store(2, 3)
    first = world.watch()
    assert [(batch.snapshot, batch.seq) for batch in first] == [(True, 3), (True, 3), (False, 4), (False, 5)]
    assert world.agrees() and captures == [3]
    del slow
    world.part()
    world.index.forget("node")
    world.watch()
    assert captures == [3, 5], "nobody took it any more"
    assert world.agrees()


def test_it_beats_every_second_and_only_where_somebody_listens(world: World) -> None:
    second = BEAT_NS
    world.telling.beat(10 * second)
    world.watch()
    world.telling.beat(10 * second + second // 4)
    assert world.told == []
    for quarter in range(4, 41):
        world.telling.beat(10 * second + quarter * second // 4 + 3_000_000)
    assert len(world.told) == 10
    assert all(batch.beat and batch.load for batch in world.told)
    world.telling.beat(60 * second)
    world.telling.beat(60 * second + second // 2)
    assert len(world.told) == 11, "what was slept through is not made up for"


def test_a_batch_is_packed_once_for_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[wire.Message] = []

    def counted(message: wire.Message) -> bytes:
        packed.append(message)
        return wire.packed(message)

    monkeypatch.setattr("kvcache.event_ring.packed", counted)
    world.store(0)
    packed.clear()
    taken: list[bytes] = []
    for owner in range(3):
        list(world.telling.watch(owner, lambda told: taken.append(told.packed), 7, 2))
    packed.clear()
    world.store(1)
    assert len(packed) == 1 and len(taken) == 3 and len(set(map(id, taken))) == 1


def test_a_node_says_of_its_load_what_is_declared() -> None:
    node = Node(NodeConfig(capacity="4MiB", http="none", socket="/nowhere"), FakeClock())
    try:
        load = node.core.load()
        assert load.keys() == NODE_LOAD.keys()
        assert load["capacity_bytes"] == load["free_bytes"] == 4 << 20
    finally:
        node.core.close()
