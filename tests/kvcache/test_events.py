"""A follower that believes every batch holds exactly what the source holds; every batch fits in a frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import events
from kvcache.block import NamespaceId, StorageKey, split_hints
from kvcache.events import EMPTY_DIGEST, Digest, Publisher
from kvcache.ledger import Change
from kvcache.namespace import Namespace
from kvcache.wire import BODY_BYTES_MAX, EventBatch, decode_reply, encode

SPACES = (b"a" * 16, b"b" * 16)
HEADER_BYTES = 16


def key(number: int, space: int = 0) -> StorageKey:
    return StorageKey(SPACES[space] + blake2b(number.to_bytes(8, "little"), digest_size=16).digest())


def stored(keys: Sequence[StorageKey], parent: StorageKey | None = None) -> Change:
    return Change("stored", tuple(keys), parent, "committed")


def removed(keys: Iterable[StorageKey]) -> Change:
    return Change("removed", tuple(keys), None, "evicted")


class Follower:
    """What somebody knows who applies the batches: each block with the one before it."""

    def __init__(self) -> None:
        self.held: dict[StorageKey, bytes] = {}
        self.names: set[bytes] = set()

    def apply(self, batch: EventBatch) -> None:
        sent = encode(1, batch)
        assert len(sent) - HEADER_BYTES <= BODY_BYTES_MAX
        assert decode_reply(sent[HEADER_BYTES:]) == (1, batch)
        self.names |= {Namespace.from_map(namespace).namespace_id() for namespace in batch.namespaces}
        for event in batch.events:
            parent = event.parent
            for block in split_hints(event.hashes):
                name = StorageKey(event.namespace + block)
                if event.kind == "stored":
                    assert name not in self.held
                    self.held[name] = parent
                    parent = block
                else:
                    del self.held[name]

    def digest(self) -> bytes:
        digest = Digest()
        for name in self.held:
            digest.add(NamespaceId(name[:16]), split_hints(name[16:24]))
        return digest.pack()


def follow(batches: Iterable[EventBatch]) -> Follower:
    follower = Follower()
    for batch in batches:
        follower.apply(batch)
    return follower


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
    assert batch.digests == {"host": EMPTY_DIGEST}


def test_the_same_prefix_of_two_ranks_does_not_cancel_out() -> None:
    publisher = Publisher("node", 1)
    [batch] = publisher.publish([stored([key(1)]), stored([key(1, 1)])])
    count, xor = batch.digests["host"][:8], batch.digests["host"][8:16]
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
    monkeypatch.setattr(events, "BATCH_BYTES_MAX", 4_000)
    monkeypatch.setattr(events, "RUN_BLOCKS_MAX", 50)
    publisher = Publisher("node", 1)
    path = [key(number) for number in range(1_000)]
    told = publisher.publish([stored(path)])
    batches = list(publisher.snapshot())
    assert len(told) > 3 and len(batches) > 3
    assert [batch.seq for batch in told] == list(range(1, len(told) + 1))
    assert [batch.left for batch in batches] == list(range(len(batches)))[::-1]
    assert follow(batches).held == follow(told).held
    assert list(follow(told).held.values()) == [b"", *(name[16:24] for name in path[:-1])]
    gone = publisher.publish([removed(path)])
    assert len(gone) > 3
    assert follow(told + gone).held == follow(publisher.snapshot()).held == {}


@pytest.mark.slow
def test_the_worst_snapshot_fits_in_its_frames() -> None:
    """Every block a run of its own: the most events for the fewest blocks."""
    publisher = Publisher("n" * 64, (1 << 63) - 1)
    publisher.publish([stored([key(number)]) for number in range(30_000)])
    batches = list(publisher.snapshot())
    assert len(follow(batches).held) == 30_000


def test_a_namespace_is_told_before_its_first_block_to_old_and_new_followers() -> None:
    publisher = Publisher("node", 1)
    spaces = [named(f"model-{number}") for number in range(events.NAMESPACES_A_BATCH_MAX + 1)]
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
    truth: dict[StorageKey, bytes] = {}
    for space, start, length in steps:
        keys = [key(number, space) for number in range(start, start + length)]
        changes = [removed([name for name in keys if name in truth])] if keys[0] in truth else []
        for change in changes:
            for name in change.keys:
                del truth[name]
        fresh = [name for name in keys if name not in truth]
        changes.append(stored(fresh))
        for before, name in zip([None, *fresh[:-1]], fresh, strict=True):
            truth[name] = before[16:24] if before else b""
        for batch in publisher.publish(changes):
            follower.apply(batch)
            assert batch.digests["host"] == follower.digest()
        publisher.check()
        late = follow(publisher.snapshot())
        assert late.held == follower.held == truth
        assert [batch.digests for batch in publisher.snapshot()][-1]["host"] == late.digest()
