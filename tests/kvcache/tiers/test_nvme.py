"""A device keeps what it was given, gives back only that, and says what is wrong when it cannot."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from kvcache.tiers import nvme_index
from kvcache.tiers.nvme import BlockFault, Device, DeviceFault
from kvcache.tiers.nvme_format import Entry, slots_in, stride_of
from tests.kvcache.tiers.nvme_blocks import (
    BLOCK,
    PAGE,
    SEGMENT,
    block_of,
    blocks,
    content_of,
    damage,
    failing,
    fetch,
    flip,
    namespace,
    offset_of,
    offsets,
    open_device,
    reason,
    reopened,
    segment_file,
)

FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nvme"


@pytest.fixture
def device(path: Path) -> Iterator[Device]:
    device = open_device(path)
    yield device
    device.close()


# --- what is written is read ------------------------------------------------------------------------


def test_what_was_written_is_read(device: Device) -> None:
    final = device.write(blocks(range(5)), [], durable=False)
    for seed, entry in enumerate(final):
        assert fetch(device, entry) == content_of(seed)
        assert entry._replace(generation=0, epoch=0) == block_of(seed, entry.offset)[0]
    assert device.written_bytes == device.read_bytes == 5 * BLOCK
    assert device.zeroed_bytes == SEGMENT


def test_it_is_there_after_a_restart(device: Device) -> None:
    final = device.write(blocks(range(5)), [], durable=True)
    again = reopened(device)
    assert again.findings == []
    assert again.entries() == sorted(final)
    assert sorted(again.take_entries()) == sorted(final)
    assert again.take_entries() == []
    assert again.directory_id == device.directory_id
    for seed, entry in enumerate(final):
        assert fetch(again, entry) == content_of(seed)
    again.close()


@pytest.mark.slow
@pytest.mark.parametrize("direct", ["auto", "on", "off"])
def test_any_size_and_any_memory(direct: str, path: Path) -> None:
    device = open_device(path, direct=direct)
    for block_bytes, skew in product([1, 64, 5000, PAGE, PAGE + 64, 3 * PAGE, 100_032], [0, 64]):
        chunk_bytes = 64 if block_bytes % 64 == 0 else block_bytes
        puts = [
            block_of(seed, offset_of(0, seed, block_bytes), block_bytes, chunk_bytes, skew)
            for seed in range(2)
        ]
        final = device.write(puts, [], durable=False)
        for seed, entry in enumerate(final):
            assert fetch(device, entry, skew) == content_of(seed, block_bytes)
    device.close()


@pytest.mark.slow
@pytest.mark.parametrize(("direct", "skew"), [("auto", 0), ("auto", 64), ("off", 0)])
@pytest.mark.parametrize(("chunk_bytes", "chunk_count"), [(65_520, 70), (65_536, 64), (640, 6_554)])
def test_a_block_of_several_pieces(
    chunk_bytes: int, chunk_count: int, skew: int, direct: str, path: Path
) -> None:
    """Pieces are whole chunks, and chunks need not be whole pages."""
    size = chunk_bytes * chunk_count
    device = Device.open(path, 16 << 20, 16 << 20, direct=direct)
    puts = [block_of(seed, offset_of(0, seed, size, 16 << 20), size, chunk_bytes, skew) for seed in range(2)]
    final = device.write(puts, [], durable=False)
    for seed, entry in enumerate(final):
        assert fetch(device, entry, skew) == content_of(seed, size)
    device.close()


def test_memory_that_cannot_be_written_can_be_stored(device: Device) -> None:
    entry, view = block_of(1, offset_of(0, 0))
    final = device.write([(entry, memoryview(bytes(view)))], [], durable=False)
    assert fetch(device, final[0]) == content_of(1)


def test_what_is_behind_a_block_is_zeros(device: Device) -> None:
    """Not what a buffer held before: it may have been another tenant's."""
    device.write([block_of(1, offset_of(0, 0, 5000), 5000, 5000)], [], durable=False)
    device.write([block_of(2, offset_of(0, 0, 5000), 4200, 4200)], [], durable=False)
    content = segment_file(device).read_bytes()
    assert content[2 * PAGE : 2 * PAGE + 4200] == content_of(2, 4200)
    assert content[2 * PAGE + 4200 : 4 * PAGE] == bytes(2 * PAGE - 4200)


def test_every_slot_of_a_segment_can_be_used(device: Device) -> None:
    last = slots_in(SEGMENT, stride_of(BLOCK)) - 1
    final = device.write([block_of(at, offset_of(1, at)) for at in range(last + 1)], [], durable=False)
    assert offset_of(1, last) + stride_of(BLOCK) <= 2 * SEGMENT
    assert [fetch(device, entry) for entry in final] == [content_of(at) for at in range(last + 1)]
    assert segment_file(device, 1).stat().st_size == SEGMENT


