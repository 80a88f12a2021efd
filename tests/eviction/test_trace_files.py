"""The front door: every format is recognised by its content, read the same, and refused by line or field."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import BadInput
from kvcache.eviction.traces.files import (
    KVTRACE,
    MOONCAKE,
    QWEN,
    TESTER,
    WRITABLE,
    Reading,
    format_of,
    open_trace,
    save_trace,
)
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace, write_trace

Fields = dict[str, object]


def made() -> Trace:
    """Some of everything: sessions, fan-outs and one-shots, in blocks of 16."""
    return generate(Workload(request_count=60, block_tokens=16, seed=3))


def content(trace: Trace) -> list[tuple[object, ...]]:
    """What a trace says, but for how its blocks are numbered: they are named by their first use."""
    names: dict[int, int] = {}
    return [
        (
            request.arrival_ms - trace.arrivals_ms[0],
            [names.setdefault(block, len(names)) for block in request.blocks],
            request.prompt_tokens,
            request.output_tokens,
        )
        for request in trace.requests()
    ]


def chat(number: int, at_s: float, hashes: list[int], parent: int = -1, **fields: object) -> Fields:
    """A line of Qwen-Bailian's."""
    plain: Fields = {"chat_id": number, "parent_chat_id": parent, "timestamp": at_s, "turn": 1}
    lengths: Fields = {"input_length": 16 * len(hashes), "output_length": 5, "type": "text"}
    return {**plain, **lengths, "hash_ids": hashes, **fields}


def lines(path: Path, *each: object) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in each) + "\n")
    return path


def asked(at_s: float, hashes: list[int], **fields: object) -> Fields:
    """A request of kv-cache-tester's."""
    plain: Fields = {"t": at_s, "type": "n", "in": 64 * len(hashes) + 9, "out": 7, "stop": "tool_use"}
    return {**plain, "hash_ids": hashes, **fields}


def session(path: Path, *requests: object, **fields: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"id": path.stem, "block_size": 64, "requests": requests, **fields}))
    return path


@pytest.mark.parametrize("form", WRITABLE)
def test_what_is_written_in_a_format_is_recognised_and_read(tmp_path: Path, form: str) -> None:
    trace = made()
    path = tmp_path / "trace"
    assert save_trace(path, trace, form) == form
    assert format_of(path) == form
    read = open_trace(path, Reading(block_tokens=16))
    assert content(read) == content(trace)
    if form in (QWEN, TESTER):
        firsts = [trace.sessions.index(each) for each in trace.sessions]
        assert [read.sessions.index(each) for each in read.sessions] == firsts
        assert set(read.kinds) == set(trace.kinds)


def test_the_name_says_the_format_only_of_npz(tmp_path: Path) -> None:
    assert save_trace(tmp_path / "a.npz", made()) == KVTRACE
    with pytest.raises(BadInput, match="no format for"):
        save_trace(tmp_path / "a.jsonl", made())
    with pytest.raises(BadInput, match="format 'mooncale'"):
        save_trace(tmp_path / "a.jsonl", made(), "mooncale")
    with pytest.raises(BadInput, match="cannot be written"):
        save_trace(tmp_path / "none" / "a.jsonl", made(), MOONCAKE)


# --- Qwen-Bailian ---------------------------------------------------------------------------------


def test_chats_of_one_parent_are_a_session(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "q.jsonl",
        chat(7, 0.25, [1, 2]),
        chat(8, 1, [3], parent=99),
        chat(9, 1.5, [1, 2, 4], parent=7, type="image"),
        chat(10, 2.25, [3, 5], parent=99),
    )
    trace = open_trace(path)
    assert trace.block_tokens == 16
    assert trace.arrivals_ms.tolist() == [250, 1_000, 1_500, 2_250]
    assert trace.sessions.tolist() == [0, 1, 0, 1]
    assert [request.kind for request in trace.requests()] == ["text", "text", "image", "text"]


