"""``kvcache demo --engine`` with real engines: the second one loads what the first computed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kvcache.demo_engine import BLOCK_TOKENS, SYSTEM_TOKENS, questions
from tests.engines.engine import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.slow]
pytest.importorskip("vllm")
RUN_S = 600.0


def test_the_second_engine_loads_what_the_first_computed() -> None:
    command = [sys.executable, "-m", "kvcache", "demo", "--engine", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    result = json.loads(done.stdout)
    asked = questions()
    old = sum((len(question.tokens) - 1) // BLOCK_TOKENS for question in asked if not question.new)
    new = SYSTEM_TOKENS // BLOCK_TOKENS * sum(question.new for question in asked)
    assert result["requests"] == len(asked)
    assert result["prompt_tokens"] == sum(len(question.tokens) for question in asked)
    assert result["hit_tokens"] == (old + new) * BLOCK_TOKENS
    assert result["wrong_tokens"] == 0
    assert result["hit_tokens_without_node"] == 0
    assert 0 < result["ttft_warm_s"] < result["ttft_cold_s"]
    assert result["seconds"] < RUN_S
