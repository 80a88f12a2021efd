"""Slots are free when their writer has ended and nobody else touches them, in whichever order."""

from __future__ import annotations

import asyncio

import pytest

from kvcache.leases import Owner
from kvcache.server.uses import Uses


class Gated:
    """A use that ends when its test says so."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.stops = 0
        self.kept = 0

    def keep(self) -> None:
        self.kept += 1

    async def stop(self) -> None:
        self.stops += 1
        await self.gate.wait()


class Place:
    def __init__(self) -> None:
        self.freed: list[Owner] = []
        self.uses = Uses(self.freed.append)

    def add(self, owner: int, reservation_id: int) -> Gated:
        use = Gated()
        self.uses.add(reservation_id, owner, use)
        return use


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_an_owner_without_uses_is_freed_at_once() -> None:
    async def play() -> None:
        place = Place()
        place.add(1, 7)
        assert not place.uses.leave(2)
        place.uses.writes_ended(2)
        assert place.freed == [2]

    asyncio.run(play())


@pytest.mark.parametrize("writer_first", [True, False])
def test_both_must_have_ended(writer_first: bool) -> None:
    async def play() -> None:
        place = Place()
        mine, also_mine, others = place.add(1, 7), place.add(1, 8), place.add(2, 9)
        assert place.uses.leave(1)
        if writer_first:
            place.uses.writes_ended(1)
        mine.gate.set()
        await turns()
        assert place.freed == []
        also_mine.gate.set()
        await turns()
        assert place.freed == ([1] if writer_first else [])
        if not writer_first:
            place.uses.writes_ended(1)
        assert place.freed == [1]
        assert (mine.stops, also_mine.stops, others.stops) == (1, 1, 0)
        assert len(place.uses) == 1

    asyncio.run(play())


def test_a_stop_that_was_cancelled_is_done_again() -> None:
    async def play() -> None:
        place = Place()
        use = place.add(1, 7)
        aborting = asyncio.create_task(place.uses.stop(7))
        await turns()
        aborting.cancel()
        await turns()
        assert place.uses.any(7)
        assert place.uses.leave(1)
        place.uses.writes_ended(1)
        use.gate.set()
        await place.uses.close()
        assert place.freed == [1]
        assert not place.uses.any(7)

    asyncio.run(play())


def test_what_is_kept_is_no_use_of_the_reservation_any_more() -> None:
    async def play() -> None:
        place = Place()
        use = place.add(1, 7)
        place.uses.keep(7)
        assert use.kept == 1
        assert not place.uses.any(7)
        assert not place.uses.leave(1)

    asyncio.run(play())


class Broken(Gated):
    async def stop(self) -> None:
        raise ValueError("our own code is wrong")


def test_one_that_cannot_be_stopped_is_told_of_and_does_not_keep_the_rest_from_closing() -> None:
    async def play() -> None:
        place, told = Place(), list[dict[str, object]]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        place.uses.add(7, 1, Broken())
        slow = place.add(1, 8)
        assert place.uses.leave(1)
        place.uses.writes_ended(1)
        await turns()
        assert told == [], "others are being stopped still"
        closing = asyncio.ensure_future(place.uses.close())
        await turns()
        assert not closing.done()
        slow.gate.set()
        await closing
        await place.uses.close()
        assert [type(context["exception"]) for context in told] == [ValueError]
        assert place.freed == [], "its slots may be touched still"

    asyncio.run(play())
