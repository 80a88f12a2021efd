"""Traces: what is written is read, and what is not a trace is refused by name."""

from __future__ import annotations

import io
import struct
import zipfile
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import BadInput
from kvcache.eviction.traces.trace import Trace, read_trace, write_trace

REAL = Path(__file__).parents[3] / "shared" / "traces"


texts = st.text(st.characters(codec="utf-8"), max_size=12).map(lambda text: text.rstrip("\0"))


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    block_tokens = draw(st.integers(1, 512))
    parents, tokens = array("i"), array("H")
    for block in range(draw(st.integers(0, 20))):
        full = [-1, *(before for before in range(block) if tokens[before] == block_tokens)]
        parents.append(draw(st.sampled_from(full)))
        tokens.append(draw(st.sampled_from([block_tokens, draw(st.integers(1, block_tokens))])))
    count = draw(st.integers(0, 12))

    def column(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    return Trace(
        block_tokens,
        parents,
        tokens,
        array("i", column(-1, len(parents) - 1)),
        array("q", sorted(column(-(1 << 40), 1 << 40))),
        array("i", column(0, 1 << 30)),
        array("i", column(0, 1 << 30)),
        array("i", column(-1, 1 << 30)),
        array("B", column(0, 255)),
        tuple(
            text.rstrip("\0")
            for text in draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=4))
        ),
        draw(st.text(st.characters(codec="utf-8"), max_size=40)).rstrip("\0"),
    )


def small() -> Trace:
    """Two requests of a conversation, and one that shares its first block: 0 <- 1 <- 2, 0 <- 3."""
    return Trace(
        block_tokens=4,
        parents=array("i", [-1, 0, 1, 0]),
        tokens=array("H", [4, 4, 3, 1]),
        leaves=array("i", [1, 2, 3]),
        arrivals_ms=array("q", [0, 5, 9]),
        input_tokens=array("i", [8, 11, 5]),
        output_tokens=array("i", [2, 2, 2]),
        sessions=array("i", [0, 0, -1]),
        kind_indexes=array("B", [0, 1, 0]),
        kinds=("turn", "end"),
        note="by hand",
    )


def npy(descr: str, shape: str, data: bytes) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def rewritten(path: Path, name: str, data: bytes | None) -> Path:
    """The small trace with one member replaced or taken away."""
    write_trace(path, small())
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members.pop(f"{name}.npy", None)
    if data is not None:
        members[f"{name}.npy"] = data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


@given(trace=traces())
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    write_trace(path, trace)
    assert read_trace(path) == trace


@given(trace=traces())
@settings(max_examples=60, deadline=None)
def test_chains_follow_parents(trace: Trace) -> None:
    for request in trace.requests():
        assert request.prompt_tokens == sum(trace.tokens[block] for block in request.blocks)
        assert list(request.blocks) == sorted(set(request.blocks))
        for parent, block in zip([-1, *request.blocks], request.blocks, strict=False):
            assert trace.parents[block] == parent
        assert (request.blocks[-1] if request.blocks else -1) == trace.leaves[request.index]


def test_requests_say_what_the_arrays_say() -> None:
    requests = list(small().requests())
    assert [list(request.blocks) for request in requests] == [[0, 1], [0, 1, 2], [0, 3]]
    assert [request.prompt_tokens for request in requests] == [8, 11, 5]
    assert [request.kind for request in requests] == ["turn", "end", "turn"]
    assert [request.session for request in requests] == [0, 0, -1]


def test_head_keeps_the_first_requests() -> None:
    head = small().head(2)
    assert head.request_count == 2
    assert [list(request.blocks) for request in head.requests()] == [[0, 1], [0, 1, 2]]


