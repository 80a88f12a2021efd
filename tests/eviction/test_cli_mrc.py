"""``kvcache tune mrc``: what it prints, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvcache.errors import BadInput
from kvcache.eviction.commands.tune import tune
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import read_trace, write_trace


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "made.npz"
    write_trace(path, generate(Workload(request_count=150, seed=3)))
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(tune, ["mrc", *arguments], catch_exceptions=True)


def test_one_object_a_size_and_policy(trace: str) -> None:
    arguments = ("--capacity", "40,10", "--policy", "leaf-lru", "--model", "131072", "--shards", "--json")
    result = run(trace, *arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["policy"], row["capacity_blocks"], row["how"]) for row in rows] == [
        ("leaf-lru", 10, "exact"),
        ("leaf-lru", 40, "exact"),
        ("belady", 10, "replayed"),
        ("belady", 40, "replayed"),
        ("leaf-lru", 10, "sampled"),
        ("leaf-lru", 40, "sampled"),
    ]
    whole = read_trace(Path(trace))
    for row in rows[:4]:
        truth = replay(whole, row["policy"], row["capacity_blocks"])
        assert row["prefix_token_hit_ratio"] == truth.prefix_token_hit_ratio
        assert (
            row["capacity_bytes"] == row["capacity_tokens"] * 131_072 == row["capacity_blocks"] * 16 * 131_072
        )
    assert rows[1]["block_hit_ratio"] == replay(whole, "leaf-lru", 40).block_hit_ratio


def test_a_person_sees_a_picture_and_a_table(trace: str) -> None:
    said = run(trace, "--model", "llama-3.1-8b").output
    assert "* leaf-lru   o leaf-hazard   + leaf-arc   x belady" in said
    assert "capacity  blocks" in said and "GiB" in said
    assert "All of it was replayed." in said
    assert "Exact." in run(trace, "--policy", "leaf-lru", "--no-bound").output


def test_what_was_sampled_is_said(trace: str) -> None:
    said = run(trace, "--sample", "30%", "--capacity", "10%", "--policy", "leaf-lru")
    assert "of the blocks, good to about a point" in said.output
    row = json.loads(
        run(
            trace, "--sample", "0.3", "--capacity", "10%", "--policy", "leaf-arc", "--json"
        ).stdout.splitlines()[0]
    )
    assert row["how"] == "sampled" and 0.2 < row["sample_rate"] < 0.4


@pytest.mark.parametrize("text", ["0", "x", "120%", "-3%"])
def test_a_sample_that_is_none_is_refused(trace: str, text: str) -> None:
    error = run(trace, "--sample", text).exception
    assert isinstance(error, BadInput) and error.code == "bad_config"


def test_sizes_of_less_than_a_block_are_left_out_of_the_usual_ones(tmp_path: Path) -> None:
    path = tmp_path / "small.npz"
    write_trace(path, generate(Workload(request_count=3, seed=1)))
    assert run(str(path)).exit_code == 0
    error = run(str(path), "--capacity", "0.01%").exception
    assert isinstance(error, BadInput) and error.code == "too_small"
