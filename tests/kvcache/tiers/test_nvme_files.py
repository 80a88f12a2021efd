"""Direct I/O and files made whole: what a call may leave undone, and a fault behind."""

import ctypes
import errno
import mmap
import os
import random
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvcache.tiers import nvme_files
from kvcache.tiers.nvme_files import (
    HUGE_PAGE_BYTES,
    Buffers,
    DeviceFault,
    SegmentFiles,
    faults,
    is_direct,
    lock_file,
    read_all,
    replace_file,
    takes_direct,
    write_all,
)

PAGE = 4096
LENGTH = 64 * PAGE
HEADER = b"header".ljust(PAGE, b".")


@pytest.fixture
def files(tmp_path: Path) -> SegmentFiles:
    return SegmentFiles(tmp_path, direct=takes_direct(tmp_path))


def aligned(content: bytes) -> memoryview:
    memory = mmap.mmap(-1, -(-len(content) // PAGE) * PAGE)
    memory[: len(content)] = content
    return memoryview(memory)[: len(content)]


def open_count() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def in_parts(call: Callable[..., int], parts: Sequence[int]) -> Callable[..., int]:
    """``call`` that transfers no more than it is told, one number a call, then all."""
    left, writes = list(parts), call is os.pwritev

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert offset % PAGE == 0, "direct I/O would refuse it"
        if not left:
            return call(descriptor, buffers, offset)
        part = left.pop(0)
        joined = b"".join(bytes(buffer) for buffer in buffers)[:part]
        if writes:
            return call(descriptor, [joined], offset) if joined else 0
        found = os.pread(descriptor, part, offset)
        for buffer in buffers:
            piece, found = found[: len(buffer)], found[len(buffer) :]
            buffer[: len(piece)] = piece
        return part

    return short


@pytest.mark.parametrize("parts", [[0], [100], [PAGE], [PAGE + 7, 2 * PAGE], [3 * PAGE, PAGE]])
def test_what_is_transferred_in_parts_is_transferred_whole(
    parts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(1).randbytes(5 * PAGE)
    views = [aligned(content[:PAGE]), aligned(content[PAGE:])]
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with monkeypatch.context() as patch:
        patch.setattr(nvme_files.os, "pwritev", in_parts(os.pwritev, parts))
        write_all(descriptor, views, PAGE)
    assert (tmp_path / "file").read_bytes() == bytes(PAGE) + content
    into = [aligned(bytes(PAGE)), aligned(bytes(4 * PAGE))]
    monkeypatch.setattr(nvme_files.os, "preadv", in_parts(os.preadv, parts))
    assert read_all(descriptor, into, PAGE) == 5 * PAGE
    assert b"".join(map(bytes, into)) == content
    os.close(descriptor)


def test_a_write_that_makes_no_progress_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    monkeypatch.setattr(nvme_files.os, "pwritev", in_parts(os.pwritev, [PAGE, 0]))
    with pytest.raises(OSError, match="stopped short"):
        write_all(descriptor, [aligned(bytes(2 * PAGE))], 0)
    os.close(descriptor)


@pytest.mark.parametrize("there", [0, 100, PAGE, PAGE + 100, 2 * PAGE])
def test_a_read_at_the_end_says_how_much_there_was(there: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * there)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    assert read_all(descriptor, [aligned(bytes(PAGE)), aligned(bytes(2 * PAGE))], 0) == there
    os.close(descriptor)


def test_memory_for_direct_io_is_whole_pages() -> None:
    view = aligned(bytes(4 * PAGE))
    assert is_direct(view)
    assert is_direct(view[PAGE:])
    assert not is_direct(view[64 : 64 + PAGE])
    assert not is_direct(view[: PAGE + 512])
    assert not is_direct(memoryview(bytes(PAGE)))


def test_buffers_are_aligned_and_used_again() -> None:
    for length in (PAGE, HUGE_PAGE_BYTES + PAGE):
        buffers = Buffers(length)
        with buffers.take() as one, buffers.take() as two:
            assert len(one) == len(two) == length
            assert is_direct(one)
            one[:] = b"1" * length
            two[:] = b"2" * length
            assert bytes(one) == b"1" * length
        with buffers.take() as three:
            assert bytes(three[:1]) in b"12"


def test_a_forked_child_has_no_part_in_buffers() -> None:
    for length in (PAGE, HUGE_PAGE_BYTES):
        with Buffers(length).take() as view:
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            assert "dc" in flags_at(address)  # "Do not copy."


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping there."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            start, end = (int(each, 16) for each in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    return []


def test_a_segment_file_is_whole_private_and_zero(files: SegmentFiles) -> None:
    files.create(17, LENGTH, HEADER)
    assert files.numbers() == [17]
    path = files.path(17)
    assert path.name == "000017.seg"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_blocks * 512 >= LENGTH
    assert path.read_bytes() == HEADER + bytes(LENGTH - PAGE)
    with files.hold(17) as descriptor:
        into = aligned(bytes(PAGE))
        assert read_all(descriptor, [into], 0) == PAGE
        assert bytes(into) == HEADER


def test_a_segment_made_again_is_the_new_one_to_who_asks_then(files: SegmentFiles) -> None:
    files.create(0, LENGTH, HEADER)
    into = aligned(bytes(PAGE))
    with files.hold(0) as before:
        files.create(0, LENGTH, b"other".ljust(PAGE, b"."))
        assert read_all(before, [into], 0) == PAGE
        assert bytes(into) == HEADER
    with files.hold(0) as after:
        read_all(after, [into], 0)
        assert bytes(into[:5]) == b"other"


@pytest.mark.parametrize("name", ["posix_fallocate", "pwritev", "fsync"])
def test_a_segment_that_cannot_be_made_leaves_nothing(
    name: str, files: SegmentFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nvme_files.os, name, refuse)
    with pytest.raises(OSError, match="No space"):
        files.create(0, LENGTH, HEADER)
    assert list(files.folder.iterdir()) == []


def test_a_name_is_durable_and_never_before_its_file(
    files: SegmentFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, []

    def sync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, sorted(names(files.folder))))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    files.create(0, LENGTH, HEADER)
    half, whole = ["000000.seg.tmp"], ["000000.seg"]
    assert synced == [(half[0], half), (files.folder.name, whole)]
    synced.clear()
    replace_file(files.folder / "small", b"small")
    assert synced == [
        ("small.tmp", ["000000.seg", "small.tmp"]),
        (files.folder.name, ["000000.seg", "small"]),
    ]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_what_a_killed_process_left_half_made_goes(files: SegmentFiles) -> None:
    half = files.folder / "000003.seg.tmp"
    half.write_bytes(b"half")
    assert files.numbers() == []
    files.remove_half_made()
    assert not half.exists()
    half.write_bytes(b"half")
    files.create(3, LENGTH, HEADER)
    assert files.numbers() == [3]


def test_files_are_closed_when_there_are_many(files: SegmentFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme_files, "OPEN_FILES_MAX", 2)
    for number in range(4):
        files.create(number, 2 * PAGE, HEADER)
    before = open_count()
    with files.hold(0) as held:
        for number in range(4):
            with files.hold(number):
                pass
        os.fstat(held)
        assert open_count() <= before + 2
    files.close()
    files.close()
    assert open_count() == before


def test_a_file_system_without_direct_io_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(nvme_files.os, "open", refuse)
    assert not takes_direct(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_trouble_is_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        takes_direct(tmp_path / "missing")


def test_a_small_file_is_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small"
    replace_file(path, b"old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(nvme_files.os, "fsync", refuse)
        with pytest.raises(OSError, match="Input/output"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["small"]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_one_holds_the_lock(tmp_path: Path) -> None:
    first = lock_file(tmp_path / "LOCK")
    assert first is not None
    assert lock_file(tmp_path / "LOCK") is None
    os.close(first)
    again = lock_file(tmp_path / "LOCK")
    assert again is not None
    os.close(again)


def test_a_fault_says_what_and_where() -> None:
    with pytest.raises(DeviceFault) as caught, faults("writing blocks to the disk"):
        raise OSError(errno.EIO, "whatever")
    assert caught.value.errno == errno.EIO
    assert str(caught.value) == "writing blocks to the disk: Input/output error"
