"""The recorder: what is read back is what was asked, in whatever files it lies, whatever was forgotten."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.clock import NS_PER_MS
from kvcache.eviction.traces.edit import coarsened, renumbered
from kvcache.eviction.traces.files import RECORDED, format_of, open_trace
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.record import Recorder
from kvcache.eviction.traces.record_format import Head, packed_chunk
from kvcache.eviction.traces.recorded import read_recorded
from kvcache.eviction.traces.trace import Trace
from tests.eviction.record_world import BLOCK, START_NS, Played, alike, content, hashes, made, whole_blocks


@given(seed=st.integers(0, 200), every=st.integers(0, 9), files=st.sampled_from([0, 1, 7, 30]))
@settings(max_examples=40)
@pytest.mark.slow
def test_what_is_read_is_what_was_asked(
    tmp_path_factory: pytest.TempPathFactory, seed: int, every: int, files: int
) -> None:
    folder = tmp_path_factory.mktemp("record")
    trace = made(seed)
    Played(folder).play(trace, every, files)
    read = read_recorded(folder)
    if files:  # Partial blocks are known within one file only: repeats of a whole prompt, no other.
        whole = [
            (at, blocks[: tokens // 128], tokens) for at, blocks, tokens in content(coarsened(trace, 128))
        ]
        found = [(at, blocks[: tokens // 128], tokens) for at, blocks, tokens in content(read)]
        assert [each[::2] for each in found] == [each[::2] for each in whole]
        assert alike([each[1] for each in found], [each[1] for each in whole])
    else:
        assert content(read) == content(coarsened(trace, 128))


def test_a_file_is_read_without_those_before_it(tmp_path: Path) -> None:
    trace = made()
    Played(tmp_path).play(trace, files=30)
    for path in sorted(tmp_path.glob("*.kvrec"))[:2]:
        path.unlink()
    read = read_recorded(tmp_path)
    part = content(coarsened(trace, 128))[60:]
    assert [tokens for _, _, tokens in content(read)] == [tokens for _, _, tokens in part]
    assert alike(
        [blocks[: tokens // 128] for _, blocks, tokens in content(read)],
        [blocks[: tokens // 128] for _, blocks, tokens in part],
    )


@given(seed=st.integers(0, 100), known_max=st.integers(2, 60), files=st.sampled_from([0, 11]))
@settings(max_examples=40)
@pytest.mark.slow
def test_forgetting_loses_what_is_shared_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, seed: int, known_max: int, files: int
) -> None:
    folder = tmp_path_factory.mktemp("record")
    trace = made(seed)
    played = Played(folder, known_max=known_max)
    played.play(trace, every=5, files=files)
    read, expected = content(read_recorded(folder)), content(coarsened(trace, 128))
    assert [each[::2] for each in read] == [each[::2] for each in expected]
    assert played.recorder.known_blocks <= 2 * known_max + 2 * max(len(blocks) for _, blocks, _ in expected)


def test_what_the_last_generation_had_is_still_known(tmp_path: Path) -> None:
    recorder = Recorder(b"s" * 16, 0, known_max=25)
    for first in (0, 1_000, 2_000, 0):  # 10 recorded blocks each; the third begins a generation.
        recorder.asked(0, run(first, 80), b"", BLOCK, "", False)
    assert told(tmp_path, recorder).leaves.tolist() == [9, 19, 29, 9]


def test_records_are_small(tmp_path: Path) -> None:
    trace = made(count=2_000)
    Played(tmp_path).play(trace, every=500)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size / trace.request_count < 12


def test_nothing_of_a_hash_is_written(tmp_path: Path) -> None:
    recorder = Recorder(b"s" * 16, 0)
    prefix = bytes(range(200, 248)) * 16
    recorder.asked(0, prefix, b"", BLOCK, "", False)
    records = recorder.take()
    assert len(records) < 12
    assert not any(prefix[at : at + 3] in records for at in range(64))


def test_two_lives_share_nothing_and_stand_in_order(tmp_path: Path) -> None:
    trace = made(count=20)
    for life in ("b", "c"):
        Played(tmp_path, life=life * 16).play(trace)
    read = read_recorded(tmp_path)
    assert read.request_count == 2 * trace.request_count
    assert len(set(content(read)[0][1])) == len(content(read)[0][1])
    one = read_recorded(next(tmp_path.glob("b*")))
    assert renumbered(read).block_count == 2 * renumbered(one).block_count
    assert format_of(tmp_path) == format_of(next(tmp_path.glob("b*"))) == RECORDED
    assert "2 files of 2 recordings" in open_trace(tmp_path).note


def test_sessions_of_two_lives_are_not_one(tmp_path: Path) -> None:
    for life in ("b", "c"):
        recorder = Recorder(b"s" * 16, 0)
        recorder.asked(0, run(0, 9), b"", BLOCK, "", False)
        recorder.saved(run(0, 9), b"", BLOCK, "t", 7, "final")
        head = Head(life * 16, 0, 1, 0, 0, 128, 1.0)
        (tmp_path / f"{life}.kvrec").write_bytes(head.packed() + packed_chunk(recorder.take()))
    assert read_recorded(tmp_path).sessions.tolist() == [0, 1]


# --- more than a look-up --------------------------------------------------------------------------


def block(number: int) -> bytes:
    return blake2b(number.to_bytes(4, "little"), digest_size=16).digest()


def run(first: int, count: int) -> bytes:
    return b"".join(block(number) for number in range(first, first + count))


def told(folder: Path, recorder: Recorder) -> Trace:
    head = Head("a" * 16, 0, 1, 0, 0, recorder.group_tokens, 1.0)
    (folder / "a.kvrec").write_bytes(head.packed() + packed_chunk(recorder.take()))
    return read_recorded(folder)


def test_a_save_tells_session_hint_and_answer(tmp_path: Path) -> None:
    recorder = Recorder(b"s" * 16, 0)
    recorder.asked(0, run(0, 20), b"", BLOCK, "one", False)
    recorder.asked(1_000_000, run(50, 9), b"", BLOCK, "two", False)
    recorder.saved(run(0, 10), b"", BLOCK, "t", 77, "tool_call")  # The prompt's first part: not yet.
    recorder.saved(run(10, 13), block(9), BLOCK, "t", 77, "tool_call")  # Its rest, and 3 blocks of answer.
    recorder.saved(run(10, 13), block(9), BLOCK, "t", 77, "tool_call")  # Again: nothing new.
    recorder.saved(run(23, 2), block(22), BLOCK, "t", 77, "tool_call")  # 2 more of the answer.
    recorder.saved(run(50, 9), b"", BLOCK, "other", 77, "turn_end")
    recorder.saved(run(90, 5), b"", BLOCK, "t", 5, "final")  # Nobody asked for this.
    trace = told(tmp_path, recorder)
    assert trace.output_tokens.tolist() == [5 * BLOCK, 0]
    assert [request.kind for request in trace.requests()] == ["tool_call", "turn_end"]
    assert trace.sessions.tolist() == [0, 1]
    assert trace.input_tokens.tolist() == [20 * BLOCK, 9 * BLOCK]


def test_ranks_and_repeats_of_one_request_are_one(tmp_path: Path) -> None:
    recorder = Recorder(b"s" * 16, 0)
    for _ in range(4):
        recorder.asked(0, run(0, 20), b"", BLOCK, "one", False)
    recorder.asked(0, run(0, 20), b"", BLOCK, "", False)
    recorder.asked(0, run(0, 20), b"", BLOCK, "", False)
    recorder.asked(0, b"", b"", BLOCK, "none", False)
    trace = told(tmp_path, recorder)
    assert trace.request_count == 3
    assert trace.block_count == 3


def test_a_prompt_of_several_calls_is_one_request(tmp_path: Path) -> None:
    recorder = Recorder(b"s" * 16, 0)
    recorder.asked(0, run(0, 1_024), b"", BLOCK, "one", True)
    recorder.asked(5, run(1_024, 1_021), block(1_023), BLOCK, "one", False)
    recorder.asked(9, run(1_024, 5), block(5_000), BLOCK, "what", False)  # Behind nothing that is known.
    recorder.asked(9, run(0, 1_024), b"", BLOCK, "two", True)
    recorder.saved(run(1_024, 2), block(1_023), BLOCK, "t", 3, "unknown")  # The prompt was longer.
    trace = told(tmp_path, recorder)
    assert [request.prompt_tokens for request in trace.requests()] == [2_045 * BLOCK, 1_026 * BLOCK]
    assert trace.sessions.tolist() == [-1, 0]
    assert list(trace.request(1).blocks[:128]) == list(trace.request(0).blocks[:128])


def test_blocks_of_other_lengths_keep_their_tokens(tmp_path: Path) -> None:
    recorder = Recorder(b"s" * 16, 0)
    recorder.asked(0, run(0, 20), b"", 16, "", False)
    recorder.asked(0, run(100, 7), b"", 48, "", False)
    recorder.asked(0, run(200, 3), b"", 256, "", False)
    trace = told(tmp_path, recorder)
    assert trace.block_tokens == 128
    assert trace.input_tokens.tolist() == [320, 336, 768]
    assert [len(request.blocks) for request in trace.requests()] == [3, 4, 3]
    other = Recorder(b"s" * 16, 0)
    other.asked(0, run(0, 20), b"", 48, "", False)
    assert other.group_tokens == 144


@given(data=st.data())
@settings(max_examples=60)
@pytest.mark.slow
def test_whatever_clients_send_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any calls in any order, files ending anywhere: sound records, and never an error."""
    folder = tmp_path_factory.mktemp("record")
    sample = data.draw(st.sampled_from([1.0, 0.5]))
    played = Played(folder, sample, known_max=data.draw(st.sampled_from([4, 1 << 17])))
    recorder = played.recorder
    small = st.integers(0, 12)
    for step in range(data.draw(st.integers(1, 40))):
        first, count, before = data.draw(small), data.draw(st.integers(0, 30)), data.draw(small)
        parent = data.draw(st.sampled_from([b"", block(before), block(first - 1 if first else 0)]))
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(["", "a", "b"]))
            tokens = data.draw(st.sampled_from([16, 16, 48, 256]))
            recorder.asked(step, run(first, count), parent, tokens, name, data.draw(st.booleans()))
        else:
            hint = data.draw(st.sampled_from(["unknown", "final", "strange"]))
            recorder.saved(run(first, count), parent, 16, "t", data.draw(st.integers(-1, 3)), hint)
        if data.draw(st.integers(0, 5)) == 0 and recorder.group_tokens:
            played.end_file()
    if recorder.group_tokens:
        played.end_file()
        assert read_recorded(folder).request_count == recorder.requests


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sample_has_whole_sessions(tmp_path: Path) -> None:
    workload = Workload(
        request_count=3_000, block_tokens=BLOCK, session_share=1.0, fan_out_share=0.0, question_tokens=400
    )
    trace = whole_blocks(generate(workload))
    played = Played(tmp_path, sample=0.3)
    names, kept = hashes(trace), []
    for request in trace.requests():
        before = played.recorder.requests
        prefix = b"".join(names[each] for each in request.blocks)
        played.recorder.asked(START_NS + request.arrival_ms * NS_PER_MS, prefix, b"", BLOCK, "", False)
        kept.append(played.recorder.requests > before)
    assert 0.2 < sum(kept) / len(kept) < 0.4
    assert played.recorder.dropped == len(kept) - sum(kept)
    sizes = Counter(trace.sessions)
    shares = Counter(session for session, is_kept in zip(trace.sessions, kept, strict=True) if is_kept)
    torn = [session for session in shares if 0 < shares[session] < sizes[session]]
    assert len(torn) < 0.05 * len(sizes)
    played.end_file()
    read = read_recorded(tmp_path)
    assert read.request_count == sum(kept)
    assert "sample 0.3" in read.note
    part = [each for each, is_kept in zip(content(coarsened(trace, 128)), kept, strict=True) if is_kept]
    assert [tokens for _, _, tokens in content(read)] == [tokens for _, _, tokens in part]
    assert alike([blocks for _, blocks, _ in content(read)], [blocks for _, blocks, _ in part])
