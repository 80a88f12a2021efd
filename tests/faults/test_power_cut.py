"""Power cuts: the disk keeps what was synced, the machine comes up again and the next process goes on.

The writers are stopped, the disk is copied, they are killed, and the copy is mounted in place of the disk:
what the page cache held back is gone. Half of the cuts are with direct I/O and half without, as direct
writes are on the disk at once here, whether they were synced or not. So what a missing fdatasync would do
shows without direct I/O only, and it is seen to: with the sabotage below, blocks are refused.

The sum: a cut is a copy, a mount, a start of the device's two processes and a look at some 200 blocks:
half a second.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvcache.testing.processes import NodeProcess
from tests.faults.clients import LATE_MS, Book, client, load_on, until_persisted
from tests.faults.disk import Disk, mounted
from tests.faults.nursery import Child, Nursery, children_of, wait_until_stopped
from tests.faults.test_kill import MOMENT_S, look, wait_for_work
from tests.faults.work import Job, Record

CUTS = 50
CUTS_OF_A_TRIAL = 10
WORK_LINES = (25, 200)
"""It tells so many of its work, 20 to 150 ms, however slow the machine."""
NODE_CUTS = 12
PERSISTED = 10
"""Blocks a cut, on the average."""
NODE_IMAGE_BYTES = 48 << 20
"""Its devices have room for all, so nothing is evicted."""
NODE_WORK_S = (0.05, 0.3)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]


def cut(disk: Disk, child: Child) -> None:
    child.stop_all()
    disk.copy()
    children = child.children()
    child.kill_all()
    assert child.end() == -signal.SIGKILL
    wait_for_ends(children)
    disk.lose_power()


def wait_for_ends(pids: Sequence[int]) -> None:
    """Of processes that were killed, and are not ours."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
            os.close(descriptor)


def cuts(nursery: Nursery, folder: Path, count: int, direct: str, *, unsynced: bool = False) -> Record:
    """So many power cuts, one after another on one disk, and what came of them."""
    way = random.Random(count)
    record = Record(folder / "record", durable_only=True)
    with mounted(folder) as disk:
        tier = disk.path / "tier"
        for seed in range(count):
            told_bytes = record.path.stat().st_size
            job = Job(str(tier), str(record.path), seed, direct=direct, lazy=True, unsynced=unsynced)
            child = nursery.start(job)
            ended = not wait_for_work(child, record.path, told_bytes, way.randint(*WORK_LINES))
            assert not ended and not child.ends_within(way.uniform(0, MOMENT_S)), child.said()
            cut(disk, child)
            record.read()
            if record.problems and not unsynced:
                break
        look(nursery, tier, record)
    return record


@pytest.mark.parametrize("direct", ["on", "off"])
def test_what_was_durable_is_there_and_right(
    nursery: Nursery, scratch: Path, factor: int, direct: str
) -> None:
    record = cuts(nursery, scratch, CUTS * factor, direct)
    assert not record.problems
    assert record.wrong == 0
    assert record.looks == CUTS * factor + 1
    assert record.checked > 20 * record.looks


def test_with_the_sync_none_is_refused(nursery: Nursery, scratch: Path) -> None:
    """A few cuts like those of the sabotage, without it: what is refused there is so for that alone."""
    record = cuts(nursery, scratch, CUTS_OF_A_TRIAL, "off")
    assert not record.problems
    assert record.checked > 20 * record.looks


def test_without_the_sync_blocks_are_refused_and_none_is_wrong(nursery: Nursery, scratch: Path) -> None:
    """The sabotage: were this green without its first line, the cuts above would prove nothing."""
    record = cuts(nursery, scratch, CUTS_OF_A_TRIAL, "off", unsynced=True)
    assert record.refused > CUTS_OF_A_TRIAL
    assert all("refused" in problem or "gone" in problem for problem in record.problems)
    assert record.wrong == 0


def test_what_a_node_said_was_durable_is_served(scratch: Path, factor: int) -> None:
    """Other blocks than the client asked for are written all the while, and nobody asks for those."""
    way = random.Random(17)
    book, log = Book(), scratch / "node.log"
    never = threading.Event()
    with mounted(scratch, NODE_IMAGE_BYTES) as disk:
        for seed in range(NODE_CUTS * factor):
            settings = {
                "socket": str(scratch / "node.sock"),
                "http": "none",
                "capacity": "3MiB",
                "nvme": f"{disk.path / 'one'}:12MiB,{disk.path / 'two'}:12MiB",
                "nvme_segment": "1MiB",
                "nvme_write": way.choice(("through", "back", "evict")),
                "nvme_back_ms": "20",
                "nvme_late_ms": LATE_MS,
                "nvme_direct": way.choice(("on", "off")),
            }
            with NodeProcess(settings, log) as node:
                with client(node.socket, book) as looking:
                    missing = looking.look()
                assert not missing, f"cut {seed}: {missing}\n{log.read_text()[-3_000:]}"
                with load_on(node.socket, book, seed):
                    until_persisted(book, PERSISTED * (seed + 1))
                    never.wait(way.uniform(*NODE_WORK_S))
                    node.pause()
                    children = children_of(node.pid)
                    for pid in children:
                        os.kill(pid, signal.SIGSTOP)
                    wait_until_stopped([node.pid, *children])
                    durable = dict(book.durable)
                    disk.copy()
                    for pid in children:
                        os.kill(pid, signal.SIGKILL)
                    node.kill()
                wait_for_ends(children)
            book.durable = durable
            disk.lose_power()
    assert not book.wrong
    assert book.persisted > PERSISTED * NODE_CUTS
    assert "Traceback" not in log.read_text()


def test_the_disk_loses_what_was_not_synced_and_only_that(scratch: Path) -> None:
    with mounted(scratch) as disk:
        before, synced, unsynced, over = (
            disk.path / name for name in ("before", "synced", "unsynced", "over")
        )
        write(before, b"a" * 8_192, sync=True)
        write(over, b"a" * 8_192, sync=True)
        write(unsynced, b"b" * 8_192, sync=False)
        write(over, b"b" * 8_192, sync=False)
        write(synced, b"b" * 8_192, sync=True)
        disk.copy()
        disk.lose_power()
        assert before.read_bytes() == over.read_bytes() == b"a" * 8_192
        assert synced.read_bytes() == b"b" * 8_192
        assert not unsynced.exists() or not unsynced.read_bytes().strip(b"\0")


def write(path: Path, content: bytes, *, sync: bool) -> None:
    """Over what is there, in place."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(descriptor, content, 0)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
