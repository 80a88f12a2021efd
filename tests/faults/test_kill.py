"""kill -9, over and over, on one directory: each process looks at all that the ones before it left.

A killed process leaves the page cache as it is, so all that was stored has to be there, durable or not,
and no entry may name a slot that does not hold its block. What a power cut loses is tried elsewhere.

The sum: a round is a start of the device's two processes, a look at some 200 blocks and up to WORK_LINES of
work, 60 ms: a third of a second.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.faults.nursery import Child, Nursery
from tests.faults.work import Job, Record

ROUNDS = {"a-few": 40, "many": 200}
WORK_LINES = 80
"""It tells so many of its work, however slow the machine, and MOMENT_S more at most."""
MOMENT_S = 0.005
OPENING_S = 0.15
STEP_S = 0.002
READY_S = 30.0


def look(nursery: Nursery, tier: Path, record: Record) -> None:
    """All that is there, once more."""
    record.read()
    looks = record.looks
    child = nursery.start(Job(str(tier), str(record.path), 0, steps=-1))
    assert child.end() == 0, child.said()
    record.read()
    assert record.looks == looks + 1


def wait_for_work(child: Child, record: Path, after_bytes: int, lines: int = 0) -> bool:
    """Until it has looked at what is there, and told so many lines of its work. False: it ended before."""
    for _ in range(int(READY_S / STEP_S)):
        if child.ends_within(STEP_S):
            return False
        with record.open("rb") as file:
            file.seek(after_bytes)
            _, looked, work = (b"\n" + file.read()).partition(b"\nc")
        if looked and work.count(b"\n") > lines:
            return True
    raise AssertionError("it never came to work")


def one_round(nursery: Nursery, job: Job, way: random.Random) -> None:
    """Start a writer and kill it: while it opens the device, or while it works; now and then the process
    that holds its index goes first, or the two at once."""
    record = Path(job.record)
    told_bytes = record.stat().st_size
    child = nursery.start(job)
    if way.random() < 0.3:
        ended = child.ends_within(way.uniform(0, OPENING_S))
    else:
        ended = not wait_for_work(child, record, told_bytes, way.randint(0, WORK_LINES))
        if not ended and way.random() < 0.2:
            child.kill_index()
        ended = ended or child.ends_within(way.uniform(0, MOMENT_S))
    assert not ended, f"it ended with {child.end()}: {child.said()}"
    if way.random() < 0.2:
        child.kill_all()
    else:
        child.kill()
    assert child.end() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=ROUNDS)
def test_what_was_stored_is_there_and_right(
    nursery: Nursery, scratch: Path, factor: int, rounds: int
) -> None:
    way = random.Random(rounds)
    record = Record(scratch / "record", durable_only=False)
    for seed in range(rounds * factor):
        direct = way.choice(("auto", "off"))
        one_round(nursery, Job(str(scratch / "tier"), str(record.path), seed, direct=direct), way)
        record.read()
        assert not record.problems, f"round {seed}: {record.problems}"
    look(nursery, scratch / "tier", record)
    assert not record.problems
    assert record.looks > rounds / 2
    assert record.checked > 100 * record.looks
    assert record.stored > 10 * rounds
