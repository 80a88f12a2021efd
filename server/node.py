"""One node: the place that picks implementations and puts them together, and the shell around them.

    listen -> accept -> handshake (Hello, Welcome, the slab's descriptor) -> Session -> Connection -> Core

One process, one event loop: the data plane. HTTP, the dashboard and the index run in a child process
(``kvcache.server.http``) that is a client like any other, so that neither's interpreter lock stalls the
other. A connection that mapped the slab is tied to its process by a pidfd: slots it had reserved when the
connection ended are used again once the process is dead or says itself that its copies have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Coroutine
from pathlib import Path

from kvcache import wire
from kvcache.address import default_address
from kvcache.clock import Clock, SystemClock
from kvcache.config import NodeConfig, is_loopback, parse_bind
from kvcache.credentials import Credentials
from kvcache.errors import BadInput, KVCacheError
from kvcache.events import Publisher
from kvcache.eviction.registry import policy_class
from kvcache.ledger import Ledger
from kvcache.server.child import HttpChild
from kvcache.server.core import Core
from kvcache.server.handlers import Connection
from kvcache.server.identity import Identity, Peer, credential_for, peer_of
from kvcache.server.session import Session, failure
from kvcache.tiers.host import HostTier, huge_pages_free_bytes, memory_available_bytes
from kvcache.tiers.space import Space

log = logging.getLogger("kvcache.server")

EXPIRE_PERIOD_S = 0.25
BACKLOG = 128
ARENA_OF_THE_WIRE = -1


class Node:
    """A node in this process. ``start`` serves, ``close`` ends; the caller runs the event loop."""

    def __init__(self, config: NodeConfig, clock: Clock | None = None) -> None:
        """RAISES BadInput when the settings, credentials or memory do not allow a node."""
        self.config = config
        self.incarnation = time.time_ns()
        self.name = config.name or f"{socket.gethostname()}-{os.getpid()}"
        self.socket_path = config.socket or default_address().removeprefix("unix://")
        self.credentials = (
            Credentials.from_file(config.credentials) if config.credentials else Credentials.default()
        )
        self._tcp = parse_bind(config.tcp, "tcp")
        self._http = parse_bind(config.http, "http")
        _refuse_unsafe_bind(self._tcp, self.credentials, "tcp")
        _refuse_unsafe_bind(self._http, self.credentials, "http")
        self.core = _build_core(config, clock or SystemClock(), self.name, self.incarnation)
        self.tcp_address = ""
        self.http_address = ""
        self._inside_token = secrets.token_hex(32)
        self._owners = itertools.count(1)
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._sessions: dict[int, asyncio.Transport] = {}
        self._processes: dict[int, int] = {}  # owner -> pidfd, for mapped connections
        self._gone: dict[int, Peer] = {}  # owners whose connection ended with the map still possible
        self._lock_descriptor = -1
        self._child: HttpChild | None = None

    @property
    def address(self) -> str:
        return f"unix://{self.socket_path}"

    async def start(self) -> None:
        """Bind, populate, serve. RAISES BadInput when another node serves here or memory runs out."""
        self._lock()
        home = self.core.arena(os.getuid(), self.credentials.default_tenant(os.getuid()))
        if self.config.populate:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, self.core.host.populate, home)
        self._listen_unix()
        if self._tcp is not None:
            self._listen_tcp(*self._tcp)
        for listener in self._sockets:
            self._spawn(self._accept(listener))
        self._spawn(self._expire())
        if self._http is not None:
            self._child = HttpChild(self.address, self.config, self._inside_token)
            self.http_address = await self._child.start()

    async def close(self) -> None:
        """End every connection and give everything back. May be called twice."""
        if self._child is not None:
            await self._child.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in list(self._sessions.values()):
            transport.abort()
        await asyncio.sleep(0)
        for listener in self._sockets:
            listener.close()
        self._sockets.clear()
        for owner in list(self._processes):
            self._unwatch_process(owner)
        if self._lock_descriptor >= 0:
            Path(self.socket_path).unlink(missing_ok=True)
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1
            self.core.close()

    # --- listening ------------------------------------------------------------------------------

    def _lock(self) -> None:
        """One node a socket: a lock file beside it, held while the process lives."""
        path = Path(self.socket_path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise BadInput(
                "address_in_use",
                f"another node serves {self.address}",
                "one socket belongs to one node",
                "stop that node, or give this one another --socket",
            ) from error
        self._lock_descriptor = descriptor
        path.unlink(missing_ok=True)  # Left by a node that was killed: the lock says it is dead.

    def _listen_unix(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o117 if self.credentials.lists_other_users(os.getuid()) else 0o177)
        try:
            listener.bind(self.socket_path)
        except OSError as error:
            raise BadInput(
                "address_in_use", f"{self.address} cannot be bound", str(error), "give another --socket"
            ) from error
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
        self._sockets.append(listener)

    def _listen_tcp(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise BadInput(
                "address_in_use", f"tcp://{host}:{port} cannot be bound", str(error), "give another --tcp"
            ) from error
        listener.listen(BACKLOG)
        self._sockets.append(listener)
        self.tcp_address = f"tcp://{host}:{listener.getsockname()[1]}"

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            if len(self._sessions) >= self.config.connections_max:
                self.core.counters["refusals:too_large"] += 1
                connection.close()
                continue
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._spawn(self._welcome(connection))

    # --- one connection -------------------------------------------------------------------------

    async def _welcome(self, connection: socket.socket) -> None:
        """Hello within its deadline, else the connection is closed; refusals are said and counted."""
        call = 0
        try:
            async with asyncio.timeout(self.config.handshake_ms / 1000):
                call, hello = await self._hello(connection)
            _check_version(hello)
            identity = self._identify(connection, hello)
            self._answer_hello(connection, call, hello, identity)
            await self._serve(connection, identity)
        except KVCacheError as error:
            self.core.counters[f"refusals:{error.code}"] += 1
            log.warning("connection refused: %s", error)
            with contextlib.suppress(OSError):
                connection.send(wire.encode(call, failure(error)))
            connection.close()
        except (OSError, TimeoutError, EOFError):
            self.core.counters["refusals:bad_frame"] += 1
            connection.close()

    async def _hello(self, connection: socket.socket) -> tuple[int, wire.Hello]:
        header = wire.decode_header(await _receive_exactly(connection, wire.HEADER.size))
        if header.body_bytes > wire.TEXT_CHARS_MAX or header.payload_bytes:
            raise BadInput("too_large", f"a Hello of {header.body_bytes} bytes", "it is a small message")
        call, hello = wire.decode_request(await _receive_exactly(connection, header.body_bytes))
        if not isinstance(hello, wire.Hello):
            raise BadInput("bad_message", "a request before Hello", "a connection starts with Hello")
        return call, hello

    def _identify(self, connection: socket.socket, hello: wire.Hello) -> Identity:
        peer = peer_of(connection)
        loopback = connection.family != socket.AF_UNIX and is_loopback(connection.getpeername()[0])
        credential, inside = credential_for(
            self.credentials, hello.token, peer, loopback=loopback, inside_token=self._inside_token
        )
        owner = next(self._owners)
        mapped = hello.map and not inside and self._watch_process(owner, peer)
        uid = peer.uid if mapped else ARENA_OF_THE_WIRE
        arena = -1
        if not inside:
            # Bytes that come over the wire are written by the node: they share the node's own arena.
            arena = self.core.arena(os.getuid() if uid == ARENA_OF_THE_WIRE else uid, credential.tenant)
        if hello.writes_ended and peer.pid:
            self._writes_ended(peer)
        return Identity(owner, credential.tenant, credential.roles, arena, mapped, peer, inside)

    def _answer_hello(
        self, connection: socket.socket, call: int, hello: wire.Hello, identity: Identity
    ) -> None:
        welcome = wire.Welcome(
            version=wire.PROTOCOL_VERSION,
            node=self.name,
            incarnation=self.incarnation,
            tenant=identity.tenant,
            roles=sorted(identity.roles),
            tenant_key=b"" if identity.inside else self.credentials.tenant_key(identity.tenant),
            slab_bytes=self.core.host.capacity_bytes if identity.mapped else 0,
        )
        frame = wire.encode(call, welcome)
        descriptors = [self.core.host.descriptor(identity.arena)] if identity.mapped else []
        # A new socket's send buffer holds far more than one small frame.
        sent = socket.send_fds(connection, [frame], descriptors) if descriptors else connection.send(frame)
        assert sent == len(frame)

    async def _serve(self, connection: socket.socket, identity: Identity) -> None:
        owner = identity.owner
        handlers = Connection(self.core, identity, lambda batch, call: session.push(batch, call))
        session = Session(handlers, lambda: self._ended(identity))
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(lambda: session, connection)
        if not transport.is_closing():
            self._sessions[owner] = transport
            self.core.counters["connections_opened"] += 1

    def _ended(self, identity: Identity) -> None:
        self._sessions.pop(identity.owner, None)
        if identity.mapped:
            self._gone[identity.owner] = identity.peer
            if identity.owner not in self._processes:
                self._forget_writer(identity.owner)

    # --- writers that may still be copying ------------------------------------------------------

    def _watch_process(self, owner: int, peer: Peer) -> bool:
        """Whether the end of the peer's process can be seen; without that its map is not given out."""
        if peer.pid <= 0:
            return False
        try:
            descriptor = os.pidfd_open(peer.pid)
        except OSError:
            return False
        self._processes[owner] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._process_died, owner)
        return True

    def _process_died(self, owner: int) -> None:
        self._unwatch_process(owner)
        if owner in self._gone:
            self._forget_writer(owner)

    def _unwatch_process(self, owner: int) -> None:
        descriptor = self._processes.pop(owner, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    def _writes_ended(self, peer: Peer) -> None:
        """The process says that no copy of its is in flight from connections that have ended."""
        for owner, other in list(self._gone.items()):
            if other == peer:
                self._unwatch_process(owner)
                self._forget_writer(owner)

    def _forget_writer(self, owner: int) -> None:
        self._gone.pop(owner, None)
        self.core.ledger.writes_ended(owner)
        self.core.settle()

    # --- tasks ----------------------------------------------------------------------------------

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_PERIOD_S)
            self.core.expire()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Our own code is wrong. The command ends the process; an embedding program decides itself.
            task.get_loop().call_exception_handler({"message": "a task of the node", "exception": error})


