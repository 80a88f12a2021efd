"""Files of strangers, or of people in a hurry: each ends in a message, in little memory, not in nonsense."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcache.errors import BadInput
from kvcache.eviction.commands.trace import trace as command
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.traces.files import QWEN, TESTER, WRITABLE, Reading, open_trace, save_trace
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.record_format import CHUNK_BYTES_MAX, Head, chunks_of, opened_file, packed_chunk
from kvcache.eviction.traces.rows import LINE_BYTES_MAX
from kvcache.eviction.traces.trace import Trace, write_trace

HEAD = Head("a" * 16, 0, 1, 0, 0, 128, 1.0)


def made(requests: int = 40) -> Trace:
    return generate(Workload(request_count=requests, block_tokens=16, seed=3))


def lines(path: Path, *each: dict[str, object]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in each))
    return path


def asked(at: int, tokens: int, hashes: list[int]) -> dict[str, object]:
    """A line of Mooncake's."""
    return {"timestamp": at, "input_length": tokens, "output_length": 1, "hash_ids": hashes}


def chat(number: int, parent: int) -> dict[str, object]:
    """A line of Qwen-Bailian's."""
    lengths = {"input_length": 20, "output_length": 5, "hash_ids": [1, 2]}
    return {"chat_id": number, "parent_chat_id": parent, "timestamp": 1.0, "type": "text", **lengths}


# --- blocks of another length than was taken for granted -------------------------------------------


@pytest.mark.parametrize("form", ["mooncake", "qwen"])
@pytest.mark.parametrize("factor", [2, 64])
def test_blocks_of_another_length_are_not_replayed(tmp_path: Path, form: str, factor: int) -> None:
    """They would give hit ratios of 2,000 %."""
    full = 512 if form == "mooncake" else 16
    other = full // factor if form == "mooncake" else full * factor
    trace = generate(Workload(request_count=60, block_tokens=other, seed=3))
    save_trace(tmp_path / "t.jsonl", trace, form)
    with pytest.raises(BadInput, match=rf"line \d+ of .*t\.jsonl: .* blocks of {full} tokens") as caught:
        open_trace(tmp_path / "t.jsonl")
    assert f"--block-tokens {other}" in caught.value.todo
    read = open_trace(tmp_path / "t.jsonl", Reading(block_tokens=other))
    assert replay(read, "belady", 100_000).prefix_token_hit_ratio < 1


def test_odd_lines_are_read_and_never_more_is_found_than_was_asked_for(tmp_path: Path) -> None:
    whole = [asked(at, 1_024, [1, 2]) for at in range(3)]
    trace = open_trace(lines(tmp_path / "t.jsonl", *whole, asked(9, 1, [1, 2]), asked(9, 9_999, [1, 2])))
    assert trace.input_tokens.tolist() == [1_024, 1_024, 1_024, 1_024, 9_999]
    write_trace(tmp_path / "t.npz", replace(made(), input_tokens=array("i", bytes(4 * 40))))
    trace = open_trace(tmp_path / "t.npz")
    assert 0 < replay(trace, "belady", 100_000).prefix_token_hit_ratio < 1


def test_a_prompt_of_more_tokens_than_a_length_can_be_is_refused(tmp_path: Path) -> None:
    count = 40_000
    chain = Trace(
        65_535,
        array("i", range(-1, count - 1)),
        array("H", [65_535]) * count,
        *(array(code, [value]) for code, value in zip("iqiiiB", (count - 1, 0, 0, 0, -1, 0), strict=True)),
    )
    write_trace(tmp_path / "t.npz", chain)
    with pytest.raises(BadInput, match=r"a prompt of 2,621,400,000 tokens"):
        open_trace(tmp_path / "t.npz")


def test_blocks_that_no_request_has_do_not_count(tmp_path: Path) -> None:
    """Per cent would be of more than there is."""
    whole = made()
    write_trace(tmp_path / "t.npz", whole.head(10))
    read = open_trace(tmp_path / "t.npz")
    assert read.block_count == len({block for each in whole.head(10).requests() for block in each.blocks})
    assert [each.prompt_tokens for each in read.requests()] == [
        each.prompt_tokens for each in whole.head(10).requests()
    ]
    write_trace(tmp_path / "again.npz", read)
    assert open_trace(tmp_path / "again.npz") == read


# --- words --------------------------------------------------------------------------------------------


WORDS = "\x1b[2J\x1b]0;mine\x07\u202e<b>\nkvcache: all is well"


def test_words_of_strangers_do_not_reach_the_terminal(tmp_path: Path) -> None:
    trace = made()
    write_trace(tmp_path / "t.npz", replace(trace, kinds=(WORDS, "b", "c"), note=WORDS))
    shown = CliRunner().invoke(command, ["info", str(tmp_path / "t.npz")]).output
    assert "<b>?kvcache" in shown
    assert not set("\x1b\x07\u202e") & set(shown) and "\nkvcache" not in shown


