"""Who is silent, what is predicted, how busy sources say they are; and readers beside a writer."""

from __future__ import annotations

import threading

import msgspec
import pytest

from kvcache import event_pages, locality_placed
from kvcache.block import NamespaceId, hints
from kvcache.index import make_index
from kvcache.locality import BEAT_NS, PLACE_NS, Applied, LocalityIndex, Located
from kvcache.locality_placed import Placements
from kvcache.wire import EventBatch
from tests.kvcache.locality_source import (
    BYTES_MAX,
    PREFIX,
    SPACES,
    Source,
    blocks,
    followed,
    is_suspect,
    path,
    synced,
    tell,
)

HINTS = hints(PREFIX)
ONE = ("n", SPACES[0])


def holding(count: int = 8) -> tuple[LocalityIndex, Source]:
    """An index that follows a source with so many blocks; nothing is later than 0."""
    source = Source("n")
    index = followed(source)
    tell(index, source.store(SPACES[0], "host", range(count)), now_ns=0)
    return index, source


# --- beats and leases ---------------------------------------------------------------------------


def test_one_beat_missed_is_suspect_and_the_next_one_ends_it() -> None:
    index, source = holding()
    index.tick(BEAT_NS)
    assert not is_suspect(index, "n")
    index.tick(BEAT_NS * 3 // 2 + 1)
    assert is_suspect(index, "n") and blocks(index) == {ONE: 8}
    assert index.match(HINTS).suspect == b"\1"
    assert tell(index, [source.publisher.beat()], 2 * BEAT_NS) == [Applied.TAKEN]
    assert not is_suspect(index, "n") and index.match(HINTS).suspect == b"\0"
    assert index.sources()[0].heard_ns == 2 * BEAT_NS


def test_the_rest_of_a_snapshot_is_none_when_its_beginning_was_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those who are told no digests would not find out that they lack it."""
    monkeypatch.setattr(event_pages, "PAGE_BYTES_MAX", 400)
    monkeypatch.setattr(event_pages, "PAGE_ROOM_BYTES", 400)
    source = Source("n")
    source.store(SPACES[0], "host", range(60))
    first, *rest = [msgspec.structs.replace(page, digests={}) for page in source.publisher.snapshot()]
    index = LocalityIndex(BYTES_MAX)
    for now_ns in range(0, 4 * BEAT_NS, BEAT_NS):
        index.tick(now_ns)
        if now_ns == 0:
            assert tell(index, [first], 0) == [Applied.TAKEN]
    index.tick(4 * BEAT_NS)
    assert tell(index, rest[:1], 4 * BEAT_NS) == [Applied.GAP]
    assert index.cursor("n") is None and index.entries == 0
    assert set(tell(index, [first, *rest], 4 * BEAT_NS)) == {Applied.TAKEN}
    assert blocks(index) == {ONE: 60}


def test_three_beats_missed_and_what_was_told_is_forgotten() -> None:
    index, source = holding()
    assert index.tick(3 * BEAT_NS) == []
    assert blocks(index) == {ONE: 8}
    assert index.tick(3 * BEAT_NS + 1) == ["n"]
    [state] = index.sources()
    assert (state.known, state.synced) == (False, False) and index.cursor("n") is None
    assert blocks(index) == {} and index.entries == 0
    assert index.tick(4 * BEAT_NS) == [], "once"
    later = [source.publisher.beat(), *source.store(SPACES[0], "host", [8])]
    assert tell(index, later, 4 * BEAT_NS) == [Applied.GAP, Applied.GAP]
    tell(index, source.answer(index.cursor("n")), 4 * BEAT_NS)
    assert blocks(index) == {ONE: 9} and not is_suspect(index, "n")


def test_nobody_is_dropped_because_we_were_away() -> None:
    """What was told meanwhile is still to be read."""
    index, source = holding()
    for quarter in range(4):
        assert index.tick(quarter * BEAT_NS // 4) == []
    assert index.tick(3 * BEAT_NS + 1) == [], "nobody ticked for more than a beat"
    assert is_suspect(index, "n") and blocks(index) == {ONE: 8}
    assert tell(index, [source.publisher.beat()], 3 * BEAT_NS + 2) == [Applied.TAKEN]
    assert index.tick(3 * BEAT_NS + 3) == [] and not is_suspect(index, "n")
    for quarter in range(13, 24):
        assert index.tick(quarter * BEAT_NS // 4) == []
    assert index.tick(6 * BEAT_NS + 3) == ["n"], "and now we were here all the time"


def test_who_tells_no_beats_is_kept_by_whoever_hears_it() -> None:
    index, _ = holding()
    for beat in range(1, 9):
        index.heard("n", beat * BEAT_NS)
        assert index.tick(beat * BEAT_NS + 1) == []
        assert not is_suspect(index, "n")
    index.suspect("n")
    index.heard("n", 10 * BEAT_NS)
    assert index.tick(10 * BEAT_NS) == [], "it lives, though its stream broke"
    assert is_suspect(index, "n")
    assert index.sources()[0].heard_ns == 8 * BEAT_NS, "what is there was so then, as far as is known"


def test_who_resyncs_for_long_is_not_dropped_meanwhile() -> None:
    index, source = holding()
    index.suspect("n")
    [page] = source.publisher.snapshot()
    for beat in range(1, 6):
        more = msgspec.structs.replace(page, left=6 - beat, events=[], digests={})
        assert index.apply(more, beat * BEAT_NS) is Applied.TAKEN
        assert index.tick(beat * BEAT_NS) == [] and blocks(index) == {ONE: 8}
    assert index.apply(page, 6 * BEAT_NS) is Applied.TAKEN
    assert not is_suspect(index, "n")


def test_when_it_was_we_who_stood_still_nobody_is_dropped_at_once() -> None:
    index, source = holding()
    index.tick(0)
    assert index.tick(60 * BEAT_NS) == []
    assert index.tick(61 * BEAT_NS - 1) == [], "who stood still with us has a beat to say that it lives"
    assert is_suspect(index, "n") and blocks(index) == {ONE: 8}
    index.apply(source.publisher.beat(), 60 * BEAT_NS)
    assert index.tick(61 * BEAT_NS) == [] and not is_suspect(index, "n")


def test_who_says_nothing_for_a_beat_after_we_stood_still_is_dropped() -> None:
    index, _ = holding()
    index.tick(0)
    assert index.tick(60 * BEAT_NS) == []
    assert index.tick(61 * BEAT_NS) == ["n"]


def test_a_beat_that_knows_of_more_shows_what_was_lost() -> None:
    index, source = holding()
    lost = source.store(SPACES[0], "host", range(8, 10))
    assert tell(index, [source.publisher.beat()]) == [Applied.GAP]
    assert is_suspect(index, "n") and index.cursor("n") == (1, 1)
    assert tell(index, [*lost, source.publisher.beat()]) == [Applied.TAKEN, Applied.TAKEN]
    assert not is_suspect(index, "n") and blocks(index) == {ONE: 10}


def test_a_late_beat_says_nothing() -> None:
    index, source = holding()
    beat = source.publisher.beat()
    tell(index, source.store(SPACES[0], "host", range(8, 10)))
    assert tell(index, [beat]) == [Applied.STALE]
    assert not is_suspect(index, "n")


def test_unknown_is_not_nothing() -> None:
    index = LocalityIndex(BYTES_MAX)
    assert index.sources() == [] and index.locate(HINTS) == [] and index.as_of("n") is None
    assert index.cursor("n") is None
    source = Source("n")
    assert tell(index, source.store(SPACES[0], "host", range(3))) == [Applied.GAP]
    [state] = index.sources()
    assert not state.known and not state.synced and blocks(index) == {}
    synced(index, source)
    [state] = index.sources()
    assert (state.synced, state.known, state.incarnation, state.seq) == (True, True, 1, 1)
    index.forget("n")
    index.forget("nobody")
    assert index.sources() == [] and blocks(index) == {} and index.entries == 0
    index.check()


def test_a_source_that_cannot_tell_all_is_partial_until_a_snapshot_says_otherwise() -> None:
    index, source = holding()
    [page] = source.publisher.snapshot()
    index.suspect("n")
    index.apply(msgspec.structs.replace(page, partial=True), 0)
    tell(index, source.store(SPACES[0], "host", [9]))
    [state] = index.sources()
    assert state.partial and state.synced
    synced(index, source)
    assert not index.sources()[0].partial


def test_how_busy_a_source_is_comes_with_the_time_it_was_told() -> None:
    index, source = holding()
    assert index.load("n") is None and index.load("nobody") is None
    index.apply(source.publisher.beat({"requests_running": 3.0}), 7)
    tell(index, [source.publisher.beat()], 9)
    load = index.load("n")
    assert load is not None and (dict(load.values), load.told_ns) == ({"requests_running": 3.0}, 7)
    index.apply(EventBatch("n", 2, 1, False, []), 10)
    assert index.load("n") is None, "it started anew"


# --- placements ---------------------------------------------------------------------------------


def placed(index: LocalityIndex, prompt: bytes = HINTS) -> list[tuple[str, bytes, int, int]]:
    return [(each.source, each.namespace, each.blocks, each.placed) for each in index.match(prompt).located()]


def test_what_was_placed_is_predicted_beyond_what_is_there_and_never_counted_as_blocks() -> None:
    index, _ = holding()
    assert index.place("n", SPACES[0], HINTS, 0) == 0
    assert placed(index) == [(*ONE, 8, 56)]
    assert placed(index, HINTS[:80]) == [(*ONE, 8, 2)]
    assert index.locate(HINTS) == [Located("n", SPACES[0], 8, (0, 8, 0), 56)]
    assert index.match(HINTS, limit=1).placed.tolist() == [56]
    assert index.entries == 8 and not is_suspect(index, "n")


def test_what_was_placed_where_nothing_is_yet_is_found() -> None:
    index, _ = holding(0)
    index.place("n", SPACES[1], HINTS[:160], 0)
    assert placed(index) == [("n", SPACES[1], 0, 20)]
    assert placed(index, hints(path(3, seed=9))) == []
    assert len(index.match(HINTS, [SPACES[0]])) == 0
    assert len(index.match(HINTS, sources=["other"])) == 0
    assert len(index.match(HINTS, sources=["n"])) == 1
    assert index.place("nobody", SPACES[0], HINTS, 0) == 64, "who is not heard of is not predicted"


def test_a_prediction_ends_between_once_and_twice_its_time() -> None:
    for start in (0, PLACE_NS // 2, PLACE_NS - 1):
        index, _ = holding(0)
        index.tick(start)
        index.place("n", SPACES[0], HINTS, start)
        times = range(start, start + 3 * PLACE_NS, PLACE_NS // 10)
        ended = next(at for at in times if not _predicts(index, at))
        assert start + PLACE_NS < ended <= start + 2 * PLACE_NS + PLACE_NS // 10


def _predicts(index: LocalityIndex, now_ns: int) -> bool:
    index.heard("n", now_ns)
    index.tick(now_ns)
    return bool(placed(index))


def test_a_prediction_that_is_made_again_goes_on() -> None:
    index, _ = holding(0)
    for turn in range(6):
        index.place("n", SPACES[0], HINTS, turn * PLACE_NS)
        assert placed(index) == [(*ONE, 0, 64)]
    index.place("n", SPACES[1], HINTS, 99 * PLACE_NS)
    assert placed(index) == [("n", SPACES[1], 0, 64)]


def test_what_the_source_tells_goes_before_what_was_predicted() -> None:
    index, source = holding()
    index.place("n", SPACES[0], HINTS, 0)
    tell(index, source.store(SPACES[0], "host", range(8, 30)))
    assert placed(index) == [(*ONE, 30, 34)]
    tell(index, source.remove(SPACES[0], "host", range(20, 30)))
    assert placed(index) == [(*ONE, 20, 0)], "it is gone, as the source says, and not about to come"
    tell(index, source.store(SPACES[0], "host", range(20, 64)))
    assert placed(index) == [(*ONE, 64, 0)]


def test_nothing_is_predicted_of_a_source_that_ended() -> None:
    for end in ("restart", "forget", "drop"):
        index, source = holding(0)
        index.place("n", SPACES[0], HINTS, 0)
        assert placed(index)
        if end == "restart":
            index.apply(EventBatch("n", 2, 1, False, []), 0)
        elif end == "forget":
            index.forget("n")
        else:
            index.tick(4 * BEAT_NS)
        assert placed(index) == [] and source.seq == 0
        index.check()


def test_predictions_are_bounded_in_bytes_and_in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    placements = Placements(make_index(400_000))
    many = hints(path(30_000, seed=1))
    refused = placements.place(0, 0, many, 0)
    assert 0 < refused < 30_000 and placements.bytes <= 400_000
    monkeypatch.setattr(locality_placed, "HOLDERS_MAX", 2)
    placements.forget(0)
    placements.place(1, 0, HINTS[:8], 0)
    placements.place(1, 1, HINTS[:8], 0)
    assert placements.place(1, 2, HINTS[:8], 0) == 1
    placements.tick(2 * PLACE_NS)
    assert placements.namespaces() == set(), "what is over takes nothing"
    placements.check()


def test_shards_of_predictions_take_their_part_of_the_memory() -> None:
    placements = Placements(make_index(200_000))
    refused = [placements.place(0, number, HINTS[:8], 0) for number in range(2_000)]
    assert refused[0] == 0 and refused[-1] == 1
    assert placements.bytes < 205_000
    placements.check()


# --- readers beside a writer --------------------------------------------------------------------


@pytest.mark.slow
def test_readers_never_see_more_than_was_told_nor_fail_while_sources_come_and_go() -> None:
    """``steady`` is there all the time, whole; of ``moving`` anything from nothing to all."""
    prompt = path(2_000, seed=6)
    question = hints(prompt)
    steady, moving = Source("steady", prompt=prompt), Source("moving", prompt=prompt)
    index = followed(steady, moving, bytes_max=64 << 20)
    tell(index, steady.store(SPACES[0], "host", range(2_000)))
    done = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not done.is_set():
            found = {(each.source, each.namespace): each for each in index.match(question).located()}
            located = {each.source for each in index.locate(question, [SPACES[0]])}
            states = {state.source: state for state in index.sources()}
            if found["steady", SPACES[0]].blocks != 2_000 or located | {"moving"} != {"steady", "moving"}:
                wrong.append(found)
            if any(each.blocks > 2_000 for each in found.values()) or states["steady"].seq != 1:
                wrong.append(states)
            index.known_namespaces(), index.load("moving"), index.cursor("moving"), index.bytes

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(1, 21):
            space = NamespaceId(bytes([turn]) * 16)
            for batch in moving.store(space, "host", range(2_000)):
                index.apply(batch, 0)
            index.place("moving", SPACES[0], question, turn * PLACE_NS)
            index.suspect("moving")
            for page in moving.publisher.snapshot():
                index.apply(page, 0)
            if turn % 5 == 0:
                index.forget("moving")
                moving = Source("moving", turn, prompt)
                synced(index, moving)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not wrong
    index.check()