def test_a_name_behind_another_parent_is_another_block(tmp_path: Path) -> None:
    trace = open_trace(lines(tmp_path / "q.jsonl", chat(1, 0, [1, 2, 2]), chat(2, 1, [3, 2])))
    assert trace.parents.tolist() == [-1, 0, 1, -1, 3]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (chat(2, 5, [1], parent=2), "parent_chat_id in line 3 of .* that is this chat itself"),
        (chat(50, 5, [1]), "parent_chat_id in line 2 of .* is 50.* comes later, in line 3"),
        (chat(1, 5, [1]), "chat_id in line 3 .* an earlier line has it too"),
        (chat(2, 0.5, [1]), "line 3 .* is at 500 ms, the request before it at 1000 ms"),
        (chat(2, float("nan"), [1]), "timestamp in line 3 of .* is 'nan'"),
        (chat(2, 1e300, [1]), "timestamp in line 3"),
        (chat(2, 5, [1], timestamp="5"), "timestamp in line 3"),
        (chat(2, 5, [1], type=7), "type in line 3"),
        (chat(2, 5, [1], type="x" * 65), "type in line 3"),
        (chat(2, 5, [1], turn=-1), "turn in line 3"),
        (chat(2, 5, [-1]), "hash_ids in line 3"),
        (chat(2, 5, [1], input_length=None), "input_length in line 3 of .* is missing"),
        ('{"chat_id": 2, "pare', "line 3 of .* is no JSON"),
    ],
)
def test_a_bad_line_of_qwens_is_refused(tmp_path: Path, bad: object, said: str) -> None:
    path = lines(tmp_path / "q.jsonl", chat(1, 0, [1]), chat(3, 1, [1, 2], parent=50), bad)
    with pytest.raises(BadInput, match=said) as caught:
        open_trace(path)
    assert caught.value.code == "bad_trace"


def test_chats_out_of_order_are_one_session_if_sorting_is_asked(tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", chat(2, 5, [1, 2], parent=1), chat(1, 1, [1]))
    trace = open_trace(path, Reading(sort=True))
    assert trace.arrivals_ms.tolist() == [1_000, 5_000]
    assert trace.sessions.tolist() == [0, 0]


def test_there_are_256_types_at_most(tmp_path: Path) -> None:
    chats = [chat(number, number, [1], type=f"t{number}") for number in range(257)]
    with pytest.raises(BadInput, match=r"line 257 of .*: too many kinds"):
        open_trace(lines(tmp_path / "q.jsonl", *chats))


# --- kv-cache-tester ------------------------------------------------------------------------------


def test_subagents_run_beside_their_session(tmp_path: Path) -> None:
    inner = {"t": 4, "type": "subagent", "requests": [asked(0, [1, 9]), asked(7, [1, 9, 10])]}
    path = session(tmp_path / "a.json", asked(1, [1, 2]), inner, asked(6, [1, 2, 3], stop=""))
    trace = open_trace(path, Reading(spread_s=0))
    assert trace.arrivals_ms.tolist() == [1_000, 4_000, 6_000, 11_000]
    assert [request.kind for request in trace.requests()] == ["tool_use", "subagent", "other", "subagent"]
    assert [len(request.blocks) for request in trace.requests()] == [2, 2, 3, 3]
    assert trace.block_count == 5
    assert set(trace.sessions) == {0}


def test_sessions_share_what_their_tools_take_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    session(folder / "a.json", asked(0, [1, 2, 3]), tool_tokens=100, system_tokens=40)
    session(folder / "b.json", asked(0, [1, 2, 3, 4]), tool_tokens=100, system_tokens=40)
    session(folder / "c.json", asked(0, [1, 2, 3, 4, 5]), tool_tokens=101, system_tokens=40)
    session(folder / "d.json", asked(0, [1, 2, 3, 4]), tool_tokens=100, system_tokens=40)
    trace = open_trace(folder)
    assert format_of(folder) == TESTER
    assert trace.request_count == 3
    assert "1 like others left out" in trace.note
    assert "made up" in trace.note
    firsts = sorted(trace.chain(leaf)[:3] for leaf in trace.leaves)
    assert firsts[0][:2] == firsts[1][:2]
    assert len({tuple(each) for each in firsts}) == 3
    assert open_trace(folder) == trace
    assert open_trace(folder, Reading(seed=2)).arrivals_ms != trace.arrivals_ms


@pytest.mark.parametrize(
    ("requests", "fields", "said"),
    [
        ([asked(1, [1]), asked(0.5, [1])], {}, r"t in requests\[1\] in .* is 500 ms, before it 1000 ms"),
        ([asked(1, [1, 2, 1])], {}, r"hash_ids in requests\[0\] in .* name a block twice"),
        ([asked(1, [1], stop=3)], {}, r"stop in requests\[0\]"),
        ([asked(-1, [1])], {}, r"t in requests\[0\]"),
        ([3], {}, r"requests\[0\] in .* is no object"),
        ([{"t": 0, "requests": 5}], {}, r"requests\[0\] in .* has no list of requests"),
        ([], {"block_size": 0}, "block_size in"),
        ([], {"block_size": 1e9}, "block_size in"),
        ([], {"tool_tokens": "x"}, "tool_tokens in"),
        ([], {"start": -5}, "start in"),
        ([], {}, "has no requests"),
    ],
)
def test_a_bad_session_is_refused(tmp_path: Path, requests: list[object], fields: Fields, said: str) -> None:
    path = session(tmp_path / "a.json", *requests, **fields)
    with pytest.raises(BadInput, match=said) as caught:
        open_trace(path)
    assert caught.value.code == "bad_trace"


def test_subagents_do_not_go_down_for_ever(tmp_path: Path) -> None:
    inner: Fields = asked(0, [1])
    for _ in range(12):
        inner = {"t": 0, "requests": [inner]}
    with pytest.raises(BadInput, match="subagents of subagents"):
        open_trace(session(tmp_path / "a.json", inner))


def test_sessions_of_two_block_lengths_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    session(folder / "a.json", asked(0, [1]))
    session(folder / "b.json", asked(0, [1, 2]), block_size=32)
    with pytest.raises(BadInput, match=r"block_size in .*b.json is 32"):
        open_trace(folder)


# --- what is none ---------------------------------------------------------------------------------


NONE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "blank": (b"\n\n  \n", "it is empty"),
    "text": (b"hello\n", "it begins with b'hello"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
    "gzip": (b"\x1f\x8b\x08\x00", "packed with gzip"),
    "npy": (b"\x93NUMPY\x01\x00", "one .npy array"),
    "other fields": (b'{"prompt": "x", "answer": 3}\n', "has the fields answer, prompt"),
    "a list": (b"[1, 2]\n", "it begins with"),
    "a number in braces": (b"{1}\n", "no JSON"),
    "zip": (b"PK\x03\x04" + bytes(40), "cannot be read"),
    "cut object": (b'{"id": "a", "requests": [{"t"', "no JSON"),
}


@pytest.mark.parametrize("case", NONE)
def test_what_is_no_trace_says_what_it_looks_like(tmp_path: Path, case: str) -> None:
    data, said = NONE[case]
    path = tmp_path / "t"
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        open_trace(path)
    assert caught.value.code == "bad_trace"
    assert said in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not there"):
        open_trace(tmp_path / "none.npz")
    with pytest.raises(BadInput, match=r"has no \.json file"):
        open_trace(tmp_path)
    with pytest.raises(BadInput, match="blocks of -1 tokens"):
        open_trace(tmp_path / "none.npz", Reading(block_tokens=-1))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="neither a file nor a folder"):
        open_trace(tmp_path / "pipe")


