"""System calls that fail, one kind with one error at a time, at every few calls of a working writer.

A device reports trouble and goes on; nothing crashes, nothing hangs, and what was acknowledged is there
when the same directory is opened by a process that is left alone. Where a call says that it did what it
did not, blocks may be lost, and still none may be wrong.

The sum: a run is a start of the device's two processes under a tracer and 30 steps, and an untraced look
behind it: half a second.
"""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.nursery import Nursery
from tests.faults.test_kill import look
from tests.faults.tracer import run_traced
from tests.faults.work import Job, Record

WRITES = ("pwritev2", "pwrite64", "writev", "fdatasync", "fsync", "fallocate")
NAMES = ("openat", "rename", "unlink", "mkdir", "rmdir")
READS = ("preadv2", "pread64", "newfstatat", "statfs", "getdents64")
PROCESSES = ("vfork", "execve", "sendto", "recvfrom", "flock")
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")
TOLD = ("pwritev2", "fdatasync", "fallocate")
"""Of these the device must report the very error."""
STEPS = 30
KILLS = 24

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]


def cases(factor: int) -> Iterator[tuple[str, str, str]]:
    """Call, error, when. An error that a call never gives in life must be survived as well."""
    way = random.Random(3)
    for _ in range(factor):
        for call in WRITES:
            for error in (*ERRORS, "EINTR"):
                yield call, error, f"{way.randint(1, 12)}+{way.randint(5, 12)}"
        for call in NAMES:
            for error in way.sample(ERRORS, 2):
                yield call, error, f"{way.randint(1, 6)}+{way.randint(3, 8)}"
        for call in (*READS, *PROCESSES):
            yield call, way.choice(("EIO", "ENOMEM", "EMFILE")), f"{way.randint(1, 12)}+{way.randint(5, 12)}"


def errors_told(record: Path, after_bytes: int) -> set[str]:
    with record.open("rb") as file:
        file.seek(after_bytes)
        words = [line.split(maxsplit=2) for line in file.read().decode().splitlines()]
    return {errno.errorcode[int(each[1])] for each in words if each[0] == "f"}


def test_nothing_is_lost_or_wrong(nursery: Nursery, scratch: Path, factor: int) -> None:
    record = Record(scratch / "record", durable_only=False)
    tampered = 0
    for seed, (call, error, when) in enumerate(cases(factor)):
        case = f"{call} {error} when={when}"
        told_bytes = record.path.stat().st_size
        job = Job(str(scratch / "tier"), str(record.path), seed, steps=STEPS, waits=True)
        child = nursery.start(job)
        status, count = run_traced(child, scratch / "trace", call, f"error={error}", when)
        assert status == 0, f"{case}: {status}: {child.said()}"
        tampered += count
        if call in TOLD and error in ERRORS and count:
            assert error in errors_told(record.path, told_bytes), case
        look(nursery, scratch / "tier", record)
        assert not record.problems, f"{case}: {record.problems}"
    assert tampered > 200
    assert record.faults > 100
    assert record.stored > 1_000


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("pwritev2", "retval=0"),
        ("pwritev2", "retval=4096"),
        ("pwritev2", "retval=12288"),
        ("pwritev2", "retval=1048576"),
        ("pwrite64", "retval=0"),
        ("pwrite64", "retval=4096"),
        ("writev", "retval=8192"),
        ("fdatasync", "retval=0"),
        ("fallocate", "retval=0"),
        ("rename", "retval=0"),
        ("unlink", "retval=0"),
        ("preadv2", "retval=0"),
        ("preadv2", "retval=4096"),
        ("preadv2", "retval=20480"),
        ("preadv2", "retval=69632"),
        ("pread64", "retval=4096"),
    ],
)
def test_a_call_that_lies_makes_nothing_wrong(
    nursery: Nursery, scratch: Path, factor: int, call: str, what: str
) -> None:
    """It gives a length and has done nothing: what was in the file or in memory before is there still."""
    way = random.Random(5)
    record = Record(scratch / "record", durable_only=False, lies=True)
    for seed in range(factor):
        job = Job(str(scratch / "tier"), str(record.path), seed, steps=2 * STEPS, waits=True)
        child = nursery.start(job)
        when = f"{way.randint(1, 40)}+{way.randint(3, 8)}"
        status, _ = run_traced(child, scratch / "trace", call, what, when)
        assert status == 0, f"{when}: {child.said()}"
        look(nursery, scratch / "tier", record)
        assert not record.problems, when


def test_killed_at_a_call(nursery: Nursery, scratch: Path, factor: int) -> None:
    """At the N-th call of a kind, not at a moment: in the order of a write there is a place for each."""
    way = random.Random(7)
    record = Record(scratch / "record", durable_only=False)
    killed = 0
    for seed in range(KILLS * factor):
        call = way.choice(("pwritev2", "fdatasync", "pwrite64", "sendto", "fsync", "rename"))
        job = Job(str(scratch / "tier"), str(record.path), seed, steps=STEPS, waits=True)
        child = nursery.start(job)
        when = str(way.randint(1, 30))
        status, _ = run_traced(child, scratch / "trace", call, "signal=KILL", when)
        assert status in (0, -signal.SIGKILL), child.said()
        killed += status != 0
        look(nursery, scratch / "tier", record)
        assert not record.problems, f"{call} {when}: {record.problems}"
    assert killed > KILLS / 4
