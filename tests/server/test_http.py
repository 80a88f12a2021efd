"""Locate, and who may ask what, over HTTP."""

from __future__ import annotations

from pathlib import Path

from kvcache.credentials import Credentials
from kvcache.errors import CODES
from kvcache.wire import EventBatch
from tests.server.http_double import (
    HASHES,
    MODEL,
    SPACE,
    TOKENS,
    Node,
    bearer,
    in_loop,
    running,
    space,
)


def with_credentials(tmp_path: Path) -> Credentials:
    file = tmp_path / "credentials.toml"
    lines = [f'master_key = "{"5a" * 32}"']
    for name, tenant, roles in (
        ("router", "a", '["router"]'),
        ("reader", "a", '["reader"]'),
        ("other", "b", '["router", "operator"]'),
    ):
        lines += [
            "[[credential]]",
            f'token = "token-of-{name}-0123"',
            f'tenant = "{tenant}"',
            f"roles = {roles}",
        ]
    file.write_text("\n".join(lines))
    file.chmod(0o600)
    return Credentials.from_file(file)


ROUTER, READER, OTHER = (f"token-of-{name}-0123" for name in ("router", "reader", "other"))


# --- locate -------------------------------------------------------------------------------------


@in_loop
async def test_tokens_and_hashes_find_the_same_blocks() -> None:
    node = Node()
    node.publisher.announce(SPACE)
    node.stored(SPACE, 4)
    async with running(node) as here:
        await here.synced()
        by_tokens = await here.located(tokens=TOKENS, model=MODEL)
        assert by_tokens["asked_blocks"] == 6 and by_tokens["complete"] is True
        [source] = by_tokens["sources"]
        assert (source["source"], source["state"], source["partial"]) == ("node-a", "synced", False)
        assert (source["blocks"], source["tokens"]) == (4, 64)
        assert source["tiers"] == {"hbm": 0, "host": 4, "nvme": 0}
        assert source["as_of"]["incarnation"] == 1 and source["as_of"]["seq"] == 2
        name = SPACE.namespace_id().hex()
        assert [shard["namespace"] for shard in source["shards"]] == [name]
        assert await here.located(tokens=TOKENS, namespace=name) == by_tokens
        assert await here.located(hashes=[block.hex() for block in HASHES]) == by_tokens
        assert (await here.located(hashes=[]))["asked_blocks"] == 0


@in_loop
async def test_events_change_the_answer_and_age_is_told() -> None:
    node = Node()
    node.publisher.announce(SPACE)
    async with running(node) as here:
        await here.synced()
        node.tell(node.stored(SPACE, 3))
        await here.until(lambda: here.index.entries == 3)
        here.clock.ns += 250_000_000
        [source] = (await here.located(tokens=TOKENS, model=MODEL))["sources"]
        assert source["blocks"] == 3
        assert source["as_of"] == {"incarnation": 1, "seq": 2, "age_ms": 250}


@in_loop
async def test_unknown_none_and_suspect_are_told_apart() -> None:
    node = Node()
    node.publisher.announce(SPACE)
    node.up = False
    async with running(node) as here:
        await here.until(lambda: len(here.pauses.taken) == 1)
        ask = {"tokens": TOKENS, "model": MODEL}
        assert await here.located(**ask) == {"complete": False, "asked_blocks": 6, "sources": []}
        node.up = True
        here.pauses.go.release()
        await here.synced()
        none = await here.located(**ask)
        assert none["complete"] is True
        assert none["sources"][0]["blocks"] == 0
        node.tell(node.stored(SPACE, 2))
        await here.until(lambda: here.index.entries == 2)
        node.die()
        await here.until(lambda: len(here.pauses.taken) == 2)
        broken = await here.located(**ask)
        assert broken["complete"] is False
        [source] = broken["sources"]
        assert (source["state"], source["blocks"]) == ("suspect", 2)
        # It started anew and has told nothing whole yet: that is not "nothing".
        here.index.apply(EventBatch("node-a", 2, 0, True, [], left=1), 0)
        [source] = (await here.located(**ask))["sources"]
        assert (source["state"], source["blocks"], source["shards"]) == ("unknown", None, [])


@in_loop
async def test_a_block_counts_when_every_rank_has_it_and_the_best_shape_is_told() -> None:
    node = Node()
    ranks = [space(tp_size=2, tp_rank=rank) for rank in range(2)]
    other = space(dtype="fp8")
    for each in (*ranks, other):
        node.publisher.announce(each)
    node.stored(ranks[0], 5)
    node.stored(ranks[1], 3)
    node.stored(other, 2)
    async with running(node) as here:
        await here.synced()
        [source] = (await here.located(tokens=TOKENS, model=MODEL))["sources"]
        assert source["blocks"] == 3
        assert sorted(shard["blocks"] for shard in source["shards"]) == [2, 3, 5]
        only = await here.located(tokens=TOKENS, namespace=other.namespace_id().hex())
        assert only["sources"][0]["blocks"] == 2


