"""Bugs put in on purpose, into copies of the tree: whether the test named for each finds it.

A module lists its plants and has ``test_without_a_plant_all_is_green`` and ``test_it_is_caught``. What they
wait for runs side by side, one run a processor, each in a copy of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("kvcache", "server", "client", "eviction", "tests", "pyproject.toml")
RUN_S = 280  # A control takes ten seconds, and several times that on a busy machine.
TEST_S = 100  # Who hangs for a bug is caught by it, as who fails.
WAITS_S = 4  # Ten times what such a test takes without its bug.
END_AT_ONCE = ("-p", "tests.planting")
PATIENT = (f"--timeout={TEST_S}",)
WAITING = (f"--timeout={WAITS_S}", *END_AT_ONCE)
FAILED = 1  # pytest's status for "tests ran, and some failed"; an import error is 2
# A signal that ends a test which hangs can leave a frame without a line number, on which pytest itself fails:
# so the process of such a test ends at once, with FAILED.
TIMEOUT_METHOD = "thread"


@dataclass(frozen=True, slots=True)
class Plant:
    """``good`` occurs once in ``file`` and is replaced by ``bad``; ``caught_by`` must then fail.

    A test that ``waits`` finds the bug because something never comes, or its fixtures wait for that once it
    has failed. Their own patience is made for a busy machine and long; here the test has WAITS_S, and its
    process ends with the first failure. REQUIRES: nothing that it leaves behind needs its fixtures' end.
    """

    name: str
    file: str
    good: str
    bad: str
    caught_by: str
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it: pytest's status, and what it printed."""

    status: int
    said: str


def copy_tree(root: Path) -> Path:
    """Each plant is put in there, and taken out again."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, root / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, root / name)
    return root


class Garden:
    """The runs of one module's tests."""

    def __init__(self, home: Path, plants: Sequence[Plant]) -> None:
        """They begin at once."""
        width = min(len(plants) + 1, len(os.sched_getaffinity(0)))
        self._copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(width):
            (home / str(number)).mkdir()
            self._copies.put(copy_tree(home / str(number)))
        self._pool = ThreadPoolExecutor(width)
        tests = sorted({plant.caught_by for plant in plants})
        self._control = self._pool.submit(self._run, None, *PATIENT, *END_AT_ONCE, *tests)
        self._runs: dict[Plant, Future[Run]] = {}
        for plant in plants:
            how = WAITING if plant.waits else PATIENT
            self._runs[plant] = self._pool.submit(self._run, plant, *how, plant.caught_by)

    def check_control(self) -> None:
        """The tests pass in a copy as it is."""
        done = self._control.result()
        assert done.status == 0, done.said[-3000:]

    def check_caught(self, plant: Plant) -> None:
        done = self._runs[plant].result()
        assert done.status == FAILED, f"not caught:\n{done.said[-3000:]}"

    def close(self) -> None:
        """What has not begun does not."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, plant: Plant | None, *arguments: str) -> Run:
        root = self._copies.get()
        try:
            with _planted(root, plant):
                return _run(root, *arguments)
        finally:
            self._copies.put(root)


@pytest.fixture(scope="module")
def garden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Garden]:
    """Of those plants of the module that this session is to test."""
    chosen = [
        item.callspec.params["plant"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and hasattr(item, "callspec")
    ]
    grown = Garden(tmp_path_factory.mktemp("planted"), chosen or request.module.PLANTS)
    yield grown
    grown.close()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process of a test that ``waits``, where this module is a plugin."""
    if report.failed:
        print(report.longreprtext, flush=True)
        os._exit(FAILED)


@contextmanager
def _planted(root: Path, plant: Plant | None) -> Iterator[None]:
    if plant is None:
        yield
        return
    path = root / plant.file
    healthy = path.read_text()
    assert healthy.count(plant.good) == 1, f"{plant.file} no longer has the passage once: {plant.good!r}"
    path.write_text(healthy.replace(plant.good, plant.bad))
    try:
        yield
    finally:
        path.write_text(healthy)


def _run(root: Path, *arguments: str) -> Run:
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"--timeout-method={TIMEOUT_METHOD}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(command, cwd=root, env=environment, stdout=said, stderr=said, process_group=0)
        try:
            status = run.wait(RUN_S)
        finally:  # What a test that hung has started must neither be waited for nor go on.
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        said.seek(0)
        return Run(status, said.read())
