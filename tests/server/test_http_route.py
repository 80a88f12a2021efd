"""The router as a proxy: answers as they come, and what it does when a worker does not give one."""

from __future__ import annotations

import asyncio
import gzip

import pytest
from aiohttp import ClientPayloadError, web

from kvcache.routing.weights import Weights
from kvcache.server.http_forward import Waits
from kvcache.server.http_route import CHOICES_KEPT, Limits
from tests.kvcache.routing.fleet_double import ENGINE, TOKENS, S, Told, engine
from tests.server.http_double import in_loop
from tests.server.route_double import CHAT, SHORT_S, FakeWorker, Routing, routing

BODY = {"model": "m", "prompt": TOKENS, "max_tokens": 3}
STREAM = {**BODY, "stream": True}


def filled(**blocks: int) -> Told:
    """An index in which these workers' engines hold so many blocks of the prompt."""
    told = Told()
    for name, count in blocks.items():
        if count:
            told.holds(engine(name), ENGINE, count)
        else:
            told.starts(engine(name), ENGINE)
    return told


def others(here: Routing, name: str) -> FakeWorker:
    [other] = [each for each in here.workers.values() if each.name != name]
    return other


# --- passing on ---------------------------------------------------------------------------------


@in_loop
async def test_the_worker_that_holds_most_gets_the_request_unchanged_and_it_is_said() -> None:
    async with routing("a", "b", told=filled(a=2, b=9)) as here:
        raw = b'{ "model": "m", "prompt": [' + ", ".join(map(str, TOKENS)).encode() + b'], "logit_bias": {} }'
        answer = await here.asked(raw, X_Custom="1", Connection="x-secret", X_Secret="2")
        assert answer.status == 200 and await answer.json() == {"from": "b"}
        assert answer.headers["x-kvcache-worker"] == "b"
        assert "it has 144 of 320" in answer.headers["x-kvcache-why"]
        assert answer.headers["X-Request-Id"] == "7" and "Keep-Alive" not in answer.headers
        [(headers, body)] = here.workers["b"].seen
        assert body == raw and headers["X-Custom"] == "1" and "X-Secret" not in headers
        assert headers["Host"] in here.workers["b"].url
        assert here.workers["a"].seen == []


@in_loop
async def test_an_answer_is_passed_on_as_it_comes() -> None:
    async with routing("a") as here:
        here.workers["a"].act = here.workers["a"].stream
        async with here.post(STREAM) as answer:
            assert await answer.content.readany() == b"data: one\n\n"
            load = here.state.loads.estimate("a", 0)
            assert (load.running, load.waiting_prefill_tokens) == (1, 0)  # Its first token came.
            here.workers["a"].go.set()
            assert await answer.content.read() == b"data: two\n\n"
            assert answer.content_type == "text/event-stream"
        assert here.state.loads.requests == 0


@in_loop
async def test_compressed_answers_and_refusals_are_the_workers_own() -> None:
    packed = gzip.compress(b"hello")

    async def act(request: web.Request) -> web.StreamResponse:
        return web.Response(body=packed, status=422, headers={"Content-Encoding": "gzip", "X-Why": "so"})

    async with routing("a", "b") as here:
        for worker in here.workers.values():
            worker.act = act
        async with here.post(BODY) as answer:
            assert (answer.status, answer.headers["X-Why"]) == (422, "so")
            assert answer.headers["Content-Encoding"] == "gzip" and await answer.read() == packed
        assert sum(len(each.seen) for each in here.workers.values()) == 1


@in_loop
async def test_an_empty_answer_is_one() -> None:
    async def act(request: web.Request) -> web.StreamResponse:
        return web.Response(status=200)

    async with routing("a") as here:
        here.workers["a"].act = act
        async with here.post(BODY) as answer:
            assert answer.status == 200 and await answer.read() == b""