def _build_core(config: NodeConfig, clock: Clock, name: str, incarnation: int) -> Core:
    huge = _use_huge_pages(config)
    available = huge_pages_free_bytes() if huge else memory_available_bytes()
    if config.capacity_bytes > available:
        raise BadInput(
            "bad_config",
            f"capacity is {config.capacity_bytes} bytes",
            f"this host has {available} bytes of memory available",
            "lower --capacity",
        )
    space = Space(config.capacity_bytes, config.unit_bytes)
    ledger = Ledger(space, policy_class(config.policy))
    host = HostTier(config.capacity_bytes, config.unit_bytes, huge_pages=huge)
    return Core(config, ledger, space, host, Publisher(name, incarnation), clock)


def _use_huge_pages(config: NodeConfig) -> bool:
    enough = huge_pages_free_bytes() >= config.capacity_bytes
    if config.huge_pages == "on" and not enough:
        raise BadInput(
            "bad_config",
            f"{huge_pages_free_bytes()} bytes of huge pages are free",
            f"the capacity is {config.capacity_bytes} bytes",
            "raise vm.nr_hugepages, or leave huge_pages at auto",
        )
    return enough and config.huge_pages != "off"


def _refuse_unsafe_bind(bind: tuple[str, int] | None, credentials: Credentials, name: str) -> None:
    if bind is not None and not is_loopback(bind[0]) and not credentials.has_tokens:
        raise BadInput(
            "unsafe_bind",
            f"{name} would listen on {bind[0]}, which others can reach",
            "no token is configured, so anybody could read and write blocks",
            "bind 127.0.0.1, or give --credentials with at least one token",
        )


def _check_version(hello: wire.Hello) -> None:
    if hello.version != wire.PROTOCOL_VERSION:
        raise BadInput(
            "bad_version",
            f"the client speaks protocol version {hello.version}",
            f"this node speaks version {wire.PROTOCOL_VERSION}",
            "run the same release of kvcache on both sides",
        )


async def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < count:
        part = await loop.sock_recv(connection, count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
