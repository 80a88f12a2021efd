"""The index of what sources tell: what makes others wrong, what is lost on the way, and its limits.

Against its oracle: test_locality_fuzz.py. Beats, leases and placements: test_locality_lease.py.
"""

from __future__ import annotations

import random
from itertools import count

import msgspec
import pytest

from kvcache import event_pages
from kvcache.block import NamespaceId, hints
from kvcache.errors import BadInput
from kvcache.events import Publisher
from kvcache.index import make_index
from kvcache.locality import LOST, PLACED_SHARE, TIERS, Applied, LocalityIndex, Located
from kvcache.namespace import Namespace
from kvcache.wire import BlockEvent, EventBatch
from tests.kvcache.locality_source import (
    BYTES_MAX,
    PREFIX,
    RING_BATCHES,
    SPACES,
    Source,
    blocks,
    expected,
    followed,
    is_suspect,
    path,
    synced,
    tell,
)

HINTS = hints(PREFIX)
ONE = ("n", SPACES[0])
SMALL = 1 << 20
MANY = 48_000
"""More blocks than so much memory takes."""

# --- what makes other indexes wrong -------------------------------------------------------------


def test_a_hole_that_is_filled_again_is_no_hole() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "hbm", range(64)))
    tell(index, source.remove(SPACES[0], "hbm", [11]))
    assert blocks(index) == {ONE: 11}
    tell(index, source.store(SPACES[0], "hbm", [11]))
    assert blocks(index) == {ONE: 64}
    tell(index, source.remove(SPACES[0], "hbm", [63, 62]))
    tell(index, source.store(SPACES[0], "hbm", [62]))
    assert blocks(index) == {ONE: 63}


def test_hundreds_of_holes_all_filled_again_leave_no_answer_wrong() -> None:
    generator = random.Random(1)
    prompt = path(400, seed=2)
    sources = [Source(f"n{number}", prompt=prompt) for number in range(6)]
    index = followed(*sources)
    for source in sources:
        tell(index, source.store(SPACES[0], "hbm", range(400)))
    holes = [(generator.choice(sources), generator.randrange(400)) for _ in range(300)]
    for source, place in holes:
        for batch in source.remove(SPACES[0], "hbm", [place]):
            index.apply(batch, 0)
    assert min(blocks(index, prompt).values()) < 400
    for source, place in holes:
        for batch in source.store(SPACES[0], "hbm", [place]):
            index.apply(batch, 0)
    for end in generator.sample(range(1, 401), 40):
        assert set(index.match(hints(prompt[:end])).blocks) == {end}
    index.check()


def test_a_child_that_comes_before_its_parent_counts_once_both_are_there() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "hbm", range(32, 64)))
    assert blocks(index) == {ONE: 0}
    tell(index, source.store(SPACES[0], "hbm", range(32)))
    assert blocks(index) == {ONE: 64}


@pytest.mark.parametrize("tiers", [("host", "hbm"), ("hbm", "host", "hbm"), ("nvme", "host", "hbm", "nvme")])
def test_interleaved_tiers_are_one_prefix(tiers: tuple[str, ...]) -> None:
    source = Source("n")
    index = followed(source)
    step = 60 // len(tiers)
    for at, tier in enumerate(tiers):
        tell(index, source.store(SPACES[0], tier, range(at * step, (at + 1) * step)))
    counts = tuple(step * tiers.count(tier) for tier in TIERS)
    assert index.locate(HINTS) == [Located("n", SPACES[0], 60, counts)]
    tell(index, source.store(SPACES[0], "nvme", range(60)))
    tell(index, source.remove(SPACES[0], tiers[0], range(3)))
    assert index.locate(HINTS) == [expected("n", source.held, SPACES[0], PREFIX)]


def test_a_lost_batch_is_had_again_from_where_the_index_stands() -> None:
    """And served meanwhile is what was known, marked."""
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "hbm", range(16)))
    lost = source.store(SPACES[0], "hbm", range(16, 32))
    assert tell(index, source.store(SPACES[0], "hbm", range(32, 48))) == [Applied.GAP]
    assert blocks(index) == {ONE: 16} and is_suspect(index, "n")
    assert index.match(HINTS).suspect == b"\1"
    assert index.cursor("n") == (1, 1)
    assert tell(index, lost) == [Applied.TAKEN]
    assert blocks(index) == {ONE: 32} and is_suspect(index, "n"), "one that it knows of is missing still"
    replayed = source.answer((1, 1))
    assert tell(index, replayed) == [Applied.STALE, Applied.TAKEN, Applied.TAKEN]
    assert blocks(index) == {ONE: 48} and not is_suspect(index, "n")
    assert index.match(HINTS).suspect == b"\0"


