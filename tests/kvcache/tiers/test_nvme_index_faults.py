"""The index under faults: cut short, bits flipped, its writers killed. This process never ends of it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from kvcache.tiers.nvme_format import Entry
from kvcache.tiers.nvme_index import Index, discard, read_index
from tests.kvcache.tiers.nvme_entries import STRIDE, entries_of, entry_of, filled

FAULT_FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))
ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


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


def test_a_free_page_far_outside_the_file_is_not_written(folder: Path) -> None:
    """A record of free pages is their count and their numbers, eight bytes each; here one is damaged."""
    data = bytearray(filled(folder, entries_of(400)))
    newest = max((0, 4_096), key=lambda meta: struct.unpack_from("=Q", data, meta + 144))
    (leaf,) = struct.unpack_from("=Q", data, newest + 80)
    (node,) = struct.unpack_from("=H", data, leaf * 4_096 + 16)
    pages = leaf * 4_096 + node + 16  # Behind the head of the node and its key, a transaction's number.
    (count,) = struct.unpack_from("=Q", data, pages)
    assert 0 < count < 20
    struct.pack_into("=Q", data, pages + 8, 1 << 28)
    (folder / "data.mdb").write_bytes(data)
    assert read_index(folder) is not None
    index = Index.open(folder, 1_000)
    with pytest.raises(OSError, match="damaged and was removed") as caught:
        for generation in range(2, 40):
            index.commit(entries_of(400, generation), [], durable=False)
            assert (folder / "data.mdb").stat().st_size < 1 << 30
    assert caught.value.errno == errno.EUCLEAN


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
for batch in range(1, 10**9):
    offsets = [(batch * 16 + number) % 480 * 8_192 for number in range(16)]
    puts = [Entry(at, StorageKey(bytes(32)), bytes(16), 4_096, 4_096, batch, bytes(16), 1) for at in offsets]
    index.commit(puts[:15], [offsets[15]], durable=batch % 2 == 0)
    print(batch, flush=True)
index.close()
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


@pytest.mark.slow
def test_a_commit_is_synced_and_a_durable_one_twice(tmp_path: Path) -> None:
    """Data pages, then (durable) the root page; a kill cannot tell, only a power cut or a look."""
    if shutil.which("strace") is None:
        pytest.skip("strace is missing: install it")
    log = tmp_path / "log"
    trace = ["strace", "-f", "-o", str(log), "-e", "trace=pwrite64,pwritev,writev,fdatasync"]
    writer = WRITER.replace("10**9", "5")
    command = [*trace, sys.executable, "-c", writer, str(tmp_path / "index")]
    said = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if said.returncode:
        pytest.skip(f"not on this machine: nobody may trace a process: {said.stderr[:200]}")
    lines = re.sub(r".*resumed.*\n", "", log.read_text()).splitlines()
    calls = "".join("s" if "fdatasync" in line else "w" for line in lines if "(" in line)
    # The file is made; then four commits, the second and fourth durable; then the index is closed.
    assert re.fullmatch("w(w+sw)(w+sws)(w+sw)(w+sws)s", calls), calls
