"""The feed against an engine that keeps its truth, over a network that loses, repeats and cuts."""

from __future__ import annotations

import os
import random

import pytest

from tests.kvcache.engine_events.line import Line, line, make
from tests.kvcache.engine_events.model_engine import (
    BLOCK,
    Chain,
    ModelEngine,
    Shelf,
    names_of,
    namespace_id,
)

FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))


@pytest.mark.parametrize("replay", [True, False])
def test_every_message_in_order_is_exact(replay: bool) -> None:
    made = line(1, 300, replay)
    made.assert_exact()
    assert made.feed.counts["gaps"] == made.feed.counts["unnamed_blocks"] == 0


def test_who_comes_late_asks_for_all_of_it() -> None:
    engine = ModelEngine(random.Random(2))
    for _ in range(100):
        engine.step()
        engine.publish()
    made = Line(engine, make())
    made.connect()
    made.assert_exact()


def test_an_engine_that_told_nothing_yet_is_known_whole() -> None:
    made = line()
    assert not made.shelf.partial
    without = line(replay=False)
    assert without.shelf.partial  # It may have told something before.


def test_a_gap_is_replayed() -> None:
    made = line(3, 50)
    for _ in range(5):
        made.engine.message()
    made.send(made.engine.message())
    made.assert_exact()
    assert made.feed.counts["gaps"] == 1
    assert made.feed.incarnation == 7


def test_what_was_lost_at_the_end_is_found_when_it_is_quiet() -> None:
    made = line(3, 50)
    made.engine.evict()
    made.engine.publish()
    assert made.shelf.members != made.engine.truth()
    made.quiet()
    made.assert_exact()
    before = made.shelf.at
    made.quiet()
    assert made.shelf.at == before


def test_a_replay_that_is_too_short_leaves_too_little() -> None:
    made = line(5, 80, buffered=3)
    for _ in range(30):
        made.engine.message()
    made.send(made.engine.message())
    assert made.shelf.partial
    assert (made.feed.incarnation, made.feed.counts["restarts"]) == (7, 0)
    for _ in range(100):
        made.assert_too_little()
        made.send(made.engine.message())


def test_a_replay_with_a_hole_goes_on_from_where_it_was() -> None:
    engine = ModelEngine(random.Random(7))
    for _ in range(100):
        engine.message()
    made = Line(engine, make())
    made.drops_one = 30
    made.connect()
    made.assert_exact()
    assert made.feed.counts["replays"] > 3


def test_a_replay_of_which_nothing_new_comes_is_given_up() -> None:
    made = line(6, 40)
    for _ in range(3):
        made.engine.message()
    made.drops_one = 1
    made.quiet()
    assert made.shelf.partial
    assert made.shelf.members == set()
    made.drops_one = 0
    made.send(made.engine.message())
    made.assert_exact()


def test_a_gap_without_a_replay_leaves_too_little() -> None:
    made = line(5, 80, replay=False)
    made.engine.message()
    made.send(made.engine.message())
    assert made.shelf.partial
    made.assert_too_little()


def test_an_unanswered_replay_leaves_too_little() -> None:
    made = line(6, 80)
    made.answers = False
    made.engine.pending = [{"type": "AllBlocksCleared"}]
    made.engine.held.clear()
    made.engine.publish()
    chain = Chain(list(range(BLOCK)), "", "")
    made.engine.pending = [made.engine.stored(chain, chain.hashes(), 0)]
    made.send(made.engine.publish())
    assert made.shelf.partial
    assert {name for _, _, name in made.shelf.members} == set(names_of(chain.tokens))


def test_a_replay_that_is_cut_goes_on_from_where_it_was() -> None:
    engine = ModelEngine(random.Random(7))
    for _ in range(100):
        engine.step()
        engine.publish()
    made = Line(engine, make())
    made.drops_after = 9
    made.connect()
    made.assert_exact()
    assert made.feed.counts["replays"] > 5


def test_the_first_message_after_a_restart_suffices() -> None:
    made = line(8, 60)
    made.engine.restart()
    chain = Chain(list(range(3 * BLOCK)), "", "")
    for each, name in zip(chain.hashes(), names_of(chain.tokens), strict=True):
        made.engine.members[each] = namespace_id(), name
        made.engine.held["GPU", each] = 1
    made.engine.pending = [made.engine.stored(chain, chain.hashes(), 0)]
    made.send(made.engine.publish())
    made.assert_exact()
    assert made.feed.incarnation == 8
    assert made.feed.counts["restarts"] == 1


@pytest.mark.parametrize("more", [0, 1, 59, 60, 200])
def test_a_restart_behind_a_new_connection_is_seen_whatever_the_numbers(more: int) -> None:
    """Also when the new process has told as much as the old one, or more."""
    made = line(9, 60)
    made.engine.restart()
    made.engine.random = random.Random(10)
    for _ in range(more):
        made.engine.step()
        made.engine.publish()
    made.connect()
    made.assert_exact()
    assert made.feed.incarnation > 7


def test_a_new_connection_to_the_same_process_goes_on() -> None:
    made = line(11, 60)
    before = made.feed.incarnation
    made.engine.message()
    made.connect()
    made.assert_exact()
    assert made.feed.incarnation == before
    assert made.feed.counts["emptied"] == 1


def test_a_new_connection_without_a_replay_begins_empty() -> None:
    made = line(12, 60, replay=False)
    made.connect()
    assert made.shelf.members == set()
    assert made.shelf.partial


def test_messages_that_come_twice_are_taken_once() -> None:
    made = line(13, 30)
    kept = made.engine.message()
    made.send(made.engine.message())  # A gap: both come with the replay.
    made.feed._live = -1  # As if the first had been on its way all the time.
    made.send(kept)
    made.assert_exact()
    assert made.feed.counts["duplicates"] >= 1


def test_garbage_empties_the_index_and_harms_nothing_else() -> None:
    made = line(14, 30)
    made.send((made.engine.seq, b"\xc1"))
    assert made.shelf.members == set()
    assert made.shelf.partial
    assert made.feed.counts["garbage"] == 1
    made.engine.seq += 1
    made.engine.held.clear()
    made.engine.store()
    made.send(made.engine.message())
    made.assert_too_little()
    assert made.shelf.members


@pytest.mark.parametrize("seed", range(12 * FACTOR))
def test_any_order_of_losses_and_restarts_never_claims_what_is_not_there(seed: int) -> None:
    choose = random.Random(seed)
    engine = ModelEngine(
        random.Random(seed + 1), choose.choice(["vllm", "sglang"]), offloads=choose.random() < 0.5
    )
    replay = choose.random() < 0.7
    made = Line(engine, make(replay, engine.engine), choose.choice([2, 20, 1 << 20]))
    made.drops_after = choose.choice([7, 1 << 20])
    made.drops_one = choose.choice([0, 0, 5])
    made.connect()
    for _ in range(150):
        for _ in range(choose.randrange(1, 4)):
            engine.step()
        message = engine.publish()
        fate = choose.random()
        if fate < 0.1:
            continue  # Lost.
        if fate < 0.14:
            engine.restart()
        if fate < 0.17:
            made.connect()
            continue
        if fate < 0.2:
            made.quiet()
        made.answers = choose.random() < 0.9
        if message is not None and fate >= 0.14:
            made.send(message)
            made.assert_too_little()
            if not made.shelf.partial:
                made.assert_exact()
    restored = Shelf()
    for batch in made.feed.snapshot():
        restored.apply(batch, 0)
        made.assert_runs(batch)
    assert restored.members == made.shelf.members
    assert restored.at == made.shelf.at