def test_the_first_event_of_a_source_that_started_anew_ends_what_it_had() -> None:
    old = Source("n", incarnation=1)
    index = followed(old)
    tell(index, old.store(SPACES[0], "hbm", range(64)))
    new = Source("n", incarnation=2)
    assert tell(index, new.store(SPACES[0], "hbm", range(3))) == [Applied.RESTARTED]
    assert blocks(index) == {} and index.cursor("n") is None
    tell(index, new.answer(index.cursor("n")))
    assert blocks(index) == {ONE: 3}
    assert tell(index, old.remove(SPACES[0], "hbm", range(9))) == [Applied.STALE]
    assert tell(index, [*old.publisher.snapshot(), old.publisher.beat()]) == [Applied.STALE] * 2
    assert blocks(index) == {ONE: 3} and index.as_of("n").incarnation == 2  # type: ignore[union-attr]


def test_ranks_share_hashes_and_are_counted_apart() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(8)))
    tell(index, source.store(SPACES[1], "host", range(5)))
    assert blocks(index) == {ONE: 8, ("n", SPACES[1]): 5}
    assert index.locate(HINTS, [SPACES[1]]) == [Located("n", SPACES[1], 5, (0, 5, 0))]
    assert tell(index, [source.publisher.beat()]) == [Applied.TAKEN], "each has its salt in the digest"
    tell(index, source.remove(SPACES[0], "host", range(8)))
    assert blocks(index) == {ONE: 0, ("n", SPACES[1]): 5}


# --- losses -------------------------------------------------------------------------------------


def test_a_gap_that_is_too_long_ago_is_healed_by_a_snapshot() -> None:
    source = Source("n")
    index = followed(source)
    for place in range(RING_BATCHES + 2):
        batches = source.store(SPACES[0], "host", [place])
    assert tell(index, batches) == [Applied.GAP]
    assert index.cursor("n") == (1, 0) and source.behind(0) is None
    tell(index, source.answer(index.cursor("n")))
    assert blocks(index) == {ONE: RING_BATCHES + 2} and not is_suspect(index, "n")


def test_a_batch_told_twice_counts_once() -> None:
    source = Source("n")
    index = followed(source)
    first = source.store(SPACES[0], "host", range(4))
    tell(index, first)
    tell(index, source.remove(SPACES[0], "host", [3]))
    assert tell(index, first) == [Applied.STALE]
    assert blocks(index) == {ONE: 3} and not is_suspect(index, "n")


def test_a_difference_that_numbers_do_not_show_is_found_by_the_digest() -> None:
    source = Source("n")
    index = followed(source)
    [batch] = source.store(SPACES[0], "host", range(4))
    half = msgspec.structs.replace(batch.events[0], hashes=batch.events[0].hashes[:16])
    tell(index, [msgspec.structs.replace(batch, events=[half], digests={})])
    assert not is_suspect(index, "n") and index.entries == 2
    assert tell(index, [source.publisher.beat()]) == [Applied.DRIFT]
    assert is_suspect(index, "n") and index.cursor("n") is None
    assert tell(index, source.store(SPACES[0], "host", [4])) == [Applied.GAP], "only a snapshot heals it"
    tell(index, source.answer(index.cursor("n")))
    assert blocks(index) == {ONE: 5} and not is_suspect(index, "n")


def test_the_digest_of_every_tier_counts() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "nvme", range(8)))
    [batch] = source.remove(SPACES[0], "nvme", range(4, 8))
    assert tell(index, [batch, source.publisher.beat()]) == [Applied.TAKEN, Applied.TAKEN]
    assert blocks(index) == {ONE: 4}


def test_a_stream_that_broke_is_taken_up_again_without_a_snapshot() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(4)))
    index.suspect("n")
    assert is_suspect(index, "n") and blocks(index) == {ONE: 4}
    assert tell(index, source.answer(index.cursor("n"))) == [Applied.TAKEN], "a beat: nothing was missed"
    assert not is_suspect(index, "n")
    index.suspect("n")
    source.store(SPACES[0], "host", range(4, 6))
    tell(index, source.answer(index.cursor("n")))
    assert not is_suspect(index, "n") and blocks(index) == {ONE: 6}


