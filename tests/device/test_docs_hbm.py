"""What docs/hbm.md shows works as it stands, and it names every layout and setting there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvcache.config import NodeConfig
from kvcache.device.pages import LAYOUTS
from kvcache.testing.processes import NodeProcess

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hbm.md").read_text()


def test_every_layout_and_setting_is_named() -> None:
    table = PAGE.partition("## Layouts")[2].partition("##")[0]
    for layout in LAYOUTS:
        name, _, order = layout.rpartition("_")
        assert f"`{layout}`" in table or (order == "hnd" and f"`{name}_nhd`, `_hnd`" in table), layout
    for setting in NodeConfig.__struct_fields__:
        assert not setting.startswith("hbm") or f"| `{setting}` |" in PAGE, setting


@pytest.mark.slow
def test_the_example_works(tmp_path: Path) -> None:
    shown = "".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    example = shown.replace("connect_device_blocking(gpu)", "connect_device_blocking(gpu, timeout_ms=20_000)")
    assert example != shown, "a busy machine does not answer within a second"
    settings = {"socket": str(tmp_path / "node.sock"), "http": "none", "capacity": "8MiB"}
    with NodeProcess({**settings, "hbm": "16MiB", "hbm_device": "cpu"}, tmp_path / "log") as node:
        ran = subprocess.run(
            [sys.executable, "-c", example],
            env={**os.environ, "KVCACHE_SOCKET": node.socket, "CUDA_VISIBLE_DEVICES": ""},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["3", "3", "0", "3"]
