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
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.nursery import Nursery
from tests.faults.test_kill import look
from tests.faults.tracer import run_traced
from tests.faults.work import Job, Record

OFTEN = ("pwritev2", "pwrite64", "writev", "fdatasync", "openat", "preadv2", "sendto", "recvfrom")
SELDOM = ("fallocate", "fsync", "rename", "unlink", "mkdir", "newfstatat", "statfs", "getdents64", "flock")
"""Mostly while a directory is new, so these have one of their own each time."""
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EINTR")
WRITES = ("pwritev2", "pwrite64", "writev", "fdatasync", "fallocate", "fsync")
TOLD = ("pwritev2", "fdatasync", "fallocate", "fsync")
"""Of these the device must report the very error."""
STEPS = 24
KILLS = 24

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]


def cases(factor: int) -> Iterator[tuple[str, str, str]]:
    """Call, error, when. An error that a call never gives in life must be survived as well."""
    way = random.Random(3)
    for _ in range(factor):
        for call in OFTEN:
            for error in ERRORS if call in WRITES else way.sample(ERRORS, 2):
                yield call, error, f"{way.randint(1, 12)}+{way.randint(5, 12)}"
        for call in SELDOM:
            for error in ERRORS[:4] if call in WRITES else way.sample(ERRORS, 2):
                yield call, error, f"{way.randint(1, 6)}+{way.randint(2, 6)}"


def errors_told(record: Path, after_bytes: int) -> set[str]:
    with record.open("rb") as file:
        file.seek(after_bytes)
        words = [line.split(maxsplit=2) for line in file.read().decode().splitlines()]
    return {errno.errorcode[int(each[1])] for each in words if each[0] == "f"}


def test_nothing_is_lost_or_wrong(nursery: Nursery, scratch: Path, factor: int) -> None:
    tampered: Counter[str] = Counter()
    common = Record(scratch / "record", durable_only=False)
    for seed, (call, error, when) in enumerate(cases(factor)):
        case = f"{call} {error} when={when}"
        fresh = call in SELDOM
        record = Record(scratch / f"record-{seed}", durable_only=False) if fresh else common
        tier = scratch / (f"tier-{seed}" if fresh else "tier")
        told_bytes = record.path.stat().st_size
        child = nursery.start(Job(str(tier), str(record.path), seed, steps=STEPS, waits=True))
        status, count = run_traced(child, scratch / "trace", call, f"error={error}", when)
        assert status == 0, f"{case}: {status}: {child.said()}"
        tampered[call] += count
        if call in TOLD and error != "EINTR" and count:
            assert error in errors_told(record.path, told_bytes), case
        look(nursery, tier, record)
        assert not record.problems, f"{case}: {record.problems}"
        if fresh:
            shutil.rmtree(tier)
    assert not {*OFTEN, *SELDOM} - tampered.keys()
    assert tampered.total() > 200
    assert common.faults > 100
    assert common.stored > 500


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
        ("getdents64", "retval=0"),
    ],
)
def test_a_call_that_lies_makes_nothing_wrong(
    nursery: Nursery, scratch: Path, factor: int, call: str, what: str
) -> None:
    """It gives a length and has done nothing: what was in the file or in memory before is there still."""
    way = random.Random(5)
    tampered = 0
    for seed in range(factor):
        tier = scratch / f"tier-{seed}"
        record = Record(scratch / f"record-{seed}", durable_only=False, lies=True)
        if call in OFTEN:
            filler = nursery.start(Job(str(tier), str(record.path), seed, steps=STEPS))
            assert filler.end() == 0, filler.said()
        child = nursery.start(Job(str(tier), str(record.path), seed, steps=STEPS, waits=True))
        when = f"{way.randint(1, 6)}+{way.randint(3, 8)}"
        status, count = run_traced(child, scratch / "trace", call, what, when)
        assert status == 0, f"{when}: {child.said()}"
        tampered += count
        look(nursery, tier, record)
        assert not record.problems, when
        shutil.rmtree(tier)
    assert tampered


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
