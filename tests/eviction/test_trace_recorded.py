"""Recordings that were torn or damaged: what is there is read, and what is wrong is said."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import BadInput
from kvcache.eviction.traces.files import open_trace
from kvcache.eviction.traces.record_format import MAGIC, Head, packed_chunk
from kvcache.eviction.traces.recorded import read_recorded
from tests.eviction.record_world import Played, content, made


def recorded(folder: Path) -> Path:
    Played(folder).play(made(count=60), every=10)
    [path] = folder.glob("*.kvrec")
    return path


def test_a_torn_last_record_is_dropped_and_said(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    whole = read_recorded(path)
    data = path.read_bytes()
    for cut in (1, 3, 20):
        path.write_bytes(data[:-cut])
        torn = read_recorded(path)
        assert "1 with a torn last record, which was dropped" in torn.note
        assert content(torn) == content(whole)[: torn.request_count]
        assert 40 < torn.request_count < whole.request_count
    assert "torn" not in whole.note


@given(at=st.integers(0, 1 << 20), flip=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=150)
@pytest.mark.slow
def test_damage_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, flip: int, cut: bool) -> None:
    path = recorded(tmp_path_factory.mktemp("record"))
    whole, data = read_recorded(path), bytearray(path.read_bytes())
    if cut:
        del data[at % len(data) :]
    else:
        data[at % len(data)] ^= flip
    path.write_bytes(data)
    try:
        read = read_recorded(path)
    except BadInput as error:
        assert error.code == "bad_trace"
        assert path.name in str(error)
    else:
        assert content(read) == content(whole)[: read.request_count] if read.request_count else True


def test_a_last_chunk_that_was_never_filled_is_torn(tmp_path: Path) -> None:
    """After a power cut a file may be as long as it was to be, and empty at its end."""
    path = recorded(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes(9))
    assert "torn" in read_recorded(path).note


def test_a_file_that_had_just_begun_does_not_hide_the_others(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    whole = read_recorded(tmp_path)
    for cut in (0, 1, 8, 9, 10, 40, len(HEAD.packed()) - 1):
        (tmp_path / "next.kvrec").write_bytes(HEAD.packed()[:cut])
        read = read_recorded(tmp_path)
        assert content(read) == content(whole)
        assert "1 with a torn last record" in read.note
    assert "torn" not in read_recorded(path).note


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x78\x9c")  # The first chunk's records, packed.
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        BadInput, match=rf"the chunk at byte {at - 8} of .* is damaged.*its checksum is another"
    ):
        read_recorded(path)


def chunk(*values: int) -> bytes:
    return packed_chunk(bytes(values))


HEAD = Head("a" * 16, 0, 1, 0, 0, 128, 1.0)
BAD: dict[str, tuple[bytes, str]] = {
    "not a recording": (b"hello", "is no recording"),
    "cut head": (HEAD.packed()[:20], "has no requests.*1 with a torn last record"),
    "empty": (MAGIC, "has no requests.*1 with a torn last record"),
    "other head": (HEAD.packed().replace(b"aaaa", b"aaab"), "the head of .* is damaged"),
    "no block": (HEAD.packed() + chunk(0, 0, 3, 0, 0), "chunk 0 of .* speaks of block -2"),
    "no request": (HEAD.packed() + chunk(3, 9, 0, 0, 0), "a request 9 back"),
    "no kind": (HEAD.packed() + chunk(77), "a record of kind 77"),
    "no hint": (HEAD.packed() + chunk(0, 0, 0, 1, 2, 0, 3, 1, 0, 50, 0), "has the hint 50"),
    "not whole": (HEAD.packed() + chunk(0, 0, 0), "makes no sense"),
    "no number": (HEAD.packed() + chunk(0, *[255] * 12), "makes no sense"),
    "a long run": (HEAD.packed() + chunk(0, 0, 0, 1, 255, 255, 255, 255, 1, 0), "has a run of"),
    "a fat tail": (HEAD.packed() + chunk(0, 0, 0, 0, 128, 1), "a partial block of 128 tokens"),
    "a bomb": (HEAD.packed() + b"", "has no requests"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_recording_is_refused(tmp_path: Path, case: str) -> None:
    data, said = BAD[case]
    path = tmp_path / "t.kvrec"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=said) as caught:
        open_trace(path) if data.startswith(MAGIC) else read_recorded(path)
    assert caught.value.code == "bad_trace"


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    packed = zlib.compress(bytes(64 << 20), 9)
    bomb = len(packed).to_bytes(4, "little") + zlib.crc32(packed).to_bytes(4, "little") + packed
    (tmp_path / "t.kvrec").write_bytes(HEAD.packed() + bomb)
    with pytest.raises(BadInput, match="too large"):
        read_recorded(tmp_path)
