"""The GPU's benchmark keeps running: all of it on the CPU, tiny, and what it says where there is no GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_gpu.py"
KEYS = ["name", "value", "unit", "ratio", "against", "n", "machine"]
PARTS = ["proof.race", "proof.share", "host", "hbm", "sum", "launches", "decode", "overlap", "tiers"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE_S = 500


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def test_on_the_cpu_every_part_runs_and_nothing_is_passed_over_in_silence(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--quick", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(list(line) == KEYS for line in lines)
    for part in PARTS:
        assert any(line["name"].startswith(f"gpu.{part}") for line in lines), part
    proofs = [line["value"] for line in lines if line["against"].startswith("must be 0")]
    assert len(proofs) >= 6
    assert not any(proofs)
    for line in lines:
        assert "no GPU" in line["machine"]
        assert (line["value"] is None) == line["against"].startswith("not measured: ")
    [kept] = tmp_path.glob("gpu-*.jsonl")
    assert kept.read_text() == done.stdout
    for begins, against, _ in goals():
        assert any(line["name"].startswith(begins) and line["against"].startswith(against) for line in lines)


def goals() -> Sequence[tuple[str, str, float]]:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module("bench_gpu").GOALS
    finally:
        sys.path.remove(str(SCRIPT.parent))


def test_a_rival_that_cannot_be_had_takes_nobody_along() -> None:
    """Whatever it raises: what a compiler says is no RuntimeError."""
    broken = """
import sys, gpu_rivals
def fail(self):
    raise TypeError("it does not compile")
gpu_rivals.SwapKernel.load = fail
sys.argv = ["bench_gpu.py", "--device", "cpu", "--quick", "--json", "--only", "launches"]
import bench_gpu
bench_gpu.main()
"""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(ROOT)])}
    found["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", broken]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=found)
    assert done.returncode == 0, done.stderr
    names = {json.loads(line)["name"] for line in done.stdout.splitlines()}
    assert "gpu.launches.index_select.load.4KiB.batch2" in names
    assert "gpu.launches.vllm_kernel.load.4KiB.batch2" not in names


def test_one_part_can_be_chosen_and_what_others_said_stays(tmp_path: Path) -> None:
    sums = ["--device", "cpu", "--quick", "--only", "sums", "--out", str(tmp_path)]
    assert run(*sums).returncode == 0
    [kept] = tmp_path.glob("gpu-*.jsonl")
    before = kept.read_text().splitlines()
    other = json.dumps({**json.loads(before[0]), "name": "gpu.other"})
    kept.write_text("".join(f"{line}\n" for line in [other, *before]))
    done = run(*sums)
    assert done.returncode == 0, done.stderr
    after = kept.read_text().splitlines()
    assert after[0] == other
    assert [json.loads(line)["name"] for line in after[1:]] == [json.loads(line)["name"] for line in before]
    assert "gpu.sum.1KiB.batch8" in done.stdout
    assert "gpu.hbm" not in done.stdout
    assert run("--device", "cpu", "--only", "nothing").returncode == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing() -> None:
    done = run("--quick", "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no CUDA device" in done.stderr
    assert "not measured" in done.stderr
