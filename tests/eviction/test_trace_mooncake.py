"""Traces as Mooncake publishes them: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.traces.mooncake import mooncake_lines, read_mooncake
from kvcache.eviction.traces.rows import LINE_BYTES_MAX


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def line(at: float, tokens: int, hashes: list[int], answer: int = 5) -> dict[str, object]:
    return {"timestamp": at, "input_length": tokens, "output_length": answer, "hash_ids": hashes}


def test_blocks_are_numbered_as_they_appear_and_the_last_may_be_partial(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl",
        line(9.0, 1_100, [70, 71, 90]),
        line(3, 1_024, [70, 71]),
        "",
        line(12, 1_600, [70, 71, 90, 95]),
        line(13, 0, []),
    )
    trace = read_mooncake(path, sort=True)
    assert trace.arrivals_ms.tolist() == [3, 9, 12, 13]
    assert trace.parents.tolist() == [-1, 0, 1, 2]
    assert trace.leaves.tolist() == [1, 2, 3, -1]
    assert trace.tokens.tolist() == [512, 512, 512, 64]
    assert [each.prompt_tokens for each in trace.requests()] == [1_024, 1_536, 1_600, 0]


def test_a_partial_block_is_of_its_own_length(tmp_path: Path) -> None:
    trace = read_mooncake(written(tmp_path / "a.jsonl", line(0, 600, [1, 2]), line(1, 700, [1, 3])))
    assert trace.tokens.tolist() == [512, 88, 188]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("3", "no object"),
        ({"timestamp": 1, "input_length": 1, "output_length": 1}, "no hash_ids"),
        (line(-1, 5, [1]), "timestamp"),
        (line(0, 5, [1], answer=1 << 31), "output_length"),
        (line(0, 1, [True]), "hash_ids"),
        (line(0, 1_024, [2, 1]), "line 2 of .* block 2 has two parents"),
        (line(0, 1_536, [1, 2, 1]), "line 2 of .* block 1 has two parents"),
        (line(-1e300, 5, [1]), "timestamp in line 2"),
        (line(0, 5, [1 << 64]), "hash_ids in line 2"),
        (line(0, 5, [1.5]), "hash_ids in line 2"),
        (" " * (LINE_BYTES_MAX + 1), "too long"),
    ],
)
def test_what_is_no_trace_is_refused_in_plain_words(tmp_path: Path, bad: object, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        read_mooncake(written(tmp_path / "a.jsonl", line(0, 1_024, [1, 2]), bad))
    assert caught.value.code == "bad_trace"
    with pytest.raises(BadInput, match="cannot be read"):
        read_mooncake(tmp_path / "none.jsonl")


def test_time_that_runs_back_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", line(9, 512, [1]), "", line(3, 512, [2]))
    with pytest.raises(BadInput, match=r"line 3 of .* is at 3 ms, the request before it at 9 ms"):
        read_mooncake(path)
    assert read_mooncake(path, sort=True).arrivals_ms.tolist() == [3, 9]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lines = [line(0, 1_100, [0, 1, 2]), line(4, 1_024, [0, 1]), line(9, 700, [3, 4])]
    trace = read_mooncake(written(tmp_path / "a.jsonl", *lines))
    assert [json.loads(each) for each in mooncake_lines(trace)] == lines
