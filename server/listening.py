"""The sockets a node listens on, and the lock that says whose they are. What the system refuses becomes
BadInput here, with what the operator can do about it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from kvcache.errors import BadInput, plainly

BACKLOG = 128
# A host that vanished is noticed after about a minute: its reservations wait for nothing else.
KEEPALIVE_IDLE_S = 30
KEEPALIVE_PERIOD_S = 10
KEEPALIVE_PROBES = 3


def lock(path: Path, setting: str = "--socket") -> int:
    """The descriptor of a lock file beside the socket; the lock lasts while it is open. The file stays.
    ``setting`` named this socket.

    RAISES BadInput when another node has it, or when what bears the socket's name is no socket."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with _binding(f"unix://{path}", setting), contextlib.ExitStack() as undo:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", flags, 0o600)
        undo.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(
                "address_in_use",
                f"another node serves unix://{path}",
                "one socket belongs to one node",
                f"stop that node, or give this one another {setting}",
            ) from error
        _remove_left(path, setting)
        undo.pop_all()
    return descriptor


def listen_unix(path: Path, mode: int, setting: str = "--socket") -> socket.socket:
    """REQUIRES: the lock. ``mode`` is who may connect."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with _binding(f"unix://{path}", setting, listener):
        # The file is made with the socket's own mode. (The umask is the whole process's, threads and all.)
        os.fchmod(listener.fileno(), mode)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(BACKLOG)
    return listener


def listen_tcp(host: str, port: int, setting: str = "--tcp") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with _binding(f"tcp://{host}:{port}", setting, listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    return listener


def tune(connection: socket.socket) -> None:
    """Small frames leave at once, and the end of a host that vanished is noticed."""
    if connection.family == socket.AF_UNIX:
        return
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_PERIOD_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
    ):
        connection.setsockopt(level, option, value)


def _remove_left(path: Path, setting: str) -> None:
    """Remove the socket of a node that was killed: the lock says that it is dead."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BadInput(
            "bad_config",
            f"{path} is there and is no socket",
            "the node's socket would take its place, and it is not the node's to remove",
            f"give another {setting}, or move it away",
        )
    path.unlink()


@contextlib.contextmanager
def _binding(address: str, setting: str, listener: socket.socket | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if listener is not None:
            listener.close()
        raise not_bound(address, error, f"give another {setting}") from error


def not_bound(address: str, error: OSError, todo: str) -> BadInput:
    """What the system refused: an address that another has, or one that cannot be had at all."""
    code = "address_in_use" if error.errno == errno.EADDRINUSE else "bad_config"
    return BadInput(code, f"{address} cannot be bound", plainly(error), todo)


async def receive_exactly(connection: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < count:
        part = await loop.sock_recv(connection, count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
