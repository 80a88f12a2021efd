"""A follower that believes every batch holds exactly what the source holds; every batch fits in a frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import event_pages, events
from kvcache.block import NamespaceId, StorageKey, hints, split_hints
from kvcache.events import EMPTY_DIGEST, TIER_NVME, Digest, Publisher
from kvcache.ledger import Change
from kvcache.namespace import Namespace
from kvcache.wire import BODY_BYTES_MAX, BlockEvent, EventBatch, decode_reply, encode
from kvcache.wire_events import run_lengths

SPACES = (b"a" * 16, b"b" * 16)
HEADER_BYTES = 16


def key(number: int, space: int = 0) -> StorageKey:
    return StorageKey(SPACES[space] + blake2b(number.to_bytes(8, "little"), digest_size=16).digest())


def stored(keys: Sequence[StorageKey], parent: StorageKey | None = None) -> Change:
    return Change("stored", tuple(keys), parent, "committed")


def removed(keys: Iterable[StorageKey]) -> Change:
    return Change("removed", tuple(keys), None, "evicted")


class Follower:
    """What somebody knows who applies the batches: names of blocks, each with the one before it, where that
    is told."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.names: set[bytes] = set()

    def apply(self, batch: EventBatch) -> None:
        sent = encode(1, batch)
        assert len(sent) - HEADER_BYTES <= BODY_BYTES_MAX
        assert decode_reply(sent[HEADER_BYTES:]) == (1, batch)
        self.names |= {Namespace.from_map(namespace).namespace_id() for namespace in batch.namespaces}
        for event in batch.events:
            if event.kind == "stored":
                self._store(event)
                continue
            for block in split_hints(event.hashes):
                del self.held[event.namespace + block]

    def _store(self, event: BlockEvent) -> None:
        starts = set(accumulate(memoryview(run_lengths(event)).cast("H"))) if event.runs else set()
        assert not event.runs or max(starts) == len(event.hashes) // 8
        parent = event.parent
        for at, block in enumerate(split_hints(event.hashes)):
            assert event.namespace + block not in self.held
            self.held[event.namespace + block] = b"" if at in starts else parent
            parent = block

    def digest(self) -> bytes:
        digest = Digest()
        for name in self.held:
            digest.add(NamespaceId(name[:16]), [name[16:]])
        return digest.pack()


def follow(batches: Iterable[EventBatch]) -> Follower:
    follower = Follower()
    for batch in batches:
        follower.apply(batch)
    return follower


def told(publisher: Publisher) -> dict[str, bytes]:
    """What the digests are now."""
    return publisher.beat().digests


def test_a_stored_run_is_one_event_and_numbers_grow_by_one() -> None:
    publisher = Publisher("node", 7)
    first = publisher.publish([stored([key(1), key(2)])])
    second = publisher.publish([stored([key(3)], parent=key(2)), removed([key(3)])])
    assert [(batch.seq, batch.snapshot, batch.left) for batch in first + second] == [
        (1, False, 0),
        (2, False, 0),
    ]
    assert [event.kind for event in second[0].events] == ["stored", "removed"]
    assert first[0].events[0].parent == b"" and second[0].events[0].parent == key(2)[16:24]
    assert (first[0].source, first[0].incarnation) == ("node", 7)


def test_removed_blocks_of_two_namespaces_are_two_events() -> None:
    publisher = Publisher("node", 1)
    publisher.publish([stored([key(1)]), stored([key(1, 1)])])
    [batch] = publisher.publish([removed([key(1), key(1, 1)])])
    assert [event.namespace for event in batch.events] == list(SPACES)
    assert told(publisher) == {"host": EMPTY_DIGEST}


def test_the_same_prefix_of_two_ranks_does_not_cancel_out() -> None:
    publisher = Publisher("node", 1)
    publisher.publish([stored([key(1)]), stored([key(1, 1)])])
    count, xor = told(publisher)["host"][:8], told(publisher)["host"][8:16]
    assert int.from_bytes(count, "little") == 2
    assert any(xor)


def test_nothing_is_one_empty_snapshot_and_no_batch() -> None:
    publisher = Publisher("node", 1)
    assert publisher.publish([]) == []
    [batch] = publisher.snapshot()
    assert (batch.seq, batch.snapshot, batch.left, batch.events) == (0, True, 0, [])


def test_a_snapshot_is_as_of_its_call_however_late_it_is_read() -> None:
    publisher = Publisher("node", 1)
    publisher.publish([stored([key(number) for number in range(10)])])
    snapshot = publisher.snapshot()
    publisher.publish([removed([key(9)])])
    batches = list(snapshot)
    assert len(follow(batches).held) == 10
    assert {batch.seq for batch in batches} == {1}


