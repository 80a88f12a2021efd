"""The other pages, the limits, and how the HTTP process follows its node."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from functools import partial
from itertools import pairwise

import pytest

from kvcache.server import http_api as api
from kvcache.server.http_follow import PAUSE_S_MAX, PAUSE_S_MIN
from kvcache.server.http_routes import ROUTES
from kvcache.wire import EventBatch
from tests.server.http_double import (
    MODEL,
    SPACE,
    TOKENS,
    Node,
    in_loop,
    running,
)

# --- the other pages ----------------------------------------------------------------------------


@in_loop
async def test_readiness_says_in_words_what_is_wrong() -> None:
    node = Node()
    node.up = False
    async with running(node) as here:
        await here.until(lambda: len(here.pauses.taken) == 1)
        assert (await here.get("/healthz")).status == 200
        response = await here.get("/readyz")
        told = await response.json()
        assert response.status == 503 and told["ready"] is False
        assert told["degraded"] == ["the node cannot be reached: the node is gone [unavailable]"]
        node.up = True
        here.pauses.go.release()
        await here.synced()
        response = await here.get("/readyz")
        assert (response.status, await response.json()) == (200, {"ready": True, "degraded": []})


@in_loop
async def test_a_node_that_serves_in_spite_of_a_trouble_is_ready_and_says_it() -> None:
    node = Node()
    node.troubles = ["the NVMe directory /x is not used: it broke"]
    async with running(node) as here:
        await here.synced()
        assert (await here.get("/v1/stats")).status == 200
        response = await here.get("/readyz")
        assert (response.status, await response.json()) == (200, {"ready": True, "degraded": node.troubles})


@in_loop
async def test_a_node_is_ready_whatever_becomes_of_an_engine_that_registered_with_it() -> None:
    async with running() as here:
        await here.synced()
        here.index.apply(EventBatch("engine:w", 1, 0, True, []), here.clock.now_ns())
        here.index.suspect("engine:w")
        response = await here.get("/readyz")
        told = {"ready": True, "degraded": ["the index does not follow engine:w yet"]}
        assert (response.status, await response.json()) == (200, told)


@in_loop
async def test_an_engine_that_registered_does_not_stand_for_the_node() -> None:
    async with running() as here:
        await here.synced()
        here.index.forget("node-a")
        here.index.apply(EventBatch("engine:w", 1, 0, True, []), here.clock.now_ns())
        assert here.follower.degraded() == ["the index has not heard from the node yet"]


@in_loop
async def test_stats_are_fresh_while_the_node_answers_and_old_after() -> None:
    node = Node()
    async with running(node) as here:
        await here.synced()
        node.values = {"hit_tokens": 9.0}
        told = await (await here.get("/v1/stats")).json()
        assert (told["node"], told["age_ms"], told["values"]) == ("node-a", 0, {"hit_tokens": 9.0})
        assert told["index"]["sources"]["node-a"]["seq"] == 0
        node.die()
        await here.until(lambda: len(here.pauses.taken) == 1)
        here.clock.ns += 3_000_000_000
        told = await (await here.get("/v1/stats")).json()
        assert (told["age_ms"], told["values"]) == (3_000, {"hit_tokens": 9.0})


@in_loop
async def test_stats_of_a_node_that_was_never_there_are_a_problem() -> None:
    node = Node()
    node.up = False
    async with running(node) as here:
        await here.until(lambda: len(here.pauses.taken) == 1)
        response = await here.get("/v1/stats")
        assert (response.status, (await response.json())["code"]) == (503, "unavailable")
        assert "kvcache_node_connected 0.0" in await (await here.get("/metrics")).text()


@in_loop
async def test_metrics_show_the_node_the_index_and_the_requests() -> None:
    node = Node()
    node.publisher.announce(SPACE)
    node.stored(SPACE, 4)
    async with running(node) as here:
        await here.synced()
        await here.get("/v1/secret-prompt")
        text = await (await here.get("/metrics")).text()
        for line in (
            "kvcache_hit_tokens_total 7.0",
            'kvcache_requests_total{request="lease"} 2.0',
            "kvcache_node_connected 1.0",
            "kvcache_index_synced 1.0",
            "kvcache_index_entries 4.0",
            'kvcache_http_requests_total{route="other",status="404"} 1.0',
        ):
            assert line in text.splitlines(), line
        assert "secret" not in text


@in_loop
async def test_every_answer_carries_the_security_headers() -> None:
    async with running() as here:
        await here.synced()
        for response in (
            await here.get("/healthz"),
            await here.get("/nothing"),
            await here.post(b"{"),
            await here.get("/metrics"),
        ):
            for name, value in api.HEADERS.items():
                assert response.headers[name] == value


@in_loop
async def test_the_openapi_document_describes_every_route() -> None:
    async with running() as here:
        document = await (await here.get("/openapi.json")).json()
        assert document["openapi"] == "3.1.0"
        assert set(document["paths"]) == {route.path for route in ROUTES}
        text = json.dumps(document)
        for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
            assert name in document["components"]["schemas"]
        body = document["paths"]["/v1/locate"]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"]["$ref"].endswith("/LocateRequest")


# --- limits -------------------------------------------------------------------------------------


@in_loop
async def test_a_body_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BODY_BYTES_MAX", 10_000)
    async with running() as here:
        response = await here.post(b" " * 20_000)
        assert (response.status, (await response.json())["code"]) == (413, "too_large")


@in_loop
async def test_a_small_body_that_unpacks_to_a_large_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BODY_BYTES_MAX", 10_000)
    async with running() as here:
        packed = zlib.compress(b" " * 5_000_000)
        assert len(packed) < 10_000
        response = await here.post(packed, **{"Content-Encoding": "deflate"})
        assert response.status in (400, 413)


@in_loop
async def test_more_requests_than_the_limit_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "REQUESTS_MAX", 2)
    async with running() as here:
        await here.synced()
        gate = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b'{"hashes": '
            await gate.wait()
            yield b"[]}"

        sent = {"Content-Type": "application/json"}
        held = [
            asyncio.ensure_future(here.client.post("/v1/locate", data=body(), headers=sent)) for _ in range(2)
        ]
        async with asyncio.timeout(20):
            while (refused := await here.get("/healthz")).status == 200:
                continue  # Until both are being answered.
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        gate.set()
        assert [(await each).status for each in held] == [200, 200]
        assert (await here.get("/healthz")).status == 200


@in_loop
async def test_a_request_that_does_not_come_to_its_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "DEADLINE_S", 0.02)
    async with running() as here:

        async def body() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        sent = {"Content-Type": "application/json"}
        response = await here.client.post("/v1/locate", data=body(), headers=sent)
        assert (response.status, (await response.json())["code"]) == (503, "unavailable")


# --- following ----------------------------------------------------------------------------------


@in_loop
async def test_a_lost_batch_leads_to_a_new_snapshot() -> None:
    node = Node()
    node.publisher.announce(SPACE)
    async with running(node) as here:
        await here.synced()
        node.stored(SPACE, 2)  # Told to nobody.
        node.tell(node.stored(SPACE, 3, start=2))
        await here.until(lambda: len(here.pauses.taken) == 1)
        assert here.follower.degraded()
        here.pauses.go.release()
        await here.until(lambda: node.snapshots == 2 and here.index.entries == 3)
        assert here.follower.degraded() == []
        assert len(node.open) == 2, "the connections before were closed"
        assert 'kvcache_index_resyncs_total{reason="gap"} 1.0' in here.metrics.render().decode()


@in_loop
async def test_pauses_double_up_to_their_limit_while_the_node_is_away() -> None:
    node = Node()
    node.up = False
    async with running(node) as here:
        for count in range(1, 10):
            await here.until(partial(here.paused, count))
            here.pauses.go.release()
        taken = here.pauses.taken[:9]
        assert taken[0] == 2 * PAUSE_S_MIN and taken[-1] == PAUSE_S_MAX
        assert all(after in (2 * before, PAUSE_S_MAX) for before, after in pairwise(taken))


@in_loop
async def test_a_node_that_comes_back_under_another_name_takes_the_place_of_the_old() -> None:
    old, new = Node(), Node("node-b", 2)
    for node in (old, new):
        node.publisher.announce(SPACE)
    old.stored(SPACE, 4)
    async with running(old) as here:
        await here.synced()
        old.die()
        await here.until(lambda: len(here.pauses.taken) == 1)
        here.connect = new.connect
        here.pauses.go.release()
        await here.until(lambda: here.follower.node == "node-b" and here.follower.degraded() == [])
        found = await here.located(tokens=TOKENS, model=MODEL)
        assert [(each["source"], each["blocks"]) for each in found["sources"]] == [("node-b", 0)]


@in_loop
async def test_events_that_make_no_sense_end_the_connection_not_the_process() -> None:
    node = Node()
    async with running(node) as here:
        await here.synced()
        node.tell([EventBatch("node-a", 1, 1, False, [], namespaces=[{"model": "x"}])])
        await here.until(lambda: len(here.pauses.taken) == 1)
        here.pauses.go.release()
        await here.synced()


@in_loop
async def test_a_node_tells_of_itself_only() -> None:
    """Or one peer could say what another holds."""
    node = Node()
    node.publisher.announce(SPACE)
    async with running(node) as here:
        await here.synced()
        node.tell([EventBatch("node-b", 9, 1, True, [])])
        await here.until(lambda: here.paused(1))
        assert [each.source for each in here.index.sources()] == ["node-a"]
        here.pauses.go.release()
        await here.synced()


@in_loop
async def test_a_node_whose_clock_went_back_is_followed() -> None:
    """It starts again with a smaller incarnation."""
    node = Node(incarnation=9)
    node.publisher.announce(SPACE)
    node.stored(SPACE, 4)
    async with running(node) as here:
        await here.synced()
        node.die()
        await here.until(lambda: here.paused(1))
        again = Node(incarnation=3)
        again.publisher.announce(SPACE)
        again.stored(SPACE, 2)
        here.connect = again.connect
        here.pauses.go.release()
        await here.synced()
        [source] = here.index.sources()
        assert (source.incarnation, here.index.entries) == (3, 2)
