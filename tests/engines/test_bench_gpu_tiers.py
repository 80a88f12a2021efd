"""The GPU benchmark's proof with a transformers model, on the CPU: the same tokens from every tier, and wrong
bytes are noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIERS = ["recompute", "hbm", "host", "node_hbm", "node_host", "node_nvme"]

pytestmark = pytest.mark.engine


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    for name in [each for each in sys.modules if each.startswith("gpu_") or each == "harness"]:
        monkeypatch.delitem(sys.modules, name)


def test_every_tier_gives_the_same_tokens_to_a_fresh_process(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "bench_gpu.py"
    chosen = ["--device", "cpu", "--quick", "--json", "--only", "tiers", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *chosen], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    for tier in TIERS:
        assert lines[f"gpu.tiers.{tier}.64"]["value"] is not None, done.stdout
    assert lines["gpu.proof.tiers.wrong_answers"]["value"] == 0
    assert lines["gpu.proof.tiers.wrong_blocks"]["value"] == 0
    [plot] = tmp_path.glob("*.svg")
    assert "NVMe" in plot.read_text()


@pytest.mark.usefixtures("benchmarks")
def test_a_wrong_byte_is_counted_and_changes_the_answer() -> None:
    import gpu_rig
    import gpu_tiers
    import torch

    rig = gpu_rig.Rig(torch.device("cpu"), quick=True)
    plan = gpu_tiers.TINY
    with ExitStack() as stack:
        slabs = gpu_tiers.Slabs(rig, plan, stack)
        engine = stack.enter_context(closing(gpu_tiers.EngineProcess("cpu", plan.model)))
        slabs.attach(engine)
        filled = {
            tokens: engine.ask({"op": "fill", "tokens": tokens, "first": plan.first(tokens)})
            for tokens in plan.prompts
        }
        assert filled[32]["answer"] != filled[64]["answer"]
        host = slabs.memory
        message = {"op": "load", "tier": "host", "tokens": 64, "first": plan.first(64)}
        message["sums"] = filled[64]["sums"]
        right = engine.ask(message)
        assert (right["wrong"], right["answer"]) == (0, filled[64]["answer"])
        start = plan.first(64) * plan.block_bytes
        host[start : start + 2 * plan.block_bytes] = 0
        wrong = engine.ask(message)
        assert wrong["wrong"] == 2
        assert wrong["answer"] != filled[64]["answer"]
    rig.close()
