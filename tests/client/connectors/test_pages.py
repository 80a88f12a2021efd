"""The pages for users name every counter, setting and reason there is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from kvcache.client.connectors.vllm_plan import METRICS
from kvcache.client.connectors.vllm_settings import Settings

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "vllm.md").read_text()
SOURCES = "".join(path.read_text() for path in sorted((ROOT / "client" / "connectors").glob("vllm_*.py")))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_its_row(name: str) -> None:
    assert f"| `vllm:kvcache_{name}` |" in PAGE


def test_every_setting_has_its_row() -> None:
    for field in fields(Settings):
        assert f"| `{field.name}` |" in PAGE


def test_every_reason_is_explained() -> None:
    reasons = set(re.findall(r'_tally\.add\(\s*"(?:lookups|failed_blocks)".*?"(\w+)"\s*\)', SOURCES))
    reasons |= set(re.findall(r'return "(\w+)"$', SOURCES, re.MULTILINE))
    reasons |= set(re.findall(r'return (?:0|b""), "(\w+)"$', SOURCES, re.MULTILINE))
    assert {"deferred", "not_wanted", "too_late", "prompt_embeds", "lease_lost"} <= reasons
    assert [reason for reason in sorted(reasons) if f"`{reason}`" not in PAGE] == []