def test_a_large_tree_is_told_in_bounded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BATCH_BYTES_MAX", 2_000)
    monkeypatch.setattr(events, "RUN_BLOCKS_MAX", 50)
    monkeypatch.setattr(event_pages, "PAGE_ROOM_BYTES", 2_000)
    publisher = Publisher("node", 1)
    path = [key(number) for number in range(1_000)]
    batches = publisher.publish([stored(path)])
    pages = list(publisher.snapshot())
    assert len(batches) > 3 and len(pages) > 3
    assert [batch.seq for batch in batches] == list(range(1, len(batches) + 1))
    assert [page.left for page in pages] == list(range(len(pages)))[::-1]
    assert follow(pages).held == follow(batches).held, "a run that a page cuts goes on in the next"
    assert list(follow(batches).held.values()) == [b"", *(name[16:24] for name in path[:-1])]
    gone = publisher.publish([removed(path)])
    assert len(gone) > 3
    assert follow(batches + gone).held == follow(publisher.snapshot()).held == {}


def test_digests_come_with_every_eighth_batch_the_last_page_and_every_beat() -> None:
    publisher = Publisher("node", 1)
    batches = [publisher.publish([stored([key(number)])])[0] for number in range(16)]
    assert [batch.seq for batch in batches if batch.digests] == [8, 16]
    held = follow(batches)
    beat = publisher.beat({"free_bytes": 7.0})
    assert (beat.seq, beat.beat, beat.events, beat.load) == (16, True, [], {"free_bytes": 7.0})
    assert batches[15].digests == beat.digests == {"host": held.digest()}
    assert publisher.publish([stored([key(16)])])[0].seq == 17, "a beat is no batch"
    *before, last = publisher.snapshot()
    assert last.digests == told(publisher) and not any(page.digests for page in before)


def test_tiers_are_held_and_digested_apart() -> None:
    publisher = Publisher("node", 1)
    path = [key(number) for number in range(4)]
    publisher.publish([stored(path)])
    publisher.publish([stored(path[:2])], TIER_NVME)
    publisher.publish([removed(path[2:])])
    assert told(publisher)["host"] == told(publisher)["nvme"] != EMPTY_DIGEST
    [page] = publisher.snapshot()
    assert [(event.tier, event.hashes) for event in page.events] == [
        (tier, hints(name[16:] for name in path[:2])) for tier in ("host", "nvme")
    ]
    publisher.check()


def test_two_blocks_with_one_hint_are_one_and_harm_nothing() -> None:
    """What is told of them is right of one of them, as long as both are held."""
    publisher = Publisher("node", 1)
    one = key(1)
    other = StorageKey(one[:24] + bytes(8))
    publisher.publish([stored([one]), stored([other])])
    assert told(publisher)["host"][:8] == (1).to_bytes(8, "little")
    publisher.publish([removed([one])])
    publisher.publish([removed([other])])
    assert told(publisher)["host"] == EMPTY_DIGEST
    publisher.check()


def test_a_namespace_is_told_before_its_first_block_to_old_and_new_followers() -> None:
    publisher = Publisher("node", 1)
    spaces = [named(f"model-{number}") for number in range(event_pages.NAMESPACES_A_PAGE_MAX + 1)]
    for space in spaces:
        publisher.announce(space)
    ids = {space.namespace_id() for space in spaces}
    assert follow(publisher.snapshot()).names == ids, "to a new one, before any block"
    batches = publisher.publish([stored([key(1)])])
    assert follow(batches).names == ids, "to the old ones as well"
    assert not batches[0].events and batches[-1].events
    assert publisher.publish([stored([key(2)])])[0].namespaces == [], "once"
    assert follow(publisher.snapshot()).names == ids


def named(model: str) -> Namespace:
    return Namespace(
        model=model, weights="w", dtype="bfloat16", layout="canonical", block_tokens=16, shape="2x2x64"
    )


Steps = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(1, 6)), max_size=40)


@given(Steps)
def test_batches_and_snapshots_say_what_is_held(steps: list[tuple[int, int, int]]) -> None:
    """Runs come and go at random; a follower from the start and one of each moment agree with the truth."""
    publisher, follower = Publisher("node", 1), Follower()
    truth: set[bytes] = set()
    for space, start, length in steps:
        keys = [key(number, space) for number in range(start, start + length)]
        changes = [removed([name for name in keys if name[:24] in truth])] if keys[0][:24] in truth else []
        truth -= {name[:24] for change in changes for name in change.keys}
        fresh = [name for name in keys if name[:24] not in truth]
        changes.append(stored(fresh))
        truth |= {name[:24] for name in fresh}
        for batch in publisher.publish(changes):
            follower.apply(batch)
            assert told(publisher)["host"] == follower.digest()
            assert batch.digests in ({}, told(publisher))
        publisher.check()
        pages = list(publisher.snapshot())
        late = follow(pages)
        assert late.held.keys() == follower.held.keys() == truth
        assert pages[-1].digests["host"] == late.digest()
