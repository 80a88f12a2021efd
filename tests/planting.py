"""Bugs put in on purpose, into a copy of the tree: whether the test named for each finds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("kvcache", "server", "client", "eviction", "tests", "pyproject.toml")
RUN_S = 110
FAILED = 1  # pytest's status for "tests ran, and some failed"; an import error is 2


@dataclass(frozen=True, slots=True)
class Plant:
    """``good`` occurs once in ``file`` and is replaced by ``bad``; ``caught_by`` must then fail."""

    name: str
    file: str
    good: str
    bad: str
    caught_by: str


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


def check_control(root: Path, plants: Iterable[Plant]) -> None:
    """The tests pass in the copy as it is."""
    done = _run(root, *sorted({plant.caught_by for plant in plants}))
    assert done.returncode == 0, done.stdout[-3000:]


def check_caught(root: Path, plant: Plant) -> None:
    path = root / plant.file
    healthy = path.read_text()
    assert healthy.count(plant.good) == 1, f"{plant.file} no longer has the passage once: {plant.good!r}"
    path.write_text(healthy.replace(plant.good, plant.bad))
    try:
        done = _run(root, plant.caught_by)
    finally:
        path.write_text(healthy)
    assert done.returncode == FAILED, f"not caught:\n{done.stdout[-3000:]}"


def _run(root: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=RUN_S)
