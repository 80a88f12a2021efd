"""The feed against an engine that keeps its truth, over a network that loses, repeats and cuts."""

from __future__ import annotations

import os
import random

import pytest

from kvcache import packing
from kvcache.engine_events.feed import EngineFeed
from kvcache.engine_events.naming import public_namespaces, salted
from kvcache.sequence import sequence_hashes
from kvcache.wire import EventBatch
from tests.kvcache.engine_events.model_engine import (
    BLOCK,
    MODEL,
    Chain,
    ModelEngine,
    Shelf,
    name_of,
    names_of,
    namespace_id,
)

FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))


def make(replay: bool = True, engine: str = "vllm", blocks_max: int = 1 << 20) -> EngineFeed:
    return EngineFeed(
        "engine:w", public_namespaces(MODEL), 7, engine=engine, replay=replay, blocks_max=blocks_max
    )


class Line:
    """A connection between the two: what the feed asks for, the engine's buffer answers."""

    def __init__(self, engine: ModelEngine, feed: EngineFeed, buffered: int = 1 << 20) -> None:
        self.engine, self.feed, self.shelf = engine, feed, Shelf()
        self.buffered = buffered
        self.answers = True
        self.drops_after = 1 << 20
        """How much of a replay arrives before the rest is lost."""
        self.drops_one = 0
        """Which message of a replay is lost in its middle; 0: none."""

    def connect(self) -> None:
        self.apply(self.feed.connected())
        self.settle()

    def send(self, message: tuple[int, bytes] | None) -> None:
        if message is not None:
            self.apply(self.feed.take(*message))
            self.settle()

    def settle(self) -> None:
        for _ in range(1_000):
            start = self.feed.wanted
            if start is None:
                return
            buffer = self.engine.log[-self.buffered :] if self.answers else []
            sent = [message for message in buffer if message[0] >= start]
            for number, message in enumerate(sent[: self.drops_after]):
                if not number or number != self.drops_one:
                    self.apply(self.feed.replayed(*message))
            self.apply(self.feed.replay_ended(self.answers and len(sent) <= self.drops_after))
        raise AssertionError("it asks for ever")

    def quiet(self) -> None:
        self.feed.quiet()
        self.settle()

    def apply(self, batches: list[EventBatch]) -> None:
        for batch in batches:
            self.shelf.apply(batch, 0)
            self.assert_runs(batch)
        self.feed.check()

    def assert_runs(self, batch: EventBatch) -> None:
        """What is told as stored together follows one another."""
        for event in batch.events:
            if event.kind == "stored":
                names = memoryview(event.hashes).cast("Q").tolist()
                before = [int.from_bytes(event.parent, "little") if event.parent else None, *names]
                known = [self.engine.before.get(name, 0) for name in names]
                assert all(first in (0, second) for first, second in zip(known, before, strict=False))

    def assert_exact(self) -> None:
        assert self.shelf.members == self.engine.truth()
        assert not self.shelf.partial

    def assert_too_little(self) -> None:
        assert self.shelf.members <= self.engine.truth()


def line(seed: int = 0, steps: int = 0, replay: bool = True, buffered: int = 1 << 20) -> Line:
    engine = ModelEngine(random.Random(seed), offloads=seed % 2 == 1)
    made = Line(engine, make(replay), buffered)
    made.connect()
    for _ in range(steps):
        engine.step()
        made.send(engine.publish())
    return made


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


def test_a_cleared_cache_is_whole_again() -> None:
    made = line(4, 80, replay=False)
    made.engine.message()
    made.send(made.engine.message())
    assert made.shelf.partial
    made.engine.clear()
    made.engine.store()
    made.send(made.engine.message())
    made.assert_exact()


def test_a_cleared_cache_of_an_engine_that_offloads_may_have_more() -> None:
    """Twice: nothing that is told later says that the lower tiers were meant too."""
    made = line(5, 80)
    for _ in range(2):
        made.engine.clear()
        made.send(made.engine.message())
        assert made.shelf.members == set()
        assert made.shelf.partial


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


def test_of_two_equal_blocks_the_last_to_go_counts() -> None:
    made = line()
    chain = Chain(list(range(2 * BLOCK)), "", "")
    event = made.engine.stored(chain, chain.hashes(), 0)
    gone = {"type": "BlockRemoved", "block_hashes": chain.hashes(), "medium": "GPU"}
    for pending, left in (([event, event], 2), ([gone], 2), ([gone], 0)):
        made.engine.pending = list(pending)
        made.send(made.engine.publish())
        assert len(made.shelf.members) == left
    sglang = Line(ModelEngine(random.Random(0)), make(engine="sglang"))
    sglang.connect()
    for pending, left in (([event, event], 2), ([gone], 0)):
        sglang.engine.pending = list(pending)
        sglang.send(sglang.engine.publish())
        assert len(sglang.shelf.members) == left


