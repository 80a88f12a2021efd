"""``kvcache tune replay``: what it prints, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvcache.errors import BadInput
from kvcache.eviction.commands import progress as cli_progress
from kvcache.eviction.commands.progress import Bar, bar
from kvcache.eviction.commands.tune import tune
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import read_trace, write_trace

FIELDS = {
    "trace",
    "policy",
    "capacity",
    "block_hit_ratio",
    "prefix_token_hit_ratio",
    "requests",
    "seconds",
}


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "made.npz"
    write_trace(path, generate(Workload(request_count=200, seed=3)))
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(tune, ["replay", *arguments], catch_exceptions=True)


def rows(*arguments: str) -> list[dict[str, object]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def number(row: dict[str, object], name: str) -> float:
    found = row[name]
    assert isinstance(found, int | float)
    return found


def refused(*arguments: str) -> BadInput:
    error = run(*arguments).exception
    assert isinstance(error, BadInput), error
    return error


def test_one_object_a_policy_and_size(trace: str) -> None:
    found = rows(trace, "--policy", "leaf-lru", "--capacity", "1%,3%,10%,30%")
    assert [row["capacity"] for row in found] == ["1%", "3%", "10%", "30%"]
    for row in found:
        assert row.keys() >= FIELDS
        assert "optimum" not in row
    both = rows(trace, "--policy", "leaf-lru,arc", "--capacity", "50")
    assert [(row["policy"], row["capacity_blocks"]) for row in both] == [("leaf-lru", 50), ("arc", 50)]


def test_it_is_what_replay_says(trace: str) -> None:
    (row,) = rows(trace, "--capacity", "40", "--bound", "--model", "llama-3.1-8b")
    result = replay(read_trace(Path(trace)), "leaf-lru", 40)
    best = replay(read_trace(Path(trace)), "belady", 40)
    assert row["prefix_token_hit_ratio"] == result.prefix_token_hit_ratio
    assert row["optimum"] == best.prefix_token_hit_ratio > result.prefix_token_hit_ratio
    assert row["loaded_bytes"] == result.hit_tokens * 131_072
    assert row["stored_bytes"] == result.admitted_blocks * 16 * 131_072
    assert row["capacity_bytes"] == 40 * 16 * 131_072


def test_a_person_reads_a_table(trace: str) -> None:
    shown = run(trace, "--policy", "leaf-lru,belady", "--capacity", "10%", "--model", "deepseek-v3").output
    assert "200 requests" in shown
    for word in ("prefix hit", "optimum", "FLOPs saved", "size GiB", "leaf-lru", "belady"):
        assert word in shown
    assert "optimum" not in run(trace, "--capacity", "10%", "--no-bound").output


def test_a_capacity_far_beyond_the_trace_takes_no_memory(trace: str) -> None:
    for policy in ("leaf-hazard", "leaf-arc", "w-tinylfu", "s3-fifo", "belady"):
        [row] = rows(trace, "--policy", policy, "--capacity", "999999999999")
        assert number(row, "block_hit_ratio") > 0.5


def test_a_policy_that_was_replaced_is_said(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[int]:
        raise RuntimeError("no")

    monkeypatch.setattr("kvcache.eviction.fifo.Fifo.victims", broken)
    (row,) = rows(trace, "--policy", "leaf-fifo", "--capacity", "10")
    assert "victims raised" in str(row["policy_fault"])
    shown = run(trace, "--policy", "leaf-fifo", "--capacity", "10").output
    assert "leaf-fifo was replaced by leaf-lru: Fifo: victims raised" in shown


def test_two_tiers_say_what_is_written(trace: str) -> None:
    tiers = (trace, "--capacity", "2%", "--nvme", "20%")
    every, twice = rows(*tiers, "--admit", "all,touched>=2", "--model", "llama-3.1-8b", "--bound")
    assert [every["admit"], twice["admit"]] == ["all", "touched>=2"]
    for row in (every, twice):
        memory, both = number(row, "memory_prefix_token_hit_ratio"), number(row, "prefix_token_hit_ratio")
        assert memory < both <= number(row, "optimum")
        assert number(row, "written_bytes") == number(row, "written_blocks") * 16 * 131_072
    assert number(twice, "drive_writes_a_day") < number(every, "drive_writes_a_day")
    (bound,) = rows(*tiers, "--dwpd", "3")
    assert number(bound, "drive_writes_a_day") < number(every, "drive_writes_a_day")
    (bytes_bound,) = rows(*tiers, "--write-budget", "1MB/s", "--model", "llama-3.1-8b")
    assert number(bytes_bound, "written_blocks") < number(every, "written_blocks")
    shown = run(*tiers, "--admit", "branch-reused").output
    for word in ("NVMe blocks", "DWPD", "branch-reused", "in memory"):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dwpd", "1"), "without --nvme"),
        (("--admit", "touched>=2"), "--admit without --nvme"),
        (("--nvme-policy", "leaf-arc"), "--nvme-policy without --nvme"),
        (("--nvme", "10%", "--dwpd", "much"), "--dwpd much"),
        (("--nvme", "10%", "--dwpd", "-1"), "--dwpd -1"),
        (("--nvme", "10%", "--dwpd", "nan"), "--dwpd nan"),
        (("--nvme", "10%", "--write-budget", "1MB/s"), "--write-budget 1MB"),
        (("--nvme", "10%", "--write-budget", "0MB/s", "--model", "4096"), "budget of 0"),
        (("--nvme", "10%", "--write-budget", "fast", "--model", "4096"), "--write-budget"),
        (("--nvme", "10%", "--admit", "some"), "'some'"),
        (("--nvme", "0"), "capacity of 0"),
        (("--nvme", "10%", "--policy", "arc"), "arc over two tiers"),
        (("--nvme", "10%", "--nvme-policy", "leaf"), "'leaf'"),
    ],
)
def test_wrong_lower_tiers_are_said_in_plain_words(
    trace: str, arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(trace, *arguments).what


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "leaf-lur"), "leaf-lur"),
        (("--policy", ","), "no policy"),
        (("--capacity", "4GiB"), "4GiB"),
        (("--capacity", "0"), "capacity of 0"),
        (("--model", "gpt-9"), "gpt-9"),
        (("--set", "samples"), "--set samples"),
        (("--set", "=3"), "--set =3"),
        (("--set", "samples=few"), "few"),
        (("--set", "speed=3"), "no setting 'speed'"),
        (("--policy", "leaf-hazard", "--set", "samples=nan"), "samples of leaf-hazard is nan"),
        (("--policy", "belady,lru", "--set", "samples=3"), "no setting 'samples'"),
    ],
)
def test_wrong_settings_are_said_in_plain_words(trace: str, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(trace, *arguments).what


def test_what_is_wrong_is_said_before_anything_is_shown_or_replayed(
    trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcache.eviction.commands.replay.open_trace", pytest.fail)
    for arguments in (["--policy", "leaf-lru,leaf-lur"], ["--policy", "leaf-hazard", "--set", "samples=-1"]):
        result = run(trace, *arguments)
        assert isinstance(result.exception, BadInput) and not result.output


def test_names_are_suggested_from_all_that_can_be_replayed(trace: str) -> None:
    assert "'sieve'" in refused(trace, "--policy", "seive").todo
    assert "'leaf-lru'" in refused(trace, "--policy", "leaflru").todo


def test_wrong_traces_are_said_in_plain_words(trace: str, tmp_path: Path) -> None:
    assert "is not there" in refused(str(tmp_path / "none.npz")).what
    cut = tmp_path / "cut.npz"
    cut.write_bytes(Path(trace).read_bytes()[:500])
    assert refused(str(cut)).code == "bad_trace"
    assert run().exit_code == 2


def test_a_bar_says_how_far_and_how_long_yet(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    shown = Bar("made: arc", 1_000, lambda: now)
    assert shown.line(250, 10.0) == "made: arc [######..................]  25%   30 s left"
    shown(64)
    assert capsys.readouterr().err == ""  # Not yet.
    now = 1.0
    shown(65)
    assert capsys.readouterr().err == ""  # Looks at the clock now and then only.
    shown(128)
    assert " 13% " in capsys.readouterr().err
    shown(1_000)
    assert capsys.readouterr().err == "\r"  # click drops the rest where nobody watches.


def test_who_waits_for_a_large_trace_sees_how_far_it_is_read(
    trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []

    def drawn(label: str, total: int) -> Bar:
        labels.append(f"{label} {total > 1}")
        return Bar(label, total)

    monkeypatch.setattr("kvcache.eviction.commands.replay.bar", drawn)
    assert run(trace, "--no-bound", "--capacity", "3%").exit_code == 0
    assert labels == ["reading made.npz True", "made.npz: leaf-lru, 3% True"]


def test_a_bar_is_drawn_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar("made", 10) is None
    monkeypatch.setattr(cli_progress.sys.stderr, "isatty", lambda: True)
    assert bar("made", 10) is not None
