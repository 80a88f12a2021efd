"""Who may use the router, with what, and what it tells of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcache.credentials import Credentials
from kvcache.errors import CODES
from kvcache.server.http_route import Limits
from tests.kvcache.routing.fleet_double import TOKENS
from tests.server.http_double import in_loop
from tests.server.route_double import CHAT, routing

BODY = {"model": "m", "prompt": TOKENS}
CLIENT, OPERATOR, OTHER = (f"token-of-{name}-0123" for name in ("client", "operator", "other"))


def with_tokens(tmp_path: Path) -> Credentials:
    file = tmp_path / "credentials.toml"
    lines = [f'master_key = "{"5a" * 32}"']
    for token, tenant, role in ((CLIENT, "a", "reader"), (OPERATOR, "a", "operator"), (OTHER, "b", "reader")):
        lines += ["[[credential]]", f'token = "{token}"', f'tenant = "{tenant}"', f'roles = ["{role}"]']
    file.write_text("\n".join(lines))
    file.chmod(0o600)
    return Credentials.from_file(file)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@in_loop
async def test_without_tokens_what_the_client_shows_is_for_the_worker() -> None:
    async with routing("a") as here:
        await here.asked(BODY, **bearer("sk-of-the-worker"))
        assert here.workers["a"].seen[0][0]["Authorization"] == "Bearer sk-of-the-worker"


def test_with_tokens_nobody_gets_in_without_and_they_go_no_further(tmp_path: Path) -> None:
    @in_loop
    async def run() -> None:
        credentials = with_tokens(tmp_path)
        async with routing("a", credentials=credentials, tenants={"a": "a"}) as here:
            for headers in ({}, bearer("x" * 20)):
                answer = await here.asked(BODY, **headers)
                assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
                assert (await here.got("/no-such-path", **headers))[0] == 401
            assert (await here.asked(BODY, **bearer(CLIENT))).status == 200
            assert "Authorization" not in here.workers["a"].seen[0][0]
            assert (await here.asked(BODY, **bearer(OPERATOR))).status == 404
            for path in ("/metrics", "/v1/choices", "/no-such-path"):
                assert (await here.got(path, **bearer(CLIENT)))[0] == 404
            assert (await here.got("/metrics", **bearer(OPERATOR)))[0] == 200
            assert (await here.got("/healthz"))[0] == 200

    run()


def test_tenants_meet_neither_workers_nor_choices_of_each_other(tmp_path: Path) -> None:
    @in_loop
    async def run() -> None:
        credentials = with_tokens(tmp_path)
        limits = Limits(authorization="Bearer sk-of-the-fleet")
        async with routing(
            "a", "b", credentials=credentials, tenants={"a": "a", "b": "b"}, limits=limits
        ) as here:
            for token, name in ((CLIENT, "a"), (OTHER, "b")):
                for _ in range(2):
                    answer = await here.asked(BODY, x_kvcache_session="same", **bearer(token))
                    assert answer.headers["x-kvcache-worker"] == name
                    other = {"a": "b", "b": "a"}[name]
                    assert other not in answer.headers["x-kvcache-why"].split()
                assert here.workers[name].seen[0][0]["Authorization"] == "Bearer sk-of-the-fleet"
            made = (await here.got("/v1/choices", **bearer(OPERATOR)))[1]["choices"]
            assert {each["worker"] for each in made} == {"a"}

    run()


@in_loop
async def test_a_page_in_a_browser_does_not_get_here_by_a_name_of_its_own() -> None:
    async with routing("a") as here:
        answer = await here.asked(BODY, Host="evil.example")
        assert answer.status == 404 and here.workers["a"].seen == []
        assert (await here.asked(BODY, Content_Type="text/plain")).status == 400


@pytest.mark.parametrize(
    ("body", "path", "status", "code"),
    [
        (b"{", "/v1/completions", 400, "bad_message"),
        (b"[]", "/v1/completions", 400, "bad_message"),
        (b"\xff", "/v1/completions", 400, "bad_message"),
        (b'{"model": "m"}', "/v1/completions", 400, "bad_message"),
        (b'{"model": "m", "prompt": "x"}', CHAT, 400, "bad_message"),
        (b'{"model": "m", "prompt": {"a": 1}}', "/v1/completions", 400, "bad_message"),
        (b'{"model": "m", "messages": ' + b"[" * 5_000, CHAT, 400, "bad_message"),
        (b'{"model": "' + b"m" * 513 + b'", "prompt": [1]}', "/v1/completions", 400, "bad_message"),
        (b'{"model": "unknown", "prompt": [1]}', "/v1/completions", 404, "unknown_model"),
        (b'{"model": "m", "prompt": "' + b"x" * 5_000 + b'"}', "/v1/completions", 413, "too_large"),
    ],
)
def test_what_is_no_request_is_refused_as_openai_does(body: bytes, path: str, status: int, code: str) -> None:
    @in_loop
    async def run() -> None:
        async with routing("a", limits=Limits(body_bytes_max=6_000 if status != 413 else 4_000)) as here:
            answer = await here.asked(body, path)
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (status, code) and code in CODES
            assert error["type"] == "invalid_request_error" and error["message"]
            assert here.workers["a"].seen == [] and here.state.loads.requests == 0

    run()


@pytest.mark.parametrize(
    "prompt",
    [[], [-1], [1 << 40], ["a", "b"], [[1, 2], [3]], "", [[]]],
    ids=["none", "negative", "huge", "texts", "prompts", "empty", "empties"],
)
def test_prompts_of_any_form_are_passed_on(prompt: object) -> None:
    """Whether it makes sense is for the worker to say."""

    @in_loop
    async def run() -> None:
        async with routing("a", tokenize_s=0) as here:
            assert (await here.asked({"model": "m", "prompt": prompt})).status == 200

    run()


@in_loop
async def test_it_tells_its_models_metrics_and_health() -> None:
    async with routing("a", "b") as here:
        models = (await here.got("/v1/models"))[1]
        assert [each["id"] for each in models["data"]] == ["m"] and models["object"] == "list"
        await here.asked(BODY)
        text = (await here.got("/metrics"))[1]
        for line in (
            'kvcache_route_requests_total{route="/v1/completions",status="200"} 1.0',
            "kvcache_route_blind_choices_total 1.0",
            f"kvcache_route_prompt_tokens_total {float(len(TOKENS))}",
            "kvcache_route_workers_up 2.0",
            'kvcache_route_tokenized_total{source="given"} 1.0',
        ):
            assert line in text.splitlines()
        assert (await here.got("/healthz"))[1] == {"alive": True}
        assert (await here.got("/readyz"))[1] == {"ready": True, "degraded": []}
