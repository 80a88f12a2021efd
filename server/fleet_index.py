"""The index of a fleet: one ``LocalityIndex``, and what keeps it told.

    fleet file, registrations ──► a Following for each node      ──┐
                              └─► an EngineFollowing for each rank ┴──► LocalityIndex ◄── tick, 4 a second

A node is followed once, however many workers name it, and for as long as one does. What is followed no more
is forgotten, at once. Two nodes of one name would be one source, now this and now that: the second is not
followed, and ``trouble`` says so.

One event loop owns all of it; the index itself may be asked from any thread.

The sum: what applying events costs (0.1 us a block).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput, NotAllowed
from kvcache.fleet import ENGINE_SOURCE, WORKERS_MAX, Fleet, Stream, Worker, token
from kvcache.following import Channel, Following
from kvcache.locality import LocalityIndex
from kvcache.wire import PROTOCOL_VERSION, Hello, Welcome

log = logging.getLogger("kvcache.server.index")

TICK_S = 0.25
CONNECT_NS = 5 * NS_PER_S

Connect = Callable[[str, str], Awaitable[Channel]]
"""To the node at an address, with a token."""


@dataclass(frozen=True, slots=True)
class Followed:
    """What is followed, and how it goes. ``source`` is empty while a node was never reached."""

    kind: str  # node, or vllm, sglang, rfc1527.
    address: str
    source: str
    connected: bool
    trouble: str
    workers: tuple[str, ...]


class Engine(Protocol):
    """What is asked of ``kvcache.engine_events.zmq.EngineFollowing``."""

    connected: bool
    trouble: str

    async def run(self) -> None: ...


MakeEngine = Callable[[Worker, Stream], Engine]
"""What follows a stream."""


@dataclass(slots=True)
class _Node:
    """As ``kvcache.following.Watched``, and who wants it."""

    address: str
    admit: Callable[[_Node, Welcome], None]
    parts: Callable[[str], None]
    users: set[str] = field(default_factory=set)
    following: Following | None = None
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        assert self.following is not None
        return self.following.node

    def met(self, welcome: Welcome) -> None:
        self.admit(self, welcome)

    def parted(self, reason: str) -> None:
        self.parts(reason)


@dataclass(slots=True)
class _Rank:
    stream: Stream
    worker: Worker
    engine: Engine
    task: asyncio.Task[None]


class FleetIndex:
    """``run`` keeps time until it is cancelled; ``close`` ends what follows. Workers may come and go."""

    def __init__(
        self,
        index: LocalityIndex,
        clock: Clock,
        connect: Connect | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        resynced: Callable[[str], None] = lambda reason: None,
        make_engine: MakeEngine | None = None,
    ) -> None:
        """``resynced`` is told why a stream ended. ``make_engine``: None for ZeroMQ, once it is needed."""
        self.index = index
        self.version = 0
        """Grows when workers come or go."""
        self.changed: Callable[[], None] = lambda: None
        """Called when workers came or went, or a node was met."""
        self._clock = clock
        self._connect = connect or self._connect_really
        self._pause = pause
        self._resynced = resynced
        self._workers: dict[str, Worker] = {}
        self._nodes: dict[str, _Node] = {}
        self._ranks: dict[str, _Rank] = {}
        self._make_engine = make_engine
        self._close_engines: Callable[[], None] = lambda: None

    # --- who is followed ------------------------------------------------------------------------

    def follow(self, fleet: Fleet) -> None:
        """All of them. RAISES BadInput; then some may be followed already."""
        for address, file in fleet.followed().items():
            if any(each.address == address for each in fleet.node):
                self.add_node(address, token(file))
        files = fleet.followed()
        for worker in fleet.worker:
            self.add(worker, token(files.get(worker.node, "")))

    def add(self, worker: Worker, node_token: str = "") -> None:
        """RAISES BadInput for a name that is taken, one worker too many, or what cannot be followed."""
        worker.check()
        if worker.name in self._workers:
            raise BadInput(
                "bad_config", f"worker {worker.name[:120]!r} is known already", "", "take it out first"
            )
        if len(self._workers) >= WORKERS_MAX:
            raise BadInput(
                "too_large", "one worker too many", f"at most {WORKERS_MAX:,}", "use another index"
            )
        streams = worker.streams()
        for stream in streams:
            if (taken := self._ranks.get(stream.source)) is not None:
                raise BadInput(
                    "bad_config",
                    f"the events of worker {worker.name[:120]!r} would be the source {stream.source[:160]}",
                    f"those of {taken.worker.name[:120]!r} are",
                    "give it another name",
                )
        if streams and self._make_engine is None:
            self._make_engine = self._engine_maker(worker)
        engines = [self._make_engine(worker, each) for each in streams] if self._make_engine else []
        for stream, engine in zip(streams, engines, strict=True):
            task = self._start(engine.run(), f"following {stream.source}")
            self._ranks[stream.source] = _Rank(stream, worker, engine, task)
        if worker.node:
            self.add_node(worker.node, node_token, worker.name)
        self._workers[worker.name] = worker
        self.version += 1
        self.changed()

    async def remove(self, name: str) -> bool:
        """It is gone: its engine's events are followed and known no more. False: nobody had that name."""
        worker = self._workers.pop(name, None)
        if worker is None:
            return False
        self.version += 1
        # Another of that name may come while we wait: by then nothing is left of this one.
        ranks = [self._ranks.pop(stream.source) for stream in worker.streams()]
        for rank in ranks:
            rank.task.cancel()
            self.index.forget(rank.stream.source)
        for rank in ranks:
            await _ended(rank.task)
        if worker.node:
            await self.remove_node(worker.node, name)
        self.changed()
        return True

    def add_node(self, address: str, node_token: str = "", user: str = "") -> None:
        """``user``: for whom."""
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = _Node(address, self._admit, self._resynced)

            async def connect() -> Channel:
                return await self._connect(address, node_token)

            following = Following(address, connect, self.index, node, self._clock, self._pause)
            node.following = following
            node.task = self._start(following.run(), f"following {address}")
        node.users.add(user)

    async def remove_node(self, address: str, user: str = "") -> None:
        """Nobody is left who wants it: it is forgotten."""
        node = self._nodes.get(address)
        if node is None:
            return
        node.users.discard(user)
        if node.users:
            return
        del self._nodes[address]
        assert node.task is not None and node.following is not None
        await _ended(node.task)
        self.index.forget(node.name)

    # --- what is known --------------------------------------------------------------------------

    @property
    def workers(self) -> Mapping[str, Worker]:
        return self._workers

    def sources_of(self, worker: Worker) -> list[str]:
        """Its own, those that it names, and its node's, once that was reached."""
        found = worker.own_sources()
        node = self.node_source(worker.node)
        return [*found, node] if node and node not in found else found

    def worker_sources(self, tenant: str | None = None) -> dict[str, list[str]]:
        """Of all workers, or of those of a tenant."""
        workers = self._workers.copy().values()
        return {each.name: self.sources_of(each) for each in workers if tenant in (None, each.tenant)}

    def is_of(self, source: str, tenant: str) -> bool:
        """Whether a tenant may know of this source: of nodes, and of its own engines. Any thread may ask."""
        rank = self._ranks.get(source)
        return rank is None or rank.worker.tenant == tenant

    def node_source(self, address: str) -> str:
        """What the node there calls itself; empty until it was reached."""
        node = self._nodes.get(address)
        return node.name if node is not None else ""

    def followed(self) -> list[Followed]:
        found = []
        for node in self._nodes.values():
            following = node.following
            assert following is not None
            up = following.calls is not None
            trouble = "" if up else following.trouble
            users = tuple(sorted(node.users - {""}))
            found.append(Followed("node", node.address, following.node, up, trouble, users))
        for rank in self._ranks.values():
            up = rank.engine.connected
            trouble = "" if up else rank.engine.trouble
            found.append(
                Followed(
                    rank.worker.engine,
                    rank.stream.events,
                    rank.stream.source,
                    up,
                    trouble,
                    (rank.worker.name,),
                )
            )
        return found

    def troubles(self) -> list[str]:
        """What is wrong, in plain words."""
        states = self.index.sources()
        found = [
            f"{each.address} is not followed: {each.trouble}" for each in self.followed() if each.trouble
        ]
        found += [f"the index does not follow {each.source} yet" for each in states if not each.synced]
        found += [f"not all of {each.source} is known here" for each in states if each.partial]
        return found

    # --- running --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Time passes."""
        while True:
            for source in self.index.tick(self._clock.now_ns()):
                log.warning("nothing was heard of %s for three beats: what it told is forgotten", source)
            await self._pause(TICK_S)

    async def close(self) -> None:
        """May be called twice."""
        tasks = [node.task for node in self._nodes.values()] + [rank.task for rank in self._ranks.values()]
        self._nodes, self._ranks, self._workers = {}, {}, {}
        for task in tasks:
            if task is not None:
                await _ended(task)
        self._close_engines()
        self._make_engine, self._close_engines = None, lambda: None

    def _start(self, work: Coroutine[Any, Any, None], doing: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda ended: _report(ended, doing))
        return task

    def _admit(self, node: _Node, welcome: Welcome) -> None:
        """RAISES NotAllowed for an engine's name, and while another node of that name is followed."""
        if welcome.node.startswith(ENGINE_SOURCE):
            raise NotAllowed(
                "bad_config",
                f"the node at {node.address} is called {welcome.node:.120}",
                f"what begins with {ENGINE_SOURCE} is what an engine holds itself",
                "give the node another name",
            )
        for other in self._nodes.values():
            following = other.following
            assert following is not None
            if other is node or following.node != welcome.node:
                continue
            if following.calls is not None:
                raise NotAllowed(
                    "bad_config",
                    f"the nodes at {other.address} and {node.address} are both called {welcome.node}",
                    "sources are told apart by their names, so only the first of them is followed",
                    "give each node a name of its own, and name each once",
                )
            following.forget()
        asyncio.get_running_loop().call_soon(self.changed)

    async def _connect_really(self, address: str, node_token: str) -> Channel:
        hello = Hello(PROTOCOL_VERSION, token=node_token, client="index")
        return await AsyncChannel.connect(address, hello, self._clock.now_ns() + CONNECT_NS, self._clock)

    def _engine_maker(self, worker: Worker) -> MakeEngine:
        """RAISES BadInput when ZeroMQ is not installed."""
        try:
            from kvcache.engine_events.feed import EngineFeed
            from kvcache.engine_events.naming import public_namespaces
            from kvcache.engine_events.zmq import EngineFollowing, new_context
        except ImportError as error:
            raise BadInput(
                "bad_config",
                f"the events of worker {worker.name[:120]!r} cannot be followed",
                f"ZeroMQ is not installed: {error}",
                "pip install 'kvcache[events]'",
            ) from error
        context = new_context()
        self._close_engines = lambda: context.destroy(linger=0)

        def make(each: Worker, stream: Stream) -> Engine:
            feed = EngineFeed(
                stream.source,
                public_namespaces(each.model, each.weights, each.adapter, each.salt, each.tenant),
                time.time_ns(),
                engine=each.engine,
                replay=bool(stream.replay),
                block_tokens=each.block_tokens,
            )
            return EngineFollowing(
                stream.events, stream.replay, feed, self.index, self._clock, context=context
            )

        return make


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _report(task: asyncio.Task[None], doing: str) -> None:
    """Our own code is wrong: the command ends the process."""
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": doing, "exception": error})
