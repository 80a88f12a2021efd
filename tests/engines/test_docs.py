"""What the pages for users say to run is run, against a real node, on the small model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.testing.processes import NodeProcess
from tests.engines.engine import ROOT
from tests.engines.scribble import node_stats
from tests.engines.tiny_model import build
from tests.engines.vllm_process import PATIENT, SETTINGS, engine_arguments

pytestmark = [pytest.mark.engine, pytest.mark.slow]
RUN_S = 600.0
PATIENT_MS = 30_000


def examples(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("docs") / "model")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    settings = {"socket": str(tmp_path / "node.sock"), "capacity": "64MiB", "http": "none"}
    with NodeProcess(settings, tmp_path / "node.log") as running:
        yield running


def run(script: str, node: NodeProcess) -> str:
    environment = {
        **os.environ,
        **SETTINGS,
        "KVCACHE_SOCKET": node.socket.removeprefix("unix://"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_transformers_example(model: Path, node: NodeProcess) -> None:
    pytest.importorskip("transformers")
    (script,) = examples("transformers.md", "python")
    patient = script.replace("connect_blocking()", f"connect_blocking(timeout_ms={PATIENT_MS})")
    assert patient != script
    printed = run(patient.replace("MODEL", str(model)), node)
    assert "'loaded_tokens': 288" in printed
    assert node_stats(node.socket)["blocks:host"] == 9


def test_the_example_of_transformers_and_hbm(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (script,) = examples("hbm.md", "py")
    patient = script.replace("_blocking(gpu)", f"_blocking(gpu, timeout_ms={PATIENT_MS})")
    assert patient != script
    settings = {"socket": str(tmp_path / "node.sock"), "capacity": "64MiB", "http": "none", "hbm": "16MiB"}
    with NodeProcess({**settings, "hbm_device": "cpu"}, tmp_path / "node.log") as node:
        printed = run(patient.replace("MODEL", str(model)), node)
        assert "'hbm_tokens': 288" in printed
        assert node_stats(node.socket)["hbm_hit_blocks"] == 9


def test_the_vllm_example(model: Path, node: NodeProcess) -> None:
    """With the small engine's arguments and patience, and token ids where the page has text: the model has
    no words."""
    pytest.importorskip("vllm")
    (script,) = examples("vllm.md", "python")
    role = '"kv_role": "kv_both",'
    assert role in script
    script = script.replace(role, f'{role} "kv_connector_extra_config": {PATIENT!r},')
    small = {key: value for key, value in engine_arguments("", None).items() if key != "model"}
    script = script.replace('"MODEL"', f"{str(model)!r}, **{small!r}")
    script = script.replace('"Once upon a time"', '[{"prompt_token_ids": list(range(5, 300))}]')
    script = script.replace("max_tokens=16", "max_tokens=16, detokenize=False")
    run(script + "\nllm.llm_engine.engine_core.shutdown()\n", node)
    assert node_stats(node.socket)["blocks:host"] == (295 + 15) // 32


def test_the_command_line_is_what_the_example_says() -> None:
    pytest.importorskip("vllm")
    _, serve = examples("vllm.md", "sh")
    words = shlex.split(serve)
    config = json.loads(words[words.index("--kv-transfer-config") + 1])
    (script,) = examples("vllm.md", "python")
    for name, value in config.items():
        assert f'"{name}": "{value}"' in script
