"""A node and its clients as processes that are killed, stopped and woken."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.errors import BadInput, Unavailable
from kvcache.testing.processes import NodeProcess
from tests.server.talk import (
    HASHES,
    SIZE,
    connected,
    content,
    deadline,
    held,
    opened,
    reserve,
    save,
    stats,
    sums_of,
)

pytestmark = pytest.mark.slow

PATIENCE_S = 20
CAPACITY_BLOCKS = 8 * (1 << 20) // SIZE
NAMES = [bytes([number % 251, number // 251, 255, 255]) * 4 for number in range(1, CAPACITY_BLOCKS + 1)]

# A client that takes every slot of the node, says so, and then waits to be killed or told to go on.
WRITER = """
import mmap, sys
from tests.server.talk import *
from tests.server.test_processes import NAMES
with connected(sys.argv[1], map=True) as channel:
    reserved = reserve(channel, opened(channel), NAMES)
    slab = mmap.mmap(channel.slab_fd, channel.welcome.slab_bytes)
    sys.stdout.write(f"{reserved.count}\\n")
    sys.stdout.flush()
    sys.stdin.readline()
    for offset in reserved.offsets:
        slab[offset : offset + SIZE] = b"late" * (SIZE // 4)
    sys.stdout.write("written\\n")
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    settings = {"socket": str(tmp_path / "node.sock"), "http": "none", "capacity": "8MiB"}
    with NodeProcess(settings, tmp_path / "node.log") as process:
        yield process


@pytest.fixture
def writer(node: NodeProcess) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, node.socket]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == f"{CAPACITY_BLOCKS}\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def eventually(channel: BlockingChannel, name: str, value: float) -> None:
    """Ask until the node's stat has this value; the node's answer is the only clock."""
    end_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
    while (found := stats(channel).get(name)) != value:
        assert SystemClock().now_ns() < end_ns, f"{name} stays {found}, not {value}"


def test_a_killed_writer_leaks_no_slot(node: NodeProcess, writer: subprocess.Popen[str]) -> None:
    with connected(node.socket, map=True) as channel:
        namespace = opened(channel)
        assert reserve(channel, namespace, HASHES[:1]).reason == "full"
        writer.kill()
        writer.wait()
        eventually(channel, "reservations", 0)
        eventually(channel, "limbo_blocks", 0)
        assert save(channel, namespace, HASHES[:4]) == 4


def test_a_stopped_writer_that_wakes_late_harms_nothing(
    node: NodeProcess, writer: subprocess.Popen[str]
) -> None:
    writer.send_signal(signal.SIGSTOP)
    with connected(node.socket, map=True) as channel:
        namespace = opened(channel)
        assert reserve(channel, namespace, HASHES[:1]).reason == "full", "it may still be copying"
        assert held(channel, namespace, NAMES) == 0
        writer.send_signal(signal.SIGCONT)
        written, _ = writer.communicate("\n", timeout=PATIENCE_S)
        assert written == "written\n"
        eventually(channel, "limbo_blocks", 0)
        eventually(channel, "reservations", 0)
        assert held(channel, namespace, NAMES) == 0, "never committed, never seen"
        assert save(channel, namespace, HASHES[:4]) == 4


def test_a_killed_node_leaves_its_clients_memory_alone(node: NodeProcess) -> None:
    with connected(node.socket, map=True) as channel:
        assert channel.slab_fd is not None
        reserved = reserve(channel, opened(channel), HASHES[:1])
        offset = reserved.offsets[0]
        with mmap.mmap(channel.slab_fd, channel.welcome.slab_bytes) as slab:
            slab[offset : offset + SIZE] = content(HASHES[0])
            node.kill()
            assert slab[offset : offset + SIZE] == content(HASHES[0])
            with pytest.raises(Unavailable):
                channel.call(wire.Commit(reserved.reservation, sums_of(HASHES[0])), deadline())


def test_a_killed_node_can_be_started_again_on_its_socket(node: NodeProcess) -> None:
    with connected(node.socket) as channel:
        before = channel.welcome.incarnation
        save(channel, opened(channel), HASHES[:2])
    node.kill()
    node.start()
    with connected(node.socket) as channel:
        assert channel.welcome.incarnation > before
        assert held(channel, opened(channel), HASHES[:2]) == 0, "host memory does not outlive its node"


def test_asked_to_end_it_takes_its_socket_along(node: NodeProcess) -> None:
    path = Path(node.socket.removeprefix("unix://"))
    assert path.exists()
    node.close()
    assert not path.exists()


def test_a_second_node_on_the_socket_says_so_and_leaves(node: NodeProcess) -> None:
    command = [sys.executable, "-m", "kvcache", "serve", "--http", "none", "--capacity", "1MiB"]
    command += ["--socket", node.socket.removeprefix("unix://")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "another node serves" in done.stderr
    assert "to do:" in done.stderr
    with connected(node.socket) as channel:
        stats(channel)


def test_a_stopped_node_answers_nothing_and_goes_on_when_woken(node: NodeProcess) -> None:
    with connected(node.socket) as channel:
        node.pause()
        with pytest.raises(Unavailable):
            channel.call(wire.Stats(), SystemClock().now_ns() + NS_PER_S // 10)
    node.wake()
    with connected(node.socket) as channel:
        stats(channel)


def test_settings_that_cannot_be_used_are_said_at_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvcache", "serve", "--capacity", "1XB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "capacity is '1XB'" in done.stderr
    environment = {**os.environ, "KVCACHE_CAPACTY": "1GiB"}
    command = [sys.executable, "-m", "kvcache", "serve"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert done.returncode == 1
    assert "did you mean 'capacity'?" in done.stderr


def test_a_writer_cannot_commit_after_it_was_cut_off(node: NodeProcess) -> None:
    with connected(node.socket, map=True) as first, connected(node.socket, map=True) as second:
        namespace = opened(first)
        reserved = reserve(first, namespace, HASHES[:1])
        with pytest.raises(BadInput, match="bad_reservation"):
            second.call(wire.Commit(reserved.reservation, sums_of(HASHES[0])), deadline())
        assert held(second, opened(second), HASHES[:1]) == 0
