"""One peer: which of its addresses is used, and what a Release does to the connection it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_S
from kvcache.locality import LocalityIndex
from kvcache.peers.peer import Here, Peer
from kvcache.testing.clock import FakeClock
from kvcache.transport.base import Endpoint, PeerLost
from kvcache.wire import Leased, Release, Released, Reply, Request, Welcome

DATA = ["tcp://0.0.0.0:1", "ucx://10.0.0.1:2", "tcp://10.0.0.1:3"]


class Plane:
    """Nothing leads anywhere; it is noted what was tried."""

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.tried: list[str] = []

    def usable(self, theirs: Sequence[str]) -> str:
        fit = [each for each in theirs if each.startswith("tcp://")]
        return next((each for each in fit if each not in self.failed), fit[0] if fit else "")

    async def endpoint(self, address: str, deadline_ns: int) -> Endpoint:
        self.tried.append(address)
        self.failed.add(address)
        raise PeerLost("nobody")


async def no_sums(views: Sequence[memoryview], chunk_bytes: int) -> bytes:
    return b""


def peer_over(plane: Plane) -> Peer:
    here = Here("here", 7, "", lambda tenant: b"")
    return Peer(
        "tcp://10.0.0.9:8211",
        here,
        plane,
        LocalityIndex(1),
        no_sums,
        FakeClock(),
        lambda peer, welcome: None,
    )


def asked(told: Sequence[str]) -> list[str]:
    """Where it went, with tickets for these addresses one after the other."""
    plane = Plane()

    async def work() -> None:
        peer = peer_over(plane)
        peer.met(Welcome(1, "a", 1, "t", [], b"", 0, DATA))
        for address in told:
            with pytest.raises(PeerLost):
                await peer.endpoint(address, 1)

    asyncio.run(work())
    return plane.tried


def test_a_ticket_is_used_at_the_address_of_its_scheme_that_does_not_fail() -> None:
    assert asked([DATA[0]] * 2) == ["tcp://10.0.0.9:1", "tcp://10.0.0.1:3"]


def test_an_address_that_was_not_told_before_or_of_another_scheme_is_taken_as_it_is() -> None:
    assert asked(["tcp://10.0.0.1:4", DATA[1]]) == ["tcp://10.0.0.1:4", DATA[1]]


class Channel:
    """It notes until when an answer is waited for."""

    def __init__(self) -> None:
        self.deadlines: list[int] = []

    async def call(self, request: Request, deadline_ns: int) -> Reply:
        assert isinstance(request, Release)
        self.deadlines.append(deadline_ns)
        return Released(True)


def test_a_release_is_waited_for_longer_than_any_lease_that_it_may_be_behind() -> None:
    """A call that is late ends its connection, and the leases of others with it; who waits for a lease, does
    so for as long as ``peer_wait_ms`` says, a day at most."""
    channel = Channel()

    async def work() -> None:
        peer = peer_over(Plane())
        peer._release(cast(AsyncChannel, channel), Leased(7, 1, [], [0], b"", 0, 0), [])
        await asyncio.gather(*peer._tasks)

    asyncio.run(work())
    assert channel.deadlines[0] > FakeClock().now_ns() + 86_400 * NS_PER_S
