"""The index of a device: which slot holds which block, in LMDB. It is read once, at start, and then only
written. docs/format-index.md describes the files.

LMDB maps its file, and what is wrong with the file or the disk under it ends the process that touches it.
So the node never opens it: a process of its own does (``nvme_index_child``), one that reads at start and
one that takes the commits. When that one dies, a commit raises OSError, and memory goes on serving.

    open ──► usable ── a commit fails ──► usable: the next commit starts a fresh process
               └────── the file is damaged, the process died of it ──► lost: files removed, OSError for good

* Entries are keyed by slot offset, so no two blocks can claim one slot. Nothing looks a key up on disk.
* A commit is one transaction, on disk when it returns, but the very last may be lost in a power cut;
  a durable one is not. A failed one has left the index as it was, or (when only the answer was lost, or
  the last sync of a durable one failed) has been made: the caller takes its slots for doubtful.
* What an index says may be old or wrong in any way: each value has a guard, and the slot header decides.

The sum: an entry takes 104 bytes, about 118 in the file. A commit is one fdatasync, 0.3 to 4 ms, plus
0.1 ms for the way to the process and 3 us an entry; reading 300,000 entries takes 0.4 s.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from operator import lt
from pathlib import Path

from kvcache.tiers.nvme_format import INDEX_RECORD_BYTES, Entry, pack_key, pack_value, parse_values

STALL_S = 20.0
"""So long may a process say nothing: on a slow disk a commit takes a second, not twenty."""
COMMIT_ENTRIES_MAX = 65_536

# As in nvme_index_child.py, which cannot import them.
REQUEST = struct.Struct("=II?")
ANSWER = struct.Struct("=iI")
EXIT_DAMAGED = 3

_CHILD = Path(__file__).with_name("nvme_index_child.py")
_DATA = "data.mdb"
_NEW = "new"
_MAP_BYTES_MIN = 64 << 20
_MAP_BYTES_ENTRY = 1_024
_BATCH_BYTES = 8_192 * INDEX_RECORD_BYTES
_DAMAGE = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})


class Index:
    """An index that takes commits. One thread at a time; ``close`` may be called twice."""

    def __init__(self, directory: Path, map_bytes: int, stall_s: float) -> None:
        self._directory = directory
        self._map_bytes = map_bytes
        self._stall_s = stall_s
        self._process: _Process | None = None
        self._lost = ""

    @classmethod
    def open(cls, directory: Path, entries_max: int, *, stall_s: float = STALL_S) -> Index:
        """For up to ``entries_max`` entries. Makes an empty index where there is none. RAISES OSError.

        REQUIRES: the caller holds the device's lock, and the directory above is there.
        """
        index = cls(directory.absolute(), _MAP_BYTES_MIN + entries_max * _MAP_BYTES_ENTRY, stall_s)
        index._start(index._directory)
        return index

    @classmethod
    def create(
        cls, directory: Path, entries_max: int, entries: Sequence[Entry], *, stall_s: float = STALL_S
    ) -> Index:
        """A fresh index of ``entries`` in place of what is there, durably, or (RAISES OSError) not at all."""
        directory.mkdir(mode=0o700, exist_ok=True)
        index = cls(directory.absolute(), _MAP_BYTES_MIN + entries_max * _MAP_BYTES_ENTRY, stall_s)
        fresh = index._directory / _NEW
        if fresh.exists():
            shutil.rmtree(fresh)
        try:
            index._start(fresh)
            for first in range(0, len(entries), COMMIT_ENTRIES_MAX):
                index.commit(entries[first : first + COMMIT_ENTRIES_MAX], (), durable=False)
            index.commit((), (), durable=True)
        finally:
            index.close()
        (fresh / _DATA).replace(index._directory / _DATA)
        shutil.rmtree(fresh)
        _sync_directory(index._directory)
        index._start(index._directory)
        return index

    def commit(self, puts: Sequence[Entry], deletes: Sequence[int], *, durable: bool) -> None:
        """Put entries and delete those of offsets, all or none; an offset in both is put.

        A delete of what is not there is no error. ``durable``: a power cut does not undo it. RAISES OSError;
        EUCLEAN says that the index was found damaged and is gone: open the device anew.
        """
        if self._lost:
            raise OSError(errno.EUCLEAN, self._lost)
        request = bytearray(REQUEST.pack(len(puts), len(deletes), durable))
        for entry in puts:
            request += pack_key(entry.offset)
            request += pack_value(entry)
        for offset in deletes:
            request += pack_key(offset)
        if self._process is None:
            self._start(self._directory)
        self._ask(request)

    def close(self) -> None:
        """What was committed is durable afterwards, if the disk lets it."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def _start(self, directory: Path) -> None:
        arguments = ("write", str(self._directory), str(directory), str(self._map_bytes))
        if not self._directory.is_dir():
            self._directory.mkdir(mode=0o700)
            _sync_directory(self._directory.parent)
        self._process = _Process(arguments, self._stall_s)
        self._ask(b"")

    def _ask(self, request: bytes | bytearray) -> None:
        """Send it and wait for the answer. RAISES OSError; then the process is gone."""
        process = self._process
        assert process is not None
        try:
            process.send(request)
            number, length = ANSWER.unpack(process.receive(ANSWER.size))
            text = process.receive(length).decode(errors="replace")
        except TimeoutError as error:
            self._give_up(kill=True)
            what = f"{self._directory}: the index did not answer within {self._stall_s:.0f} s"
            raise OSError(errno.ETIMEDOUT, what) from error
        except (ConnectionError, EOFError) as error:
            status = self._give_up(kill=False)
            number, text = errno.EUCLEAN if -status in _DAMAGE else errno.EIO, _ended(status)
            raise self._failure(number, text) from error
        except OSError:  # Its answer may still come, and would be taken for that to the next request.
            self._give_up(kill=True)
            raise
        if number:
            self._give_up(kill=False)
            raise self._failure(number, text)

    def _give_up(self, *, kill: bool) -> int:
        process, self._process = self._process, None
        assert process is not None
        return process.kill() if kill else process.end()

    def _failure(self, number: int, text: str) -> OSError:
        if number == errno.EUCLEAN:
            self._lost = f"{self._directory}: the index is damaged and was removed: {text}"
            with contextlib.suppress(OSError):
                discard(self._directory)
            return OSError(number, self._lost)
        return OSError(number, f"{self._directory}: the index: {text}")


