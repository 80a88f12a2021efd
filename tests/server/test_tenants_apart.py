"""What a tenant's router learns of others' engines and blocks, over HTTP and in frames: nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec

from kvcache.fleet import Worker
from kvcache.locality import LocalityIndex
from kvcache.locator import Names, Source
from kvcache.server.locate_answers import IndexAnswers
from tests.kvcache.routing.fleet_double import ENGINE, NODE, TOKENS, Told, names
from tests.server.http_double import in_loop
from tests.server.test_http_rfc1403 import ROUTER, Here, running

OTHERS = replace(ENGINE, tenant="other")


@asynccontextmanager
async def two_tenants() -> AsyncIterator[tuple[Here, LocalityIndex]]:
    """Each has a worker, and the node holds blocks of both."""
    async with running() as here:
        told = Told()
        told.index = here.index
        for name, tenant, space in (("mine", "default", ENGINE), ("theirs", "other", OTHERS)):
            here.fleet.add(Worker(name=name, model="m", tenant=tenant, events=f"tcp://{name}:5557"))
            here.index.forget(f"engine:{name}")
            told.holds(f"engine:{name}", space, 5, now_ns=here.clock.ns)
        told.starts("node-a", NODE, replace(NODE, tenant="other"), now_ns=here.clock.ns)
        told.holds("node-a", NODE, 3, now_ns=here.clock.ns)
        told.holds("node-a", replace(NODE, tenant="other"), 9, now_ns=here.clock.ns)
        yield here, here.index


@in_loop
async def test_over_http_there_are_no_others() -> None:
    async with two_tenants() as (here, index):
        status, found = await here.ask("/v1/workers", token=ROUTER)
        assert status == 200 and isinstance(found, dict)
        assert found["workers"] == {"mine": ["engine:mine"]}
        assert [each["source"] for each in found["followed"]] == ["engine:mine"]
        assert {each["source"]: each["blocks"] for each in found["sources"]} == {
            "engine:mine": 5,
            "node-a": 3,
        }
        index.suspect("engine:theirs")
        model = {"model": "m", "weights": "w", "block_tokens": 16}
        _, located = await here.ask("/v1/locate", {"model": model, "tokens": TOKENS}, token=ROUTER)
        assert isinstance(located, dict) and located["complete"]
        assert {each["source"] for each in located["sources"]} == {"engine:mine", "node-a"}


@in_loop
async def test_nothing_is_placed_at_others_engines() -> None:
    async with two_tenants() as (here, index):
        answers = IndexAnswers(index, here.clock, here.fleet.worker_sources, here.fleet.is_of)
        space = ENGINE.namespace_id()
        for source, placed in (("engine:theirs", 0), ("engine:mine", 20)):
            asked = {"source": source, "namespace": space.hex(), "tokens": TOKENS}
            assert await here.ask("/v1/placements", asked, token=ROUTER) == (200, {"placed": placed})
            answers.place("default", source, space, memoryview(names(ENGINE)))
        assert {each.source for each in index.match(names(ENGINE), {space}).located()} == {"engine:mine"}


@in_loop
async def test_in_frames_there_are_no_others() -> None:
    async with two_tenants() as (here, index):
        answers = IndexAnswers(index, here.clock, here.fleet.worker_sources, here.fleet.is_of)
        sources = msgspec.json.decode(answers.sources("default"), type=list[Source])
        assert {each.source: each.blocks for each in sources} == {"engine:mine": 5, "node-a": 3}
        told = msgspec.json.decode(answers.names("default"), type=Names, strict=False)
        assert set(told.sources.values()) == {"engine:mine", "node-a"}
        assert told.workers == {"mine": ["engine:mine"]}
        theirs = msgspec.json.decode(answers.names("other"), type=Names, strict=False)
        assert theirs.workers == {"theirs": ["engine:theirs"]}