def test_the_same_trace_is_the_same_file(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.npz", small())
    write_trace(tmp_path / "b.npz", small())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_requests_are_put_in_order_of_arrival_if_asked(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "t.npz", "t_ms", ints("q", 9, 5, 5))
    with pytest.raises(BadInput, match="request 1 arrives at 5 ms, the one before it at 9 ms"):
        read_trace(path)
    trace = read_trace(path, sort=True)
    assert list(trace.arrivals_ms) == [5, 5, 9]
    assert list(trace.leaves) == [2, 3, 1]
    assert list(trace.input_tokens) == [11, 5, 8]


def test_other_integer_widths_are_taken(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "t.npz", "leaf", ints("q", 1, 2, 3))
    assert read_trace(path) == small()


def ints(code: str, *values: int) -> bytes:
    descr = {"i": "<i4", "H": "<u2", "q": "<i8"}[code]
    return npy(descr, f"({len(values)},)", array(code, values).tobytes())


BAD_MEMBERS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("parent", None, "no array 'parent'"),
    "not an array": ("parent", b"hello", "strange header"),
    "version 2": (
        "parent",
        ints("i", 1).replace(b"Y\x01", b"Y\x02"),
        "strange header",
    ),
    "code in the header": ("parent", npy("<i4", "(__import__('os'),)", bytes(16)), "not a plain list"),
    "pickled": ("parent", npy("|O", "(4,)", bytes(32)), "not a plain list"),
    "two dimensions": ("parent", npy("<i4", "(2, 2)", bytes(16)), "not a plain list"),
    "big-endian": ("parent", npy(">i4", "(4,)", bytes(16)), "not a plain list"),
    "floats": ("parent", npy("<f4", "(4,)", bytes(16)), "not a plain list"),
    "odd width": ("parent", npy("<i3", "(4,)", bytes(12)), "holds i3"),
    "text for integers": ("parent", npy("<U4", "(4,)", bytes(64)), "holds U4"),
    "integers for text": ("kinds", ints("i", 1, 2), "holds i4"),
    "too short": ("parent", npy("<i4", "(4,)", bytes(15)), "has 15 bytes"),
    "too long": ("parent", npy("<i4", "(4,)", bytes(17)), "has 17 bytes"),
    "too many": ("parent", npy("<i4", "(99999999,)", bytes(16)), "the limit is"),
    "out of range": ("leaf", ints("q", 1, 1 << 40, 3), "out of range"),
    "counts differ": ("ntok", npy("<u2", "(3,)", bytes(6)), "3 token counts"),
    "columns differ": ("in_len", npy("<i4", "(2,)", bytes(8)), "2 values of in_len"),
    "child first": (
        "parent",
        ints("i", -1, 2, 1, 0),
        "block 1 has parent 2",
    ),
    "below the root": ("parent", ints("i", -2, 0, 1, 0), "has parent -2"),
    "empty block": ("ntok", ints("H", 4, 4, 3, 0), "block 3 has 0 tokens"),
    "overfull block": (
        "ntok",
        ints("H", 4, 4, 3, 5),
        "block 3 has 5 tokens",
    ),
    "after a partial": ("ntok", ints("H", 4, 3, 3, 1), "block 2 follows"),
    "no such leaf": ("leaf", ints("i", 1, 2, 4), "not there"),
    "negative length": ("in_len", ints("i", 1, -2, 4), "negative length"),
    "block of none": ("block", npy("<i4", "()", bytes(4)), "blocks of 0 tokens"),
    "not text": ("note", npy("<U2", "()", b"\xff" * 8), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_what_is_no_trace_is_refused(tmp_path: Path, case: str) -> None:
    name, data, said = BAD_MEMBERS[case]
    with pytest.raises(BadInput) as caught:
        read_trace(rewritten(tmp_path / "t.npz", name, data))
    assert caught.value.code == "bad_trace"
    assert said in str(caught.value)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not there"):
        read_trace(tmp_path / "none.npz")


def test_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(b"not a zip file at all")
    with pytest.raises(BadInput, match="cannot be read"):
        read_trace(path)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_trace(tmp_path)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    huge = io.BytesIO()
    huge.write(npy("<i4", "(1,)", bytes(1 << 20)))
    with pytest.raises(BadInput, match="the limit is"):
        read_trace(rewritten(tmp_path / "t.npz", "block", huge.getvalue()))


def test_members_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, small())
    with zipfile.ZipFile(path, "a") as archive:
        for index in range(100):
            archive.writestr(f"more-{index}", b"")
    with pytest.raises(BadInput, match="members"):
        read_trace(path)


@given(at=st.integers(0, 1_000_000), flip=st.integers(1, 255))
@settings(max_examples=80, deadline=None)
@pytest.mark.slow
def test_a_damaged_file_is_read_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    write_trace(path, small())
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= flip
    path.write_bytes(data)
    try:
        trace = read_trace(path)
    except BadInput as error:
        assert error.code == "bad_trace"
    else:
        assert trace == small()


@pytest.mark.skipif(
    not REAL.is_dir(), reason=f"no real traces at {REAL}: the reader is tested on our own only"
)
@pytest.mark.slow
def test_real_traces_are_read() -> None:
    paths = sorted(REAL.glob("*.npz"))
    assert paths, f"{REAL} holds no traces"
    for path in paths:
        trace = read_trace(path)
        assert trace.request_count > 1_000
        assert trace.block_tokens in (64, 512)
        assert trace.note
        request = trace.request(trace.request_count - 1)
        assert request.arrival_ms == max(trace.arrivals_ms)
