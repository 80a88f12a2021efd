"""Stores and nodes as processes that are killed, stopped, woken and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvcache.block import BlockHash
from kvcache.channel import BlockingChannel
from kvcache.client.blocking_store import BlockingNodeStore
from kvcache.client.store import BlockingStore, Handle
from kvcache.clock import NS_PER_MS, NS_PER_S, SystemClock
from kvcache.testing.processes import NodeProcess
from kvcache.testing.stores import EXAMPLE, SIZE, SPEC, content, prompt, room, whole
from kvcache.wire import PROTOCOL_VERSION, Hello, Stats, StatsReply
from tests.client.conftest import PATIENCE_S, TIMEOUT_MS, eventually, impatient, options

pytestmark = pytest.mark.slow

CAPACITY_BLOCKS = 2 * (1 << 20) // SIZE

# A client that leases one prompt, and stands still with another reserved, before its copy. Told to go
# on, it copies and commits..
CLIENT = """
import sys
from kvcache.client import connect_blocking, local
from kvcache.testing.stores import *

def held(sources, targets, chunk_bytes, copy=local.copy_and_sum):
    say("copying")
    sys.stdin.readline()
    return copy(sources, targets, chunk_bytes)

def say(text):
    sys.stdout.write(f"{text}\\n")
    sys.stdout.flush()

