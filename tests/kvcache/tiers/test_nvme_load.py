"""What a directory holds when it is opened: what is whole is taken, the rest is said and not touched."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.errors import BadInput
from kvcache.sums import guard_sum
from kvcache.tiers import nvme_index
from kvcache.tiers.nvme import Device
from kvcache.tiers.nvme_format import slots_in, stride_of
from tests.kvcache.tiers.nvme_blocks import (
    BLOCK,
    CAPACITY,
    PAGE,
    SEGMENT,
    block_of,
    blocks,
    content_of,
    damage,
    fetch,
    flip,
    key_of,
    namespace,
    offset_of,
    offsets,
    open_device,
    reason,
    reopened,
    segment_file,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nvme"


@pytest.fixture
def device(path: Path) -> Iterator[Device]:
    device = open_device(path)
    yield device
    device.close()


# --- what is damaged is not taken ------------------------------------------------------------------


def break_segment(kind: str, file: Path) -> None:
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        os.truncate(file, SEGMENT - PAGE)
    elif kind == "empty":
        os.truncate(file, 0)
    elif kind == "longer":
        os.truncate(file, SEGMENT + PAGE)
    elif kind == "header":
        flip(file, 8 * 100)
    elif kind == "another's":
        file.write_bytes(file.with_name("000001.seg").read_bytes())
    else:
        damage(file, 0, bytes(PAGE))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "longer", "header", "another's", "blank"])
def test_a_segment_that_is_not_whole_loses_its_blocks_only(kind: str, device: Device) -> None:
    device.write(blocks(range(3)), [], durable=False)
    kept = device.write(blocks(range(3, 5), number=1), [], durable=False)
    device.close()
    break_segment(kind, segment_file(device))
    again = open_device(device.path)
    assert sorted(again.take_entries()) == sorted(kept)
    assert len(again.rejected) == 3
    assert (kind == "missing") or "000000.seg" in again.findings[0]
    new = again.write(blocks([9]), [], durable=False)[0]
    assert fetch(again, new) == content_of(9)
    third = reopened(again)
    assert sorted(third.take_entries()) == sorted([new, *kept])
    assert third.findings == []
    third.close()


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["missing", "zeros", "truncated"])
def test_without_its_index_a_device_reads_the_headers(harm: str, device: Device) -> None:
    device.write(blocks(range(8)), [], durable=False)
    device.write([block_of(9, offset_of(1, 1))], [], durable=False)
    device.write([block_of(9, offset_of(1, 2))], [], durable=False)  # Newer, of the same key.
    device.close()
    data = device.path / "index" / "data.mdb"
    if harm == "missing":
        data.unlink()
    elif harm == "zeros":
        data.write_bytes(bytes(data.stat().st_size))
    else:
        os.truncate(data, 100)
    told: list[tuple[str, int, int]] = []
    again = open_device(device.path, progress=lambda *all: told.append(all))
    entries = again.take_entries()
    assert again.rejected == []
    assert offsets(entries) == [*(offset_of(0, slot) for slot in range(8)), offset_of(1, 2)]
    for entry in entries[:8]:
        assert len(fetch(again, entry)) == BLOCK
    assert told[0][:2] == ("reading slot headers", 0)
    assert ("reading slot headers", told[0][2], told[0][2]) in told
    assert any("slot headers" in finding for finding in again.findings)
    third = reopened(again)
    assert sorted(third.take_entries()) == sorted(entries)
    assert third.findings == []
    third.close()


def test_a_header_in_anothers_place_is_not_taken(device: Device) -> None:
    one, two = device.write(blocks([1, 2]), [], durable=False)
    device.close()
    content = segment_file(device).read_bytes()
    damage(segment_file(device), one.offset, content[two.offset : two.offset + PAGE])
    damage(segment_file(device), two.offset, bytes(PAGE))
    nvme_index.discard(device.path / "index")
    again = open_device(device.path)
    assert again.take_entries() == []
    assert any("1 headers are damaged" in finding for finding in again.findings)
    again.close()


def test_a_stale_index_entry_is_found_by_the_header(device: Device) -> None:
    """As an index that was restored from a copy would have it."""
    old = device.write(blocks([1]), [], durable=False)[0]
    device.write(blocks([2]), [], durable=False)
    device._index.commit([old], [], durable=True)  # type: ignore[union-attr]  # It is open.
    again = reopened(device)
    assert again.take_entries() == [old]
    assert reason(again, old) == "generation"
    again.close()


def test_entries_that_no_slot_has_room_for_are_rejected(device: Device) -> None:
    final = device.write(blocks([1]), [], durable=False)[0]
    wrong = [
        final._replace(offset=offset_of(0, 1) + PAGE),
        final._replace(offset=offset_of(0, 2), block_bytes=BLOCK + PAGE),
        final._replace(offset=offset_of(0, 3), epoch=final.epoch + 1),
        final._replace(offset=offset_of(1, 0)),
        final._replace(offset=SEGMENT - PAGE),
        final._replace(offset=0),
        final._replace(offset=CAPACITY + PAGE),
        final._replace(offset=offset_of(0, 4), generation=final.generation - 1),
    ]
    device._index.commit(wrong, [], durable=True)  # type: ignore[union-attr]  # It is open.
    again = reopened(device)
    assert again.take_entries() == [final]
    assert offsets([entry for entry, _ in again.rejected]) == offsets(wrong)
    again.write([], [], durable=True)
    third = reopened(again)
    assert third.rejected == []
    third.close()


def test_a_slot_that_would_go_over_the_end_is_none(device: Device) -> None:
    final = device.write(blocks([1, 2]), [], durable=False)
    past = slots_in(SEGMENT, stride_of(BLOCK))
    over = final[1]._replace(offset=final[0].offset + past * stride_of(BLOCK), key=key_of(3))
    assert over.offset < SEGMENT
    device._index.commit([over], [], durable=True)  # type: ignore[union-attr]  # It is open.
    again = reopened(device)
    assert again.take_entries() == final
    assert again.rejected == [(over, "no slot begins there")]
    again.close()


# --- the directory ---------------------------------------------------------------------------------


def test_what_is_made_is_private(device: Device) -> None:
    device.write(blocks([1]), [], durable=False)
    device.save_namespace(namespace().to_map())
    for each in [device.path, *device.path.rglob("*")]:
        assert stat.S_IMODE(each.stat().st_mode) == (0o700 if each.is_dir() else 0o600), each


def test_a_second_holder_is_refused(device: Device) -> None:
    for read_only in (False, True):
        with pytest.raises(BadInput) as caught:
            open_device(device.path, read_only=read_only)
        assert caught.value.code == "address_in_use"
        assert str(device.path) in str(caught.value)
    reopened(device).close()


def test_another_version_is_refused_and_left_alone(device: Device) -> None:
    device.write(blocks([1]), [], durable=False)
    device.close()
    later = with_version(2)
    (device.path / "tier.json").write_bytes(later)
    before = snapshot(device.path)
    with pytest.raises(BadInput) as caught:
        open_device(device.path)
    assert caught.value.code == "bad_tier"
    assert "2" in str(caught.value)
    assert snapshot(device.path) == before


def with_version(version: int) -> bytes:
    """A superblock of a format that is not there yet."""
    fields: dict[str, object] = {"kind": "kvcache nvme tier", "version": version, "other": 1}
    text = json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"
    whole = {**fields, "checksum": guard_sum(text).hex()}
    return json.dumps(whole, indent=2, sort_keys=True).encode() + b"\n"


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


def test_another_segment_size_is_refused_and_left_alone(device: Device) -> None:
    device.write(blocks([1]), [], durable=False)
    device.close()
    before = snapshot(device.path)
    with pytest.raises(BadInput) as caught:
        Device.open(device.path, CAPACITY, 2 * SEGMENT)
    assert caught.value.code == "bad_tier"
    assert str(SEGMENT) in str(caught.value)
    assert snapshot(device.path) == before


@pytest.mark.parametrize("harm", ["missing", "flipped", "empty"])
def test_a_lost_superblock_is_made_again_from_the_segments(harm: str, device: Device) -> None:
    final = device.write(blocks([1]), [], durable=False)
    device.close()
    file = device.path / "tier.json"
    if harm == "missing":
        file.unlink()
    elif harm == "flipped":
        flip(file, 8 * 30 + 1)
    else:
        file.write_bytes(b"")
    again = open_device(device.path)
    assert again.directory_id == device.directory_id
    assert again.take_entries() == final
    assert "made again" in again.findings[0]
    third = reopened(again)
    assert third.findings == []
    third.close()


def test_a_directory_of_somebody_else_is_refused(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "thesis.tex").write_text("all of it")
    with pytest.raises(BadInput) as caught:
        open_device(path)
    assert caught.value.code == "bad_tier"
    assert "thesis.tex" in str(caught.value)
    assert [each.name for each in path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_others_may_write_is_refused(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(BadInput, match="others may write"):
        open_device(path)


def test_without_direct_io_the_page_cache_is_used_and_it_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(file: Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    device = open_device(path)
    assert not device.direct
    assert "direct I/O" in device.findings[0]
    final = device.write(blocks([1]), [], durable=True)
    assert fetch(device, final[0]) == content_of(1)
    device.probe()
    device = reopened(device)
    assert device.take_entries() == final
    device.close()
    with pytest.raises(BadInput, match="direct I/O"):
        open_device(path, direct="on")
    device = open_device(path, direct="off")
    assert device.findings == []
    device.close()


def test_a_file_is_no_directory(path: Path) -> None:
    path.write_text("")
    with pytest.raises(BadInput, match="not a directory"):
        open_device(path)


def test_less_than_a_segment_is_refused(path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        Device.open(path, SEGMENT - 1, SEGMENT)
    assert caught.value.code == "too_small"
    assert not path.exists()


def test_a_capacity_that_cannot_fit_is_said(path: Path) -> None:
    device = Device.open(path, 1 << 43, 1 << 30)
    assert "free" in device.findings[0]
    device.close()


def test_a_lower_capacity_gives_space_back(device: Device) -> None:
    kept = device.write(blocks([1]), [], durable=False)
    device.write(blocks([2], number=3), [], durable=False)
    device.close()
    again = Device.open(device.path, 2 * SEGMENT, SEGMENT)
    assert again.segment_count == 2
    assert again.take_entries() == kept
    assert not segment_file(device, 3).exists()
    again.close()


# --- opened to be looked at ------------------------------------------------------------------------


def test_read_only_changes_nothing(device: Device) -> None:
    final = device.write(blocks(range(3)), [], durable=False)
    device.write(blocks([5], number=1), [], durable=False)
    device.close()
    os.truncate(segment_file(device, 1), PAGE)
    (device.path / "segments" / "000002.seg.tmp").write_bytes(b"half")
    before = snapshot(device.path)
    looked = Device.open(device.path, read_only=True)
    assert looked.segment_bytes == SEGMENT
    assert sorted(looked.take_entries()) == sorted(final)
    assert [why for _, why in looked.rejected] == ["its segment is not there"]
    assert "000001.seg" in looked.findings[0]
    assert fetch(looked, final[1]) == content_of(1)
    looked.close()
    assert snapshot(device.path) == before


def test_read_only_reads_headers_where_there_is_no_index(device: Device) -> None:
    final = device.write(blocks(range(3)), [], durable=False)
    device.close()
    nvme_index.discard(device.path / "index")
    before = snapshot(device.path)
    looked = Device.open(device.path, read_only=True)
    assert sorted(looked.take_entries()) == sorted(final)
    looked.close()
    assert snapshot(device.path) == before


def test_read_only_makes_no_tier(path: Path) -> None:
    with pytest.raises(BadInput, match="no NVMe tier"):
        Device.open(path, read_only=True)
    assert not path.exists()


def test_capacity_zero_is_what_is_there(device: Device) -> None:
    final = device.write(blocks([1], number=2), [], durable=False)
    device.close()
    again = Device.open(device.path, 0, SEGMENT)
    assert again.segment_count == 3
    assert again.take_entries() == final
    again.close()
