"""The benchmarks' shared helpers: turns are fair, ratios are taken within a round, lines are as promised."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMISED = ["name", "value", "unit", "ratio", "against", "n", "machine"]

spec = importlib.util.spec_from_file_location("harness", ROOT / "benchmarks" / "harness.py")
assert spec is not None and spec.loader is not None
harness = importlib.util.module_from_spec(spec)
sys.modules["harness"] = harness
spec.loader.exec_module(harness)


def test_turns_are_interleaved_the_order_shifts_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def contestant(name: str) -> Callable[[], float]:
        def turn() -> float:
            calls.append(name)
            return float(len(calls))

        return turn

    results = harness.interleaved({name: contestant(name) for name in "abc"}, 3)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert results == {"a": [4.0, 9.0, 11.0], "b": [5.0, 7.0, 12.0], "c": [6.0, 8.0, 10.0]}


def test_a_ratio_pairs_the_rounds() -> None:
    results = {"mine": [2.0, 20.0, 9.0], "theirs": [1.0, 10.0, 9.0]}
    assert harness.compare(results, "mine", "theirs") == 2.0


@pytest.mark.parametrize(
    ("size", "name"), [(256 << 10, "256KiB"), (2 << 20, "2MiB"), (1 << 30, "1GiB"), (100, "100B")]
)
def test_sizes_have_names(size: int, name: str) -> None:
    assert harness.size_name(size) == name


def test_lines_are_as_promised(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [harness.Figure("copy.fused.2MiB", 20.5, "GB/s", 1.2, "memmove", 51, harness.machine())]
    harness.report(figures, harness.options("", ["--json", "--quick"]))
    line = json.loads(capsys.readouterr().out)
    assert list(line) == PROMISED
    harness.report(figures, harness.options("", []))
    assert "1.20 x memmove" in capsys.readouterr().out
