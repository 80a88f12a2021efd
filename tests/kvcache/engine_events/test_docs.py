"""docs/engine-events.md says what is so: its Python runs, its settings and media are those of the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvcache import packing
from kvcache.engine_events.decode import Removed, Skipped, decode
from kvcache.engine_events.held import BLOCKS_MAX
from kvcache.fleet import Fleet

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/engine-events.md").read_text()


@pytest.mark.slow
def test_its_python_runs() -> None:
    [example] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_its_settings_are_of_the_form_that_is_read(tmp_path: Path) -> None:
    [worker] = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "fleet.toml"
    path.write_text(worker)
    assert Fleet.from_file(path).worker[0].engine == "vllm"
    for settings in re.findall(r"--kv-events-config '(\{.*?\})'", TEXT):
        assert "*" in json.loads(settings)["endpoint"]


def test_its_media_and_its_bound_are_those_of_the_code() -> None:
    told = re.findall(r"`([A-Z_0-9]+)`(?:, `([A-Z_0-9]+)`)?(?: and `([A-Z_0-9]+)`)? (?:is|are) `(\w+)`", TEXT)
    assert len(told) == 3
    for *media, tier in told:
        for medium in filter(None, media):
            assert _removed(medium) == Removed((1,), tier)
    assert _removed("EXTERNAL") == Skipped("medium")
    assert f"{BLOCKS_MAX:,} an engine" in TEXT


def _removed(medium: str) -> object:
    (event,) = decode(packing.pack([1, [["BlockRemoved", [1], medium]]])).events
    return event