def test_deleted_blocks_are_gone_after_a_restart(device: Device) -> None:
    final = device.write(blocks(range(4)), [], durable=False)
    device.write([], [final[1].offset, final[2].offset], durable=False)
    again = reopened(device)
    assert sorted(again.take_entries()) == [final[0], final[3]]
    again.close()


def test_what_was_dropped_goes_with_the_next_commit(device: Device) -> None:
    final = device.write(blocks(range(4)), [], durable=False)
    device.drop([final[0].offset])
    device.write([block_of(9, offset_of(1, 0))], [], durable=False)
    again = reopened(device)
    assert offsets(again.take_entries()) == [*offsets(final[1:]), offset_of(1, 0)]
    again.close()


def test_generations_grow_and_never_repeat(device: Device) -> None:
    first = device.write(blocks(range(3)), [], durable=False)
    again = open_device_with_clock(device, 1)  # The clock was set back.
    second = again.write(blocks(range(3)), [], durable=False)
    again.close()
    numbers = [entry.generation for entry in first + second]
    assert numbers == sorted(set(numbers))


def open_device_with_clock(device: Device, wall_ns: int) -> Device:
    device.close()
    return open_device(device.path, wall_ns=lambda: wall_ns)


# --- a slot is used again ---------------------------------------------------------------------------


def test_a_slot_that_is_used_again_holds_the_new_block_only(device: Device) -> None:
    old = device.write(blocks([1]), [], durable=False)[0]
    new = device.write(blocks([2]), [old.offset], durable=False)[0]
    assert fetch(device, new) == content_of(2)
    assert reason(device, old) == "generation"
    again = reopened(device)
    assert again.take_entries() == [new]
    again.close()


def test_the_same_block_written_again_is_another_generation(device: Device) -> None:
    old = device.write(blocks([1]), [], durable=False)[0]
    new = device.write(blocks([1]), [], durable=False)[0]
    assert reason(device, old) == "generation"
    assert fetch(device, new) == content_of(1)


