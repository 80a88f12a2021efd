"""What a worker is sent of a request, for how long it is waited for, and what its silence means."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.client_reqrep import ConnectionKey

from kvcache.fleet import Worker
from kvcache.server import http_route_answers as answers
from kvcache.server.http_forward import Forwarder, Silent, Waits
from kvcache.server.http_route import Limits
from tests.kvcache.routing.fleet_double import TOKENS
from tests.server.http_double import in_loop
from tests.server.route_double import PATIENCE_S, SHORT_S, routing

BODY = {"model": "m", "prompt": TOKENS}


@in_loop
async def test_a_worker_is_not_asked_to_compress_for_a_client_that_did_not_ask() -> None:
    async with routing("a") as here:
        raw, headers = json.dumps(BODY).encode(), {"Content-Type": "application/json"}
        plain = ["Accept-Encoding", "Accept", "User-Agent"]
        url = here.url + "/v1/completions"
        async with here.session.post(url, data=raw, headers=headers, skip_auto_headers=plain) as answer:
            assert answer.status == 200
        [(seen, _)] = here.workers["a"].seen
        assert not {*plain} & {*seen}
        await here.asked(BODY, Accept_Encoding="br")
        assert here.workers["a"].seen[1][0]["Accept-Encoding"] == "br"


@in_loop
async def test_a_compressed_request_is_passed_on_as_it_was_read() -> None:
    async with routing("a") as here:
        raw = json.dumps(BODY).encode()
        assert (await here.asked(gzip.compress(raw), Content_Encoding="gzip")).status == 200
        [(headers, body)] = here.workers["a"].seen
        assert body == raw and "Content-Encoding" not in headers
        answer = await here.asked(b"no gzip", Content_Encoding="gzip")
        assert answer.status == 400 and (await answer.json())["error"]["code"] == "bad_message"


@in_loop
async def test_a_request_takes_no_longer_however_many_workers_are_tried() -> None:
    for short_s in SHORT_S:
        async with routing("a", "b", limits=Limits(whole_s=short_s), waits=Waits(whole_s=60.0)) as here:
            for worker in here.workers.values():
                worker.act = worker.hang
            answer = await here.asked(BODY)
            if not any(each.seen for each in here.workers.values()):
                continue
            assert answer.status == 502 and "none of 1 workers answered" in await answer.text()
            assert sum(len(each.seen) for each in here.workers.values()) == 1
            down = [here.state.health.why_down(name, 0) for name in here.workers]
            assert down == ["", ""], "so short a time says nothing of a worker"
            return
    raise AssertionError("nobody was asked in time")


@in_loop
async def test_a_request_whose_time_is_over_before_a_worker_is_asked_says_so() -> None:
    async with routing("a", limits=Limits(whole_s=0.0)) as here:
        answer = await here.asked(BODY)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "before a worker was asked" in await answer.text()
        assert here.workers["a"].seen == [] and await here.choices() == []


@in_loop
async def test_a_worker_that_takes_no_connection_is_dead_however_little_time_is_left() -> None:
    class Full:
        """A worker whose queue of connections is full."""

        async def request(self, *_: object, **__: object) -> Any:
            raise aiohttp.ConnectionTimeoutError("Connection timeout to host http://10.0.0.2:8000")

    forwarder = Forwarder(Full(), Waits())  # type: ignore[arg-type]  # A double.
    with pytest.raises(Silent) as caught:
        async with forwarder.open(Worker(name="a", url="http://x"), "/v1/completions", {}, b"", False, 1.0):
            pass
    assert caught.value.dead and caught.value.why == "it cannot be reached in time"


@in_loop
async def test_who_takes_nothing_of_a_cut_answer_keeps_no_connection() -> None:
    """What was written and not taken keeps a closing connection open, for as long as its other end lives."""
    ended: list[str] = []
    aborted = asyncio.Event()

    class Full:
        def close(self) -> None:
            ended.append("closed")

        def abort(self) -> None:
            aborted.set()

    class Request:
        transport = Full()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "TAKEN_S", 0.01)
        await answers.cut(Request(), web.StreamResponse(), b"")  # type: ignore[arg-type]  # A double.
        assert ended == ["closed"] and not aborted.is_set()
        await asyncio.wait_for(aborted.wait(), PATIENCE_S)


@in_loop
async def test_an_answer_that_took_too_long_is_said_to_have(caplog: pytest.LogCaptureFixture) -> None:
    for short_s in SHORT_S:
        async with routing("a", limits=Limits(whole_s=short_s)) as here:
            here.workers["a"].act = here.workers["a"].hang_after
            async with here.post({**BODY, "stream": True}) as answer:
                if answer.status != 200:
                    continue
                with pytest.raises(aiohttp.ClientPayloadError):
                    await answer.read()
            assert "the answer of worker a was cut: too long" in caplog.messages
            return
    raise AssertionError("no answer began in time")


@in_loop
async def test_a_worker_is_not_dead_for_what_this_host_has_no_more_of() -> None:
    key = ConnectionKey("10.0.0.2", 8000, False, True, None, None, None)

    class Out:
        def __init__(self, number: int) -> None:
            self.number = number

        async def request(self, *_: object, **__: object) -> Any:
            raise aiohttp.ClientConnectorError(key, OSError(self.number, "so it is"))

    for number, dead in ((errno.EMFILE, False), (errno.ECONNREFUSED, True)):
        forwarder = Forwarder(Out(number), Waits())  # type: ignore[arg-type]  # A double.
        with pytest.raises(Silent) as caught:
            async with forwarder.open(Worker(name="a", url="http://x"), "/v1/x", {}, b"", True, 1.0):
                pass
        assert (caught.value.dead, caught.value.why) == (dead, "it cannot be reached: so it is")
