"""A node whose disks fail under load: it says so, memory serves on, and all is back when they work again.

The calls of the running node, of every thread and of the processes that hold its indexes, are made to
fail from outside; then they are let alone. Nothing is restarted in between.

The sum: a case is a node, a second of faults, and up to 5 s until the node has tried its devices again.
"""

from __future__ import annotations

import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.testing.processes import NodeProcess
from kvcache.wire import PROTOCOL_VERSION, Hello, Stats, StatsReply
from tests.faults.clients import LATE_MS, PROMPT_BLOCKS, PROMPTS, SPECS, Book, Client, client, load_on
from tests.faults.nursery import children_of
from tests.faults.tracer import attached

PATIENCE_S = 40.0
PAUSE_S = 0.05
SLOW_LATE_MS = "1000"
LAST = (1, PROMPTS)
"""A prompt that nobody else saves."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]

CASES = {
    "a write fails": ("pwritev2", "error=EIO", "fenced"),
    "no space": ("pwritev2", "error=ENOSPC", "read_only"),
    "read-only": ("pwritev2", "error=EROFS", "read_only"),
    "no quota": ("pwritev2", "error=EDQUOT", "read_only"),
    "a sync fails": ("fdatasync", "error=EIO", "fenced"),
    "the index fails": ("pwrite64", "error=EIO", "fenced"),
    "a read fails": ("preadv2", "error=EIO", "fenced"),
    "a read is slow": ("preadv2", "delay_enter=2500000", "fenced"),
}


def asked(address: str) -> StatsReply:
    deadline_ns = SystemClock().now_ns() + int(PATIENCE_S) * NS_PER_S
    channel = BlockingChannel.connect(address, Hello(PROTOCOL_VERSION), deadline_ns)
    try:
        reply = channel.call(Stats(), deadline_ns)
    finally:
        channel.close()
    assert isinstance(reply, StatsReply)
    return reply


def until(node: NodeProcess, condition: Callable[[StatsReply], bool], what: str) -> None:
    never, deadline = threading.Event(), time.monotonic() + PATIENCE_S
    while not condition(reply := asked(node.socket)):
        assert time.monotonic() < deadline, f"never: {what}: {reply}"
        never.wait(PAUSE_S)


def page(node: NodeProcess, path: str) -> str:
    try:
        with urllib.request.urlopen(f"{node.http}{path}", timeout=PATIENCE_S) as answer:
            return str(answer.read(), "utf-8")
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


def fill(made: Client, book: Book) -> None:
    """Half of the prompts, durably: the others are for the time of the faults."""
    for space in range(len(SPECS)):
        for number in range(0, PROMPTS, 2):
            made.save((space, number), PROMPT_BLOCKS)
            made.persist((space, number), PROMPT_BLOCKS)
    assert sum(book.durable.values()) == len(SPECS) * PROMPT_BLOCKS * PROMPTS // 2


@pytest.mark.parametrize("case", CASES)
def test_a_node_whose_disks_fail(scratch: Path, case: str) -> None:
    call, what, state = CASES[case]
    book, log = Book(), scratch / "node.log"
    settings = {
        "socket": str(scratch / "node.sock"),
        "http": "127.0.0.1:0",
        "capacity": "3MiB",
        "nvme": f"{scratch / 'one'}:16MiB,{scratch / 'two'}:16MiB",
        "nvme_segment": "1MiB",
        "nvme_late_ms": SLOW_LATE_MS if what.startswith("delay") else LATE_MS,
    }
    with NodeProcess(settings, log) as node:
        with client(node.socket, book) as made:
            fill(made, book)
            assert asked(node.socket).troubles == []
            with attached([node.pid, *children_of(node.pid)], call, what, "1+1"):
                with load_on(node.socket, book, 1):
                    name = f"nvme_devices:{state}"
                    until(node, lambda reply: reply.values[name] > 0, f"a device is {state}")
                assert_told(node, state, log)
                assert made.save(LAST, 4) == 4
                assert made.load(LAST, 4, 0) == 4, "memory serves on"
            until(node, lambda reply: not reply.troubles, "the devices work again")
            assert not made.look()
        node.kill()
        node.start()
        with client(node.socket, book) as made:
            assert not made.look()
    assert not book.wrong
    assert "Traceback" not in log.read_text()


def assert_told(node: NodeProcess, state: str, log: Path) -> None:
    """In plain words, everywhere."""
    trouble = asked(node.socket).troubles[0]
    assert "the NVMe directory" in trouble
    told(node, "/readyz", r"the NVMe directory \S+ (is not used|takes no new blocks)")
    told(node, "/metrics", rf'kvcache_nvme_devices{{state="{state}"}} [12]')
    assert re.search(r"kvcache\.nvme: \S+: (fenced|no more writes): ", log.read_text())


def told(node: NodeProcess, path: str, pattern: str) -> None:
    """Pages are made from what the node said a moment ago."""
    never, deadline = threading.Event(), time.monotonic() + PATIENCE_S
    while not re.search(pattern, text := page(node, path)):
        assert time.monotonic() < deadline, f"{pattern} is not in {text}"
        never.wait(PAUSE_S)