def test_a_slot_is_unpublished_before_it_is_written(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.write(blocks([1]), [], durable=False)
    told = record(device, monkeypatch)
    device.write(blocks([2]), [], durable=True)
    at = offset_of(0, 0)
    assert told == [f"delete {at}", f"pwritev {at}", "fdatasync", f"put {at} durably"]


def test_a_new_slot_takes_one_commit(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was given up in time, too."""
    _, old = device.write(blocks([1, 2]), [], durable=False)
    device.write([], [old.offset], durable=False)
    told = record(device, monkeypatch)
    device.write([block_of(3, at := old.offset)], [], durable=False)
    assert told == [f"pwritev {at}", "fdatasync", f"put {at}"]


def record(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the disk, in order."""
    told: list[str] = []
    index, commit, pwritev, fdatasync = device._index, device._index.commit, os.pwritev, os.fdatasync

    def committing(puts: list[Entry], deletes: list[int], *, durable: bool) -> None:
        told.extend(f"delete {offset}" for offset in deletes)
        told.extend(f"put {entry.offset}" + " durably" * durable for entry in puts)
        commit(puts, deletes, durable=durable)

    def writing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        told.append(f"pwritev {offset}")
        return pwritev(descriptor, buffers, offset)

    def syncing(descriptor: int) -> None:
        told.append("fdatasync")
        fdatasync(descriptor)

    monkeypatch.setattr(index, "commit", committing)
    monkeypatch.setattr(os, "pwritev", writing)
    monkeypatch.setattr(os, "fdatasync", syncing)
    return told


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_nothing_of_a_batch_that_failed_is_found(
    call: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, old = device.write(blocks([1, 2]), [], durable=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.EIO))
        with pytest.raises(DeviceFault) as caught:
            device.write([block_of(3, old.offset), block_of(4, offset_of(0, 5))], [], durable=False)
    assert caught.value.errno == errno.EIO
    assert str(device.path) in str(caught.value)
    again = reopened(device)
    assert again.take_entries() == [kept]
    again.close()


def test_after_a_commit_that_failed_a_slot_is_unpublished_first(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have happened: only its answer was lost."""
    device.write(blocks([1]), [], durable=False)
    with monkeypatch.context() as patch:
        patch.setattr(device._index, "commit", failing(errno.EIO))
        with pytest.raises(DeviceFault):
            device.write([block_of(2, offset_of(0, 1))], [], durable=False)
    told = record(device, monkeypatch)
    device.write([block_of(3, offset_of(0, 1))], [], durable=False)
    assert told[0] == f"delete {offset_of(0, 1)}"


def test_a_segment_for_another_size_forgets_the_old_one(device: Device) -> None:
    old = device.write(blocks(range(3)), [], durable=False)
    small = block_of(7, offset_of(0, 0, PAGE), PAGE)
    new = device.write([small], [], durable=False)[0]
    assert new.epoch > old[0].epoch
    assert device.zeroed_bytes == SEGMENT
    assert fetch(device, new) == content_of(7, PAGE)
    again = reopened(device)
    assert again.take_entries() == [new]
    assert again.rejected == []
    again.close()


def test_a_segment_whose_formatting_failed_is_made_anew(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its header says then, nobody knows."""
    device.write(blocks([1]), [], durable=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(errno.EIO))
        with pytest.raises(DeviceFault):
            device.write([block_of(2, offset_of(0, 0, PAGE), PAGE)], [], durable=False)
    new = device.write(blocks([3]), [], durable=False)
    again = reopened(device)
    assert again.take_entries() == new
    assert fetch(again, new[0]) == content_of(3)
    again.close()


def test_an_old_header_in_a_segment_formatted_anew_is_not_believed(device: Device) -> None:
    old = device.write([block_of(at, offset_of(0, at)) for at in range(6)], [], durable=False)
    device.write([block_of(7, offset_of(0, 0, PAGE), PAGE)], [], durable=False)
    device.write([block_of(8, offset_of(0, 0))], [], durable=False)
    nvme_index.discard(device.path / "index")
    again = reopened(device)
    assert offsets(again.take_entries()) == [offset_of(0, 0)]
    assert {reason(again, entry) for entry in old[1:]} <= {"", "header"}
    again.close()


# --- what is damaged is not served ------------------------------------------------------------------


@pytest.mark.slow
def test_a_flipped_bit_in_a_header_is_a_miss(device: Device) -> None:
    entry = device.write(blocks([1]), [], durable=False)[0]
    for bit in range(0, 8 * PAGE, 1 if FACTOR > 1 else 7):
        flip(segment_file(device), 8 * entry.offset + bit)
        assert reason(device, entry) == "header"
        flip(segment_file(device), 8 * entry.offset + bit)
    assert fetch(device, entry) == content_of(1)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_anywhere_is_a_miss(seed: int, device: Device) -> None:
    pick = random.Random(seed)
    final = device.write(blocks(range(5)), [], durable=False)
    for seed, entry in enumerate(final):
        bit = (entry.offset + pick.randrange(PAGE + BLOCK)) * 8 + pick.randrange(8)
        flip(segment_file(device), bit)
        assert reason(device, entry) in ("header", "checksum")
        flip(segment_file(device), bit)
        assert fetch(device, entry) == content_of(seed)


def test_a_block_in_anothers_place_is_a_miss(device: Device) -> None:
    one, two = device.write(blocks([1, 2]), [], durable=False)
    content = segment_file(device).read_bytes()
    damage(segment_file(device), two.offset, content[one.offset : two.offset])
    assert reason(device, two) == "generation"


def test_the_bytes_of_one_under_the_header_of_another_are_a_miss(device: Device) -> None:
    one, two = device.write(blocks([1, 2]), [], durable=False)
    content = segment_file(device).read_bytes()
    damage(segment_file(device), two.offset + PAGE, content[one.offset + PAGE : two.offset])
    assert reason(device, two) == "checksum"


def test_a_checksum_is_bound_to_its_key(device: Device) -> None:
    """Equal bytes under another key: whoever asks for the one must not get the other."""
    one = device.write(blocks([1]), [], durable=False)[0]
    with pytest.raises(BlockFault):
        fetch(device, one._replace(key=block_of(2, 0)[0].key))


def test_a_file_cut_short_while_in_use_is_a_miss(device: Device) -> None:
    one, two = device.write(blocks([1, 2]), [], durable=False)
    os.truncate(segment_file(device), two.offset + PAGE + 100)
    assert fetch(device, one) == content_of(1)
    assert reason(device, two) == "short"


# --- what else it keeps ----------------------------------------------------------------------------


def test_a_namespace_is_kept(device: Device) -> None:
    assert device.namespaces() == []
    fields = namespace().to_map()
    for _ in range(2):
        device.save_namespace(fields)
    assert device.namespaces() == [fields]
    again = reopened(device)
    assert again.namespaces() == [fields]
    again.close()


def test_a_namespace_that_is_damaged_is_left_out(device: Device) -> None:
    device.save_namespace(namespace().to_map())
    file = next((device.path / "namespaces").iterdir())
    good = file.read_bytes()
    for bad in (b"", b"[]", b"{}", good.replace(b"Llama", b"llama"), good[:-1], b"\xff" + good):
        file.write_bytes(bad)
        assert device.namespaces() == []


def test_close_may_be_called_twice(device: Device) -> None:
    device.close()
    device.close()