@in_loop
async def test_a_session_stays_with_its_worker_by_header_or_field() -> None:
    async with routing("a", "b", told=filled(a=0, b=0), weights=Weights(placed_credit=0)) as here:
        first = (await here.asked(BODY, x_kvcache_session="chat-1")).headers["x-kvcache-worker"]
        for _ in range(3):
            assert (await here.asked(BODY, x_kvcache_session="chat-1")).headers["x-kvcache-worker"] == first
        keyed = {(await here.asked({**BODY, "user": "u"})).headers["x-kvcache-worker"] for _ in range(3)}
        assert len(keyed) == 1
        assert "x-kvcache-session" not in {name.lower() for name in here.workers[first].seen[0][0]}


@in_loop
async def test_a_client_that_leaves_ends_the_workers_request() -> None:
    async with routing("a") as here:
        worker = here.workers["a"]
        worker.act = worker.stream
        async with here.post(STREAM) as answer:
            await answer.content.readany()
        await worker.left.wait()
        assert here.state.loads.requests == 0
        worker.left.clear()
        worker.act = worker.hang  # The same before anything came.
        waiting = asyncio.ensure_future(here.asked(STREAM))
        while len(worker.seen) < 2:
            await asyncio.sleep(0)
        waiting.cancel()
        await worker.left.wait()
        while here.state.loads.requests:
            await asyncio.sleep(0)


# --- workers that do not answer -----------------------------------------------------------------


@in_loop
async def test_a_worker_that_dies_before_its_first_byte_is_replaced_by_the_next_best() -> None:
    async with routing("a", "b", told=filled(a=2, b=9)) as here:
        here.workers["b"].act = here.workers["b"].die_before
        answer = await here.asked(BODY)
        assert answer.status == 200 and answer.headers["x-kvcache-worker"] == "a"
        [last, first] = await here.choices()
        assert (first["worker"], first["tried"], last["worker"], last["tried"]) == ("b", [], "a", ["b"])
        here.workers["b"].act = here.workers["b"].whole
        again = await here.asked(BODY)  # Not at once again.
        assert again.headers["x-kvcache-worker"] == "a"
        assert "passed over, not answering: b" in again.headers["x-kvcache-why"]
        here.parts.clock.ns += 2 * S  # type: ignore[attr-defined]  # The test's own clock.
        assert (await here.asked(BODY)).headers["x-kvcache-worker"] == "b"


@in_loop
async def test_a_worker_where_nobody_listens_costs_one_try() -> None:
    async with routing("a", told=filled(a=0, gone=20), missing=("gone",)) as here:
        answer = await here.asked(BODY)
        assert answer.headers["x-kvcache-worker"] == "a"
        assert (await here.choices())[1]["worker"] == "gone"
        assert (await here.got("/readyz"))[1] == {"ready": True, "degraded": ["worker gone is passed over"]}


@in_loop
async def test_when_nobody_answers_the_client_is_told_to_come_back() -> None:
    async with routing("a", missing=("x", "y", "z"), limits=Limits(attempts=3)) as here:
        here.workers["a"].act = here.workers["a"].die_before
        answer = await here.asked(BODY)
        assert (answer.status, answer.headers["Retry-After"]) == (502, "1")
        error = (await answer.json())["error"]
        assert error["code"] == "unavailable" and "none of 3 workers answered" in error["message"]
        assert len(await here.choices()) == 3


@in_loop
async def test_a_fleet_that_is_away_is_not_ready_and_is_tried_all_the_same() -> None:
    async with routing(missing=("x",)) as here:
        assert (await here.asked(BODY)).status == 502
        status, said = await here.got("/readyz")
        assert status == 503 and said["degraded"][0] == "no worker can be sent requests"
        assert (await here.asked(BODY)).status == 502
        assert "no worker answered lately" in (await here.choices())[0]["notes"][-1]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_worker_that_says_it_is_away_is_replaced(status: int) -> None:
    @in_loop
    async def run() -> None:
        async with routing("a", "b", told=filled(a=0, b=9)) as here:
            here.workers["b"].act = here.workers["b"].answers(status)
            assert (await here.asked(BODY)).headers["x-kvcache-worker"] == "a"

    run()


