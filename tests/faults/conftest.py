"""What the fault runs share: how long they run, where, and the process that forks their writers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.nursery import Nursery
from tests.faults.work import Job

MEMORY = Path("/dev/shm")
ROOM_BYTES = 512 << 20
FILLING_STEPS = 120


@pytest.fixture(scope="session")
def factor() -> int:
    """By how much ``make torture`` multiplies the rounds."""
    return max(1, int(os.environ.get("KVCACHE_FAULT_FACTOR", "1")))


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is room: what the disk does is not what is tried here."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES
    with tempfile.TemporaryDirectory(prefix="kvcache-", dir=MEMORY if roomy else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def full(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with blocks of all sizes in it. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("full")
    child = nursery.start(Job(str(folder / "tier"), str(folder / "record"), 11, steps=FILLING_STEPS))
    assert child.end() == 0, child.said()
    return folder / "tier"


@pytest.fixture
def tier(full: Path, scratch: Path) -> Path:
    """A full directory to be harmed."""
    return shutil.copytree(full, scratch / "tier")