# --- snapshots ----------------------------------------------------------------------------------


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_pages, "PAGE_BYTES_MAX", 400)
    monkeypatch.setattr(event_pages, "PAGE_ROOM_BYTES", 400)


@pytest.mark.usefixtures("small_pages")
def test_a_snapshot_replaces_only_when_it_is_whole() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(60)))
    index.suspect("n")
    source.remove(SPACES[0], "host", range(50, 60))
    *pages, last = source.publisher.snapshot()
    assert len(pages) > 1
    for page in pages:
        assert tell(index, [page]) == [Applied.TAKEN]
        assert blocks(index) == {ONE: 60} and is_suspect(index, "n"), "the old content serves on, marked"
    assert tell(index, [last]) == [Applied.TAKEN]
    assert blocks(index) == {ONE: 50} and not is_suspect(index, "n")
    assert index.entries == 50


@pytest.mark.usefixtures("small_pages")
def test_a_snapshot_that_lacks_a_page_is_not_taken_and_one_told_twice_does_not_matter() -> None:
    source = Source("n")
    source.store(SPACES[0], "host", range(60))
    first, second, *rest = source.publisher.snapshot()
    index = LocalityIndex(BYTES_MAX)
    assert tell(index, [first, *rest[:1]]) == [Applied.TAKEN, Applied.GAP]
    assert index.entries == 0 and index.cursor("n") is None
    results = tell(index, [first, first, second, *rest])
    assert results == [Applied.TAKEN, Applied.STALE, *[Applied.TAKEN] * (1 + len(rest))]
    assert blocks(index) == {ONE: 60}
    assert tell(index, [rest[-1]]) == [Applied.STALE], "its last page alone is no snapshot"
    assert blocks(index) == {ONE: 60} and not is_suspect(index, "n")


@pytest.mark.usefixtures("small_pages")
def test_a_page_that_lost_a_part_never_serves() -> None:
    source = Source("n")
    source.store(SPACES[0], "host", range(60))
    first, *rest = source.publisher.snapshot()
    index = LocalityIndex(BYTES_MAX)
    assert tell(index, [msgspec.structs.replace(first, events=[]), *rest])[-1] is Applied.DRIFT
    assert len(index.match(HINTS)) == 0 and index.entries == 0
    tell(index, source.answer(index.cursor("n")))
    assert blocks(index) == {ONE: 60}


def test_a_snapshot_that_is_older_than_what_is_there_is_ignored() -> None:
    source = Source("n")
    index = followed(source)
    old = list(source.publisher.snapshot())
    tell(index, source.store(SPACES[0], "host", range(4)))
    index.suspect("n")
    assert tell(index, old) == [Applied.STALE]
    assert blocks(index) == {ONE: 4}


# --- limits and nonsense ------------------------------------------------------------------------


def test_over_its_limit_it_says_too_little_and_says_so() -> None:
    prompt = path(MANY, seed=3)
    source = Source("n", prompt=prompt)
    index = followed(source, bytes_max=SMALL)
    assert set(tell(index, source.store(SPACES[0], "host", range(MANY)))) == {Applied.TAKEN}
    held = index.entries
    assert 1_000 < held < MANY and index.refused_blocks == MANY - held
    assert index.bytes <= index.bytes_max
    assert 1_000 < blocks(index, prompt)[ONE] <= held
    assert index.sources()[0].partial and not is_suspect(index, "n")
    assert tell(index, [source.publisher.beat()]) == [Applied.TAKEN], "its digest is not expected to agree"
    tell(index, source.remove(SPACES[0], "host", range(MANY)))
    tell(index, source.store(SPACES[0], "nvme", range(100)))
    assert blocks(index, prompt) == {ONE: 100}, "room that came back is used"
    synced(index, source)
    assert not index.sources()[0].partial


