"""What ``kvcache index`` says of whom it follows: once, when that changes."""

from __future__ import annotations

import asyncio

from kvcache.fleet import Worker, engine_source
from kvcache.server.index_cli import _say_changes
from tests.kvcache.routing.fleet_double import ENGINE
from tests.kvcache.routing.fleet_double import Told as Events
from tests.server.http_double import in_loop
from tests.server.test_fleet_index import Here, running


@in_loop
async def test_two_workers_at_one_address_are_told_of_once_and_who_is_gone_is_forgotten() -> None:
    async with running() as here:
        said = await follow_two(here)
        told = _say_changes(here.fleet, {}, lambda line, _: said.append(line))
        assert [line.split(",")[0].split(":")[0] for line in said] == [
            "following vllm tcp",
            "not following vllm tcp",
        ]
        assert _say_changes(here.fleet, told, lambda line, _: said.append(line)) == told and len(said) == 2
        assert await here.fleet.remove("b")
        assert _say_changes(here.fleet, told, lambda line, _: said.append(line)).keys() == {
            engine_source("a")
        }
        assert len(said) == 2


async def follow_two(here: Here) -> list[str]:
    """Of one of them there are events."""
    for name in "ab":
        here.fleet.add(Worker(name=name, events="tcp://10.0.0.2:5557"))
    events = Events()
    events.index = here.index
    events.holds(engine_source("a"), ENGINE, 3, now_ns=here.clock.ns)
    while not all(each.connected for each in here.fleet.followed()):
        await asyncio.sleep(0)
    return []
