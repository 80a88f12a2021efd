"""What the proxy tells the index of its choices, and for how long."""

from __future__ import annotations

import asyncio

from kvcache.routing.waiting import AGAIN_NS
from tests.kvcache.routing.fleet_double import TOKENS
from tests.server.http_double import in_loop
from tests.server.route_double import Routing, routing
from tests.server.test_http_route import filled

BODY = {"model": "m", "prompt": TOKENS}


def placed(here: Routing) -> int:
    """How many blocks of the prompt are predicted."""
    told = here.parts.view.find(here.state.ask(here.parts.view, "m", TOKENS).queries)
    return sum(row.placed for rows in told.rows for row in rows)


async def passes(here: Routing, ns: int) -> None:
    """With other requests now and then."""
    here.parts.clock.ns += ns  # type: ignore[attr-defined]  # The test's own clock.
    await here.asked({"model": "m", "prompt": [7] * 64})


@in_loop
async def test_what_waits_for_its_first_byte_is_told_again_until_it_has_come() -> None:
    async with routing("a", told=filled(a=0)) as here:
        worker = here.workers["a"]
        worker.act = worker.hang
        waiting = asyncio.ensure_future(here.asked(BODY))
        while not worker.seen:
            await asyncio.sleep(0)
        worker.act = worker.whole
        for _ in range(4):
            assert placed(here) == 20, "it waits, so it will be cached there"
            await passes(here, AGAIN_NS)
        waiting.cancel()
        await worker.left.wait()
        while here.state.loads.requests:
            await asyncio.sleep(0)
        for _ in range(4):
            await passes(here, AGAIN_NS)
        assert placed(here) == 0, "nobody ever told of it"