@in_loop
async def test_a_worker_that_is_busy_is_spared_but_not_taken_for_dead() -> None:
    async with routing("a", "b", told=filled(a=0, b=9)) as here:
        here.workers["b"].act = here.workers["b"].answers(429)
        assert (await here.asked(BODY)).headers["x-kvcache-worker"] == "a"
        assert (await here.got("/readyz"))[1]["degraded"] == []
        here.workers["a"].act = here.workers["a"].answers(429)
        answer = await here.asked(BODY)
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")


@in_loop
async def test_a_worker_that_hangs_before_its_first_byte_is_replaced() -> None:
    for short_s in SHORT_S:
        async with routing("a", "b", told=filled(a=0, b=9), waits=Waits(first_byte_s=short_s)) as here:
            here.workers["b"].act = here.workers["b"].hang
            answer = await here.asked(STREAM)
            if answer.status == 200 and here.workers["b"].seen:
                assert answer.headers["x-kvcache-worker"] == "a"
                await here.workers["b"].left.wait()
                return
    raise AssertionError("nothing was in time")


@in_loop
async def test_an_answer_that_dies_in_the_middle_is_no_whole_one_and_says_so() -> None:
    async with routing("a", "b", told=filled(a=9, b=0)) as here:
        worker = here.workers["a"]
        worker.act = worker.die_after
        async with here.post(STREAM) as answer:
            assert await answer.content.readany() == b"data: one\n\n"
            worker.go.set()
            said = b""
            with pytest.raises(ClientPayloadError):
                while chunk := await answer.content.readany():
                    said += chunk
        assert b'"code":"unavailable"' in said and said.startswith(b'data: {"error"')
        assert others(here, "a").seen == []  # What began is not begun anew.
        worker.act = worker.die_in_a_body
        async with here.post(BODY) as answer:
            with pytest.raises(ClientPayloadError):
                await answer.read()
        assert "after" in (await here.got("/metrics"))[1]
        assert here.state.loads.requests == 0


@in_loop
async def test_silence_in_the_middle_and_an_answer_without_end_are_cut() -> None:
    async def is_cut(waits: Waits, limits: Limits) -> bool:
        """False: it had not begun by then."""
        async with routing("a", waits=waits, limits=limits) as here:
            here.workers["a"].act = here.workers["a"].hang_after
            async with here.post(STREAM) as answer:
                if answer.status != 200:
                    return False
                with pytest.raises(ClientPayloadError):
                    await answer.content.read()
            await here.workers["a"].left.wait()
            return True

    assert await is_cut(Waits(idle_s=SHORT_S[0]), Limits())
    assert any([await is_cut(Waits(), Limits(whole_s=short_s)) for short_s in SHORT_S])


@in_loop
async def test_more_requests_than_fit_are_told_to_come_back() -> None:
    async with routing("a", limits=Limits(requests_max=1)) as here:
        worker = here.workers["a"]
        worker.act = worker.stream
        async with here.post(STREAM) as first:
            await first.content.readany()
            answer = await here.asked(BODY)
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert (await here.got("/healthz"))[0] == 200  # That is answered all the same.
            worker.go.set()
            await first.read()
        worker.act = worker.whole
        assert (await here.asked(BODY)).status == 200


# --- the index, and without it ------------------------------------------------------------------


@in_loop
async def test_without_an_index_requests_spread_and_sessions_stay() -> None:
    async with routing("a", "b") as here:
        seen = [(await here.asked(BODY)).headers for _ in range(4)]
        assert {each["x-kvcache-worker"] for each in seen} == {"a", "b"}
        assert "without an index: there is no index" in seen[0]["x-kvcache-why"]
        stays = {
            (await here.asked(BODY, x_kvcache_session="s")).headers["x-kvcache-worker"] for _ in range(4)
        }
        assert len(stays) == 1


