"""The connection that carries the bytes of an endpoint of ``ucx://``, and the transfers that are on it.

    up ── cut by this side: its parts are stopped ──► cut        up ── broke: its parts learn it ──► cut

A wire's ``cut`` returns when none of its messages is under way, so a lane that was cut touches no memory.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from kvcache.transport.ucx_frames import LIFE, Frame
from kvcache.transport.ucx_streams import Part


class Wire(Protocol):
    """One connection of the library. Futures end with PeerLost when it broke, and are never cancelled."""

    def receive(self, tag: int, into: memoryview) -> asyncio.Future[None]: ...

    def send(self, tag: int, piece: memoryview) -> asyncio.Future[None]: ...

    async def cut(self) -> None:
        """End it at once. When this returns every future has ended. May be called twice."""


class Owner(Protocol):
    """Whose lane it is."""

    def tell(self, frame: Frame) -> None: ...

    def lane_ended(self, lane: DataLane) -> None:
        """Called once: let its wire be cut."""


class DataLane:
    """A wire for bytes, with the parts that use it."""

    def __init__(self, owner: Owner, number: int, wire: Wire, tags: tuple[int, int]) -> None:
        self.number = number
        self.is_cut = False
        self.wire = wire
        self.parts: set[Part] = set()
        self._owner = owner
        self._mine, self._peers = tags
        self._life = bytearray(8)
        wire.receive(self._mine | LIFE, memoryview(self._life)).add_done_callback(self._broke)

    def receive(self, transfer: int, into: memoryview) -> asyncio.Future[None]:
        return self.wire.receive(self._mine | transfer, into)

    def send(self, transfer: int, piece: memoryview) -> asyncio.Future[None]:
        return self.wire.send(self._peers | transfer, piece)

    def tell(self, frame: Frame) -> None:
        self._owner.tell(frame)

    def add(self, part: Part) -> None:
        self.parts.add(part)
        part.done.add_done_callback(lambda _: self.parts.discard(part))

    def cut(self, why: str) -> None:
        """This side ends it: nothing of what is on it will be whole. May be called twice."""
        for part in list(self.parts):
            part.stop(why)
        self._end()

    def _broke(self, life: asyncio.Future[None]) -> None:
        life.exception()
        for part in list(self.parts):
            part.broke()
        self._end()

    def _end(self) -> None:
        if not self.is_cut:
            self.is_cut = True
            self._owner.lane_ended(self)
