"""Where a node is: ``unix:///path`` or ``tcp://host:port``; the default; and a socket that leads there."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput

UNIX_PATH_BYTES_MAX = 107
_TODO = "write unix:///absolute/path.sock or tcp://host:port"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse(text: str) -> Address:
    """An absolute path without a scheme is a unix socket. RAISES BadInput for anything else."""
    if text.startswith("/"):
        return _unix(text)
    scheme, found, rest = text.partition("://")
    if found and scheme == "unix":
        return _unix(rest)
    if found and scheme == "tcp":
        return _tcp(text, rest)
    raise BadInput("bad_config", f"{text!r} is no address", "it has no scheme known here", _TODO)


def default_address(environment: Mapping[str, str] | None = None) -> str:
    """``$KVCACHE_SOCKET``, else in ``$XDG_RUNTIME_DIR``, else in a directory of this user under /tmp.

    RAISES BadInput when that last directory belongs to somebody else: /tmp is everybody's, and a
    stranger's node could answer there.
    """
    variables = os.environ if environment is None else environment
    if chosen := variables.get("KVCACHE_SOCKET"):
        return str(parse(chosen))
    if runtime := variables.get("XDG_RUNTIME_DIR"):
        return str(_unix(f"{runtime}/kvcache/node.sock"))
    return str(_unix(f"{_own_directory()}/node.sock"))


def connected_socket(where: Address, deadline_ns: int, clock: Clock) -> socket.socket:
    """A socket that does not block. RAISES OSError, TimeoutError among them.

    A host name is looked up by the system, which has no deadline for that.
    """
    if isinstance(where, UnixAddress):
        return _connect_one(socket.AF_UNIX, where.path, deadline_ns, clock)
    found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    for family, _, _, _, target in found[:-1]:
        with contextlib.suppress(OSError):
            return _connect_one(family, target, deadline_ns, clock)
    family, _, _, _, target = found[-1]
    return _connect_one(family, target, deadline_ns, clock)


def _connect_one(
    family: int, target: str | tuple[str | int | bytes, ...], deadline_ns: int, clock: Clock
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A full backlog makes a unix connect wait, so it needs the timeout as much as TCP does.
        sock.settimeout(max(deadline_ns - clock.now_ns(), 1) / NS_PER_S)
        sock.connect(target)
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _own_directory() -> Path:
    uid = os.getuid()
    directory = Path(tempfile.gettempdir()) / f"kvcache-{uid}"
    try:
        owner = directory.lstat().st_uid
    except FileNotFoundError:
        return directory
    if owner != uid:
        raise BadInput(
            "bad_config",
            f"{directory} belongs to uid {owner}",
            f"this process runs as uid {uid}, and only its own node may answer there",
            "set KVCACHE_SOCKET, or have the directory removed",
        )
    return directory


def _unix(path: str) -> UnixAddress:
    if not path.startswith("/"):
        raise BadInput("bad_config", f"the socket path {path!r} is not absolute", "", _TODO)
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        raise BadInput(
            "bad_config",
            f"the socket path {path!r} is too long",
            f"the system takes {UNIX_PATH_BYTES_MAX} bytes",
            "use a shorter path, for instance in /run or /tmp",
        )
    if "\0" in path:
        raise BadInput("bad_config", "the socket path holds a zero byte", "", _TODO)
    return UnixAddress(path)


def _tcp(text: str, rest: str) -> TcpAddress:
    host, found, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not found or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise BadInput("bad_config", f"{text!r} is no address", "a tcp address is a host and a port", _TODO)
    if not _can_be_looked_up(host):
        raise BadInput("bad_config", f"{text!r} is no address", "no host has such a name", _TODO)
    return TcpAddress(host, int(port))


def _can_be_looked_up(host: str) -> bool:
    """Whatever the system then says. What cannot even be asked would be no OSError."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return host.isprintable() and " " not in host
