"""The one-sided path to one peer: made, proved by a probe, brought up to date, and read over.

    none ──wire──► made ── all readers' agent was replaced ──► none, made again by who reads next
                    └── peer registered more memory ──► stale ──► brought up to date when nothing is in flight

What a peer has forgotten since stays known here, and he sends nobody there any more. One that has told of too
much is lost, and begins anew when he is connected to again.

A path is believed when the peer's random probe was read over it: then bytes move, and they are his.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from kvcache.transport.base import PeerLost
from kvcache.transport.nixl import Agents
from kvcache.transport.nixl_regions import REGIONS_MAX
from kvcache.transport.nixl_rounds import SMALL, Path, Span
from kvcache.transport.nixl_wire import AnyMessage, Hello, Wired, Wiring

_T = TypeVar("_T")


class Lane:
    """One endpoint's. ``check`` raises when the endpoint is lost, which sets ``lost``."""

    def __init__(
        self,
        agents: Agents,
        hello: Hello,
        say: Callable[[AnyMessage], None],
        check: Callable[[], None],
        lost: asyncio.Event,
    ) -> None:
        self._agents = agents
        self._hello = hello
        self._say = say
        self._check = check
        self._lost = lost
        self._path = Path([hello.description])
        self._wiring = asyncio.Lock()
        self._is_stale = False
        self._rounds = 0
        self._no_rounds = asyncio.Event()
        self._no_rounds.set()

    def renew(self, description: bytes) -> None:
        """The peer has registered more memory. RAISES PeerLost when that was too often."""
        if len(self._path.descriptions) > REGIONS_MAX:
            raise PeerLost("it has registered memory too often")
        self._path.descriptions.append(description)
        self._is_stale = True

    async def wire(self) -> None:
        """Make the path, and see that bytes come over it. RAISES PeerLost."""
        async with self._wiring:
            if self._path.generation and await self._probe():
                return  # Somebody else has made it.
            self._say(Wiring())
            try:
                while True:
                    self._check()
                    await self._agents.meet(self._path)
                    if await self._probe():
                        return
            finally:
                self._say(Wired())

    async def read(self, local: Sequence[Span], remote: Sequence[Span], look: Callable[[], None]) -> None:
        """One round, as ``Agents.read``; the path is made again when it must be. RAISES PeerLost."""
        await self._bring_up_to_date()
        while not await self._read(local, remote, look):
            await self.wire()

    async def leave(self) -> None:
        """It is not needed any more. Returns when nothing is in flight."""
        await self._no_rounds.wait()
        await self._agents.forget(self._path)

    async def _read(self, local: Sequence[Span], remote: Sequence[Span], look: Callable[[], None]) -> bool:
        self._rounds += 1
        self._no_rounds.clear()
        try:
            return await self._agents.read(self._path, local, remote, look)
        finally:
            self._rounds -= 1
            if not self._rounds:
                self._no_rounds.set()

    async def _bring_up_to_date(self) -> None:
        """NIXL takes a new description in only while nothing is in flight."""
        while self._is_stale:
            await unless(self._lost, self._no_rounds.wait(), self._check)
            if self._is_stale and not self._rounds:
                self._is_stale = False
                await self._agents.meet(self._path)

    async def _probe(self) -> bool:
        """False: the path was lost again. RAISES PeerLost when there is no path that works."""
        hello = self._hello
        slot = await unless(self._lost, self._agents.landing.take(), self._check)
        try:
            length = len(hello.probe)
            here, there = (slot.place, length, SMALL), (hello.probe_address, length, SMALL)
            came = await self._read([here], [there], self._check)
            if came and slot.view[:length] != hello.probe:
                raise PeerLost("it does not lead to the peer")
            return came
        except PeerLost as error:
            self._check()
            raise PeerLost(f"there is no one-sided path, use tcp:// ({error})") from error
        finally:
            self._agents.landing.give(slot)


async def unless(
    lost: asyncio.Event, waiting: Coroutine[object, object, _T], check: Callable[[], None]
) -> _T:
    """What ``waiting`` gives; when ``lost`` is set before, what ``check`` raises then."""
    wait, end = asyncio.ensure_future(waiting), asyncio.ensure_future(lost.wait())
    try:
        await asyncio.wait([wait, end], return_when=asyncio.FIRST_COMPLETED)
        check()
        return await wait
    finally:
        end.cancel()
        wait.cancel()