@in_loop
async def test_a_suspect_index_is_used_for_less_and_says_so() -> None:
    told = filled(a=20, b=18)
    async with routing("a", "b", told=told) as here:
        assert (await here.asked(BODY)).headers["x-kvcache-worker"] == "a"
        for name in "ab":
            told.index.suspect(engine(name))
        answer = await here.asked(BODY)
        assert "suspect" in answer.headers["x-kvcache-why"]
        terms = (await here.choices())[0]["candidates"][0]["terms"]
        assert next(each["weighted"] for each in terms if each["name"] == "freshness") > 0


@in_loop
async def test_an_index_that_forgot_everybody_is_as_none() -> None:
    told = filled(a=20, b=0)
    async with routing("a", "b", told=told) as here:
        for name in "ab":
            told.index.forget(engine(name))
        answer = await here.asked(BODY)
        assert answer.status == 200
        assert "the index knows nothing of these workers" in answer.headers["x-kvcache-why"]


# --- text ---------------------------------------------------------------------------------------


@in_loop
async def test_a_worker_is_asked_once_for_the_tokens_of_a_text() -> None:
    async with routing("a", "b", told=filled(a=0, b=9)) as here:
        for worker in here.workers.values():
            worker.tokens = TOKENS
        messages = [{"role": "user", "content": "hello"}]
        for body, path in (
            ({"model": "m", "prompt": "hello", "max_tokens": 5}, "/v1/completions"),
            ({"model": "m", "messages": messages, "temperature": 0}, CHAT),
        ):
            for _ in range(2):
                answer = await here.asked(body, path)
                assert answer.headers["x-kvcache-worker"] == "b"
                assert "144 hbm" in answer.headers["x-kvcache-why"]
        asked = [each for worker in here.workers.values() for each in worker.tokenized]
        assert sorted(asked, key=str) == sorted(
            [{"model": "m", "prompt": "hello"}, {"model": "m", "messages": messages}], key=str
        )


@in_loop
async def test_without_tokens_prompts_that_begin_alike_go_to_the_same_worker() -> None:
    async with routing("a", "b", told=filled(a=0, b=0)) as here:
        seen = set()
        for number in range(4):
            text = "the same long beginning " * 100 + str(number)
            answer = await here.asked({"model": "m", "prompt": text})
            assert "tokens are not known" in answer.headers["x-kvcache-why"]
            seen.add(answer.headers["x-kvcache-worker"])
        assert len(seen) == 1
        # Neither knows, so neither is asked again for a while.
        assert [len(each.tokenized) for each in here.workers.values()] == [1, 1]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "hello"}], "cache_salt": "s"},
        {"messages": [{"role": "user", "content": "hello"}], "truncate_prompt_tokens": 5},
    ],
    ids=["picture", "salt", "truncated"],
)
def test_what_is_more_than_its_tokens_is_not_asked_of_the_index(body: dict[str, object]) -> None:
    @in_loop
    async def run() -> None:
        async with routing("a", told=filled(a=20)) as here:
            here.workers["a"].tokens = TOKENS
            answer = await here.asked({"model": "m", **body}, CHAT)
            assert answer.status == 200 and "tokens are not known" in answer.headers["x-kvcache-why"]
            assert here.workers["a"].tokenized == []

    run()


@in_loop
async def test_choices_are_bounded_and_explain_themselves() -> None:
    async with routing("a", "b", told=filled(a=0, b=9), limits=Limits(requests_max=8)) as here:
        for _ in range(CHOICES_KEPT + 5):
            await here.asked({"model": "m", "prompt": [1]})
        made = await here.choices()
        assert len(made) == CHOICES_KEPT
        assert len((await here.got("/v1/choices?limit=2"))[1]["choices"]) == 2
        for each in made[0]["candidates"]:
            assert sum(term["weighted"] for term in each["terms"]) == pytest.approx(each["cost"])
        assert str(made).count("secret") == 0 and set(made[0]["candidates"][0]) == {"worker", "cost", "terms"}
