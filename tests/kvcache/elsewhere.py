"""A few lines in other processes, with other seeds of Python's own hash: names may not depend on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

SEEDS = ("0", "4242")


def printed_elsewhere(program: str, seeds: Sequence[str] = SEEDS) -> list[list[str]]:
    """The lines that ``program`` prints, once for each seed, each in a new process."""
    return [_run(program, seed) for seed in seeds]


def _run(program: str, seed: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()
