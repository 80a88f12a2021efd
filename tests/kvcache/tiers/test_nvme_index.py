"""The index: commits, what a start reads back, and that no damage to its file ends this process."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import lmdb
import pytest

from kvcache.block import StorageKey
from kvcache.tiers import nvme_index, nvme_index_child
from kvcache.tiers.nvme_format import INDEX_RECORD_BYTES, Entry, pack_key, pack_value
from kvcache.tiers.nvme_index import Index, discard, read_index

FAULT_FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))
STRIDE = 8_192
ROOT = Path(__file__).parents[3]


def entry_of(number: int, generation: int = 1) -> Entry:
    random = Random(number << 20 | generation)
    key, parent, checksum = (random.randbytes(size) for size in (32, 16, 16))
    return Entry(number * STRIDE, StorageKey(key), parent, 4_096, 4_096, generation, checksum, 1)


def entries_of(count: int, generation: int = 1) -> list[Entry]:
    return [entry_of(number, generation) for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def index(folder: Path) -> Iterator[Index]:
    index = Index.open(folder, 100_000)
    yield index
    index.close()


def filled(folder: Path, entries: list[Entry]) -> bytes:
    """The data file of an index of ``entries``, made in four commits, so that it has free pages."""
    index = Index.open(folder, 100_000)
    for part in range(4):
        index.commit(entries[part::4], [entry.offset for entry in entries[3::4]], durable=False)
    index.close()
    return (folder / "data.mdb").read_bytes()


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


@pytest.mark.slow
def test_a_truncated_file_is_refused_or_read_whole(folder: Path) -> None:
    entries = entries_of(400)
    data = filled(folder, entries)
    random = Random(1)
    lengths = [0, 1, 4_095, 4_096, 8_191, 8_192, len(data) - 1, len(data) - 4_096]
    lengths += [random.randrange(len(data)) for _ in range(6)]
    for length in lengths:
        (folder / "data.mdb").write_bytes(data[:length])
        assert read_index(folder) in (None, entries), length


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


def test_a_smaller_index_opens_a_larger_file(folder: Path) -> None:
    entries = entries_of(2_000)
    filled(folder, entries)
    index = Index.open(folder, -60_000)
    index.commit(entries_of(2_000, generation=2), [], durable=False)
    index.close()
    assert read_index(folder) == entries_of(2_000, generation=2)


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


def check_flipped(folder: Path, data: bytes, known: set[Entry], random: Random) -> None:
    flipped = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 8))):
        flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
    (folder / "data.mdb").write_bytes(flipped)
    entries = read_index(folder)
    assert entries is None or known.issuperset(entries)
    if entries is None:
        return
    try:
        index = Index.open(folder, 10_000)
        try:
            for number in range(3):
                index.commit([entry_of(random.randrange(600), 2)], [number * STRIDE], durable=False)
        finally:
            index.close()
    except OSError as error:
        assert error.errno == errno.EUCLEAN, error
        assert read_index(folder) is None
    else:
        entries = read_index(folder)
        assert entries is None or known.issuperset(entries)


@pytest.mark.parametrize("part", range(10))
@pytest.mark.slow
def test_flipped_bits_never_end_this_process_nor_make_an_entry(folder: Path, part: int) -> None:
    entries = entries_of(400)
    data = filled(folder, entries)
    known = {*entries, *entries_of(600, generation=2)}
    for seed in range(20 * FAULT_FACTOR):
        check_flipped(folder, data, known, Random(seed * 10 + part))


WRITER = """
import sys
from pathlib import Path
from kvcache.block import StorageKey
from kvcache.tiers.nvme_format import Entry
from kvcache.tiers.nvme_index import Index

index = Index.open(Path(sys.argv[1]), 10_000)
for batch in range(1, 10_000):
    offsets = [(batch * 16 + number) % 480 * 8_192 for number in range(16)]
    puts = [Entry(at, StorageKey(bytes(32)), bytes(16), 4_096, 4_096, batch, bytes(16), 1) for at in offsets]
    index.commit(puts[:15], [offsets[15]], durable=batch % 2 == 0)
    print(batch, flush=True)
"""


def killed_writer(folder: Path, commits: int, victim: str) -> int:
    """Runs WRITER, kills it after ``commits`` commits and a while, and says the last that it was told of."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(commits):
            assert writer.stdout.readline()
        children = Path(f"/proc/{writer.pid}/task/{writer.pid}/children").read_text().split()
        for _ in range(commits * 7 % 1_000):  # A point within a commit.
            os.sched_yield()
        os.kill(writer.pid if victim == "node" else int(children[0]), signal.SIGKILL)
        last = commits
        for line in writer.stdout:
            last = int(line)
        assert writer.wait() != 0
    return last


@pytest.mark.parametrize("victim", ["node", "child"])
@pytest.mark.slow
def test_a_killed_writer_leaves_every_commit_whole(folder: Path, victim: str) -> None:
    random = Random(victim)
    for _ in range(10 * FAULT_FACTOR):
        discard(folder)
        last = killed_writer(folder, random.randrange(1, 200), victim)
        entries = read_index(folder)
        assert entries is not None
        newest = max(entry.generation for entry in entries)
        assert last <= newest <= last + 1
        expected = {
            (batch * 16 + number) % 480 * 8_192: batch
            for batch in range(1, newest + 1)
            for number in range(16)
        }
        expected = {at: batch for at, batch in expected.items() if at // 8_192 % 16 != 15}
        assert {entry.offset: entry.generation for entry in entries} == expected
