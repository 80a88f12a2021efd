"""Recordings on disk: a thread that writes what it is handed, and keeps within its bytes.

    records ──► put (a bounded queue, never waits) ──► thread: pack, make room, write

Files are ``<life>-<sequence>.kvrec`` in one folder, which one node at a time may record into (a lock file).
When the folder would hold more than ``bytes_max``, the oldest recordings in it go. What goes wrong (disk
full, folder gone, no right) ends the recording: ``failed`` says it, nothing waits, nothing is raised.

The sum: 1 ms to pack and write 32 KiB of records, which is some 4,000 requests.
"""

from __future__ import annotations

import fcntl
import os
import queue
import stat
import threading
from pathlib import Path

from kvcache.eviction.traces.record_format import SUFFIX, Head, packed_chunk

FILES_A_FOLDER = 8
"""So many files, roughly, share ``bytes_max``: what goes when room is made is one of them."""
QUEUE_MAX = 64
BYTES_MIN = 1 << 20
CLOSE_S = 5.0
_LOCK = "recording.lock"

_Work = Head | bytes | None


class RecordFiles:
    """``put`` and ``begin`` come from one thread; what they say is done by another, in order."""

    def __init__(self, folder: Path, bytes_max: int, before: RecordFiles | None = None) -> None:
        """``before`` has ended, and may still write. REQUIRES: ``bytes_max`` is at least ``BYTES_MIN``."""
        assert bytes_max >= BYTES_MIN
        self.folder = folder
        self.failed = ""
        """Why it ended; empty while it has not."""
        self.written_bytes = 0
        self.file_bytes = 0
        self._bytes_max = bytes_max
        self._queue: queue.Queue[_Work] = queue.Queue(QUEUE_MAX)
        self._descriptor = -1
        self._lock = -1
        self._current: Path | None = None
        self._begun = threading.Event()
        self._ended = threading.Event()
        arguments = (before,)
        self._thread = threading.Thread(target=self._run, args=arguments, name="kvcache-record", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Has it ended, or failed, and is nothing left to write?"""
        return not self._thread.is_alive()

    @property
    def is_full(self) -> bool:
        """Is it time for another file?"""
        return self.file_bytes >= self._bytes_max // FILES_A_FOLDER

    def wait_begun(self) -> None:
        """Until it has the folder to itself, or has failed; for a while at most."""
        self._begun.wait(CLOSE_S)

    def begin(self, head: Head) -> bool:
        """What is put from now on goes into a new file. False: it cannot be taken now."""
        self.file_bytes = 0
        return self._take(head)

    def put(self, records: bytes) -> bool:
        """False: it was not taken, the disk does not keep up. REQUIRES: a file was begun."""
        return self._take(records)

    def end(self) -> None:
        """Nothing more is put; what was put is written. May be called twice."""
        self._ended.set()
        self._take(None)

    def close(self) -> None:
        """``end``, and wait for it, for a while at most. May be called twice."""
        self.end()
        self._thread.join(CLOSE_S)

    def _take(self, work: _Work) -> bool:
        if self.failed:
            return False
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            return False
        return True

    # --- in the thread --------------------------------------------------------------------------

    def _run(self, before: RecordFiles | None) -> None:
        if before is not None:
            before._thread.join(CLOSE_S)
        try:
            self._lock_folder()
            self._begun.set()
            while (work := self._next()) is not None:
                if isinstance(work, Head):
                    self._open(work)
                else:
                    self._write(packed_chunk(work))
        except OSError as error:
            self.failed = f"{error.strerror or error} ({self.folder})"
        except ValueError as error:  # A name that none can have.
            self.failed = f"{error} ({self.folder})"
        finally:
            self._begun.set()
            for descriptor in (self._descriptor, self._lock):
                if descriptor >= 0:
                    os.close(descriptor)

    def _next(self) -> _Work:
        """None: it is over. What ends it may have found the queue full."""
        if not self._ended.is_set():
            return self._queue.get()
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            return None

    def _lock_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(self.folder / _LOCK, flags, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, "another node records here") from error

    def _open(self, head: Head) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._current = self.folder / f"{head.life}-{head.sequence:08}{SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._current, flags, 0o600)
        self._write(head.packed())

    def _write(self, data: bytes) -> None:
        self._make_room(len(data))
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self.file_bytes += len(data)
        self.written_bytes += len(data)

    def _make_room(self, size: int) -> None:
        held = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # Somebody has just taken it away, and so made room.
            if stat.S_ISREG(status.st_mode):
                held.append((status.st_mtime_ns, path.name, status.st_size, path))
        total = sum(each[2] for each in held) + size
        for _, _, bytes_held, path in sorted(held):
            if total <= self._bytes_max:
                return
            if path != self._current:
                path.unlink(missing_ok=True)
                total -= bytes_held
        if not self._current or not self._current.exists():
            raise FileNotFoundError(2, "the file being written was taken away")