@in_loop
async def test_a_tenant_never_sees_anothers_blocks_even_with_their_hashes(tmp_path: Path) -> None:
    node = Node()
    mine = space(tenant="a")
    node.publisher.announce(mine)
    node.stored(mine, 6)  # By these hashes, whoever's key made them.
    async with running(node, with_credentials(tmp_path)) as here:
        await here.synced()
        body = {"hashes": [block.hex() for block in HASHES]}
        found = await (await here.post(body, ROUTER)).json()
        assert found["sources"][0]["blocks"] == 6
        stolen = await (await here.post(body, OTHER)).json()
        assert stolen["sources"][0]["blocks"] == 0 and stolen["sources"][0]["shards"] == []
        named = await here.post({**body, "namespace": mine.namespace_id().hex()}, OTHER)
        unheard = await here.post({**body, "namespace": "ab" * 16}, OTHER)
        assert (await named.json())["code"] == (await unheard.json())["code"] == "unknown_namespace"


BAD_BODIES = {
    "no json": b"{",
    "not utf-8": b'{"namespace": "\xff"}',
    "a list": [],
    "unknown field": {"hashes": [], "salt": "x"},
    "neither": {},
    "both": {"hashes": [], "tokens": []},
    "hashes and model": {"hashes": [], "model": MODEL},
    "tokens alone": {"tokens": TOKENS},
    "tokens, model and namespace": {"tokens": TOKENS, "model": MODEL, "namespace": "ab" * 16},
    "short hash": {"hashes": ["abcd"]},
    "upper case": {"hashes": ["AB" * 16]},
    "hash with a newline": {"hashes": ["ab" * 16 + "\n"]},
    "negative token": {"tokens": [-1], "model": MODEL},
    "wide token": {"tokens": [1 << 32], "model": MODEL},
    "float token": {"tokens": [1.5], "model": MODEL},
    "empty block": {"tokens": [], "model": {**MODEL, "block_tokens": 0}},
    "huge block": {"tokens": [], "model": {**MODEL, "block_tokens": 1 << 70}},
    "control character": {"tokens": [], "model": {**MODEL, "model": "a\nb"}},
    "unheard namespace": {"tokens": [], "namespace": "ab" * 16},
    "deep": b"[" * 100_000,
}


@in_loop
async def test_what_cannot_be_asked_is_refused_with_a_reason() -> None:
    async with running() as here:
        await here.synced()
        for name, body in BAD_BODIES.items():
            response = await here.post(body)
            told = await response.json()
            assert response.status == 400, (name, told)
            assert response.content_type == "application/problem+json"
            assert told["code"] in CODES and told["what"], name
            assert told["status"] == 400
        response = await here.client.post("/v1/locate", data=b"{}", headers={"Content-Type": "text/plain"})
        assert response.status == 400 and "application/json" in (await response.json())["what"]


# --- who may ask --------------------------------------------------------------------------------


@in_loop
async def test_without_a_good_token_every_path_answers_alike(tmp_path: Path) -> None:
    async with running(credentials=with_credentials(tmp_path)) as here:
        seen = set()
        for path in (
            "/v1/stats",
            "/metrics",
            "/v1/nothing",
            "/openapi.json",
            "/v1/locate",
            "/%2e%2e/etc",
        ):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}):
                response = await here.client.get(path, headers=headers)
                seen.add((response.status, await response.text(), response.headers["WWW-Authenticate"]))
        assert len(seen) == 1
        assert next(iter(seen))[0] == 401
        for path in ("/healthz", "/readyz"):
            assert (await here.get(path)).status in (200, 503)


@in_loop
async def test_without_the_role_a_path_is_as_one_that_does_not_exist(tmp_path: Path) -> None:
    async with running(credentials=with_credentials(tmp_path)) as here:
        await here.synced()
        missing = await here.get("/v1/nothing", READER)
        for path in ("/v1/stats", "/metrics", "/openapi.json"):
            response = await here.get(path, READER)
            assert (response.status, await response.text()) == (404, await missing.text())
            assert (await here.get(path, ROUTER)).status == 200
        assert (await here.post({"hashes": []}, READER)).status == 404
        assert (await here.client.delete("/v1/stats", headers=bearer(ROUTER, {}))).status == 404


@in_loop
async def test_without_tokens_only_loopback_names_are_answered() -> None:
    """A page in a browser can make its own name point here; its requests then carry that name."""
    async with running() as here:
        await here.synced()
        for host in ("evil.example", "evil.example:8210", "127.0.0.1.evil.example", "[::2]:80"):
            response = await here.get("/v1/stats", Host=host)
            assert (response.status, (await response.json())["code"]) == (404, "not_allowed")
        assert "this method" in (await (await here.get("/v1/locate")).json())["what"]
        for host in ("localhost:1", "127.0.0.1", "[::1]:8210"):
            assert (await here.get("/v1/stats", Host=host)).status == 200
