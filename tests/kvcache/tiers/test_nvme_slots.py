"""Which blocks go in one call, and that each lies where it would lie alone."""

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvcache.sums import sum_chunks
from kvcache.tiers import nvme_files, nvme_slots
from kvcache.tiers.nvme_files import BlockFault, DeviceFault
from kvcache.tiers.nvme_format import Entry, parse_slot_header, stride_of
from kvcache.tiers.nvme_slots import READ_BYTES_MAX, WRITE_BYTES_MAX, Held, Slots, neighbours
from tests.kvcache.tiers.nvme_blocks import (
    BLOCK,
    CHUNK,
    PAGE,
    block_of,
    blocks,
    content_of,
    damage,
    memory_of,
    offset_of,
    open_device,
    segment_file,
)

STRIDE = stride_of(BLOCK)


def runs(puts: Sequence[Held], bytes_max: int = WRITE_BYTES_MAX) -> list[list[int]]:
    """The offsets of each run."""
    found = neighbours([entry for entry, _ in puts], [view for _, view in puts], bytes_max)
    return [[entry.offset for entry, _ in run] for run in found]


def put(slot: int, number: int = 0, block_bytes: int = BLOCK, skew: int = 0) -> Held:
    return block_of(slot, offset_of(number, slot, block_bytes), block_bytes, skew=skew)


def test_neighbours_go_together_in_the_order_in_which_they_lie() -> None:
    puts = [put(slot) for slot in (5, 0, 1, 3, 2, 7)]
    at = offset_of(0, 0)
    assert runs(puts) == [
        [at, at + STRIDE, at + 2 * STRIDE, at + 3 * STRIDE],
        [at + 5 * STRIDE],
        [at + 7 * STRIDE],
    ]
    assert runs([]) == []


def test_segments_and_sizes_are_kept_apart() -> None:
    small = put(0, number=1, block_bytes=PAGE)
    puts = [put(slot) for slot in range(12)] + [small, put(0, number=2)]
    assert [len(run) for run in runs(puts)] == [12, 1, 1]


def test_a_run_has_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    puts = [put(slot) for slot in range(12)]
    assert [len(run) for run in runs(puts, 3 * STRIDE)] == [3, 3, 3, 3]
    assert [len(run) for run in runs(puts, 3 * STRIDE - 1)] == [2] * 6
    assert [len(run) for run in runs(puts, STRIDE - 1)] == [1] * 12
    monkeypatch.setattr(nvme_slots, "RUN_BLOCKS_MAX", 5)
    assert [len(run) for run in runs(puts)] == [5, 5, 2]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("block_bytes", [PAGE, 3 * PAGE + 64, BLOCK])
@pytest.mark.parametrize("skews", [[0] * 6, [0, 64, 0, 0, 128, 64]])
def test_every_block_lies_where_it_would_lie_alone(
    direct: bool, block_bytes: int, skews: list[int], tmp_path: Path
) -> None:
    puts = [put(slot, block_bytes=block_bytes, skew=skew) for slot, skew in enumerate(skews)]
    random.Random(block_bytes).shuffle(puts)
    (run,) = neighbours([entry for entry, _ in puts], [view for _, view in puts], READ_BYTES_MAX)
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
    descriptor = os.open(tmp_path / "file", flags)
    slots = Slots(direct=direct)
    slots.write(descriptor, run[0][0].offset, run)
    for slot, (entry, _) in enumerate(run):
        whole = (tmp_path / "file").read_bytes()[entry.offset :][: stride_of(block_bytes)]
        assert parse_slot_header(whole[:PAGE]) == entry
        assert whole[PAGE:] == content_of(slot, block_bytes).ljust(len(whole) - PAGE, b"\0")
    for some in (run, run[2:5], run[:1]):
        into = [(entry, memory_of(b"\xee" * block_bytes, skews[0])) for entry, _ in some]
        sums = slots.read(descriptor, some[0][0].offset, into)
        assert sums == [sum_chunks([view], CHUNK) for _, view in some]
        assert [bytes(view) for _, view in into] == [bytes(view) for _, view in some]
    os.close(descriptor)


def test_a_read_tells_of_each_block_why_not(tmp_path: Path) -> None:
    puts = [put(slot) for slot in range(6)]
    at = offset_of(0, 0)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    slots = Slots(direct=False)
    slots.write(descriptor, at, puts)
    os.pwrite(descriptor, b"?", at + 2 * STRIDE + 100)
    os.ftruncate(descriptor, at + 6 * STRIDE - 1)

    def reasons(expected: Sequence[Entry]) -> list[str]:
        into = [(entry, memory_of(bytes(BLOCK))) for entry in expected]
        found = slots.read(descriptor, expected[0].offset, into)
        return [each.reason if isinstance(each, BlockFault) else "" for each in found]

    entries = [entry for entry, _ in puts]
    entries[1] = entries[1]._replace(generation=1)
    assert reasons(entries) == ["", "generation", "header", "", "", "short"]
    assert [reasons([entry]) for entry in entries] == [
        [""],
        ["generation"],
        ["header"],
        [""],
        [""],
        ["short"],
    ]
    os.close(descriptor)


def test_many_are_read_in_the_order_asked_for_whatever_becomes_of_some(tmp_path: Path) -> None:
    device = open_device(tmp_path / "device")
    written = device.write(blocks(range(6)) + blocks(range(6, 9), 1), [], durable=False)
    wrong = written[2]
    damage(segment_file(device), wrong.offset + PAGE + 17, b"?")
    order = [written[at] for at in (7, 4, 2, 0, 8, 3, 1, 5)]
    into = [memory_of(bytes(BLOCK)) for _ in order]
    found = device.read_many(order, into)
    for entry, view, sums in zip(order, into, found, strict=True):
        if entry == wrong:
            assert isinstance(sums, BlockFault) and sums.reason == "checksum"
        else:
            assert sums == sum_chunks([view], CHUNK)
            assert view == content_of(written.index(entry))
    device.close()


def test_behind_a_fault_of_the_device_nothing_more_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = open_device(tmp_path / "device")
    written = device.write(
        blocks(range(2)) + blocks(range(2, 4), 1) + blocks(range(4, 6), 2), [], durable=False
    )
    calls = []

    def once(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.EIO, "planted")
        return preadv(descriptor, buffers, offset)

    preadv = os.preadv
    monkeypatch.setattr(nvme_files.os, "preadv", once)
    found = device.read_many(written, [memory_of(bytes(BLOCK)) for _ in written])
    assert [type(each) for each in found] == [bytes] * 2 + [DeviceFault] * 4
    assert len(calls) == 2
    device.close()
