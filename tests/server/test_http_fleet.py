"""Over HTTP: engines' blocks beside nodes', who is followed, and placements."""

from __future__ import annotations

from array import array

from kvcache.block import hints
from kvcache.engine_events.naming import public_namespace, salted
from kvcache.namespace import Namespace
from kvcache.packing import PREFIX_BLOCKS_MAX
from kvcache.sequence import sequence_hashes
from kvcache.wire import BlockEvent, EventBatch
from tests.server.http_double import HASHES, MODEL, SPACE, TOKENS, Node, Running, in_loop, running

ENGINE = public_namespace("m", 16, tenant="default")
NAMES = sequence_hashes(array("I", TOKENS), 16)


def tell(here: Running, source: str, namespace: Namespace, names: bytes) -> None:
    event = BlockEvent("stored", namespace.namespace_id(), "hbm", b"", names)
    batch = EventBatch(source, 1, 0, True, [event], 0, [namespace.to_map()], load={"running": 3.0})
    here.index.apply(batch, here.clock.now_ns())


@in_loop
async def test_tokens_find_what_engines_told_themselves() -> None:
    node = Node()
    node.publisher.announce(SPACE)
    node.stored(SPACE, 2)
    async with running(node) as here:
        await here.synced()
        tell(here, "engine:w", ENGINE, bytes(NAMES[:5]))
        found = await here.located(model=MODEL, tokens=TOKENS)
        assert {each["source"]: each["blocks"] for each in found["sources"]} == {"engine:w": 5, "node-a": 2}
        assert found["asked_blocks"] == 6
        for other in ({"weights": "w"}, {"model": "other"}, {"block_tokens": 8}, {"adapter": "x"}):
            found = await here.located(model={**MODEL, **other}, tokens=TOKENS)
            engine = next(each for each in found["sources"] if each["source"] == "engine:w")
            assert engine["blocks"] == (5 if "weights" in other else 0)
        found = await here.located(namespace=ENGINE.namespace_id().hex(), tokens=TOKENS)
        assert [each["blocks"] for each in found["sources"] if each["source"] == "engine:w"] == [5]


@in_loop
async def test_weights_that_are_known_keep_engines_apart() -> None:
    async with running() as here:
        tell(here, "engine:w", public_namespace("m", 16, "w", tenant="default"), bytes(NAMES))
        tell(here, "engine:x", public_namespace("m", 16, "x", tenant="default"), bytes(NAMES))
        found = await here.located(model=MODEL, tokens=TOKENS)
        assert {each["source"]: each["blocks"] for each in found["sources"] if each["blocks"]} == {
            "engine:w": 6
        }


@in_loop
async def test_a_cache_salt_names_other_blocks() -> None:
    async with running() as here:
        names = sequence_hashes(array("I", TOKENS), 16, salted("secret"))
        tell(here, "engine:w", ENGINE, bytes(names))
        asked = {"model": MODEL, "tokens": TOKENS}
        for more, blocks in (({}, 0), ({"cache_salt": "secret"}, 6), ({"cache_salt": "other"}, 0)):
            found = await here.located(**asked, **more)
            assert {each["blocks"] for each in found["sources"] if each["source"] == "engine:w"} == {blocks}


@in_loop
async def test_hashes_may_be_hints_of_either_scheme() -> None:
    node = Node()
    node.publisher.announce(SPACE)
    node.stored(SPACE, 3)
    async with running(node) as here:
        await here.synced()
        tell(here, "engine:w", ENGINE, bytes(NAMES[:5]))
        for asked, expected in (
            ([each[:8].hex() for each in HASHES], {"node-a": 3, "engine:w": 0}),
            ([each.hex() for each in HASHES], {"node-a": 3, "engine:w": 0}),
            ([each.to_bytes(8, "little").hex() for each in NAMES], {"node-a": 0, "engine:w": 5}),
        ):
            found = await here.located(hashes=asked)
            assert {each["source"]: each["blocks"] for each in found["sources"]} == expected


@in_loop
async def test_who_is_followed_is_told_with_load_and_age() -> None:
    async with running() as here:
        await here.synced()
        tell(here, "engine:w", ENGINE, bytes(NAMES[:5]))
        here.clock.ns += 5_000_000
        told = await (await here.get("/v1/workers")).json()
        assert told["workers"] == {} and told["followed"] == []
        engine = told["sources"][0]
        assert (engine["source"], engine["state"], engine["blocks"]) == ("engine:w", "synced", 5)
        assert (engine["load"], engine["load_age_ms"], engine["as_of"]["age_ms"]) == ({"running": 3.0}, 5, 5)


@in_loop
async def test_a_placement_is_predicted() -> None:
    async with running() as here:
        tell(here, "engine:w", ENGINE, bytes(NAMES[:2]))
        placement = {"source": "engine:w", "namespace": ENGINE.namespace_id().hex(), "tokens": TOKENS}
        for body, placed in ((placement, 6), ({**placement, "source": "nobody"}, 0)):
            answer = await here.client.post("/v1/placements", json=body)
            assert (answer.status, await answer.json()) == (200, {"placed": placed})
        [row] = here.index.match(bytes(NAMES)).located()
        assert (row.blocks, row.placed) == (2, 4)
        unknown = await here.client.post("/v1/placements", json={**placement, "namespace": "00" * 16})
        assert (await unknown.json())["code"] == "unknown_namespace"
        neither = await here.client.post(
            "/v1/placements", json={"source": "engine:w", "namespace": ENGINE.namespace_id().hex()}
        )
        assert neither.status == 400 and len(hints(HASHES)) == 48


@in_loop
async def test_no_more_blocks_are_named_than_may_be_asked_about() -> None:
    """A million names hold up all that this process follows for seconds."""
    async with running() as here:
        await here.synced()
        tokens = [7] * (PREFIX_BLOCKS_MAX + 9)
        space = public_namespace("m", 1, tenant="default")
        tell(here, "engine:w", space, bytes(sequence_hashes(array("I", tokens[:3]), 1)))
        for body in ({"model": {**MODEL, "block_tokens": 1}}, {"namespace": space.namespace_id().hex()}):
            assert (await here.located(tokens=tokens, **body))["asked_blocks"] == PREFIX_BLOCKS_MAX
