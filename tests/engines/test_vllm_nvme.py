"""A real vLLM engine and a node that was killed: the next node finds the blocks on NVMe and serves them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcache.testing.processes import NodeProcess
from tests.engines.engine import EngineProcess, start_engine
from tests.engines.scribble import node_stats
from tests.engines.tiny_model import build, prompt
from tests.engines.vllm_process import BLOCK_TOKENS, PATIENT

pytestmark = [pytest.mark.engine, pytest.mark.slow]
pytest.importorskip("vllm")

LENGTHS = (200, 700, 1500)
PROMPTS = [prompt(length, seed=length) for length in LENGTHS]
STORED_BLOCKS = sum((length - 1) // BLOCK_TOKENS for length in LENGTHS)
WRITTEN_S = 60.0


def start(model: Path, address: str, log: Path) -> EngineProcess:
    return start_engine(
        "tests.engines.vllm_process", [str(model), json.dumps({"address": address, **PATIENT}), "{}"], log
    )


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WRITTEN_S
    while not condition():
        assert time.monotonic() < end


def test_prompts_outlive_the_engine_and_the_node(tmp_path: Path) -> None:
    model = build(tmp_path / "model")
    settings = {
        "socket": str(tmp_path / "node.sock"),
        "capacity": "256MiB",
        "http": "none",
        "nvme": f"{tmp_path / 'tier'}:512MiB",
    }
    with NodeProcess(settings, tmp_path / "node.log") as node:
        with start(model, node.socket, tmp_path / "a.log") as engine:
            first = engine.ask("generate", prompts=PROMPTS)["tokens"]
            assert engine.ask("generate", prompts=PROMPTS, salt="cold")["tokens"] == first
            assert engine.close() == 0
        until(lambda: node_stats(node.socket)["nvme_wanted_blocks"] == 0)
        written = node_stats(node.socket)["blocks:nvme"]
        node.kill()
        node.start()
        assert node_stats(node.socket)["nvme_restored_blocks"] == written >= 2 * STORED_BLOCKS
        with start(model, node.socket, tmp_path / "b.log") as engine:
            assert engine.ask("generate", prompts=PROMPTS)["tokens"] == first
            metrics = engine.ask("metrics")
            assert engine.close() == 0
        assert node_stats(node.socket)["nvme_read_blocks"] >= STORED_BLOCKS
    assert metrics["vllm:kvcache_loaded_blocks"] == STORED_BLOCKS
    assert metrics["vllm:prompt_tokens_by_source{external_kv_transfer}"] == STORED_BLOCKS * BLOCK_TOKENS
