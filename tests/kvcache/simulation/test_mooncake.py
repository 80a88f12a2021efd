"""Traces as Mooncake publishes them: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcache.errors import BadInput
from kvcache.simulation.mooncake import LINE_BYTES_MAX, read_mooncake


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
    trace = read_mooncake(path)
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
        (line(0, 1_024, [2, 1]), "two parents"),
        (" " * (LINE_BYTES_MAX + 1), "too long"),
    ],
)
def test_what_is_no_trace_is_refused_in_plain_words(tmp_path: Path, bad: object, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        read_mooncake(written(tmp_path / "a.jsonl", line(0, 1_024, [1, 2]), bad))
    assert caught.value.code == "bad_trace"
    with pytest.raises(BadInput, match="cannot be read"):
        read_mooncake(tmp_path / "none.jsonl")