local.copy_and_sum = held
store = connect_blocking(sys.argv[1], timeout_ms=20_000)
handle = store.open(EXAMPLE, SPEC)
assert store.lease(handle, prompt(handle, 4, 1)).count == 4
mine = prompt(handle, int(sys.argv[2]), 2)
say(store.save(handle, mine, whole(content(handle, mine))))
sys.stdin.readline()
"""


def node_at(tmp_path: Path, tcp: str) -> NodeProcess:
    capacity = f"{CAPACITY_BLOCKS * SIZE}B"
    settings = {"socket": str(tmp_path / "node.sock"), "tcp": tcp, "http": "none", "capacity": capacity}
    return NodeProcess(settings, tmp_path / "node.log")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    with node_at(tmp_path, "127.0.0.1:0") as process:
        yield process


@contextmanager
def connected(address: str) -> Iterator[tuple[BlockingNodeStore, Handle]]:
    store = BlockingNodeStore(options(address, mapped=True), SystemClock())
    try:
        yield store, store.open(EXAMPLE, SPEC)
    finally:
        store.close()


@contextmanager
def client(node: NodeProcess, block_count: int) -> Iterator[subprocess.Popen[str]]:
    """The client above, at its copy: all but the leased blocks are reserved when it asks for so many."""
    command = [sys.executable, "-c", CLIENT, node.socket, str(block_count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "copying\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def node_stats(node: NodeProcess) -> dict[str, float]:
    deadline_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
    channel = BlockingChannel.connect(node.socket, Hello(PROTOCOL_VERSION), deadline_ns)
    reply = channel.call(Stats(), deadline_ns)
    channel.close()
    assert isinstance(reply, StatsReply)
    return reply.values


def saved(store: BlockingStore, handle: Handle, prefix: list[BlockHash]) -> int:
    return store.save(handle, prefix, whole(content(handle, prefix)))


def loaded(store: BlockingStore, handle: Handle, prefix: list[BlockHash]) -> int:
    """How many blocks came; those that came are right."""
    lease = store.lease(handle, prefix)
    into = room(lease.count)
    failed = store.load(lease, whole(into))
    store.release(lease)
    expected = content(handle, prefix)
    assert all(into[at] == expected[at] for at in range(lease.count) if at not in failed)
    return lease.count - len(failed)


def took_ms(began_ns: int) -> int:
    return (SystemClock().now_ns() - began_ns) // NS_PER_MS


@pytest.mark.parametrize("path", ["unix", "tcp"])
def test_a_stopped_node_costs_one_deadline_then_nothing_and_is_found_again(
    node: NodeProcess, path: str
) -> None:
    address = node.socket if path == "unix" else node.tcp
    with connected(address) as (store, handle):
        prefix = prompt(handle, 4)
        assert saved(store, handle, prefix) == 4
        lease = store.lease(handle, prefix)
        node.pause()
        with impatient(store, 300):
            began_ns = SystemClock().now_ns()
            assert store.match(handle, prefix) == 0
            assert 300 <= took_ms(began_ns) < TIMEOUT_MS
            assert store.counters["ended:deadline"] == 1
            began_ns = SystemClock().now_ns()
            for _ in range(100):
                assert store.match(handle, prefix) == 0
                assert store.lease(handle, prefix).count == 0
                assert len(store.load(lease, whole(room(4)))) == 4
            assert took_ms(began_ns) < 100 * 300, "most miss at once, a few look whether it is back"
        node.wake()
        eventually(lambda: loaded(store, handle, prefix) == 4)
        assert store.counters["connects"] == 2
        store.release(lease)
    eventually(lambda: node_stats(node)["leases"] == 0)


@pytest.mark.parametrize("path", ["unix", "tcp"])
def test_a_store_outlives_its_node(node: NodeProcess, tmp_path: Path, path: str) -> None:
    with connected(node.socket if path == "unix" else node.tcp) as (store, handle):
        prefix = prompt(handle, 4)
        assert saved(store, handle, prefix) == 4
        lease = store.lease(handle, prefix)
        node.kill()
        assert store.match(handle, prefix) == 0
        assert saved(store, handle, prefix) == 0
        assert len(store.load(lease, whole(room(4)))) == 4
        with node_at(tmp_path, node.tcp.removeprefix("tcp://")):
            eventually(lambda: saved(store, handle, prefix) == 4)
            assert loaded(store, handle, prefix) == 4, "the namespace was opened again by itself"
            assert len(store.load(lease, whole(room(4)))) == 4, "a lease of the old node is none of the new"
            assert store.counters["failed_blocks:lease_lost"] == 4
            store.release(lease)


def test_a_killed_client_leaks_neither_slots_nor_leases(node: NodeProcess) -> None:
    with connected(node.socket) as (store, handle):
        assert saved(store, handle, prompt(handle, 4, 1)) == 4
        with client(node, CAPACITY_BLOCKS - 4) as process:
            assert node_stats(node)["leases"] == 1
            assert saved(store, handle, prompt(handle, 1, 3)) == 0, "every slot is leased or reserved"
            process.kill()
            process.wait()
        eventually(lambda: node_stats(node)["leases"] == 0)
        eventually(lambda: node_stats(node)["reservations"] == 0)
        eventually(lambda: saved(store, handle, prompt(handle, CAPACITY_BLOCKS, 3)) == CAPACITY_BLOCKS)
        assert loaded(store, handle, prompt(handle, CAPACITY_BLOCKS, 3)) == CAPACITY_BLOCKS


def test_a_stopped_client_that_wakes_late_harms_nothing(node: NodeProcess) -> None:
    count = CAPACITY_BLOCKS - 4
    with connected(node.socket) as (store, handle):
        assert saved(store, handle, prompt(handle, 4, 1)) == 4
        with client(node, count) as process:
            process.send_signal(signal.SIGSTOP)
            assert saved(store, handle, prompt(handle, 1, 3)) == 0, "its slots are not given to others"
            process.send_signal(signal.SIGCONT)
            written, _ = process.communicate("\n\n", timeout=PATIENCE_S)
            assert int(written) == count, "nobody took what was its own"
        assert loaded(store, handle, prompt(handle, count, 2)) == count
        eventually(lambda: node_stats(node)["leases"] == 0)
        assert saved(store, handle, prompt(handle, 8, 3)) == 8


def test_a_client_whose_node_was_restarted_under_its_copy_writes_nowhere(node: NodeProcess) -> None:
    with connected(node.socket) as (store, handle):
        assert saved(store, handle, prompt(handle, 4, 1)) == 4
        with client(node, CAPACITY_BLOCKS - 4) as process:
            node.kill()
            node.start()
            mine = prompt(handle, CAPACITY_BLOCKS, 3)
            eventually(lambda: saved(store, handle, mine) == CAPACITY_BLOCKS)
            written, _ = process.communicate("\n\n", timeout=PATIENCE_S)
            assert int(written) == 0
            assert process.returncode == 0
            assert loaded(store, handle, mine) == CAPACITY_BLOCKS
