"""Recordings on disk: within their bytes, one node a folder, and what goes wrong ends them without a word
to whoever records."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvcache.eviction.traces import record_files
from kvcache.eviction.traces.record_files import BYTES_MIN, QUEUE_MAX, RecordFiles
from kvcache.eviction.traces.record_format import Head

HEAD = Head("a" * 16, 0, 1, 0, 0, 128, 1.0)
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is just now: what was put is there once it was closed."""
    monkeypatch.setattr(record_files, "CLOSE_S", PATIENCE_S)


def noise(number: int, size: int = 20_000) -> bytes:
    """Does not pack."""
    return os.urandom(size - 1) + bytes([number])


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.kvrec"))


def test_what_is_put_is_written_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "down"
    files = RecordFiles(folder, BYTES_MIN)
    assert files.begin(HEAD)
    assert all(files.put(bytes([number])) for number in range(5))
    assert files.begin(replace(HEAD, sequence=1))
    assert files.put(b"last")
    files.close()
    files.close()
    assert files.failed == ""
    assert held(folder) == [f"{'a' * 16}-00000000.kvrec", f"{'a' * 16}-00000001.kvrec"]
    assert sum(path.stat().st_size for path in folder.glob("*.kvrec")) == files.written_bytes
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


def test_the_oldest_go_before_there_is_too_much(tmp_path: Path) -> None:
    sequence = 0
    for life in range(3):
        files = RecordFiles(tmp_path, BYTES_MIN)
        for _ in range(6):
            assert files.begin(replace(HEAD, life=str(life) * 16, sequence=sequence))
            sequence += 1
            assert all(files.put(noise(number)) for number in range(7))
        files.close()
        assert files.failed == ""
        assert sum(path.stat().st_size for path in tmp_path.glob("*.kvrec")) <= BYTES_MIN
    names = held(tmp_path)
    assert 6 <= len(names) < 8
    assert names[-1] == f"{'2' * 16}-00000017.kvrec"
    assert not any(name.startswith("0") for name in names)


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, BYTES_MIN)
    files.begin(HEAD)
    assert all(files.put(noise(number, 30_000)) for number in range(45))
    files.close()
    [name] = held(tmp_path)
    assert (tmp_path / name).stat().st_size == files.written_bytes > BYTES_MIN


def test_what_others_do_in_the_folder_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder and two links that are called like recordings, and one that somebody takes away just then."""
    (tmp_path / "folder.kvrec").mkdir()
    (tmp_path / "nowhere.kvrec").symlink_to(tmp_path / "none")
    (tmp_path / "elsewhere.kvrec").symlink_to(tmp_path / "mine.npz")
    (tmp_path / "mine.npz").write_bytes(bytes(4 * BYTES_MIN))
    (tmp_path / "gone.kvrec").write_bytes(bytes(10))
    lstat = Path.lstat

    def taken(path: Path) -> os.stat_result:
        if path.name == "gone.kvrec":
            path.unlink(missing_ok=True)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", taken)
    files = RecordFiles(tmp_path, BYTES_MIN)
    files.begin(HEAD)
    files.put(noise(1))
    files.close()
    assert not files.failed and files.written_bytes
    left = {"folder.kvrec", "nowhere.kvrec", "elsewhere.kvrec", "mine.npz"}
    assert left < {path.name for path in tmp_path.iterdir()}


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.npz"
    mine.write_bytes(bytes(2 * BYTES_MIN))
    files = RecordFiles(tmp_path, BYTES_MIN)
    files.begin(HEAD)
    files.put(noise(1))
    files.close()
    assert mine.stat().st_size == 2 * BYTES_MIN


def test_one_recording_a_folder(tmp_path: Path) -> None:
    first = RecordFiles(tmp_path, BYTES_MIN)
    first.begin(HEAD)
    first.put(b"x")
    while not held(tmp_path):
        pass  # Until its thread has the lock.
    second = RecordFiles(tmp_path, BYTES_MIN)
    second._thread.join(PATIENCE_S)
    assert second.is_over
    assert "another node records here" in second.failed
    assert not second.put(b"x")
    second.close()
    first.end()
    third = RecordFiles(tmp_path, BYTES_MIN, before=first)
    third.begin(replace(HEAD, sequence=1))
    third.close()
    assert first.failed == third.failed == ""
    assert len(held(tmp_path)) == 2


@pytest.mark.parametrize("trouble", ["no folder", "no right", "gone"])
def test_what_goes_wrong_is_kept_to_itself(tmp_path: Path, trouble: str) -> None:
    folder = tmp_path / "folder"
    if trouble == "no folder":
        folder.write_text("a file")
    if trouble == "no right":
        folder = Path("/proc/kvcache-has-no-place-here")
    files = RecordFiles(folder, BYTES_MIN)
    files.begin(HEAD)
    if trouble == "gone":
        while not held(folder):
            pass
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    files.put(b"x")
    files._thread.join(PATIENCE_S)
    assert not files._thread.is_alive()
    assert files.failed
    assert str(folder) in files.failed
    assert not files.put(b"more")
    files.close()


def test_a_full_disk_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvcache.eviction.traces.record_files.os.write", full)
    files = RecordFiles(tmp_path, BYTES_MIN)
    files.begin(HEAD)
    files._thread.join(PATIENCE_S)
    assert files.failed == f"No space left on device ({tmp_path})"


def test_a_disk_that_hangs_costs_records_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    goes_on = threading.Event()
    write = os.write

    def slow(descriptor: int, data: memoryview) -> int:
        goes_on.wait(PATIENCE_S)
        return write(descriptor, data)

    monkeypatch.setattr("kvcache.eviction.traces.record_files.os.write", slow)
    files = RecordFiles(tmp_path, BYTES_MIN)
    files.begin(HEAD)
    taken = [files.put(b"x") for _ in range(2 * QUEUE_MAX)]
    assert QUEUE_MAX - 1 <= sum(taken) <= QUEUE_MAX + 1
    files.end()
    goes_on.set()
    files.close()
    assert not files._thread.is_alive()
    assert files.failed == ""
