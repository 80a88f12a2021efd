"""One node: the place that picks implementations and puts them together, and the shell around them.

    listen -> accept -> handshake (Hello, Welcome, the slab's descriptor) -> Session -> Connection -> Core

One process, one event loop: the data plane. HTTP, the dashboard and the index run in a child process
(``kvcache.server.http``) that is a client like any other, so that neither's interpreter lock stalls the
other. A connection that mapped the slab is tied to its process (``writers``): slots it had reserved when it
ended are used again once the process is dead or says itself that its copies have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Coroutine
from pathlib import Path

import msgspec

from kvcache import wire
from kvcache.address import TcpAddress, default_address
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock, SystemClock
from kvcache.config import NodeConfig, is_loopback, parse_bind
from kvcache.credentials import Credentials
from kvcache.errors import BadInput, KVCacheError
from kvcache.events import Publisher
from kvcache.eviction.choice import Choice, parse_choice
from kvcache.ledger import Ledger
from kvcache.peers.peer import Here
from kvcache.peers.plane import DataPlane
from kvcache.server.binding import refuse_unsafe_bind, refuse_unsafe_data
from kvcache.server.child import HttpChild
from kvcache.server.core import Core
from kvcache.server.handlers import Connection
from kvcache.server.hbm import NO_HBM
from kvcache.server.hbm_opening import below_hbm, open_hbm
from kvcache.server.identity import Identity, check_version, credential_for, peer_of, planning
from kvcache.server.listening import listen_tcp, listen_unix, lock, receive_exactly, tune
from kvcache.server.peering import join, peer_token
from kvcache.server.recording import Plan as RecordPlan
from kvcache.server.session import Session, failure
from kvcache.server.shadow_plan import EVICTED, Store
from kvcache.server.shadow_plan import Plan as ShadowPlan
from kvcache.server.sizing import segment_bytes, takes_huge_pages
from kvcache.server.writers import Writers
from kvcache.tiers.admission import hours_since
from kvcache.tiers.demote import Rules
from kvcache.tiers.drive import Place
from kvcache.tiers.host import HostTier
from kvcache.tiers.scrub import ScrubSettings
from kvcache.tiers.space import Space
from kvcache.tiers.stack import Stack, StackRules
from kvcache.transport.keys import shown

log = logging.getLogger("kvcache.server")

EXPIRE_PERIOD_S = 0.25
NVME_WAIT_S = 5.0
NO_ARENA = -1
ROLES_OF_A_MAP = frozenset({"reader", "writer"})
ACCEPT_PAUSE_S = 0.1


class Node:
    """A node in this process. ``start`` serves, ``close`` ends; the caller runs the event loop."""

    def __init__(self, config: NodeConfig, clock: Clock | None = None) -> None:
        """RAISES BadInput when the settings, credentials or memory do not allow a node."""
        self.config = config
        self.incarnation = time.time_ns()
        self.name = config.name or f"{socket.gethostname()}-{os.getpid()}"
        self.socket_path = config.socket or default_address().removeprefix("unix://")
        self.credentials = Credentials.named(config.credentials)
        self._tcp = parse_bind(config.tcp, "tcp")
        self._http = parse_bind(config.http, "http")
        refuse_unsafe_bind(self._tcp, self.credentials, "tcp")
        refuse_unsafe_bind(self._http, self.credentials, "http")
        refuse_unsafe_data(config.data_addresses, self.credentials, config.trust_network)
        self._clock = clock or SystemClock()
        token = peer_token(config.peer_token_file) if config.peer_addresses else ""
        self.core = _build_core(config, self._clock, self.name, self.incarnation)
        if config.peer_addresses:
            join(self.core, Here(self.name, self.incarnation, token, self.credentials.tenant_key))
        self.tcp_address = ""
        self.http_address = ""
        self._inside_token = secrets.token_hex(32)
        self._owners = itertools.count(1)
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._sessions: dict[int, asyncio.Transport] = {}
        self._greeting: set[socket.socket] = set()  # accepted, and not said who they are yet
        self._writers = Writers(self.core.uses.writes_ended)
        self._lock_descriptor = -1
        self._child: HttpChild | None = None

    @property
    def address(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def data_addresses(self) -> list[str]:
        """Where its transports listen, for a log: peers are told more (``Welcome.data``)."""
        return [shown(address) for address in self.core.plane.addresses]

    @property
    def is_stuck(self) -> bool:
        """After ``close``: does a thread still hang in a device? Then the process does not end by itself."""
        return any(each is not None and each.is_stuck for each in (self.core.stack, self.core.hbm))

    async def start(self) -> None:
        """Bind, populate, serve. RAISES BadInput when another node serves here or memory runs out."""
        self._lock_descriptor = lock(Path(self.socket_path))
        home = self.core.arena(os.getuid(), self.credentials.default_tenant(os.getuid()))
        # Both take seconds when there is much: the one in the kernel, the other on the disk.
        await asyncio.gather(self._populate(home), self._open_nvme())
        await self.core.plane.start()
        self._listen()
        for listener in self._sockets:
            self._spawn(self._accept(listener))
        self._spawn(self._expire())
        self.core.bringing.start()
        self.core.tuning.start()
        if (plan := RecordPlan.of(self.config)) is not None:
            self.core.recording.begin(plan, time.time_ns() // NS_PER_MS)
        if self._http is not None:
            self._child = HttpChild(self.address, self.config, self._inside_token)
            self.http_address = await self._child.start()

    async def _open_nvme(self) -> None:
        if self.core.stack is not None:
            await self.core.stack.start(self.core.namespaces.remember, NVME_WAIT_S)

    async def _populate(self, arena: int) -> None:
        if not self.config.populate:
            return
        log.info("taking %s of memory for blocks now; no client can connect meanwhile", self.config.capacity)
        start_ns = self._clock.now_ns()
        await asyncio.get_running_loop().run_in_executor(None, self.core.host.populate, arena)
        log.info("took it in %.1f s", (self._clock.now_ns() - start_ns) / NS_PER_S)

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
        await self.core.tuning.close()
        await self.core.bringing.close()
        await self.core.uses.close()
        await self.core.tickets.close()
        await self.core.plane.close()
        for each in [*self._sockets, *self._greeting]:
            each.close()
        self._sockets.clear()
        self._greeting.clear()
        self._writers.close()
        if self.core.hbm is not None:
            await self.core.hbm.close()
        if self.core.stack is not None:
            await self.core.stack.close()
        if self._lock_descriptor >= 0:
            Path(self.socket_path).unlink(missing_ok=True)
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1
            self.core.close()

    # --- listening ------------------------------------------------------------------------------

    def _listen(self) -> None:
        mode = 0o660 if self.credentials.lists_other_users(os.getuid()) else 0o600
        self._sockets.append(listen_unix(Path(self.socket_path), mode))
        if self._tcp is not None:
            listener = listen_tcp(*self._tcp)
            self._sockets.append(listener)
            self.tcp_address = str(TcpAddress(self._tcp[0], listener.getsockname()[1]))

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                # No descriptor is free, or the client is gone already: the next may have more luck.
                log.error("a connection cannot be accepted: %s", error)
                self.core.counters["refusals:unavailable"] += 1
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._sessions) + len(self._greeting) >= self.config.connections_max:
                self.core.counters["refusals:too_large"] += 1
                connection.close()
                continue
            self._greeting.add(connection)
            self._spawn(self._welcome(connection))

    # --- one connection -------------------------------------------------------------------------

    async def _welcome(self, connection: socket.socket) -> None:
        """Hello within its deadline, else the connection is closed; refusals are said and counted."""
        owner, call = next(self._owners), 0
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            undo.callback(self._writers.forget, owner)
            undo.callback(self.core.host.unpin, owner)
            try:
                tune(connection)
                async with asyncio.timeout(self.config.handshake_ms / 1000):
                    call, hello = await self._hello(connection)
                check_version(hello)
                identity = await self._with_hbm(self._identify(connection, hello, owner), hello)
                identity = planning(identity, hello)
                pins = self._answer_hello(connection, call, hello, identity)
                await self._serve(connection, identity, pins)
                undo.pop_all()
            except KVCacheError as error:
                self.core.counters[f"refusals:{error.code}"] += 1
                log.warning("connection refused: %s", error)
                with contextlib.suppress(OSError):
                    connection.send(wire.encode(call, failure(error)))
            except (OSError, TimeoutError, EOFError):
                self.core.counters["refusals:bad_frame"] += 1
            finally:
                self._greeting.discard(connection)

    async def _hello(self, connection: socket.socket) -> tuple[int, wire.Hello]:
        header = wire.decode_header(await receive_exactly(connection, wire.HEADER.size))
        if header.body_bytes > wire.TEXT_CHARS_MAX or header.payload_bytes:
            raise BadInput("too_large", f"a Hello of {header.body_bytes} bytes", "it is a small message")
        call, hello = wire.decode_request(await receive_exactly(connection, header.body_bytes))
        if not isinstance(hello, wire.Hello):
            raise BadInput("bad_message", "a request before Hello", "a connection starts with Hello")
        return call, hello

    def _identify(self, connection: socket.socket, hello: wire.Hello, owner: int) -> Identity:
        peer = peer_of(connection)
        loopback = connection.family != socket.AF_UNIX and is_loopback(connection.getpeername()[0])
        credential, inside = credential_for(
            self.credentials,
            hello.token,
            peer,
            loopback=loopback,
            inside_token=self._inside_token,
            tenant=hello.tenant,
        )
        if hello.writes_ended:
            self._writers.stopped(peer, hello.client)
        # Who maps the slab can read and write all of it.
        may_map = hello.map and credential.roles >= ROLES_OF_A_MAP
        mapped = may_map and self._writers.watch(owner, peer, hello.client)
        arena = NO_ARENA
        if "writer" in credential.roles:
            # Bytes that come over the wire are written by the node: they share the node's own arena.
            arena = self.core.arena(peer.uid if mapped else os.getuid(), credential.tenant)
        return Identity(owner, credential.tenant, credential.roles, arena, mapped, peer, inside, hello.node)

    async def _with_hbm(self, identity: Identity, hello: wire.Hello) -> Identity:
        """With the slab for who maps host memory too, of the same trust domain, if it asks for one."""
        core = self.core
        if core.hbm is None or not (identity.mapped and hello.hbm):
            return identity
        domain = f"{identity.peer.uid}-{identity.tenant}"
        number = await core.hbm.admit(domain, hello, below_hbm(core, identity.arena))
        return dataclasses.replace(identity, hbm=number)

    def _answer_hello(
        self, connection: socket.socket, call: int, hello: wire.Hello, identity: Identity
    ) -> bool:
        """May it pin its map?"""
        unit_bytes = self.core.host.unit_to_pin(identity.arena) if identity.mapped and hello.pins else 0
        welcome = wire.Welcome(
            version=wire.PROTOCOL_VERSION,
            node=self.name,
            incarnation=self.incarnation,
            tenant=identity.tenant,
            roles=sorted(identity.roles),
            tenant_key=b"" if identity.inside else self.credentials.tenant_key(identity.tenant),
            slab_bytes=self.core.host.capacity_bytes if identity.mapped else 0,
            data=self.core.plane.addresses if "peer" in identity.roles else [],
            pinned_unit=unit_bytes,
        )
        descriptors = [self.core.host.descriptor(identity.arena)] if identity.mapped else []
        if self.core.hbm is not None and identity.hbm != NO_HBM:
            welcome = msgspec.structs.replace(welcome, hbm=self.core.hbm.slab(identity.hbm))
            descriptors.append(self.core.hbm[identity.hbm].descriptor)
        frame = wire.encode(call, welcome)
        # A new socket's send buffer holds far more than one small frame.
        sent = socket.send_fds(connection, [frame], descriptors) if descriptors else connection.send(frame)
        assert sent == len(frame)
        return unit_bytes > 0

    async def _serve(self, connection: socket.socket, identity: Identity, pins: bool) -> None:
        owner = identity.owner
        handlers = Connection(self.core, identity, lambda batch, call: session.push(batch, call))
        session = Session(handlers, lambda: self._ended(identity, handlers.kept_aside))
        if pins:  # Nothing was awaited since it was told so.
            self.core.host.pin(identity.arena, owner, session.cut)
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: session, connection)
        self.core.counters["connections_opened"] += 1
        if not transport.is_closing():
            self._sessions[owner] = transport

    def _ended(self, identity: Identity, kept_aside: bool) -> None:
        self._sessions.pop(identity.owner, None)
        self.core.host.unpin(identity.owner)
        self._writers.leave(identity.owner, kept_aside)

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
    huge = takes_huge_pages(config)
    space = Space(config.capacity_bytes, config.unit_bytes)
    choice, alone = parse_choice(config.policy, config.policy_params), not config.nvme_places
    ledger = Ledger(space, choice.make(declines=alone))  # What memory declines never gets to NVMe.
    plane = DataPlane(config.data_addresses, clock)
    host = HostTier(config.capacity_bytes, config.unit_bytes, huge_pages=huge, registrar=plane)
    core = Core(config, ledger, space, host, Publisher(name, incarnation), clock, plane)
    core.tuning.add("host", choice, ledger, declines=alone)
    if (plan := ShadowPlan.of(config)) is not None:
        is_alone = alone and not config.peer_addresses and not config.hbm_bytes
        store = Store(ledger, config.capacity_bytes, is_alone, lambda: core.counters[EVICTED] > 0)
        core.tuning.shadowing.begin(plan, store, choice, clock.now_ns())
    if config.nvme_places:
        core.stack = core.bringing.stack = _build_stack(core, clock, choice)
        core.tuning.add("nvme", choice, core.stack.ledger, declines=False)
    if config.hbm_bytes:
        core.tuning.add("hbm", parse_choice(config.hbm_policy, ""), declines=False)
        core.hbm = open_hbm(core)
    return core


def _build_stack(core: Core, clock: Clock, choice: Choice) -> Stack:
    config = core.config
    segment = segment_bytes(config)
    places = [
        Place(
            path,
            size,
            segment,
            config.nvme_direct,
            config.nvme_late_ms * NS_PER_MS,
            int(config.nvme_writes_a_day * size) or None,
        )
        for path, size in config.nvme_places
    ]
    return Stack(
        StackRules(
            places,
            Rules(
                config.nvme_write,
                config.nvme_admission,
                config.nvme_back_ms * NS_PER_MS,
                config.nvme_write_bytes_s,
            ),
            hours_since(time.time(), clock),
            ScrubSettings(config.nvme_scrub_share),
        ),
        core.ledger,
        core.host,
        choice.make(declines=False),
        core.namespaces.spec_of,
        clock,
        core.counters,
        core.settle,
    )
