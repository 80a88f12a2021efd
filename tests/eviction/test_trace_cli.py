"""``kvcache trace``: each command does what its line of help says, for people and for scripts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from kvcache.errors import BadInput
from kvcache.eviction.commands import progress as cli_progress
from kvcache.eviction.commands import trace as trace_cli
from kvcache.eviction.commands.trace import trace
from kvcache.eviction.traces.files import MOONCAKE, Reading, format_of, open_trace, save_trace
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import read_trace, write_trace


def run(*arguments: str | Path) -> Result:
    """RAISES what the command raises."""
    assert isinstance(trace, click.Group)
    done = CliRunner().invoke(trace, [str(each) for each in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done


def objects(done: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in done.output.splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.npz"
    write_trace(path, generate(Workload(request_count=120, seed=3)))
    return path


def test_info_for_people_and_for_scripts(source: Path) -> None:
    assert "120 requests" in run("info", source).output
    [found] = objects(run("info", source, "--json"))
    assert (found["trace"], found["format"], found["requests"]) == (str(source), "kvtrace-v1", 120)
    assert 0.5 < float(str(found["ideal_token_hit"])) < 1


def test_convert_there_and_back(source: Path, tmp_path: Path) -> None:
    lines = tmp_path / "t.jsonl"
    [said] = objects(run("convert", source, lines, "--format", MOONCAKE, "--json"))
    assert said == {**said, "written": str(lines), "format": MOONCAKE, "requests": 120, "block_tokens": 16}
    assert format_of(lines) == MOONCAKE
    run("convert", lines, tmp_path / "back.npz", "--block-tokens", "16", "--to-block-tokens", "64")
    back = read_trace(tmp_path / "back.npz")
    assert (back.block_tokens, back.request_count) == (64, 120)


def test_convert_sorts_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    plain = {"input_length": 512, "output_length": 1}
    path.write_text("".join(json.dumps({**plain, "timestamp": at, "hash_ids": [at]}) + "\n" for at in (5, 2)))
    with pytest.raises(BadInput, match=r"line 2 .* --sort"):
        run("convert", path, tmp_path / "t.npz")
    run("convert", path, tmp_path / "t.npz", "--sort")
    assert read_trace(tmp_path / "t.npz").arrivals_ms.tolist() == [2, 5]


def test_anonymize(source: Path, tmp_path: Path) -> None:
    said = run("anonymize", source, tmp_path / "a.npz", "--round-ms", "100", "--no-kinds").output
    blocks = read_trace(tmp_path / "a.npz").block_count
    assert said == f"{tmp_path / 'a.npz'}: 120 requests, {blocks:,} blocks of 16 tokens (kvtrace-v1)\n"
    assert read_trace(tmp_path / "a.npz").kinds == ("unknown",)


@pytest.mark.parametrize("by", ["time", "session"])
def test_split(source: Path, tmp_path: Path, by: str) -> None:
    parts = objects(
        run("split", source, tmp_path / "a.npz", tmp_path / "b.npz", "--by", by, "--share", "30%", "--json")
    )
    counts = [open_trace(str(part["written"])).request_count for part in parts]
    assert sum(counts) == 120
    assert counts[0] < counts[1]
    with pytest.raises(BadInput, match="a share of 'half'"):
        run("split", source, tmp_path / "a.npz", tmp_path / "b.npz", "--share", "half")


def test_generate(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.npz"
    run("generate", out, "--requests", "50", "--seed", "4")
    assert read_trace(out) == generate(Workload(request_count=50, seed=4))
    [said] = objects(run("generate", out, "--like", source, "--json"))
    assert said["requests"] == 120
    assert "fitted to" in read_trace(out).note
    run("generate", out, "--like", source, "--to-block-tokens", "32", "--requests", "10")
    assert (read_trace(out).block_tokens, read_trace(out).request_count) == (32, 10)


def test_reading_is_what_the_options_say(tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    folder.mkdir()
    asked = {"t": 0, "in": 64, "out": 1, "hash_ids": [1]}
    (folder / "a.json").write_text(json.dumps({"block_size": 64, "requests": [asked]}))
    run("convert", folder, tmp_path / "t.npz", "--spread", "0", "--seed", "3")
    assert read_trace(tmp_path / "t.npz") == open_trace(folder, Reading(spread_s=0, seed=3))


def test_a_person_who_waits_sees_how_far_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr(
        trace_cli, "bar", lambda label, total: cli_progress.Bar(label, total, lambda: next(seconds))
    )
    chats = tmp_path / "chats.jsonl"
    save_trace(chats, open_trace(source), "qwen")
    for path in (source, chats):
        with pytest.raises(SystemExit):
            trace.main(["info", str(path)])
        out, err = capsys.readouterr()
        assert f"{path.name}: 120 requests" in out
        assert err.endswith("\r")  # Cleared; colours and the like are for a terminal.
        assert "\r" not in out
    assert "reading chats.jsonl [#" in err
