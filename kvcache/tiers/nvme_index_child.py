"""The process that holds a device's LMDB files open: run by ``kvcache.tiers.nvme_index``, imported by nobody.

LMDB maps its file. A truncated file, a page the disk cannot read or a flipped bit then ends the process
that touches it with a signal, so that process is this one, and never the node. It imports as little as it
can, for it is started with each device: LMDB and a few modules of C.

    read  LOCK_DIRECTORY DIRECTORY             stream all entries, then leave; nothing is written
    write LOCK_DIRECTORY DIRECTORY MAP_BYTES   take commits until the other side closes, then leave

Standard input is a socket, and everything goes over it: entries as they lie in the index, key and value;
a request is a head and its records; an answer an errno and a text (``nvme_index`` says it in structs).

* One of these at a time has the lock of the directory, also when the node that started it was killed and
  another was started: what was under way is finished before anything is read.
* Nothing is judged here but the tree itself; whether an entry is right its guard says, to the node.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import struct
import sys
from itertools import chain, islice

import lmdb

SOCKET = 0
KEY_BYTES = 8
RECORD_BYTES = 104
BATCH = 4_096
EXIT_DAMAGED = 3
REQUEST = struct.Struct("=II?")
ANSWER = struct.Struct("=iI")
NUMBERS = {os.strerror(number): number for number in errno.errorcode}


def main(mode: str, lock_directory: str, directory: str, *map_bytes: str) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        # Meant for the node, which closes this process when it is ready to.
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if mode == "read":
        lock(lock_directory, fcntl.LOCK_SH)
        return read(directory)
    try:
        if not os.path.isdir(directory):  # noqa: PTH112 - pathlib takes as long to import as LMDB.
            os.mkdir(directory, 0o700)  # noqa: PTH102
        lock(lock_directory, fcntl.LOCK_EX)
        environment = open_to_write(directory, int(map_bytes[0]))
    except (OSError, lmdb.Error) as error:
        return answer(error)
    answer(None)
    return serve(environment)


def lock(directory: str, kind: int) -> None:
    """Held until this process ends."""
    fcntl.flock(os.open(directory, os.O_RDONLY | os.O_DIRECTORY), kind)


def read(directory: str) -> int:
    try:
        environment = lmdb.open(directory, readonly=True, create=False, lock=False, readahead=True)
        expected = environment.stat()["entries"]
        with environment.begin() as transaction, transaction.cursor() as cursor:
            pieces = chain.from_iterable(cursor)
            while batch := list(islice(pieces, 2 * BATCH)):
                expected -= len(batch) // 2
                send(records(batch))
    except lmdb.Error:
        return EXIT_DAMAGED
    return EXIT_DAMAGED if expected else 0


def records(batch: list[bytes]) -> bytes:
    """Keys and values joined; one that has another length becomes zeros, which no guard vouches for."""
    joined = b"".join(batch)
    if len(joined) * 2 == len(batch) * RECORD_BYTES:
        return joined
    pairs = (key + value for key, value in zip(batch[::2], batch[1::2], strict=True))
    return b"".join(pair if len(pair) == RECORD_BYTES else bytes(RECORD_BYTES) for pair in pairs)


def open_to_write(directory: str, map_bytes: int) -> lmdb.Environment:
    """Without LMDB's own lock file: the directory's lock leaves no reader and no other writer."""
    with contextlib.suppress(FileNotFoundError):
        # The capacity may be lower than it was.
        map_bytes = max(map_bytes, 2 * os.stat(f"{directory}/data.mdb").st_size)  # noqa: PTH116
    resource.setrlimit(resource.RLIMIT_FSIZE, (map_bytes, map_bytes))
    environment = lmdb.open(
        directory,
        map_size=map_bytes,
        mode=0o600,
        sync=True,
        metasync=False,
        writemap=False,
        lock=False,
        readahead=False,
    )
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)
    return environment


def serve(environment: lmdb.Environment) -> int:
    while len(head := receive(REQUEST.size)) == REQUEST.size:
        put_count, delete_count, durable = REQUEST.unpack(head)
        body = receive(put_count * RECORD_BYTES + delete_count * KEY_BYTES)
        if len(body) != put_count * RECORD_BYTES + delete_count * KEY_BYTES:
            break
        try:
            commit(environment, body, put_count * RECORD_BYTES)
            if durable:
                environment.sync(True)
        except (OSError, lmdb.Error) as error:
            return answer(error)
        answer(None)
    try:
        environment.sync(True)
    except lmdb.Error:
        return 1
    return 0


def commit(environment: lmdb.Environment, body: bytes, puts_end: int) -> None:
    """One transaction. Deletes go first, so that an offset in both is put."""
    with environment.begin(write=True) as transaction:
        for at in range(puts_end, len(body), KEY_BYTES):
            transaction.delete(body[at : at + KEY_BYTES])
        for at in range(0, puts_end, RECORD_BYTES):
            transaction.put(body[at : at + KEY_BYTES], body[at + KEY_BYTES : at + RECORD_BYTES])


def answer(error: OSError | lmdb.Error | None) -> int:
    """The exit status that goes with it. After an error this process is of no further use."""
    text = str(error).encode()[:1_000] if error else b""
    send(ANSWER.pack(errno_of(error) if error else 0, len(text)) + text)
    return 1 if error else 0


def errno_of(error: OSError | lmdb.Error) -> int:
    """EUCLEAN when LMDB finds its file damaged. LMDB gives the system's errors as their texts."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, lmdb.MapFullError):
        return errno.ENOSPC
    number = NUMBERS.get(str(error).rpartition(": ")[2], errno.EUCLEAN)
    # Beyond the file's limit: only a damaged list of free pages sends it there.
    return errno.EUCLEAN if number == errno.EFBIG else number


def receive(size: int) -> bytes:
    """Less only when the other side has closed."""
    parts = []
    while size and (part := os.read(SOCKET, min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(SOCKET, view) :]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
