"""The index against the truth, looked up one block at a time: whatever sources do, and whatever is lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec
import pytest

from kvcache.block import BlockHash, NamespaceId, StorageKey, hints
from kvcache.errors import BadInput
from kvcache.events import Publisher
from kvcache.ledger import Change
from kvcache.locality import LOST, TIERS, Applied, LocalityIndex, Located
from kvcache.namespace import Namespace
from kvcache.wire import BlockEvent, EventBatch

SPACES = (NamespaceId(b"a" * 16), NamespaceId(b"b" * 16))
PREFIX = [BlockHash(blake2b(bytes([number]), digest_size=16).digest()) for number in range(24)]
Truth = dict[tuple[NamespaceId, str], set[BlockHash]]


class Source:
    """What a source holds, and the batches by which it tells."""

    def __init__(self, name: str, incarnation: int = 1) -> None:
        self.name = name
        self.held: Truth = {}
        self.publisher = Publisher(name, incarnation)
        self.incarnation = incarnation

    def store(self, space: NamespaceId, tier: str, blocks: Iterable[int]) -> list[EventBatch]:
        held = self.held.setdefault((space, tier), set())
        fresh = [PREFIX[number] for number in blocks if PREFIX[number] not in held]
        held.update(fresh)
        return self._tell("stored", space, tier, fresh)

    def remove(self, space: NamespaceId, tier: str, blocks: Iterable[int]) -> list[EventBatch]:
        held = self.held.setdefault((space, tier), set())
        gone = [PREFIX[number] for number in blocks if PREFIX[number] in held]
        held.difference_update(gone)
        return self._tell("removed", space, tier, gone)

    def _tell(self, kind: str, space: NamespaceId, tier: str, blocks: list[BlockHash]) -> list[EventBatch]:
        if not blocks:
            return []
        keys = tuple(StorageKey(space + block) for block in blocks)
        return self.publisher.publish([Change(kind, keys, None, "")], tier)  # type: ignore[arg-type]


def expected(name: str, held: Truth, space: NamespaceId, prefix: Sequence[BlockHash]) -> Located:
    """By the book: block after block until none of the tiers has it."""
    blocks = 0
    tiers = dict.fromkeys(TIERS, 0)
    for block in prefix:
        having = [tier for tier in TIERS if block in held.get((space, tier), set())]
        if not having:
            break
        blocks += 1
        for tier in having:
            tiers[tier] += 1
    return Located(name, space, blocks, tuple(tiers.values()))


def synced(index: LocalityIndex, source: Source) -> None:
    for batch in source.publisher.snapshot():
        assert index.apply(batch, 0) in (Applied.TAKEN, Applied.STALE)


def blocks(index: LocalityIndex, prefix: Sequence[BlockHash] = PREFIX) -> dict[tuple[str, bytes], int]:
    return {(found.source, found.namespace): found.blocks for found in index.locate(hints(prefix))}


def followed(*sources: Source) -> LocalityIndex:
    index = LocalityIndex(1 << 20)
    for source in sources:
        synced(index, source)
    return index


def tell(index: LocalityIndex, batches: Iterable[EventBatch]) -> list[Applied]:
    results = [index.apply(batch, 5) for batch in batches]
    index.check()
    return results


# --- what makes other indexes wrong -------------------------------------------------------------


def test_a_hole_that_is_filled_again_is_no_hole() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(20)))
    tell(index, source.remove(SPACES[0], "host", [11]))
    assert blocks(index) == {("n", SPACES[0]): 11}
    tell(index, source.store(SPACES[0], "host", [11]))
    assert blocks(index) == {("n", SPACES[0]): 20}


def test_a_child_that_comes_before_its_parent_counts_once_both_are_there() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(10, 20)))
    assert blocks(index) == {("n", SPACES[0]): 0}
    tell(index, source.store(SPACES[0], "host", range(10)))
    assert blocks(index) == {("n", SPACES[0]): 20}


def test_interleaved_tiers_are_one_prefix() -> None:
    source = Source("n")
    index = followed(source)
    for tier, part in (("host", range(0, 4)), ("hbm", range(3, 9)), ("nvme", range(9, 12)), ("host", [12])):
        tell(index, source.store(SPACES[0], tier, part))
    assert index.locate(hints(PREFIX)) == [Located("n", SPACES[0], 13, (6, 5, 3))]
    tell(index, source.remove(SPACES[0], "host", [3]))
    assert index.locate(hints(PREFIX)) == [Located("n", SPACES[0], 13, (6, 4, 3))]


def test_ranks_share_hashes_and_are_counted_apart() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(8)))
    tell(index, source.store(SPACES[1], "host", range(5)))
    assert blocks(index) == {("n", SPACES[0]): 8, ("n", SPACES[1]): 5}
    assert index.locate(hints(PREFIX), [SPACES[1]]) == [Located("n", SPACES[1], 5, (0, 5, 0))]
    tell(index, source.remove(SPACES[0], "host", range(8)))
    assert blocks(index) == {("n", SPACES[0]): 0, ("n", SPACES[1]): 5}


# --- losses -------------------------------------------------------------------------------------


def test_a_lost_batch_is_noticed_and_what_was_known_is_served_marked_until_a_snapshot() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(4)))
    source.store(SPACES[0], "host", range(4, 6))
    later = source.store(SPACES[0], "host", range(6, 8))
    assert tell(index, later) == [Applied.GAP]
    assert blocks(index) == {("n", SPACES[0]): 4}
    assert not index.sources()[0].synced
    assert tell(index, source.store(SPACES[0], "host", [8])) == [Applied.GAP], "and it stays so"
    synced(index, source)
    assert blocks(index) == {("n", SPACES[0]): 9}
    assert index.sources()[0].synced


def test_a_source_that_starts_anew_has_nothing_until_it_says_so() -> None:
    old = Source("n", incarnation=1)
    index = followed(old)
    tell(index, old.store(SPACES[0], "host", range(9)))
    new = Source("n", incarnation=2)
    assert tell(index, new.store(SPACES[0], "host", range(3))) == [Applied.RESTARTED]
    assert blocks(index) == {}
    synced(index, new)
    assert blocks(index) == {("n", SPACES[0]): 3}
    assert tell(index, old.remove(SPACES[0], "host", range(9))) == [Applied.STALE]
    assert [index.apply(batch, 9) for batch in old.publisher.snapshot()] == [Applied.STALE]
    assert blocks(index) == {("n", SPACES[0]): 3}


def test_a_batch_told_twice_counts_once() -> None:
    source = Source("n")
    index = followed(source)
    first = source.store(SPACES[0], "host", range(4))
    tell(index, first)
    tell(index, source.remove(SPACES[0], "host", [3]))
    assert tell(index, first) == [Applied.STALE]
    assert blocks(index) == {("n", SPACES[0]): 3}


def test_a_difference_that_numbers_do_not_show_is_found_by_the_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvcache.events.DIGEST_EVERY", 1)
    source = Source("n")
    index = followed(source)
    [batch] = source.store(SPACES[0], "host", range(4))
    half = msgspec.structs.replace(
        batch, events=[msgspec.structs.replace(batch.events[0], hashes=batch.events[0].hashes[:16])]
    )
    *_, last = source.publisher.snapshot()
    beat = EventBatch("n", 1, 1, False, [], digests=last.digests, beat=True)
    assert [index.apply(each, 0) for each in (half, beat)][-1] in LOST
    assert not index.sources()[0].synced
    synced(index, source)
    assert blocks(index) == {("n", SPACES[0]): 4}


def test_a_snapshot_replaces_only_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.event_pages.PAGE_ROOM_BYTES", 220)
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(20)))
    first, *rest = source.publisher.snapshot()
    assert len(rest) > 1
    index.apply(first, 0)
    assert blocks(index) == {("n", SPACES[0]): 20}, "the old content serves on"
    index.suspect("n")
    index.check()
    synced(index, source)
    assert blocks(index) == {("n", SPACES[0]): 20}
    assert index.entries == 20


def test_a_snapshot_that_lacks_its_middle_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.event_pages.PAGE_ROOM_BYTES", 220)
    source = Source("n")
    source.store(SPACES[0], "host", range(20))
    batches = list(source.publisher.snapshot())
    index = LocalityIndex(1 << 20)
    assert [index.apply(batch, 0) for batch in (batches[0], *batches[2:3])] == [Applied.TAKEN, Applied.GAP]
    assert not index.sources()[0].synced
    assert index.entries == 0
    synced(index, source)


def test_unknown_is_not_nothing() -> None:
    index = LocalityIndex(1 << 20)
    assert index.sources() == [] and index.locate(hints(PREFIX)) == []
    source = Source("n")
    synced(index, source)
    [as_of] = index.sources()
    assert (as_of.synced, as_of.incarnation, as_of.seq) == (True, 1, 0)
    index.suspect("n")
    assert not index.sources()[0].synced
    index.forget("n")
    assert index.sources() == []


def test_the_time_a_source_was_heard_of_never_goes_back_nor_on_without_its_stream() -> None:
    source = Source("n")
    index = followed(source)
    index.heard("n", 100)
    index.heard("n", 50)
    assert index.sources()[0].heard_ns == 100
    index.suspect("n")
    index.heard("n", 200)
    assert index.sources()[0].heard_ns == 100


# --- limits and nonsense ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        BlockEvent("moved", SPACES[0], "host"),
        BlockEvent("stored", SPACES[0], "tape"),
        BlockEvent("stored", b"short", "host"),
        BlockEvent("stored", SPACES[0], "host", b"", b"fifteen bytes.."),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused_whole(event: BlockEvent) -> None:
    source = Source("n")
    index = followed(source)
    good = BlockEvent("stored", SPACES[0], "host", b"", PREFIX[0])
    with pytest.raises(BadInput):
        index.apply(EventBatch("n", 1, 1, False, [good, event]), 0)
    assert index.entries == 0
    index.check()


def test_cleared_empties_one_tier_of_one_shard() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(4)))
    tell(index, source.store(SPACES[0], "nvme", range(2)))
    batch = EventBatch("n", 1, 3, False, [BlockEvent("cleared", SPACES[0], "host")])
    assert index.apply(batch, 0) is Applied.TAKEN
    assert index.locate(hints(PREFIX)) == [Located("n", SPACES[0], 2, (0, 0, 2))]


def test_namespaces_are_remembered_by_what_they_are() -> None:
    space = Namespace(
        model="m", weights="w", dtype="bf16", layout="canonical", block_tokens=16, shape="1x1x1"
    )
    publisher = Publisher("n", 1)
    publisher.announce(space)
    index = LocalityIndex(1 << 20)
    for batch in publisher.snapshot():
        index.apply(batch, 0)
    assert index.namespace(space.namespace_id()) == space
    assert index.namespace(SPACES[0]) is None
    assert index.known_namespaces() == [space.namespace_id()]