def test_a_trace_without_requests_is_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.npz", made().head(0))
    with pytest.raises(BadInput, match="has no requests"):
        open_trace(tmp_path / "t.npz")


def as_npz(path: Path, trace: Trace) -> None:
    write_trace(path, trace)


def as_form(form: str) -> Callable[[Path, Trace], None]:
    def write(path: Path, trace: Trace) -> None:
        save_trace(path, trace, form)

    return write


def as_session(path: Path, trace: Trace) -> None:
    session(path, asked(0, [1, 2]), asked(3, [1, 2, 3]))


WRITERS = {"npz": as_npz, "mooncake": as_form(MOONCAKE), "qwen": as_form(QWEN), "tester": as_session}


@given(form=st.sampled_from(sorted(WRITERS)), at=st.integers(0, 1 << 20), how=st.integers(0, 511))
@settings(max_examples=150)
@pytest.mark.slow
def test_a_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, form: str, at: int, how: int
) -> None:
    """One byte of it is another, or it ends early: never anything but a trace or a refusal."""
    path = tmp_path_factory.mktemp("trace") / "t"
    WRITERS[form](path, made().head(12))
    data = bytearray(path.read_bytes())
    if how >= 256:
        del data[at % len(data) :]
    else:
        data[at % len(data)] ^= how
    path.write_bytes(data)
    try:
        trace = open_trace(path)
    except BadInput as error:
        assert error.code == "bad_trace"
        assert str(path.name) in str(error) or zipfile.is_zipfile(path)
    else:
        assert replace(trace) == trace  # It checks itself.


def test_an_npz_that_was_cut_off_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, made())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="cut off has lost its directory"):
        open_trace(path)
