"""Which blocks go in one call, and that each lies where it would lie alone."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvcache.sums import sum_chunks
from kvcache.tiers import nvme_slots
from kvcache.tiers.nvme_files import BlockFault
from kvcache.tiers.nvme_format import Entry, parse_slot_header, stride_of
from kvcache.tiers.nvme_slots import Put, Slots, neighbours
from tests.kvcache.tiers.nvme_blocks import BLOCK, CHUNK, PAGE, block_of, content_of, memory_of, offset_of

STRIDE = stride_of(BLOCK)


def runs(puts: Sequence[Put]) -> list[list[int]]:
    """The offsets of each run."""
    found = neighbours([entry for entry, _ in puts], [view for _, view in puts])
    return [[entry.offset for entry, _ in run] for run in found]


def put(slot: int, number: int = 0, block_bytes: int = BLOCK, skew: int = 0) -> Put:
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
    monkeypatch.setattr(nvme_slots, "RUN_BLOCKS_MAX", 5)
    assert [len(run) for run in runs(puts)] == [5, 5, 2]
    monkeypatch.setattr(nvme_slots, "RUN_BYTES_MAX", 3 * BLOCK)
    assert [len(run) for run in runs(puts)] == [3, 3, 3, 3]
    monkeypatch.setattr(nvme_slots, "RUN_BYTES_MAX", BLOCK - 1)
    assert [len(run) for run in runs(puts)] == [1] * 12


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("block_bytes", [PAGE, 3 * PAGE + 64, BLOCK])
@pytest.mark.parametrize("skews", [[0] * 6, [0, 64, 0, 0, 128, 64]])
def test_every_block_lies_where_it_would_lie_alone(
    direct: bool, block_bytes: int, skews: list[int], tmp_path: Path
) -> None:
    puts = [put(slot, block_bytes=block_bytes, skew=skew) for slot, skew in enumerate(skews)]
    (run,) = neighbours([entry for entry, _ in puts], [view for _, view in puts])
    random.Random(block_bytes).shuffle(puts)
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
    descriptor = os.open(tmp_path / "file", flags)
    slots = Slots(direct=direct)
    slots.write(descriptor, run[0][0].offset, run)
    for slot, (entry, _) in enumerate(run):
        whole = (tmp_path / "file").read_bytes()[entry.offset :][: stride_of(block_bytes)]
        content = content_of(slot, block_bytes)
        assert parse_slot_header(whole[:PAGE]) == entry
        assert whole[PAGE:] == content.ljust(len(whole) - PAGE, b"\0")
        into = memory_of(b"\xee" * block_bytes, skews[slot])
        assert slots.read(descriptor, entry.offset, entry, into) == sum_chunks([content], CHUNK)
        assert into == content
    os.close(descriptor)


def test_a_read_tells_why_not(tmp_path: Path) -> None:
    entry, view = put(0)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    slots = Slots(direct=False)
    slots.write(descriptor, 0, [(entry, view)])

    def reason(expected: Entry, inside: int = 0) -> str:
        with pytest.raises(BlockFault) as caught:
            slots.read(descriptor, inside, expected, memory_of(bytes(BLOCK)))
        return caught.value.reason

    assert reason(entry._replace(generation=entry.generation + 1)) == "generation"
    assert reason(entry, PAGE) == "short"
    os.pwrite(descriptor, b"?", 100)
    assert reason(entry) == "header"
    os.close(descriptor)
