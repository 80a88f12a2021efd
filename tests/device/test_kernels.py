"""That the Triton kernels are what is tested, and what the compiler makes of them for a Hopper GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from kvcache.device import kernels, sums
from kvcache.errors import Unavailable
from tests.device.places import CUDA, of_kernels

KERNELS = (kernels._copy, kernels._copy_and_sum, kernels._finish)


@of_kernels
def test_triton_runs_here() -> None:
    """Compiled on a GPU, else in the interpreter: a run that did neither has shown nothing."""
    assert all(isinstance(kernel, InterpretedFunction) != CUDA for kernel in KERNELS)


@of_kernels
@pytest.mark.slow
def test_they_are_tried_before_they_are_used() -> None:
    kernels.check(torch.device("cuda" if CUDA else "cpu"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler"),
        subprocess.CalledProcessError(1, "gcc"),
        PermissionError("~/.triton"),
        CompilationError("def _copy", None, "no such thing"),
        OutOfResources(300_000, 232_448, "shared memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_triton_cannot_compile_torch_does_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine's image need not have a compiler in it."""

    class Uncompiled:
        def __getitem__(self, grid: object) -> object:
            raise error

    monkeypatch.setattr(kernels, "_copy_and_sum", Uncompiled())
    with pytest.raises(Unavailable, match="Triton cannot be used here"):
        kernels.check(torch.device("cpu"))
    tried = SimpleNamespace(check=lambda device: kernels.check(torch.device("cpu")))
    monkeypatch.setattr(sums, "_triton", tried)
    assert sums.kernels_for.__wrapped__(torch.device("cuda", 0)) is None
    assert "slower" in caplog.text


def test_what_sums_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_launch_sum", lambda *given: torch.zeros((1, 1), dtype=torch.int64))
    with pytest.raises(Unavailable, match="wrong sums"):
        kernels.check(torch.device("cpu"))


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
