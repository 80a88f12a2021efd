"""A network that fails under transfers between two hosts, and heals: every call ends in time, no byte is
wrong, no memory is written that a call has given back, and traffic goes on.

    sound ── fault ─► some seconds ── heal ─► within 3 s every line has transferred again

The sum: a fault takes 3 to 6 s, most of it waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.testing.netns import TwoHosts
from kvcache.testing.stalls import Stalls
from kvcache.testing.transport_pair import CLOCK, LATE_NS
from kvcache.transport.base import Limits, Transport
from kvcache.transport.table import open_transport
from tests.netfaults.peers import Peer, Peers
from tests.netfaults.traffic import Line, Traffic, fence, wary

pytestmark = pytest.mark.timed

HEALED_NS = 3 * NS_PER_S
PATIENCE_NS = 500 * NS_PER_MS
SIZES = (1_000, 65_536, 1 << 20)
COUNTS = (1, 3, 8)
LINES = 3
SLOW_BYTES_PER_S = 4_000_000
BLINKS = 6
PLAY_S = 110

Fault = Callable[[TwoHosts], None]
Played = Callable[[Traffic, Transport], Awaitable[None]]

CUTS: dict[str, Fault] = {
    "both ways": TwoHosts.cut,
    "to the caller": lambda hosts: hosts.cut_towards(hosts.right),
    "to the peer": lambda hosts: hosts.cut_towards(hosts.left),
}


class NetworkFaults:
    """For a transport by its scheme. The peer is on the left, who calls is on the right."""

    scheme = ""

    @pytest.fixture
    def peer(self, hosts: TwoHosts) -> Iterator[Peer]:
        with hosts.left.run(Peers) as peers:
            yield peers.start(f"{self.scheme}://{hosts.left.address}:0", self.limits())

    def limits(self) -> Limits:
        return wary()

    def play(self, hosts: TwoHosts, peer: Peer, scenario: Played) -> None:
        """With traffic that has begun; what it did is checked at the end."""

        async def main(stalls: Stalls) -> None:
            transport = open_transport(self.scheme, self.limits())
            traffic = Traffic(transport, peer.address, 1, stalls, lines=LINES, patience_ns=PATIENCE_NS)
            try:
                traffic.start(SIZES, COUNTS)
                await traffic.progress(10 * NS_PER_S)
                await scenario(traffic, transport)
                await traffic.stop()
                await fence(Line(transport, peer.address, traffic.calls))
                traffic.calls.check()
            finally:
                await transport.close()

        with Stalls() as stalls:
            hosts.right.run(lambda: asyncio.run(asyncio.wait_for(main(stalls), PLAY_S)))

    @pytest.mark.slow
    @pytest.mark.parametrize("way", CUTS)
    def test_a_partition(self, hosts: TwoHosts, peer: Peer, way: str) -> None:
        async def scenario(traffic: Traffic, transport: Transport) -> None:
            await asyncio.to_thread(CUTS[way], hosts)
            cut_ns = CLOCK.now_ns()
            silence_ns = self.limits().silence_ns
            # Who is not heard may be told so, a silence later.
            await pause(traffic, 2 * silence_ns + LATE_NS)
            assert not any(line.is_up for line in traffic.lines)
            await pause(traffic, PATIENCE_NS)
            since = [call for call in traffic.calls.all if call.began_ns > cut_ns]
            assert since
            assert not any(call.is_done for call in since if call.what != "notify")
            await heals(hosts, traffic, transport, peer)

        self.play(hosts, peer, scenario)

    @pytest.mark.slow
    def test_a_network_that_blinks(self, hosts: TwoHosts, peer: Peer) -> None:
        """Shorter than a silence: nobody is lost for it, unless the system itself is slow to try again."""

        async def scenario(traffic: Traffic, transport: Transport) -> None:
            for _ in range(BLINKS):
                await asyncio.to_thread(hosts.cut)
                await pause(traffic, self.limits().silence_ns // 3)
                await asyncio.to_thread(hosts.heal)
                await traffic.progress(HEALED_NS)
            await heals(hosts, traffic, transport, peer)

        self.play(hosts, peer, scenario)

    @pytest.mark.slow
    def test_loss(self, hosts: TwoHosts, peer: Peer) -> None:
        async def scenario(traffic: Traffic, transport: Transport) -> None:
            await asyncio.to_thread(hosts.lose, 20)
            lossy_ns = CLOCK.now_ns()
            await pause(traffic, 4 * NS_PER_S)
            outcomes = traffic.calls.outcomes(since_ns=lossy_ns)
            assert outcomes["done"]
            assert outcomes["TransferLate"]
            await heals(hosts, traffic, transport, peer)

        self.play(hosts, peer, scenario)

    @pytest.mark.slow
    def test_a_slow_wire(self, hosts: TwoHosts, peer: Peer) -> None:
        async def scenario(traffic: Traffic, transport: Transport) -> None:
            await asyncio.to_thread(hosts.slow, SLOW_BYTES_PER_S)
            slow_ns = CLOCK.now_ns()
            await pause(traffic, 3 * NS_PER_S)
            outcomes = traffic.calls.outcomes(since_ns=slow_ns)
            assert outcomes["done"]
            assert outcomes["TransferLate"]
            assert not outcomes["PeerLost"]  # Slow is not silent.
            await heals(hosts, traffic, transport, peer)

        self.play(hosts, peer, scenario)


async def pause(traffic: Traffic, time_ns: int) -> None:
    """Time under a fault is what is tried."""
    clock = traffic.calls.stalls
    until_ns = clock.awake_ns() + time_ns
    while (left_ns := until_ns - clock.awake_ns()) > 0:
        await asyncio.sleep(left_ns / NS_PER_S)


async def heals(hosts: TwoHosts, traffic: Traffic, transport: Transport, peer: Peer) -> None:
    """Within 3 s a new connection works, and every old line."""
    await asyncio.to_thread(hosts.heal)
    clock = traffic.calls.stalls
    healed_ns = clock.awake_ns()
    await Line(transport, peer.address, traffic.calls).read(4, 65_536, HEALED_NS)
    took_ns = await traffic.progress(HEALED_NS - (clock.awake_ns() - healed_ns))
    latest_ms = traffic.calls.latest_ns() / NS_PER_MS
    print(f"healed in {took_ns / NS_PER_S:.2f} s, latest call {latest_ms:.1f} ms past its deadline")
    print(dict(traffic.calls.outcomes()))


class TestTcp(NetworkFaults):
    scheme = "tcp"
