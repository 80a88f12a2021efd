"""What an engine told of its blocks, in the index: their names, their copies, and what cannot be told."""

from __future__ import annotations

import random

from kvcache import packing
from kvcache.engine_events.feed import EngineFeed
from kvcache.engine_events.held import PLACES_MAX
from kvcache.engine_events.naming import public_namespaces, salted
from kvcache.sequence import sequence_hashes
from tests.kvcache.engine_events.line import Line, line, make
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


def test_what_cannot_be_told_is_said_at_once() -> None:
    made = line()
    chain = Chain(list(range(BLOCK)), "", "")
    told = made.engine.stored(chain, chain.hashes(), 0)
    for event, partial in ((told, False), ({**told, "parent_block_hash": 12_345}, True)):
        made.engine.pending = [event]
        made.send(made.engine.publish())
        assert made.shelf.partial == partial
    assert len(made.shelf.members) == 1


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


def test_a_hash_that_means_two_blocks_at_once_is_not_told() -> None:
    """Only one of the two would be taken out when it goes."""
    made = line()
    chain = Chain(list(range(2 * BLOCK)), "", "")
    made.engine.pending = [made.engine.stored(chain, [77, 77], 0)]
    made.send(made.engine.publish())
    assert made.shelf.partial
    assert made.shelf.members == set()
    assert made.feed.counts["conflicts"] == 2
    made.feed.check()


def test_copies_of_a_block_are_counted_up_to_a_bound() -> None:
    made = line()
    chain = Chain([1] * BLOCK, "", "")
    event = made.engine.stored(chain, [77], 0)
    gone = {"type": "BlockRemoved", "block_hashes": [77], "medium": "GPU"}
    for pending, left, partial in (
        ([event] * PLACES_MAX, 1, False),
        ([event], 1, True),
        ([gone] * (PLACES_MAX - 1), 1, True),
        ([gone], 0, True),
    ):
        made.engine.pending = list(pending)
        made.send(made.engine.publish())
        assert (len(made.shelf.members), made.shelf.partial) == (left, partial)
        made.feed.check()


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
