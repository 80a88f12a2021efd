"""What the README tells a newcomer to type works: its Python runs, its commands and targets exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvcache.cli import SUBCOMMANDS
from kvcache.testing.processes import NodeProcess

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/architecture.md",
    "docs/hit-ratio.md",
    "docs/http.md",
    "docs/vllm.md",
    "docs/transformers.md",
)

# What the example leaves to the reader: a namespace, tokens, and memory.
BEFORE = """
from kvcache.block import BlockSpec
from kvcache.namespace import Namespace, shape_of
spec = BlockSpec(block_tokens=16, plane_count=2, head_count=2, head_bytes=1024)
namespace = Namespace(
    model="m", weights="w", dtype="float32", layout="canonical", block_tokens=16, shape=shape_of(spec)
)
tokens = list(range(64))
blocks = [[bytes([number]) * spec.block_bytes] for number in range(4)]
buffers = []
"""
AFTER = """
again = store.lease(handle, prefix)
buffers = [[bytearray(spec.block_bytes)] for _ in range(again.count)]
assert again.count == 4
assert store.load(again, buffers) == frozenset()
assert [bytes(piece) for [piece] in buffers] == [piece for [piece] in blocks]
"""


def text(page: str) -> str:
    return (ROOT / page).read_text()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", text("README.md"), re.DOTALL)
    settings = {"socket": str(tmp_path / "node.sock"), "http": "none", "capacity": "8MiB"}
    with NodeProcess(settings, tmp_path / "log") as node:
        done = subprocess.run(
            [sys.executable, "-c", BEFORE + example + AFTER],
            env={"KVCACHE_SOCKET": node.socket, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_every_command_named_exists(page: str) -> None:
    for name in re.findall(r"(?:`|^)kvcache ([a-z-]+)", text(page), re.MULTILINE):
        assert name in SUBCOMMANDS, f"{page} names kvcache {name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_named_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", text("Makefile"), re.MULTILINE))
    for name in re.findall(r"(?:`|^)make ([a-z-]+)", text(page), re.MULTILINE):
        assert name in targets, f"{page} names make {name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_named_is_there(page: str) -> None:
    for name in re.findall(r"\b((?:docs|benchmarks)/[\w-]+\.md)\b", text(page)):
        assert (ROOT / name).exists(), f"{page} names {name}"
