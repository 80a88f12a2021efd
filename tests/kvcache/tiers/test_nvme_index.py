"""The index: commits, what a start reads back, and that no damage to its file ends this process."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from kvcache.tiers import nvme_index, nvme_index_child
from kvcache.tiers.nvme_format import INDEX_RECORD_BYTES, pack_key, pack_value
from kvcache.tiers.nvme_index import Index, discard, read_index
from tests.kvcache.tiers.nvme_entries import STRIDE, entries_of, entry_of, filled


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def index(folder: Path) -> Iterator[Index]:
    index = Index.open(folder, 100_000)
    yield index
    index.close()


def test_what_was_committed_is_read_back(folder: Path, index: Index) -> None:
    entries = entries_of(300)
    index.commit(entries[:1], [], durable=True)
    index.commit(entries[1:], [], durable=False)
    index.commit([], [entries[7].offset, 1_000_000 * STRIDE], durable=False)
    index.commit([entry_of(9, 2)], [entries[9].offset], durable=False)
    index.close()
    expected = [entry_of(9, 2) if entry == entries[9] else entry for entry in entries if entry != entries[7]]
    findings: list[str] = []
    assert read_index(folder, findings) == expected
    assert findings == []


def test_an_empty_index_is_read_as_empty(folder: Path, index: Index) -> None:
    index.close()
    index.close()
    assert read_index(folder) == []


def test_an_index_opened_again_goes_on(folder: Path, index: Index) -> None:
    index.commit([entry_of(1)], [], durable=False)
    index.close()
    again = Index.open(folder, 10)
    again.commit([entry_of(2)], [], durable=False)
    again.close()
    assert read_index(folder) == [entry_of(1), entry_of(2)]


def test_a_missing_or_discarded_index_is_none(tmp_path: Path, folder: Path, index: Index) -> None:
    findings: list[str] = []
    assert read_index(tmp_path / "nowhere", findings) is None
    assert findings == [f"{tmp_path / 'nowhere'}: there is no index"]
    index.commit([entry_of(1)], [], durable=True)
    index.close()
    discard(folder)
    discard(folder)
    discard(tmp_path / "nowhere")
    assert read_index(folder) is None


def test_reading_writes_nothing(folder: Path, index: Index) -> None:
    index.commit(entries_of(50), [], durable=False)
    index.close()
    before = [(path.name, path.stat(), path.read_bytes()) for path in sorted(folder.iterdir())]
    assert len(read_index(folder) or []) == 50
    after = [(path.name, path.stat(), path.read_bytes()) for path in sorted(folder.iterdir())]
    assert [(name, kept.st_mtime_ns, data) for name, kept, data in before] == [
        (name, kept.st_mtime_ns, data) for name, kept, data in after
    ]
    assert [name for name, _, _ in after] == ["data.mdb"]


def test_the_files_are_the_owners_alone(folder: Path, index: Index) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "data.mdb").stat().st_mode) == 0o600


def test_a_created_index_replaces_the_old_one(folder: Path, index: Index) -> None:
    index.commit(entries_of(5), [], durable=True)
    index.close()
    (folder / "new").mkdir()
    (folder / "new" / "data.mdb").write_bytes(b"left by a start that was killed")
    fresh = Index.create(folder, 100, entries_of(20, generation=2))
    fresh.commit([entry_of(20, 2)], [], durable=True)
    fresh.close()
    assert read_index(folder) == entries_of(21, generation=2)
    assert [path.name for path in folder.iterdir()] == ["data.mdb"]


def test_both_sides_mean_the_same_bytes() -> None:
    assert nvme_index.REQUEST.format == nvme_index_child.REQUEST.format
    assert nvme_index.ANSWER.format == nvme_index_child.ANSWER.format
    assert nvme_index.EXIT_DAMAGED == nvme_index_child.EXIT_DAMAGED
    assert INDEX_RECORD_BYTES == nvme_index_child.RECORD_BYTES


def test_damaged_values_are_left_out_and_counted(folder: Path) -> None:
    entries = entries_of(40)
    data = bytearray(filled(folder, entries))
    at = data.find(entries[9].checksum)
    while at >= 0:  # Every copy: older pages hold some, too.
        data[at] ^= 1
        at = data.find(entries[9].checksum)
    (folder / "data.mdb").write_bytes(data)
    findings: list[str] = []
    assert read_index(folder, findings) == entries[:9] + entries[10:]
    assert findings == [f"{folder}: 1 entries of the index are damaged and were left out"]


def test_a_value_under_another_key_is_left_out(folder: Path) -> None:
    entries = entries_of(4)
    filled(folder, entries)
    with lmdb.open(str(folder), lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(pack_key(entries[1].offset), pack_value(entries[2]))
        transaction.put(pack_key(entries[2].offset), pack_value(entries[1]))
    assert read_index(folder) == [entries[0], entries[3]]


def test_an_entry_of_another_length_is_left_out(folder: Path) -> None:
    entries = entries_of(4)
    filled(folder, entries)
    with lmdb.open(str(folder), lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(pack_key(entries[1].offset), pack_value(entries[1]) + b"x")
        transaction.put(pack_key(entries[2].offset) + b"x", b"")
    findings: list[str] = []
    assert read_index(folder, findings) == [entries[0], entries[2], entries[3]]
    assert findings == [f"{folder}: 2 entries of the index are damaged and were left out"]


def test_a_file_cut_short_under_a_writer_loses_the_index_and_not_this_process(
    folder: Path, index: Index
) -> None:
    index.commit(entries_of(300), [], durable=True)
    os.truncate(folder / "data.mdb", 8_192)
    for _ in range(2):
        with pytest.raises(OSError, match=r"index is damaged and was removed: .* signal 7") as caught:
            index.commit([entry_of(1, 2)], [], durable=False)
        assert caught.value.errno == errno.EUCLEAN
    assert read_index(folder) is None
    Index.create(folder, 100, entries_of(2)).close()
    assert read_index(folder) == entries_of(2)


def test_an_index_that_cannot_be_opened_is_removed(folder: Path) -> None:
    filled(folder, entries_of(4))
    (folder / "data.mdb").write_bytes(b"x" * 8_192)
    with pytest.raises(OSError, match=r"damaged and was removed: .*not an LMDB file") as caught:
        Index.open(folder, 100)
    assert caught.value.errno == errno.EUCLEAN
    Index.open(folder, 100).close()


def child_of(index: Index) -> int:
    assert index._process is not None
    return index._process._child.pid


def test_a_process_that_ends_is_replaced_by_the_next_commit(folder: Path, index: Index) -> None:
    index.commit([entry_of(1)], [], durable=False)
    os.kill(child_of(index), signal.SIGKILL)
    with pytest.raises(OSError, match="ended by signal 9") as caught:
        index.commit([entry_of(2)], [], durable=False)
    assert caught.value.errno == errno.EIO
    index.commit([entry_of(3)], [], durable=False)
    index.close()
    assert read_index(folder) == [entry_of(1), entry_of(3)]


def test_a_process_that_hangs_is_given_up(folder: Path, index: Index) -> None:
    assert index._process is not None
    index._process._socket.settimeout(0.1)
    os.kill(child_of(index), signal.SIGSTOP)
    with pytest.raises(OSError, match="did not answer within 20 s") as caught:
        index.commit([entry_of(1)], [], durable=False)
    assert caught.value.errno == errno.ETIMEDOUT
    index.commit([entry_of(2)], [], durable=False)
    index.close()
    assert read_index(folder) == [entry_of(2)]


def test_an_answer_that_was_not_heard_is_not_taken_for_the_next(
    folder: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = index._process
    assert process is not None

    def deaf(size: int) -> bytes:
        raise OSError(errno.ENOBUFS, "")

    monkeypatch.setattr(process, "receive", deaf)
    with pytest.raises(OSError, match=str(errno.ENOBUFS)):
        index.commit([entry_of(1)], [], durable=False)
    assert process._child.poll() is not None
    monkeypatch.undo()
    index.commit([entry_of(2)], [entry_of(1).offset], durable=False)
    index.close()
    assert read_index(folder) == [entry_of(2)]


def test_signals_to_the_nodes_group_do_not_end_the_process(folder: Path, index: Index) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child_of(index), number)
    index.commit([entry_of(1)], [], durable=True)


def test_a_reader_waits_for_the_writer_that_is_not_gone_yet(folder: Path, index: Index) -> None:
    """As after a node was killed: what its process was told is finished before anything is read."""
    findings: list[str] = []
    assert read_index(folder, findings, stall_s=0.1) is None
    assert findings == [f"{folder}: the index cannot be read: timed out"]
    index.close()
    assert read_index(folder, stall_s=60) == []


def test_a_directory_that_has_vanished_is_an_error(tmp_path: Path, folder: Path, index: Index) -> None:
    with pytest.raises(OSError) as caught:
        Index.open(tmp_path / "no" / "where", 100)
    assert caught.value.errno == errno.ENOENT


def test_an_index_opens_a_file_that_is_larger_than_it_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = filled(folder, entries_of(2_000))
    monkeypatch.setattr(nvme_index, "_MAP_BYTES_MIN", len(data) // 8_192 * 4_096)
    index = Index.open(folder, 0)
    index.commit(entries_of(2_000, generation=2), [], durable=False)
    index.close()
    assert read_index(folder) == entries_of(2_000, generation=2)


def test_half_a_request_is_no_commit(folder: Path, index: Index) -> None:
    entries = entries_of(3)
    index.commit(entries, [], durable=False)
    assert index._process is not None
    index._process.send(nvme_index.REQUEST.pack(0, 2, False) + pack_key(entries[0].offset))
    index.close()
    assert read_index(folder) == entries


def patched(folder: Path, at: int, content: bytes) -> None:
    with (folder / "data.mdb").open("r+b") as file:
        file.seek(at)
        file.write(content)


def test_entries_out_of_order_are_refused(folder: Path, index: Index) -> None:
    """Page 2 is the only leaf; the places of its nodes stand behind its head, two bytes each."""
    index.commit(entries_of(2), [], durable=True)
    index.close()
    places = (folder / "data.mdb").read_bytes()[8_208:8_212]
    patched(folder, 8_208, places[2:] + places[:2])
    findings: list[str] = []
    assert read_index(folder, findings) is None
    assert findings == [f"{folder}: the index is out of order"]


@pytest.mark.parametrize("count", [1, 2, 4, 1 << 40])
def test_another_number_of_entries_than_the_file_says_is_refused(
    folder: Path, index: Index, count: int
) -> None:
    """The number of entries of the main database stands at 120 in either meta page."""
    index.commit(entries_of(3), [], durable=True)
    index.close()
    for page in (0, 4_096):
        patched(folder, page + 120, count.to_bytes(8, sys.byteorder))
    findings: list[str] = []
    assert read_index(folder, findings) is None
    assert findings == [f"{folder}: the index cannot be read: LMDB finds it damaged"]


class Endless(nvme_index._Process):
    """What a tree with a loop in it would be."""

    def __init__(self) -> None:
        pass

    def receive_up_to(self, size: int) -> bytes:
        return bytes(size)


def test_a_stream_without_end_is_cut_off() -> None:
    with pytest.raises(ValueError, match="more entries than the file can hold"):
        nvme_index._receive_entries(Endless(), 10 << 20)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (lmdb.MapFullError("mdb_put: MDB_MAP_FULL: Environment mapsize limit reached"), errno.ENOSPC),
        (lmdb.DiskError(f"mdb_put: {os.strerror(errno.ENOSPC)}"), errno.ENOSPC),
        (lmdb.Error(f"mdb_txn_commit: {os.strerror(errno.EIO)}"), errno.EIO),
        (lmdb.Error(f"mdb_txn_commit: {os.strerror(errno.EROFS)}"), errno.EROFS),
        (lmdb.Error(f"mdb_txn_commit: {os.strerror(errno.EDQUOT)}"), errno.EDQUOT),
        (lmdb.Error(f"mdb_txn_commit: {os.strerror(errno.EFBIG)}"), errno.EUCLEAN),
        (lmdb.CorruptedError("mdb_get: MDB_CORRUPTED: Located page was wrong type"), errno.EUCLEAN),
        (OSError(errno.EACCES, "no"), errno.EACCES),
    ],
)
def test_what_lmdb_raises_has_an_errno(error: OSError | lmdb.Error, number: int) -> None:
    assert nvme_index_child.errno_of(error) == number