def test_without_room_for_both_a_snapshot_takes_the_place_of_what_it_replaces() -> None:
    probe = make_index(SMALL - SMALL // PLACED_SHARE)
    fits = MANY - probe.store(probe.open(0), 1, hints(path(MANY)))
    size = fits * 7 // 10
    source, other = (Source("n", prompt=path(size, seed)) for seed in (4, 5))
    index = followed(source, bytes_max=SMALL)
    tell(index, source.store(SPACES[0], "host", range(size)))
    assert index.refused_blocks == 0
    index.suspect("n")
    other.store(SPACES[0], "host", range(size))
    assert {index.apply(page, 0) for page in other.publisher.snapshot()} == {Applied.TAKEN}
    assert (index.refused_blocks, index.entries) == (0, size)
    assert list(index.match(hints(other.prompt)).blocks) == [size]
    assert len(index.match(hints(source.prompt))) == 0
    index.check()


@pytest.mark.parametrize(
    "event",
    [
        BlockEvent("moved", SPACES[0], "host"),
        BlockEvent("stored", SPACES[0], "tape"),
        BlockEvent("stored", b"short", "host"),
        BlockEvent("stored", SPACES[0], "host", b"", b"fifteen bytes.."),
        BlockEvent("stored", SPACES[0], "host", b"seven..", HINTS),
        BlockEvent("stored", SPACES[0], "host", b"", HINTS[:24], b"\1\0\3\0"),
        BlockEvent("stored", SPACES[0], "host", b"", HINTS[:24], b"\1\0\0\0\2\0"),
        BlockEvent("stored", SPACES[0], "host", b"", HINTS[:24], b"\3\0\1"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused_whole(event: BlockEvent) -> None:
    index = followed(Source("n"))
    good = BlockEvent("stored", SPACES[0], "host", b"", HINTS[:8])
    with pytest.raises(BadInput):
        index.apply(EventBatch("n", 1, 1, False, [good, event]), 0)
    with pytest.raises(BadInput):
        index.apply(EventBatch("n", 1, 1, False, [good], beat=True), 0)
    assert index.entries == 0 and index.cursor("n") == (1, 0)
    index.check()


def test_runs_are_paths_of_their_own() -> None:
    index = followed(Source("n"))
    other = hints(path(4, seed=9))
    event = BlockEvent("stored", SPACES[0], "host", b"", HINTS[:24] + other, b"\3\0\4\0")
    assert index.apply(EventBatch("n", 1, 1, False, [event]), 0) is Applied.TAKEN
    assert list(index.match(HINTS).blocks) == [3] and list(index.match(other).blocks) == [4]


def test_cleared_empties_one_tier_of_one_shard() -> None:
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(4)))
    tell(index, source.store(SPACES[0], "nvme", range(2)))
    tell(index, source.store(SPACES[1], "host", range(4)))
    batch = EventBatch("n", 1, 4, False, [BlockEvent("cleared", SPACES[0], "host")])
    assert index.apply(batch, 0) is Applied.TAKEN
    found = [Located("n", SPACES[0], 2, (0, 0, 2)), Located("n", SPACES[1], 4, (0, 4, 0))]
    assert index.locate(HINTS) == found


def test_namespaces_are_remembered_by_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Namespace(
        model="m", weights="w", dtype="bf16", layout="canonical", block_tokens=16, shape="1x1x1"
    )
    publisher = Publisher("n", 1)
    publisher.announce(space)
    index = LocalityIndex(BYTES_MAX)
    tell(index, publisher.snapshot())
    assert index.namespace(space.namespace_id()) == space
    assert index.namespace(SPACES[0]) is None
    assert index.known_namespaces() == [space.namespace_id()]


def test_numbers_of_namespaces_are_bounded_and_those_that_nobody_uses_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("kvcache.locality.NAMESPACES_MAX", "kvcache.locality_view.NAMESPACES_MAX"):
        monkeypatch.setattr(name, 4)
    index = followed(Source("old"), Source("new"))
    seqs = count(1)

    def stored(source: str, number: int) -> None:
        space = NamespaceId(bytes([number]) * 16)
        event = BlockEvent("stored", space, "host", b"", HINTS[:8])
        index.apply(EventBatch(source, 1, next(seqs), False, [event]), 0)

    for number in range(6):
        stored("old", number)
    assert index.entries == 4 and index.refused_blocks == 2
    [old, _] = index.sources()
    assert old.partial and old.source == "old"
    index.forget("old")
    index.tick(0)
    seqs = count(1)
    stored("new", 9)
    assert index.locate(HINTS) == [Located("new", NamespaceId(b"\x09" * 16), 1, (0, 1, 0))]
    index.check()


def test_what_is_lost_is_told_by_its_name() -> None:
    assert {Applied.GAP, Applied.RESTARTED, Applied.DRIFT} == LOST
