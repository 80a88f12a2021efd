"""The copy and its sums: the C++ module, its levels and the twin all do the same; xxhash is the oracle.

``KVCACHE_NATIVE=0`` leaves the C++ module out of these tests. Nothing else does: where it was not
built and nobody said so, they fail.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvcache import sums, sums_twin
from kvcache.block import BlockSpec, StorageKey
from kvcache.errors import BadInput

if TYPE_CHECKING:
    from typing_extensions import Buffer

WITH_NATIVE = os.environ.get("KVCACHE_NATIVE") != "0"
LENGTHS_ALL_BELOW = 1101
GUARD = 64
PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Implementation:
    name: str
    copy_and_sum: Callable[[Sequence[Buffer], Sequence[Buffer], int], bytes]
    sum_chunks: Callable[[Sequence[Buffer], int], bytes]


def implementations() -> Iterator[Implementation]:
    """The twin, and of the C++ module each level and kind of store that this machine has."""
    yield Implementation("twin", sums_twin.copy_and_sum, sums_twin.sum_chunks)
    if not WITH_NATIVE:
        return
    try:
        from kvcache._native import core
    except ImportError:
        return
    yield Implementation("native", core.copy_and_sum, core.sum_chunks)
    for level in core.levels():
        for stores in ("cached", "streaming"):
            yield Implementation(
                f"{level}-{stores}",
                partial(core.copy_and_sum, level=level, stores=stores),
                partial(core.sum_chunks, level=level),
            )


IMPLEMENTATIONS = list(implementations())
every_one = pytest.mark.parametrize("made", IMPLEMENTATIONS, ids=lambda made: made.name)


def expected(content: bytes | memoryview, chunk_bytes: int) -> bytes:
    chunks = (content[at : at + chunk_bytes] for at in range(0, len(content), chunk_bytes))
    return b"".join(xxhash.xxh3_64_intdigest(chunk).to_bytes(8, "little") for chunk in chunks)


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def aligned(length: int, alignment: int, shift: int) -> memoryview:
    """``length`` zero bytes whose address is ``shift`` over a multiple of ``alignment``."""
    room = bytearray(length + 2 * alignment)
    with sums_twin._views([room], "target") as (view,):
        start = (shift - (view.buf or 0)) % alignment
    return memoryview(room)[start : start + length]


@pytest.mark.skipif(not WITH_NATIVE, reason="KVCACHE_NATIVE=0 asked for the twin")
def test_the_native_module_is_built_and_in_use() -> None:
    assert sums.NATIVE, "kvcache/_native/core is missing: no C++ compiler, or `pip install -e .` was not run"
    from kvcache._native import core

    assert core.levels()[-1] == "portable"


@pytest.mark.slow
def test_the_environment_chooses_the_twin() -> None:
    question = "from kvcache import sums; raise SystemExit(sums.NATIVE)"
    environment = {**os.environ, "KVCACHE_NATIVE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", question], env=environment, check=False).returncode == 0


@every_one
def test_every_short_length_has_the_sum_of_the_oracle(made: Implementation) -> None:
    content = noise(LENGTHS_ALL_BELOW)
    for length in range(1, LENGTHS_ALL_BELOW):
        target = bytearray(length + GUARD)
        got = made.copy_and_sum([content[:length]], [memoryview(target)[:length]], length)
        want = expected(content[:length], length)
        assert (length, got, bytes(target)) == (length, want, content[:length] + bytes(GUARD))
        assert (length, made.sum_chunks([content[:length]], length)) == (length, want)


@every_one
def test_random_lengths_and_alignments(made: Implementation) -> None:
    generator = random.Random(7)
    content = noise(140_000, 1)
    for _ in range(100):
        length, start, shift = (
            generator.randrange(1, 70_000),
            generator.randrange(70_000),
            generator.randrange(64),
        )
        source = memoryview(content)[start : start + length]
        target = aligned(length, 64, generator.choice([0, shift]))
        assert made.copy_and_sum([source], [target], length) == expected(source, length), (
            length,
            start,
            shift,
        )
        assert target == source, (length, start, shift)


@every_one
@pytest.mark.parametrize("chunk_bytes", [1, 16, 240, 241, 256, 960, 1024, 1088, 4096, 65_536])
def test_chunks_are_summed_one_by_one(made: Implementation, chunk_bytes: int) -> None:
    content = noise(5 * chunk_bytes, 2)
    target = aligned(len(content), 64, 0)
    assert made.copy_and_sum([content], [target], chunk_bytes) == expected(content, chunk_bytes)
    assert made.sum_chunks([content], chunk_bytes) == expected(content, chunk_bytes)
    assert target == content


@every_one
def test_no_byte_outside_the_targets_is_written(made: Implementation) -> None:
    content = noise(3 * 4096, 3)
    room = bytearray(b"\xaa" * 8 * 4096)
    targets = [memoryview(room)[at * 4096 : (at + 1) * 4096] for at in (5, 1, 3)]
    sources = [content[at * 4096 : (at + 1) * 4096] for at in range(3)]
    assert made.copy_and_sum(sources, targets, 1024) == expected(content, 1024)
    guard = b"\xaa" * 4096
    pieces = [guard, sources[1], guard, sources[2], guard, sources[0], guard, guard]
    assert room == b"".join(pieces)


@every_one
def test_a_changed_byte_changes_its_chunk_and_no_other(made: Implementation) -> None:
    content = bytearray(noise(4 * 4096, 4))
    before = made.sum_chunks([content], 4096)
    content[2 * 4096 + 1234] ^= 1
    after = made.sum_chunks([content], 4096)
    assert [before[at : at + 8] == after[at : at + 8] for at in range(0, 32, 8)] == [True, True, False, True]


@every_one
def test_nothing_to_do(made: Implementation) -> None:
    assert made.copy_and_sum([], [], 64) == b""
    assert made.copy_and_sum([b"", b"x" * 64], [bytearray(), bytearray(64)], 64) == expected(b"x" * 64, 64)
    assert made.sum_chunks([b""], 64) == b""


@every_one
def test_buffers_of_other_shapes_are_their_bytes(made: Implementation) -> None:
    content = noise(4096, 5)
    source = memoryview(content).cast("f", shape=[32, 32])
    target = bytearray(4096)
    got = made.copy_and_sum([source], [memoryview(target).cast("I", shape=[16, 64])], 1024)
    assert (got, bytes(target)) == (expected(content, 1024), content)


@every_one
def test_one_source_may_be_copied_twice(made: Implementation) -> None:
    content, first, second = noise(512, 6), bytearray(512), bytearray(512)
    assert made.copy_and_sum([content, content], [first, second], 256) == 2 * expected(content, 256)
    assert first == second == content


Bad = tuple[Sequence["Buffer"], Sequence[bytes | bytearray | memoryview], int, str]

TARGET_REFUSED = "target 1 is read-only or not contiguous"
OVERLAP = "a source and a target overlap"


def bad_cases() -> dict[str, Bad]:
    """What is refused, and the words. Sources hold other bytes than targets, so a write would show."""
    ones, room = b"x" * 64, memoryview(bytearray(192))
    one, low, high = bytearray(64), room[:128], room[64:]
    longer = "source 1 has 64 bytes, target 1 has 128 bytes"
    ragged = "source 1 has 96 bytes, not a multiple of 64"
    return {
        "more sources": ([ones] * 2, [one], 64, "2 sources, 1 targets"),
        "longer target": ([ones] * 2, [one, bytearray(128)], 64, longer),
        "shorter target": ([2 * ones], [one], 64, "source 0 has 128 bytes, target 0 has 64 bytes"),
        "part of a chunk": ([ones, b"x" * 96], [one, bytearray(96)], 64, ragged),
        "no chunk": ([ones], [one], 0, "chunk_bytes is 0"),
        "less than no chunk": ([ones], [one], -64, "chunk_bytes is -64"),
        "read-only": ([ones] * 2, [one, bytes(64)], 64, TARGET_REFUSED),
        "target in pieces": ([ones] * 2, [one, memoryview(bytearray(128))[::2]], 64, TARGET_REFUSED),
        "source in pieces": ([memoryview(2 * ones)[::2]], [one], 64, "source 0 is not contiguous"),
        "onto itself": ([low], [low], 64, OVERLAP),
        "source below target": ([low], [high], 64, OVERLAP),
        "source above target": ([high], [low], 64, OVERLAP),
        "source inside target": ([3 * ones, room[64:128]], [room, one], 64, OVERLAP),
        "another's target": ([2 * ones, high], [low, bytearray(128)], 64, OVERLAP),
        "two targets": ([2 * ones] * 2, [high, low], 64, "two targets overlap"),
    }


@every_one
@pytest.mark.parametrize("case", bad_cases())
def test_bad_input_is_refused_before_anything_is_written(made: Implementation, case: str) -> None:
    sources, targets, chunk_bytes, message = bad_cases()[case]
    before = [bytes(target) for target in targets]
    with pytest.raises(ValueError, match=f"^{message}$"):
        made.copy_and_sum(sources, targets, chunk_bytes)
    assert [bytes(target) for target in targets] == before
    with pytest.raises(BadInput) as refused:
        sums.copy_and_sum(sources, targets, chunk_bytes)
    assert (refused.value.code, refused.value.what) == ("bad_block", message)


@every_one
def test_bad_sums_are_refused(made: Implementation) -> None:
    for buffers, chunk_bytes in (([bytes(96)], 64), ([bytes(64)], 0), ([memoryview(bytes(8))[::2]], 4)):
        with pytest.raises(ValueError, match=r"source 0|chunk_bytes"):
            made.sum_chunks(buffers, chunk_bytes)
        with pytest.raises(BadInput):
            sums.sum_chunks(buffers, chunk_bytes)


@every_one
def test_what_is_no_buffer_is_a_type_error(made: Implementation) -> None:
    with pytest.raises(TypeError):
        made.copy_and_sum(["text"], [bytearray(64)], 64)  # type: ignore[list-item]  # On purpose.
    with pytest.raises(TypeError):
        made.sum_chunks([1], 64)  # type: ignore[list-item]  # On purpose.


@every_one
def test_buffers_are_given_back(made: Implementation) -> None:
    """A bytearray with an export cannot be resized. Refusals give back too."""
    source, target = bytearray(64), bytearray(64)
    made.copy_and_sum([source], [target], 64)
    made.sum_chunks([source], 64)
    with pytest.raises(ValueError):
        made.copy_and_sum([source], [target], 48)
    source.append(0)
    target.append(0)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[BlockSpec, int]:
    sizes = (st.integers(1, top) for top in (4, 6, 5))
    planes, heads, tokens = (draw(size) for size in sizes)
    head_bytes = draw(st.sampled_from([1, 2, 8, 96, 256, 1024, 4096, 70_000]))
    return BlockSpec(tokens, planes, heads, head_bytes), draw(st.integers(0, 63))


@every_one
@given(layout=layouts(), data=st.data())
def test_planes_and_one_slot_give_the_same_sums(
    made: Implementation, layout: tuple[BlockSpec, int], data: st.DataObject
) -> None:
    """Out of planes that lie apart into one slot, and back: one block, one row of sums."""
    spec, shift = layout
    content = noise(spec.block_bytes, spec.block_bytes)
    cut = range(0, spec.block_bytes, spec.plane_bytes)
    planes = [content[at : at + spec.plane_bytes] for at in cut]
    slot = aligned(spec.block_bytes, 64, shift)
    pieces = [slot[at : at + spec.plane_bytes] for at in cut]
    want = expected(content, spec.chunk_bytes)
    assert made.copy_and_sum(planes, pieces, spec.chunk_bytes) == want
    assert slot == content
    back = [bytearray(spec.plane_bytes) for _ in cut]
    order = data.draw(st.permutations(range(len(back))))
    got = made.copy_and_sum([pieces[at] for at in order], [back[at] for at in order], spec.chunk_bytes)
    row = len(want) // len(back)
    assert got == b"".join(want[at * row : (at + 1) * row] for at in order)
    assert back == planes
    assert made.sum_chunks([slot], spec.chunk_bytes) == made.sum_chunks(planes, spec.chunk_bytes) == want


@every_one
@pytest.mark.parametrize("action", ["copy", "sum"])
def test_other_threads_run_during_one_call(made: Implementation, action: str) -> None:
    """A count that moves between two lines of this thread proves that the call gave up the lock.

    With so long a switch interval nobody takes the lock from a thread that does not give it. The
    counter wants it every 0.1 ms and a call lasts some milliseconds; a call that keeps the lock never
    shows a move, however long it is repeated.
    """
    source, target = noise(1 << 20) * 16, bytearray(16 << 20)
    counted, stop = [0], threading.Event()
    switch = sys.getswitchinterval()

    def count() -> None:
        while not stop.wait(0.000_1):
            counted[0] += 1

    def moved() -> bool:
        before = counted[0]
        if action == "copy":
            made.copy_and_sum([source], [target], 1 << 20)
        else:
            made.sum_chunks([source], 1 << 20)
        return counted[0] > before

    thread = threading.Thread(target=count)
    sys.setswitchinterval(1000)
    try:
        thread.start()
        end = time.monotonic() + PATIENCE_S
        while not moved():
            assert time.monotonic() < end, "it keeps the lock"
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(switch)


def test_a_block_checksum_covers_each_of_its_parts() -> None:
    key, row = StorageKey(bytes(range(32))), bytes(16)
    first = sums.block_checksum(key, 131_072, 65_536, row)
    assert first == xxhash.xxh3_128_digest(
        b"kvcache.block.1" + key + (131_072).to_bytes(8, "little") + (65_536).to_bytes(4, "little") + row
    )
    others = {
        sums.block_checksum(StorageKey(bytes(32)), 131_072, 65_536, row),
        sums.block_checksum(key, 131_073, 65_536, row),
        sums.block_checksum(key, 131_072, 65_537, row),
        sums.block_checksum(key, 131_072, 65_536, b"\1" + row[1:]),
    }
    assert len(first) == 16 and len(others) == 4 and first not in others


def test_golden_sums_stay() -> None:
    """Stored blocks must verify in years: known answers, not only equality of two implementations."""
    content = bytes(range(256)) * 256
    assert sums.sum_chunks([content], 65_536).hex() == GOLDEN_CHUNK
    assert sums.block_checksum(StorageKey(bytes(32)), 65_536, 65_536, bytes(8)).hex() == GOLDEN_BLOCK


GOLDEN_CHUNK = "16550a616db51d9a"
GOLDEN_BLOCK = "7d4cd3e0eb1d351e68b0b5d8276dd131"