def test_a_router_can_call_a_salted_prompt_the_same() -> None:
    made = line()
    chain = Chain(list(range(3 * BLOCK)), "secret", "")
    made.engine.pending = [made.engine.stored(chain, chain.hashes(), 0)]
    made.send(made.engine.publish())
    tokens = b"".join(token.to_bytes(4, "little") for token in chain.tokens)
    asked = sequence_hashes(tokens, BLOCK, salted("secret")).tolist()
    assert {name for _, _, name in made.shelf.members} == set(asked)
    assert set(asked).isdisjoint(sequence_hashes(tokens, BLOCK).tolist())


def test_no_more_than_blocks_max_is_held_and_the_rest_is_said_to_be_missing() -> None:
    engine = ModelEngine(random.Random(15))
    made = Line(engine, make(blocks_max=10))
    made.connect()
    for _ in range(200):
        engine.step()
        made.send(engine.publish())
        assert made.feed.blocks <= 10
        made.assert_too_little()
    assert made.feed.counts["refused_blocks"]


def test_a_block_of_no_known_parent_is_not_named() -> None:
    made = line()
    chain = Chain(list(range(3 * BLOCK)), "", "")
    made.engine.pending = [made.engine.stored(chain, chain.hashes(), 2)]
    made.send(made.engine.publish())
    assert made.shelf.members == set()
    assert made.shelf.partial
    assert made.feed.counts["unnamed_blocks"] == 1


def test_a_parent_of_another_namespace_names_nothing() -> None:
    made = line()
    chain = Chain(list(range(2 * BLOCK)), "", "")
    parent = made.engine.stored(chain, chain.hashes()[:1], 0)
    child = made.engine.stored(chain, chain.hashes(), 1)
    made.engine.pending = [{**parent, "token_ids": chain.tokens[:BLOCK]}, {**child, "lora_name": "x"}]
    made.send(made.engine.publish())
    assert len(made.shelf.members) == 1
    assert made.feed.counts["unnamed_blocks"] == 1


def test_a_hash_that_means_another_block_takes_the_first_away() -> None:
    made = line()
    first, second = Chain([1] * BLOCK, "", ""), Chain([2] * BLOCK, "", "")
    made.engine.pending = [
        made.engine.stored(first, [77], 0),
        made.engine.stored(second, [77], 0),
    ]
    made.send(made.engine.publish())
    assert {name for _, _, name in made.shelf.members} == set(names_of(second.tokens))
    assert made.shelf.partial


def test_another_ranks_messages_are_not_mixed_in() -> None:
    made = line(16, 20)
    before = set(made.shelf.members)
    chain = Chain([5] * BLOCK, "", "")
    event = made.engine.stored(chain, chain.hashes(), 0)
    made.send((made.engine.seq, packing.pack([1.0, [event], 3])))
    assert made.shelf.members == before
    assert made.feed.counts["other_rank"] == 1
    assert made.feed.rank == 0


def rfc(kind: str, **fields: object) -> dict[str, object]:
    base = {"event_id": 1, "event_type": kind, "model_name": None, "block_size": None, "medium": "cpu"}
    return {**base, "tenant_id": "default", "backend_id": "b", "dp_rank": None, **fields}


def test_hashes_without_tokens_are_names_in_rfc_1527() -> None:
    feed = EngineFeed("pool", public_namespaces(MODEL), 1, engine="rfc1527", replay=False, block_tokens=BLOCK)
    shelf = Shelf()
    tokens = list(range(2 * BLOCK))
    names = names_of(tokens)
    stored = rfc("stored", seq_hashes=names, base_block_idx=0, parent_hash=None, token_ids=None)
    told = [
        [1, [stored], 0],
        [2, [rfc("stored", seq_hashes=[9], parent_hash=names[1], token_ids=[7] * BLOCK, medium="gpu")], 0],
        [3, [rfc("removed", seq_hashes=names[:1])], 0],
    ]
    for batch in feed.connected():
        shelf.apply(batch, 0)
    for seq, plain in enumerate(told):
        for batch in feed.take(seq, packing.pack(plain)):
            shelf.apply(batch, 0)
    space = namespace_id()
    third = name_of([7] * BLOCK, names[1])
    assert shelf.members == {("host", space, names[1]), ("hbm", space, third)}
    for batch in feed.take(3, packing.pack([4, [rfc("cleared")], 0])):
        shelf.apply(batch, 0)
    assert shelf.members == {("hbm", space, third)}
    assert not feed.partial
    other = rfc("stored", seq_hashes=[5], parent_hash=None, token_ids=None, lora_name="a")
    for batch in feed.take(4, packing.pack([5, [other, rfc("cleared", lora_name="a")], 0])):
        shelf.apply(batch, 0)
    assert shelf.partial  # It meant one of two.


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
