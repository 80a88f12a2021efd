"""A node process whose NVMe device does not answer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.clock import NS_PER_S
from kvcache.testing.processes import NodeProcess
from kvcache.testing.stalls import Stalls
from tests.server.talk import HASHES, connected, deadline, opened, save

pytestmark = pytest.mark.slow

PATIENCE_S = 60
END_NS = 15 * NS_PER_S
"""Less than what a device that hangs is given for an answer."""


def children_of(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] + [
        int(text)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if task.name != str(pid)
        for text in (task / "children").read_text().split()
    ]


def test_a_node_that_is_told_to_end_does_not_wait_for_a_device_that_hangs(tmp_path: Path) -> None:
    settings = {
        "socket": str(tmp_path / "node.sock"),
        "http": "none",
        "capacity": "8MiB",
        "nvme": f"{tmp_path / 'tier'}:32MiB",
    }
    stopped: list[int] = []
    with NodeProcess(settings, tmp_path / "node.log") as node:
        stopped = children_of(node.pid)
        try:
            assert stopped, "its index is a process of its own"
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            with connected(node.socket) as channel:
                namespace = opened(channel)
                assert save(channel, namespace, HASHES[:8]) == 8
                reply = channel.call(wire.Persist(namespace, b"".join(HASHES[:8]), 100), deadline())
                assert reply == wire.Matched(0)
            assert node._process is not None
            with Stalls() as stalls:
                began_ns = stalls.awake_ns()
                node.signal(signal.SIGTERM)
                assert node._process.wait(PATIENCE_S) == 0
                assert stalls.awake_ns() - began_ns < END_NS
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGKILL)
    assert "does not answer" in (tmp_path / "node.log").read_text()
