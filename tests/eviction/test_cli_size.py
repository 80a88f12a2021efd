"""``kvcache tune size``: what it says to buy, and what it says where that is impossible."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from kvcache.errors import BadInput
from kvcache.eviction.advise.sizing import Goal, Option, Sizer
from kvcache.eviction.commands.size import Shop, cheapest_first
from kvcache.eviction.commands.tune import tune
from kvcache.eviction.simulate.curves import Estimator
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import write_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("size") / "made.npz"
    write_trace(path, generate(Workload(request_count=120, seed=5, block_tokens=64, arrivals_a_second=0.1)))
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(tune, ["size", *arguments], catch_exceptions=True)


def refused(*arguments: str) -> BadInput:
    error = run(*arguments).exception
    assert isinstance(error, BadInput), error
    return error


@pytest.mark.slow
def test_the_cheapest_comes_first_and_is_confirmed(trace: str) -> None:
    result = run(trace, "--hit", "30%", "--model", "131072", "--dwpd", "100", "--memory", "5%", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    costs = [25 * row["memory_blocks"] + row["nvme_blocks"] for row in rows]
    assert costs == sorted(costs)
    assert rows[0]["confirmed"] and rows[0]["prefix_token_hit_ratio"] >= 0.3
    assert {row["admit"] for row in rows} >= {None, "all"}
    for row in rows:
        assert row["memory_bytes"] == row["memory_blocks"] * 64 * 131_072
        assert row["drive_writes_a_day"] <= 100


@pytest.mark.slow
def test_a_person_reads_a_sentence_and_a_table(trace: str) -> None:
    said = run(
        trace, "--hit", "0.3", "--model", "llama-3.1-8b", "--dwpd", "1000", "--memory-price", "9999"
    ).output
    assert "For llama-3.1-8b, buy" in said and "of NVMe that takes" in said
    assert "the whole trace finds" in said and "times a day." in said
    assert "a GiB of memory is taken as 9999 of NVMe" in said
    assert "blocks of memory under" in run(trace, "--hit", "30%", "--nvme-most", "0").output


def test_the_cheapest_that_is_enough_is_named() -> None:
    estimator = Estimator(Forest(generate(Workload(request_count=120, seed=5, block_tokens=64))), 1.0)
    sizer = Sizer(estimator, Goal(0.5 * estimator.most))
    least = sizer.memory("leaf-lru").memory_blocks
    costs = [3 * least, least, 2 * least]
    found = cheapest_first(sizer, [Option("leaf-lru", blocks) for blocks in costs], Shop(25.0, 0, 0))
    assert [option.memory_blocks for option in found] == sorted(costs)
    assert found[0].confirmed and not found[1].confirmed
    # What only seemed enough has to grow, and then another may be cheaper.
    found = cheapest_first(
        sizer, [Option("leaf-lru", least - 3), Option("leaf-lru", least)], Shop(25.0, 0, 0)
    )
    assert found[0].confirmed and found[0].memory_blocks >= least


@pytest.mark.slow
def test_what_cannot_be_had_is_said(trace: str) -> None:
    assert "cannot be had at any size" in refused(trace, "--hit", "99%").what
    error = refused(trace, "--hit", "30%", "--memory-most", "2", "--nvme-most", "0")
    assert "nothing that can be bought" in error.what and "the least that does is" in error.why
    assert "--memory-most" in error.todo


@pytest.mark.parametrize(
    "arguments",
    [
        ("--hit", "many"),
        ("--hit", "0"),
        ("--hit", "130%"),
        ("--hit", "30%", "--dwpd", "0"),
        ("--hit", "30%", "--memory-price", "-1"),
        ("--hit", "30%", "--admit", "sometimes"),
        ("--hit", "30%", "--memory", "40GiB"),
        ("--hit", "30%", "--policy", "belady"),
    ],
)
def test_wrong_input_is_refused(trace: str, arguments: tuple[str, ...]) -> None:
    assert refused(trace, *arguments).code == "bad_config"