def test_half_a_character_can_be_shown_and_written(tmp_path: Path) -> None:
    source = lines(tmp_path / "t.jsonl", {**chat(1, -1), "type": "\ud800"})
    for form in WRITABLE:
        save_trace(tmp_path / form, open_trace(source), form)
    done = CliRunner().invoke(command, ["info", str(source)], catch_exceptions=False)
    assert "kinds     ? 1" in done.output


# --- archives, lines, circles --------------------------------------------------------------------------


def test_an_archive_that_numpy_would_not_write_is_refused(tmp_path: Path) -> None:
    """A packed member that is damaged raises what its own library raises."""
    write_trace(tmp_path / "t.npz", made())
    packed = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "t.npz") as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as odd:
        for name in plain.namelist():
            odd.writestr(name, plain.read(name))
    data = bytearray(packed.getvalue())
    data[60] ^= 255
    (tmp_path / "t.npz").write_bytes(data)
    with pytest.raises(BadInput, match="packed in another way"):
        open_trace(tmp_path / "t.npz")


def test_a_first_line_that_is_too_long_is_said_to_be(tmp_path: Path) -> None:
    lines(tmp_path / "t.jsonl", {"timestamp": 1, "hash_ids": "x" * LINE_BYTES_MAX})
    with pytest.raises(BadInput, match=r"line 1 of .* is too long"):
        open_trace(tmp_path / "t.jsonl")


def test_sorting_hides_no_circle_of_chats(tmp_path: Path) -> None:
    source = lines(tmp_path / "t.jsonl", chat(4, 3), chat(3, 2), chat(2, 1), chat(1, 3))
    with pytest.raises(BadInput, match=r"parent_chat_id of chat . .* goes on from itself"):
        open_trace(source, Reading(sort=True))
    open_trace(lines(source, chat(4, 3), chat(3, 2), chat(2, 1), chat(1, -1)), Reading(sort=True))


# --- recordings ------------------------------------------------------------------------------------------


def test_a_recording_is_unpacked_a_chunk_at_a_time(tmp_path: Path) -> None:
    """4 KiB each, and 4 MiB once they are unpacked."""
    path = tmp_path / "t.kvrec"
    path.write_bytes(HEAD.packed() + packed_chunk(bytes(CHUNK_BYTES_MAX)) * 6)
    tracemalloc.start()
    try:
        assert sum(len(records) for _, records in chunks_of(opened_file(path))) == 6 * CHUNK_BYTES_MAX
        assert tracemalloc.get_traced_memory()[1] < 4 * CHUNK_BYTES_MAX
    finally:
        tracemalloc.stop()


def test_numbers_of_blocks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of known blocks gives each another number: a few bytes could fill the memory."""
    monkeypatch.setattr("kvcache.eviction.traces.recorded.NUMBERS_MAX", 1_000)
    new, old = bytes([0, 0, 0, 1, 100, 0]), bytes([0, 0, 0, 1, 101, 50, 0])
    path = tmp_path / "t.kvrec"
    path.write_bytes(HEAD.packed() + packed_chunk(new + old * 10))
    assert open_trace(path).block_count == 50
    path.write_bytes(HEAD.packed() + packed_chunk(new + old * 20))
    with pytest.raises(BadInput, match="number too many blocks"):
        open_trace(path)


def test_a_copy_among_recordings_is_not_counted_twice(tmp_path: Path) -> None:
    data = HEAD.packed() + packed_chunk(bytes([0, 0, 0, 1, 6, 0]))
    (tmp_path / "a.kvrec").write_bytes(data)
    assert open_trace(tmp_path).request_count == 1
    (tmp_path / "b.kvrec").write_bytes(data)
    with pytest.raises(BadInput, match=r"first in the head of .*b\.kvrec is 1"):
        open_trace(tmp_path)


# --- where it is written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["kvtrace-v1", QWEN])
def test_what_was_there_stays_until_what_is_new_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    target = tmp_path / "t"
    target.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvcache.eviction.traces.files.write_trace", full)
    monkeypatch.setattr("kvcache.eviction.traces.files.qwen_lines", full)
    with pytest.raises(BadInput, match="No space left"):
        save_trace(target, made(), form)
    assert target.read_text() == "before" and [target] == list(tmp_path.iterdir())
    monkeypatch.undo()
    link = tmp_path / "link"
    link.symlink_to(target)
    save_trace(link, made(), form)
    assert link.is_symlink() and open_trace(target).request_count == 40
    save_trace(Path(os.devnull), made(), form)
    assert not Path(os.devnull).is_file()


def test_sessions_are_not_mixed_with_others(tmp_path: Path) -> None:
    save_trace(tmp_path / "new", made(), TESTER)
    with pytest.raises(BadInput, match=r"has trace_.*json"):
        save_trace(tmp_path / "new", made(3), TESTER)
    assert open_trace(tmp_path / "new").request_count == 40


def test_two_parts_are_two_files(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.npz", made())
    part = str(tmp_path / "a.npz")
    done = CliRunner().invoke(command, ["split", str(tmp_path / "t.npz"), part, f"{tmp_path}/./a.npz"])
    assert isinstance(done.exception, BadInput) and "both parts" in done.exception.what
    assert not Path(part).exists()
