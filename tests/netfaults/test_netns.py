"""The faults do what they say, no more and no less: seen with bare packets, without anything of ours."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from kvcache.clock import NS_PER_S, SystemClock
from kvcache.errors import Unavailable
from kvcache.testing import netns
from kvcache.testing.netns import Host, TwoHosts

pytestmark = pytest.mark.timed

PACKETS = 400
PATIENCE_NS = 20 * NS_PER_S
TRIES = 5
"""Of what is measured: in one of them the machine does nothing else."""
CLOCK = SystemClock()


def arrived(source: Host, target: Host, least: int) -> int:
    """How many of ``PACKETS`` packets come; ``least`` are waited for."""

    def listen() -> socket.socket:
        heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        heard.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        heard.bind((target.address, 0))
        heard.setblocking(False)
        return heard

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as said:
            for _ in range(PACKETS):
                said.sendto(b"x", address)

    with target.run(listen) as heard:
        address = heard.getsockname()
        # The other end of a veth has a packet before the sender goes on, unless the system puts it off.
        source.run(send)
        count, until_ns = 0, CLOCK.now_ns() + PATIENCE_NS
        while True:
            try:
                heard.recv(10)
            except BlockingIOError:
                if count >= least or CLOCK.now_ns() > until_ns:
                    return count
                continue
            count += 1


def both_ways(hosts: TwoHosts, right: int = PACKETS, left: int = PACKETS) -> tuple[int, int]:
    """Of PACKETS each: what came from left to right, and from right to left. So many are waited for."""
    return arrived(hosts.left, hosts.right, right), arrived(hosts.right, hosts.left, left)


def test_a_sound_wire_carries_everything(hosts: TwoHosts) -> None:
    assert both_ways(hosts) == (PACKETS, PACKETS)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (TwoHosts.cut, (0, 0)),
        (lambda hosts: hosts.cut_towards(hosts.right), (0, PACKETS)),
        (lambda hosts: hosts.cut_towards(hosts.left), (PACKETS, 0)),
    ],
    ids=["both ways", "left to right", "right to left"],
)
def test_a_cut(hosts: TwoHosts, fault: Callable[[TwoHosts], None], expected: tuple[int, int]) -> None:
    assert both_ways(hosts) == (PACKETS, PACKETS)  # They know each other's hardware address now.
    fault(hosts)
    assert both_ways(hosts, *expected) == expected
    hosts.heal()
    assert both_ways(hosts) == (PACKETS, PACKETS)


def test_loss(hosts: TwoHosts) -> None:
    assert both_ways(hosts) == (PACKETS, PACKETS)
    hosts.lose(20)
    least, most = 7 * PACKETS // 10, 9 * PACKETS // 10  # Five standard deviations.
    for count in both_ways(hosts, least, least):
        assert least <= count <= most


@pytest.mark.slow
def test_a_slow_wire(hosts: TwoHosts) -> None:
    def through(byte_count: int) -> float:
        """Bytes a second, of a connection."""
        with hosts.left.run(lambda: socket.create_server((hosts.left.address, 0))) as server:
            address = server.getsockname()
            with hosts.right.run(lambda: socket.create_connection(address)) as said:
                heard, _ = server.accept()
                with heard:
                    said.setblocking(False)
                    return rate(said, heard, byte_count)

    def rate(said: socket.socket, heard: socket.socket, byte_count: int) -> float:
        began_ns, count, data = CLOCK.now_ns(), 0, bytes(1 << 16)
        while count < byte_count:
            try:
                said.send(data)
            except BlockingIOError:
                count += len(heard.recv(1 << 20))
        return count * NS_PER_S / (CLOCK.now_ns() - began_ns)

    assert any(through(20 << 20) > 20e6 for _ in range(TRIES))
    hosts.slow(2_000_000)
    assert any(1e6 < through(1 << 20) < 3e6 for _ in range(TRIES))
    hosts.heal()
    assert any(through(20 << 20) > 20e6 for _ in range(TRIES))


def test_nobody_is_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns.os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="need root"):
        TwoHosts()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns.shutil, "which", lambda tool: None if tool == "nft" else tool)
    with pytest.raises(Unavailable, match="install nftables"):
        TwoHosts()