def read_index(
    directory: Path, findings: list[str] | None = None, *, stall_s: float = STALL_S
) -> list[Entry] | None:
    """All entries, by offset; None when the index is missing or damaged: slot headers know what is stored.

    Entries whose guard does not fit are left out. What is wrong is added to ``findings``, in plain words.
    Writes nothing. RAISES OSError when no process can be started or heard.
    """
    found = findings if findings is not None else []
    if not (directory / _DATA).exists():
        found.append(f"{directory}: there is no index")
        return None
    process = _Process(("read", str(directory.absolute()), str(directory.absolute())), stall_s)
    try:
        with _no_collection():
            entries, bad_count = _receive_entries(process, (directory / _DATA).stat().st_size)
    except (TimeoutError, ValueError) as error:
        process.kill()
        found.append(f"{directory}: the index cannot be read: {error}")
        return None
    except OSError:
        process.kill()
        raise
    status = process.end()
    if status:
        found.append(f"{directory}: the index cannot be read: {_ended(status)}")
        return None
    offsets = [entry.offset for entry in entries]
    if not all(map(lt, offsets, offsets[1:])):
        found.append(f"{directory}: the index is out of order")
        return None
    if bad_count:
        found.append(f"{directory}: {bad_count} entries of the index are damaged and were left out")
    return entries


def discard(directory: Path) -> None:
    """Remove the index, so that a fresh one is made. RAISES OSError."""
    if (directory / _NEW).exists():
        shutil.rmtree(directory / _NEW)
    (directory / _DATA).unlink(missing_ok=True)
    if directory.exists():
        _sync_directory(directory)


class _Process:
    """A child that runs ``nvme_index_child``, and the socket to it. RAISES OSError when it cannot start."""

    def __init__(self, arguments: Sequence[str], stall_s: float) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._socket.settimeout(stall_s)
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", str(_CHILD), *arguments],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except BaseException:
                self._socket.close()
                raise

    def send(self, data: bytes | bytearray) -> None:
        """RAISES TimeoutError, ConnectionError."""
        self._socket.sendall(data)

    def receive(self, size: int) -> bytes:
        """RAISES TimeoutError; EOFError when the process has ended."""
        data = self.receive_up_to(size)
        if len(data) < size:
            raise EOFError
        return data

    def receive_up_to(self, size: int) -> bytes:
        """Less only when the process has ended. RAISES TimeoutError."""
        buffer = bytearray(size)
        view, filled = memoryview(buffer), 0
        with contextlib.suppress(ConnectionError):
            while filled < size and (count := self._socket.recv_into(view[filled:])):
                filled += count
        return bytes(view[:filled])

    def end(self) -> int:
        """Close the socket and wait until the process has finished. Its exit status."""
        self._socket.close()
        try:
            return self._child.wait(STALL_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """A process that waits for a dead disk cannot be killed at once; it is left to itself then."""
        self._socket.close()
        self._child.kill()
        try:
            return self._child.wait(1.0)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL


def _receive_entries(process: _Process, file_bytes: int) -> tuple[list[Entry], int]:
    """What the process streams, and how many were bad. RAISES TimeoutError, ValueError for too many."""
    entries: list[Entry] = []
    bad_count = received = 0
    while batch := process.receive_up_to(_BATCH_BYTES):
        whole = len(batch) - len(batch) % INDEX_RECORD_BYTES  # More is there only when the process died.
        some, bad = parse_values(batch[:whole])
        entries += some
        bad_count += bad
        received += len(batch)
        if received > file_bytes:
            raise ValueError("it has more entries than the file can hold")
    return entries, bad_count


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the collector's passes: what is made here is all kept, and to look through it takes as long
    as to make it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _ended(status: int) -> str:
    if status < 0:
        return f"the process that has it open ended by signal {-status}"
    if status == EXIT_DAMAGED:
        return "LMDB finds it damaged"
    return f"the process that has it open ended with status {status}"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
