"""A peer that is a process of its own is stopped, woken, killed, started again, while blocks come from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.clock import NS_PER_MS, SystemClock
from kvcache.testing.processes import NodeProcess
from tests.server.peer_world import WAIT_MS, Here
from tests.server.talk import HASHES, connected, deadline, opened, save

pytestmark = pytest.mark.slow

CLOCK = SystemClock()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[NodeProcess]:
    settings = {
        "name": "a",
        "socket": str(tmp_path / "a.sock"),
        "tcp": "127.0.0.1:0",
        "http": "none",
        "capacity": "8MiB",
    }
    with NodeProcess(settings, tmp_path / "a.log") as process:
        fill(process)
        yield process


@pytest.fixture
def here(peer: NodeProcess, tmp_path: Path) -> Iterator[Here]:
    """A node that knows what the peer holds: by a path that stays the same when the peer is started again."""
    with ExitStack() as stack:
        node = Here(tmp_path, "b", stack, peers=peer.socket, peer_wait_ms=400)
        node.until_known(8)
        yield node


def fill(process: NodeProcess) -> None:
    with connected(process.socket) as channel:
        assert save(channel, opened(channel), HASHES[:8]) == 8


def test_a_peer_that_was_stopped_is_a_miss_in_time_and_is_asked_again_when_it_wakes(
    peer: NodeProcess, here: Here
) -> None:
    here.until(lambda: here.load(HASHES[:2]) == 2, "they come, at once unless the machine stands still")
    late = here.stat("peer_failed_fetches:late")
    peer.pause()
    began_ns = CLOCK.now_ns()
    assert here.load(HASHES[:8]) == 2
    assert CLOCK.now_ns() - began_ns < WAIT_MS * NS_PER_MS // 2
    assert here.stat("peer_failed_fetches:late") == late + 1
    here.until_quiet()
    here.until(lambda: here.stat("peers:lost") == 1, "it is noticed that the peer says nothing")
    assert here.load(HASHES[:8]) == 2
    assert here.stat("peer_failed_fetches:late") == late + 1, "who is known to be lost is not waited for"
    peer.wake()
    here.until(lambda: here.load(HASHES[:8]) == 8, "all is well again")
    here.until_quiet()


def test_a_peer_that_is_killed_and_started_again_is_followed_and_asked_again(
    peer: NodeProcess, here: Here
) -> None:
    leased = here.lease(HASHES[:8], wait_ms=0)
    peer.kill()
    here.channel.call(wire.Release(leased.lease), deadline()) if leased.lease else None
    assert here.load(HASHES[:8]) in (0, 8), "whole, or not at all"
    here.until(lambda: here.stat("peers:lost") == 1, "it is noticed")
    here.until_quiet()
    held = here.holds(HASHES[:8])
    for block in reversed(HASHES[:held]):
        here.quarantine(block)
    peer.start()
    fill(peer)
    here.until(lambda: here.load(HASHES[:8]) == 8, "all is well again")
    assert here.troubles() == []
    here.until_quiet()
