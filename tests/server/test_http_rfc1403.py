"""The paths of RFC 1403: what Dynamo's indexer (1.6.1) answered to the same requests and events, and
Mooncake's dialect.

Where both count a tier below the GPU, Dynamo's indexer leaves it out of an engine's own events; what is
expected here is what the engine holds."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import ClientError
from aiohttp.test_utils import TestClient, TestServer

from kvcache.credentials import Credential, Credentials
from kvcache.engine_events.feed import EngineFeed
from kvcache.engine_events.naming import public_namespaces
from kvcache.fleet import Stream, Worker
from kvcache.locality import LocalityIndex
from kvcache.metrics import HttpMetrics
from kvcache.sequence import local_hashes, sequence_hashes
from kvcache.server import http_api, http_rfc1403_app
from kvcache.server.fleet_index import FleetIndex
from kvcache.server.http_app import HttpApp
from kvcache.server.http_fleet import FleetSubject
from tests.server.http_double import Clock, in_loop
from tests.server.route_double import PATIENCE_S, SHORT_S

OPERATOR, ROUTER = "the-operator-of-all", "the-router-of-all-of-it"
TOKENS = list(range(32))
PACKED = struct.pack("<32I", *TOKENS)


class Engine:
    """Its stream is fed by hand."""

    def __init__(self, worker: Worker, stream: Stream, index: LocalityIndex, clock: Clock) -> None:
        self.connected, self.trouble = True, ""
        self.stream = stream
        spaces = public_namespaces(worker.model, worker.weights, worker.adapter, worker.salt, worker.tenant)
        self._feed = EngineFeed(stream.source, spaces, 1, replay=False, block_tokens=worker.block_tokens)
        self._index, self._clock, self._next = index, clock, 0
        for batch in self._feed.connected():
            index.apply(batch, clock.now_ns())

    async def run(self) -> None:
        await asyncio.Event().wait()

    def tell(self, *events: list[object]) -> None:
        """As vLLM writes them."""
        payload = msgspec.msgpack.encode([0.0, list(events), self.stream.rank])
        for batch in self._feed.take(self._next, payload):
            self._index.apply(batch, self._clock.now_ns())
        self._next += 1


class Here:
    def __init__(self) -> None:
        self.clock, self.metrics = Clock(), HttpMetrics()
        self.index = LocalityIndex(1 << 24)
        self.engines: dict[str, Engine] = {}
        self.fleet = FleetIndex(self.index, self.clock, make_engine=self._make)
        tokens = {
            OPERATOR: Credential("default", frozenset({"operator"})),
            ROUTER: Credential("default", frozenset({"router"})),
        }
        app = HttpApp(
            FleetSubject(self.fleet, self.metrics),
            self.fleet,
            self.metrics,
            Credentials(tokens, {}, None, bytes(32)),
            self.clock,
        )
        self.client = TestClient(TestServer(app.application()))

    def _make(self, worker: Worker, stream: Stream) -> Engine:
        engine = self.engines[stream.events] = Engine(worker, stream, self.index, self.clock)
        return engine

    async def ask(self, path: str, body: object = None, token: str = OPERATOR) -> tuple[int, object]:
        answer = await self.client.request(
            "GET" if body is None else "POST", path, json=body, headers={"Authorization": f"Bearer {token}"}
        )
        raw = await answer.read()
        return answer.status, msgspec.json.decode(raw) if raw else None

    async def registered(self, instance: int | str, port: int, **more: object) -> None:
        body = {"instance_id": instance, "endpoint": f"tcp://h:{port}", "model_name": "m", "block_size": 4}
        assert await self.ask("/register", {**body, **more}) == (201, {"status": "ok"})


@asynccontextmanager
async def running() -> AsyncIterator[Here]:
    here = Here()
    await here.client.start_server()
    try:
        yield here
    finally:
        await here.client.close()
        await here.fleet.close()


async def three_ranks(here: Here) -> None:
    """What the other indexer was told as well."""
    await here.registered(1, 5557)
    await here.registered(1, 5558, dp_rank=1)
    await here.registered(2, 5559)
    here.engines["tcp://h:5557"].tell(["BlockStored", list(range(101, 109)), None, TOKENS, 4, None, "GPU"])
    here.engines["tcp://h:5558"].tell(
        ["BlockStored", [201, 202, 203, 204], None, TOKENS[:16], 4, None, "GPU"]
    )
    here.engines["tcp://h:5559"].tell(
        ["BlockStored", [301, 302], None, TOKENS[:8], 4, None, "GPU"],
        ["BlockStored", [303, 304], 302, TOKENS[8:16], 4, None, "CPU"],
        ["BlockStored", [305], 304, TOKENS[16:20], 4, None, "STORAGE"],
    )


def signed(hashes: memoryview) -> list[int]:
    return [struct.unpack("<q", struct.pack("<Q", each))[0] for each in hashes]


ONE = {"longest_matched": 32, "gpu": 32, "dp": {"0": 32, "1": 16}, "cpu": 32, "disk": 32}
TWO = {"longest_matched": 20, "gpu": 8, "dp": {"0": 8}, "cpu": 16, "disk": 20}
BOTH = {
    "scores": {"1": {"0": 32, "1": 16}, "2": {"0": 8}},
    "frequencies": [],
    "instances": {"1": ONE, "2": TWO},
}
NOTHING = {"scores": {}, "frequencies": [], "instances": {}}
UNKNOWN = (404, {"error": "no indexer for model=zz routing_group=default"})


@in_loop
async def test_dynamos_dialect_query() -> None:
    async with running() as here:
        await three_ranks(here)
        assert await here.ask("/query", {"token_ids": TOKENS, "model_name": "m"}) == (200, BOTH)
        assert await here.ask("/query", {"token_ids": [9] * 4, "model_name": "m"}) == (200, NOTHING)
        assert await here.ask("/query", {"token_ids": [], "model_name": "m"}) == (200, NOTHING)
        assert await here.ask("/query", {"token_ids": TOKENS, "model_name": "zz"}) == UNKNOWN
        with_adapter = {"token_ids": TOKENS, "model_name": "m", "lora_name": "x"}
        assert await here.ask("/query", with_adapter) == (200, NOTHING)
        here.engines["tcp://h:5557"].tell(["BlockRemoved", [107, 108], "GPU"])
        _, told = await here.ask("/query", {"token_ids": TOKENS, "model_name": "m"})
        assert isinstance(told, dict) and told["scores"] == {"1": {"0": 24, "1": 16}, "2": {"0": 8}}


@in_loop
async def test_dynamos_dialect_query_by_hash_signed_or_not() -> None:
    async with running() as here:
        await three_ranks(here)
        hashes = local_hashes(PACKED, 4)
        for listed in (signed(hashes), list(hashes)):
            asked = {"block_hashes": listed, "model_name": "m"}
            assert await here.ask("/query_by_hash", asked) == (200, BOTH)
        assert max(hashes) >= 1 << 63
        status, _ = await here.ask("/query_by_hash", {"block_hashes": [1 << 64], "model_name": "m"})
        assert status == 422
        status, _ = await here.ask("/query_by_hash", {"model_name": "m"})
        assert status == 422


@in_loop
async def test_dynamos_dialect_registrations() -> None:
    async with running() as here:
        assert await here.ask("/workers") == (200, [])
        await three_ranks(here)
        again = {"instance_id": 1, "endpoint": "tcp://h:1", "model_name": "m", "block_size": 4}
        taken = (409, {"error": "instance 1 dp_rank 0 already registered"})
        assert await here.ask("/register", again) == taken
        listener = {"endpoint": "tcp://h:5559", "status": "active"}
        status, listed = await here.ask("/workers")
        assert isinstance(listed, list) and (status, len(listed)) == (200, 2)
        assert listed[0]["endpoints"] == {"0": "tcp://h:5557", "1": "tcp://h:5558"}
        assert listed[1] == {
            "instance_id": 2,
            "source": "zmq",
            "status": "active",
            "model_name": "m",
            "routing_group": "default",
            "block_size": 4,
            "endpoints": {"0": "tcp://h:5559"},
            "listeners": {"0": listener},
        }
        gone = {"instance_id": 2, "model_name": "m"}
        assert await here.ask("/unregister", gone) == (200, {"status": "ok"})
        assert await here.ask("/unregister", gone) == (404, {"error": "instance 2 not found"})
        _, told = await here.ask("/query", {"token_ids": TOKENS, "model_name": "m"})
        assert isinstance(told, dict) and told["instances"] == {"1": ONE}
        assert [state.source for state in here.index.sources()] == ["engine:1", "engine:1/1/1"]
        assert await here.ask("/unregister", {"instance_id": 1, "model_name": "m"}) == (200, {"status": "ok"})
        assert await here.ask("/workers") == (200, []) and here.index.entries == 0


@in_loop
async def test_mooncakes_dialect() -> None:
    async with running() as here:
        register = {
            "endpoint": "tcp://h:5557",
            "replay_endpoint": "tcp://h:5558",
            "type": "vLLM",
            "modelname": "deepseek",
            "tenant_id": "default",
            "instance_id": "vllm-prefill-node1",
            "block_size": 4,
            "dp_rank": 0,
            "additionalsalt": "w8a8",
        }
        told = {"status": "registered successfully", "instance_id": "vllm-prefill-node1"}
        assert await here.ask("/register", register) == (200, told)
        here.engines["tcp://h:5557"].tell(
            ["BlockStored", [1, 2], None, TOKENS[:8], 4, None, "GPU"],
            ["BlockStored", [1, 2, 3], None, TOKENS[:12], 4, None, "CPU"],
        )
        hit = {"longest_matched": 12, "GPU": 8, "DP": {"0": 12}, "CPU": 12, "DISK": 0}
        query = {"model": "deepseek", "tenant_id": "default", "block_size": 4}
        salted = {**query, "cache_salt": "w8a8"}
        expected = (200, {"default": {"vllm-prefill-node1": hit}})
        assert await here.ask("/query", {**salted, "token_ids": TOKENS}) == expected
        hashes = sequence_hashes(PACKED, 4)
        for field in ("seq_hashes", "block_hash"):
            asked = {**salted, field: list(hashes), "instance_id": "vllm-prefill-node1"}
            assert await here.ask("/query_by_hash", asked) == expected
        for other in (query, {**salted, "instance_id": "another"}, {**salted, "model": "qwen"}):
            assert await here.ask("/query", {**other, "token_ids": TOKENS}) == (200, {"default": {}})
        nobody = {"longest_matched": 0, "GPU": 0, "DP": {"0": 0}, "CPU": 0, "DISK": 0}
        empty = (200, {"default": {"vllm-prefill-node1": nobody}})
        assert await here.ask("/query", {**salted, "block_size": 8, "token_ids": TOKENS}) == empty
        unregister = {"modelname": "deepseek", "instance_id": "vllm-prefill-node1", "dp_rank": 0}
        removed = {
            "status": "unregistered successfully",
            "removed_instances": ["vllm-prefill-node1|default|0"],
        }
        assert await here.ask("/unregister", unregister) == (200, removed)


@in_loop
async def test_registering_takes_an_operator_and_tenants_are_kept_apart() -> None:
    async with running() as here:
        body = {"instance_id": 1, "endpoint": "tcp://h:5557", "model_name": "m", "block_size": 4}
        for path in ("/register", "/unregister"):
            status, _ = await here.ask(path, body, ROUTER)
            assert status == 404
        status, _ = await here.ask("/register", {**body, "tenant_id": "other"})
        assert status == 404 and not here.fleet.workers
        await here.registered(1, 5557)
        asked = {"token_ids": TOKENS, "model_name": "m"}
        assert (await here.ask("/query", asked, ROUTER))[0] == 200
        assert (await here.ask("/query", {**asked, "tenant_id": "other"}, ROUTER))[0] == 404
        mooncakes = {"token_ids": TOKENS, "model": "m", "tenant_id": "other"}
        assert await here.ask("/query", mooncakes, ROUTER) == (200, {"other": {}})
        assert (await here.client.get("/health")).status == 200
        assert (await here.client.get("/workers")).status == 401


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "TensorFlow"}, "TensorFlow"),
        ({"model_name": ""}, "model_name"),
        ({"endpoint": "udp://h:1"}, "events of worker"),
        ({"instance_id": "a b"}, "name"),
        ({"block_size": -1}, "block_size"),
        ({"tenant_id": "default", "replay_endpoint": "x"}, "replay of worker"),
    ],
)
@in_loop
async def test_a_wrong_registration_says_what_is_wrong(change: dict[str, object], said: str) -> None:
    async with running() as here:
        body = {"instance_id": 1, "endpoint": "tcp://h:5557", "model_name": "m", "block_size": 4}
        status, told = await here.ask("/register", {**body, **change})
        assert status == 422 and isinstance(told, dict) and said in told["error"]
        assert not here.fleet.workers


@in_loop
async def test_a_dump_comes_in_pages_that_end_between_instances() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_rfc1403_app, "DUMP_BLOCKS", 5)
        patch.setattr(http_rfc1403_app, "EVENT_BLOCKS", 3)
        async with running() as here:
            assert await here.ask("/dump") == (200, {})
            await three_ranks(here)
            found: dict[tuple[int, int, str], set[int]] = {}
            pages, after = 0, ""
            while True:
                answer = await here.client.get(
                    f"/dump?after={after}", headers={"Authorization": f"Bearer {OPERATOR}"}
                )
                told = msgspec.json.decode(await answer.read())
                pages += 1
                for event in told["m:default"]["events"]:
                    blocks = event["event"]["data"]["stored"]["blocks"]
                    assert len(blocks) <= 3
                    key = event["worker_id"], event["dp_rank"], event["storage_tier"]
                    found.setdefault(key, set()).update(block["block_hash"] for block in blocks)
                after = answer.headers.get(http_rfc1403_app.NEXT, "")
                if not after:
                    break
            hashes = list(sequence_hashes(PACKED, 4))
            assert pages == 2 and found == {
                (1, 0, "device"): set(hashes),
                (1, 1, "device"): set(hashes[:4]),
                (2, 0, "device"): set(hashes[:2]),
                (2, 0, "host_pinned"): set(hashes[2:4]),
                (2, 0, "disk"): {hashes[4]},
            }


@in_loop
async def test_a_dump_that_takes_too_long_is_cut_and_no_other_answer_begins_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stalls(self: http_rfc1403_app.Rfc1403, page: object) -> AsyncIterator[bytes]:
        yield b'{"a":'
        await asyncio.Event().wait()

    monkeypatch.setattr(http_rfc1403_app.Rfc1403, "_told", stalls)
    async with running() as here, asyncio.timeout(PATIENCE_S):
        headers = {"Authorization": f"Bearer {OPERATOR}"}
        for short_s in SHORT_S:
            monkeypatch.setattr(http_api, "DEADLINE_S", short_s)
            async with here.client.get("/dump", headers=headers) as answer:
                if answer.status != 200:
                    continue
                assert await answer.content.readany() == b'{"a":'
                with pytest.raises(ClientError):
                    await answer.content.read()
                return
    raise AssertionError("no answer began in time")


@in_loop
async def test_nobody_takes_the_name_that_anothers_instance_would_have() -> None:
    async with running() as here:
        await here.registered("w@other", 5557)
        await here.registered("w", 5558, dp_rank=1)
        assert list(here.fleet.workers) == ["w@other@default", "w/1"]
        here.fleet.add(Worker(name="w@other", tenant="other", events="tcp://h:5559"))  # As its own would be.
        _, listed = await here.ask("/workers")
        assert isinstance(listed, list) and [each["instance_id"] for each in listed] == ["w@other", "w"]
        asked = {"instance_id": "w@other", "model_name": "m"}
        assert await here.ask("/unregister", asked) == (200, {"status": "ok"})
