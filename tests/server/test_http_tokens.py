"""Tokens that workers are asked for: whose they are, and when a worker is asked no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kvcache.routing.fleet_double import TOKENS
from tests.server.http_double import in_loop
from tests.server.route_double import routing
from tests.server.test_http_route_limits import CLIENT, OTHER, bearer, with_tokens


def text(number: int) -> dict[str, object]:
    return {"model": "m", "prompt": f"hello {number}"}


@pytest.mark.parametrize(("status", "asked"), [(400, 2), (401, 2), (404, 1), (500, 1)])
def test_a_question_that_a_worker_refuses_says_nothing_of_the_next(status: int, asked: int) -> None:
    """Nor does who is not let in: without tokens of ours, each client shows its own."""

    @in_loop
    async def run() -> None:
        async with routing("a") as here:
            here.workers["a"].no_tokens = status
            for number in range(2):
                assert "tokens are not known" in (await here.asked(text(number))).headers["x-kvcache-why"]
            assert len(here.workers["a"].tokenized) == asked

    run()


def test_a_tenant_is_told_no_tokens_that_anothers_worker_counted(tmp_path: Path) -> None:
    @in_loop
    async def run() -> None:
        tenants = {"a": "a", "b": "b"}
        async with routing("a", "b", credentials=with_tokens(tmp_path), tenants=tenants) as here:
            here.workers["a"].tokens, here.workers["b"].tokens = TOKENS, TOKENS[:16]
            for token, name, count in ((CLIENT, "a", len(TOKENS)), (OTHER, "b", 16)):
                answer = await here.asked(text(0), **bearer(token))
                assert f"what holds its {count}" in answer.headers["x-kvcache-why"]
                assert len(here.workers[name].tokenized) == 1

    run()
