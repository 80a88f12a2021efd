"""A node and engines as processes: they share HBM, and any of them is killed in the middle."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.testing.processes import NodeProcess
from tests.device.hbm_rig import HBM, HBM_BLOCKS, PATIENCE_S
from tests.server.talk import connected, deadline

pytestmark = pytest.mark.slow
READY_S = 60


class EngineProcess:
    def __init__(self, address: str, name: str) -> None:
        command = [sys.executable, "-m", "tests.device.hbm_process", address, name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(READY_S), "no answer"
        return self.process.stdout.readline().strip()

    def do(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def engine(node: NodeProcess, name: str) -> Iterator[EngineProcess]:
    made = EngineProcess(node.socket, name)
    try:
        assert made.answer() == "ready"
        yield made
    finally:
        made.kill()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    settings = {
        "socket": str(tmp_path / "node.sock"),
        "http": "none",
        "capacity": "1MiB",
        "hbm": HBM,
        "hbm-device": "cpu",
    }
    with NodeProcess(settings, tmp_path / "node.log") as process:
        yield process


def stats(node: NodeProcess) -> dict[str, float]:
    with connected(node.socket) as channel:
        reply = channel.call(wire.Stats(), deadline())
    assert isinstance(reply, wire.StatsReply)
    return reply.values


def until(node: NodeProcess, **expected: float) -> None:
    end_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
    while not expected.items() <= (now := stats(node)).items():
        shown = json.dumps({name: now.get(name) for name in expected})
        assert SystemClock().now_ns() < end_ns, f"it never came to hold: {shown}"


def test_one_saves_and_another_loads(node: NodeProcess) -> None:
    with engine(node, "a") as a, engine(node, "b") as b:
        assert a.do("save 20 0") == "20"
        assert b.do("load 20 0") == "20 [] 20"
        assert b.do("save 30 1") == "30"
        a.kill()
        assert b.do("load 20 0") == "20 [] 40", "its blocks outlive it"


def test_a_writer_that_is_killed_in_the_middle(node: NodeProcess) -> None:
    """Its slots are used again once it is dead, and what it had written by half is never found."""
    with engine(node, "a") as a, engine(node, "b") as b:
        assert a.do(f"stall-save {HBM_BLOCKS} 0") == "half"
        assert b.do("load 20 0") == "0 [] 0"
        assert b.do("save 20 1") == "20", "in host memory: all slots are its"
        assert stats(node)["blocks:host"] == 20
        a.kill()
        until(node, hbm_reservations=0.0, hbm_limbo_blocks=0.0)
        assert b.do("load 20 0") == "0 [] 0"
        assert b.do(f"save {HBM_BLOCKS} 1") == str(HBM_BLOCKS)
        assert b.do(f"load {HBM_BLOCKS} 1") == f"{HBM_BLOCKS} [] {HBM_BLOCKS}"


def test_a_reader_that_is_killed_in_the_middle(node: NodeProcess) -> None:
    with engine(node, "a") as a, engine(node, "b") as b:
        assert b.do(f"save {HBM_BLOCKS} 0") == str(HBM_BLOCKS)
        assert a.do(f"stall-load {HBM_BLOCKS} 0") == "half"
        assert stats(node)["hbm_leases"] == 1
        assert b.do("save 20 1") == "20", "in host memory: all are held"
        assert stats(node)["blocks:host"] == 20
        a.kill()
        until(node, hbm_leases=0.0)
        assert b.do("save 20 1") == "20"
        assert b.do("load 20 1") == "20 [] 20"


def test_the_node_is_killed_in_the_middle(node: NodeProcess) -> None:
    """Engines keep what they map, find nothing, and go on with the next node: its memory is another."""
    with engine(node, "a") as a, engine(node, "b") as b:
        assert a.do("save 20 0") == "20"
        assert b.do("stall-load 20 0") == "half"
        assert a.do("stall-save 20 1") == "half"
        node.kill()
        assert b.do("go on") == "[]", "verified, and the lease had not ended"
        assert a.do("go on") == "0"
        assert a.do("load 20 0") == "0 [] 0"
        node.start()
        again(a, "save 20 1", "20")
        assert b.do("load 20 0").startswith("0 []")
        again(b, "load 20 1", "20 [] 40")
        until(node, hbm_leases=0.0, hbm_reservations=0.0, hbm_limbo_blocks=0.0)


def again(process: EngineProcess, order: str, expected: str) -> None:
    """Until it is back: it tries every so often."""
    end_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
    while (said := process.do(order)) != expected:
        assert SystemClock().now_ns() < end_ns, f"it says {said}"
