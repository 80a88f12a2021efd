"""The figures, the picture and the command."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from kvcache import cli
from kvcache.errors import BadInput
from kvcache.eviction.traces.generate import Workload as Made
from kvcache.eviction.traces.generate import generate
from kvcache.eviction.traces.trace import write_trace
from kvcache.simulation.plot import svg
from kvcache.simulation.report import figures, percentile, table
from kvcache.simulation.run import ROUTERS, Settings, simulate
from tests.kvcache.simulation.made import made


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "small.npz"
    write_trace(path, generate(Made(request_count=80, block_tokens=64, arrivals_a_second=5)))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.commands, ["simulate", "--capacity", "500", *map(str, arguments)])


def test_percentiles_are_values_that_were_there() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] == [1, 50, 90, 99, 100]
    assert percentile([7.0], 0.99) == 7 and percentile([], 0.5) == 0


def test_what_arrives_while_it_warms_up_does_not_count() -> None:
    workload, settings = made(80), Settings(workers=2, capacity=600)
    done = simulate(workload, "exact", settings)
    late = [job for job in done.jobs if job.arrival_s >= workload.span_s / 2]
    found = figures(workload, settings, done, warm_up=0.5)
    assert 0 < found.requests == len(late) < 80
    assert found.hit_blocks == sum(job.used for job in late) / sum(len(job.path) for job in late)
    assert found.hit_blocks <= found.ideal_blocks <= 1


def test_the_picture_is_xml_and_names_every_router_once_more_than_the_legend() -> None:
    workload, settings = made(60), Settings(workers=2, capacity=600)
    rows = [figures(workload, settings, simulate(workload, router, settings)) for router in ROUTERS]
    drawn = svg(rows)
    assert drawn == svg(rows)
    texts = [node.text for node in ElementTree.fromstring(drawn).iter() if node.tag.endswith("text")]
    assert {*ROUTERS, "exact (this project)"} - {"exact"} <= set(texts)
    assert "made" in texts and "nan" not in drawn and "inf" not in drawn
    assert len(table([(row, 1.0) for row in rows]).splitlines()) == len(ROUTERS) + 1


def test_the_command_prints_a_table_or_json_and_draws(trace: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.svg"
    shown = run(trace, "--workers", 2, "--plot", picture)
    assert shown.exit_code == 0, shown.output
    assert all(router in shown.output for router in ROUTERS) and "small: 80 requests" in shown.output
    assert picture.read_text().startswith("<svg")
    told = run(trace, "--workers", 2, "--router", "exact,random", "--json", "--delay", 5, "--loss", 20)
    lines = [json.loads(line) for line in told.output.splitlines()]
    assert [line["router"] for line in lines] == ["exact", "random"]
    assert lines[0]["lost_batches"] > 0 and lines[1]["over_credited"] == -1
    assert "| exact |" in run(trace, "--router", "exact", "--markdown").output


def test_weights_come_from_a_file(trace: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.toml"
    rows = {}
    for text in ("waiting_prefill = 50.0", "[weights]\nwaiting_prefill = 0.0\nrunning = 0.0"):
        weights.write_text(text)
        rows[text] = run(
            trace, "--router", "exact", "--workers", 4, "--speed", 20, "--json", "--weights", weights
        )
        assert rows[text].exit_code == 0, rows[text].output
    spread, together = (json.loads(result.output) for result in rows.values())
    assert spread["hit_tokens"] < together["hit_tokens"]


def test_the_same_seed_prints_the_same(trace: Path) -> None:
    """All but how fast it chose, which is measured."""
    told = []
    for seed in (1, 1, 2):
        shown = run(trace, "--workers", 3, "--restarts", 2, "--loss", 10, "--seed", seed, "--json")
        lines = [json.loads(line) for line in shown.output.splitlines()]
        assert [line.pop("choices_a_second") > 0 for line in lines] == [True] * len(ROUTERS)
        told.append(lines)
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.npz", None, "is not there"),
        ("bad.npz", b"PK no archive", "bad.npz"),
        ("bad.jsonl", b'{"timestamp": 1}\n', "no hash_ids"),
        ("empty.jsonl", b"", "it is empty"),
    ],
)
def test_what_is_no_trace_is_said(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run(tmp_path / name)
    assert result.exit_code == 1 and isinstance(result.exception, BadInput)
    assert said in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--router", "best"], "no router is called 'best'"),
        (["--capacity", 1], "the largest request"),
        (["--warm-up", 1], "warm-up"),
        (["--speed", 0], "speed"),
        (["--loss", 101], "loss"),
        (["--delay", -1], "delay"),
        (["--workers", 0], "workers"),
        (["--restarts", -1], "restarts"),
        (["--policy", "best"], "no policy is called 'best'"),
        (["--weights", "none.toml"], "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(trace: Path, arguments: list[object], said: str) -> None:
    result = run(trace, *arguments)
    assert result.exit_code == 1 and said in str(result.exception)


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    done = run("--plot", tmp_path / "none" / "picture.svg")
    assert isinstance(done.exception, BadInput)
    assert "there is no folder" in done.exception.why
    assert not done.output
