"""That the Triton kernels are what is tested, and what the compiler makes of them for a Hopper GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime.interpreter import InterpretedFunction

from kvcache.device import kernels
from tests.device.places import CUDA

KERNELS = (kernels._copy, kernels._copy_and_sum, kernels._finish)


def test_triton_runs_here() -> None:
    """Compiled on a GPU, else in the interpreter: a run that did neither has shown nothing."""
    assert all(isinstance(kernel, InterpretedFunction) != CUDA for kernel in KERNELS)


@pytest.mark.slow
def test_a_hopper_moves_sixteen_bytes_at_a_time() -> None:
    """Compiled for it, which takes no GPU: 8 pairs of words a thread in a tile of 16 KiB, 4 more of keys
    where they are summed, and nothing through local memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "gather: 8 wide loads, 8 wide stores, 0 spilled",
        "scatter: 8 wide loads, 8 wide stores, 0 spilled",
        "gather and sum: 12 wide loads, 8 wide stores, 0 spilled",
        "scatter and sum: 12 wide loads, 8 wide stores, 0 spilled",
        "sum: 12 wide loads, 0 wide stores, 0 spilled",
    ]
