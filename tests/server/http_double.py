"""A node that is not there, and an HTTP process that follows it, in this process."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, ParamSpec

from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer

from kvcache.block import StorageKey, chain
from kvcache.credentials import Credentials
from kvcache.errors import Unavailable
from kvcache.events import Publisher
from kvcache.ledger import Change
from kvcache.locality import LocalityIndex
from kvcache.metrics import HttpMetrics
from kvcache.namespace import Namespace
from kvcache.server import http_follow
from kvcache.server.fleet_index import FleetIndex
from kvcache.server.http_app import HttpApp
from kvcache.server.http_follow import Follower
from kvcache.wire import EventBatch, Reply, Request, Stats, StatsReply, Welcome

Arguments = ParamSpec("Arguments")
TOKENS = list(range(100))
DEFAULT = Credentials.default()
KEY = DEFAULT.tenant_key("default")


def space(tenant: str = "default", **fields: str | int) -> Namespace:
    values: dict[str, str | int] = {
        "model": "m",
        "weights": "w",
        "dtype": "bf16",
        "layout": "canonical",
        "block_tokens": 16,
        "shape": "2x2x64",
    }
    return Namespace(**{**values, "tenant": tenant, **fields})  # type: ignore[arg-type]


SPACE = space()
HASHES = chain(SPACE.root(KEY), KEY, TOKENS, 16)
MODEL = {"model": "m", "weights": "w", "block_tokens": 16}


class Clock:
    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def now_ns(self) -> int:
        return self.ns


class Node:
    """Connections to a node that is not there: each gets the snapshot, then what is told later."""

    def __init__(self, name: str = "node-a", incarnation: int = 1) -> None:
        self.name, self.incarnation = name, incarnation
        self.publisher = Publisher(name, incarnation)
        self.up = True
        self.open: list[Connection] = []
        self.values = {"hit_tokens": 7.0, "requests:lease": 2.0}
        self.troubles: list[str] = []
        self.snapshots = 0

    async def connect(self) -> Connection:
        if not self.up:
            raise Unavailable("unavailable", "the node is gone")
        self.open.append(Connection(self))
        return self.open[-1]

    def stored(self, namespace: Namespace, count: int, start: int = 0) -> list[EventBatch]:
        keys = [StorageKey(namespace.namespace_id() + block) for block in HASHES[start:count]]
        parent = None if start == 0 else StorageKey(namespace.namespace_id() + HASHES[start - 1])
        return self.publisher.publish([Change("stored", tuple(keys), parent, "committed")])

    def tell(self, batches: list[EventBatch]) -> None:
        for batch in batches:
            for connection in self.open:
                connection.queue.put_nowait(batch)

    def die(self) -> None:
        self.up = False
        for connection in list(self.open):
            connection.close()


class Connection:
    def __init__(self, node: Node) -> None:
        self._node = node
        self.queue: asyncio.Queue[EventBatch | None] = asyncio.Queue()
        self.closed = False
        self.welcome = Welcome(1, node.name, node.incarnation, "", ["operator"], b"", 0)

    async def call(self, request: Request, deadline_ns: int) -> Reply:
        assert isinstance(request, Stats)
        if self.closed:
            raise Unavailable("unavailable", "the connection ended")
        return StatsReply(self._node.values, self._node.troubles)

    async def events(self, incarnation: int = 0, seq: int = 0) -> AsyncIterator[EventBatch]:
        self._node.snapshots += 1
        for batch in self._node.publisher.snapshot():
            yield batch
        while (batch_or_end := await self.queue.get()) is not None:
            yield batch_or_end
        raise Unavailable("unavailable", "the connection ended")

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._node.open.remove(self)
            self.queue.put_nowait(None)


class Pauses:
    """Every pause waits until the test lets it go on; polls of the node's numbers wait for ever."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.go = asyncio.Semaphore(0)

    async def __call__(self, seconds: float) -> None:
        if seconds == http_follow.POLL_S:
            await asyncio.Event().wait()
        self.taken.append(seconds)
        await self.go.acquire()


class Running:
    """An HTTP process in this one."""

    def __init__(self, node: Node, credentials: Credentials) -> None:
        self.node = node
        self.clock = Clock()
        self.metrics = HttpMetrics()
        self.index = LocalityIndex(4 << 20)
        self.pauses = Pauses()
        self.connect: Callable[[], Awaitable[http_follow.Channel]] = node.connect
        self.follower = Follower(lambda: self.connect(), self.index, self.metrics, self.clock, self.pauses)
        self.fleet = FleetIndex(self.index, self.clock)
        app = HttpApp(self.follower, self.fleet, self.metrics, credentials, self.clock)
        self.app = app.application()
        self.client: TestClient[web.Request, web.Application]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the other tasks run until it holds."""
        for _ in range(10_000):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("it never came to that")

    def paused(self, times: int) -> bool:
        return len(self.pauses.taken) == times

    async def synced(self) -> None:
        await self.until(lambda: any(state.synced for state in self.index.sources()))

    async def get(self, path: str, token: str = "", **headers: str) -> ClientResponse:
        return await self.client.get(path, headers=bearer(token, headers))

    async def post(self, body: object, token: str = "", **headers: str) -> ClientResponse:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **bearer(token, headers)}
        return await self.client.post("/v1/locate", data=data, headers=sent)

    async def located(self, **body: object) -> dict[str, Any]:
        response = await self.post(body)
        found: dict[str, Any] = await response.json()
        assert response.status == 200, found
        return found


def bearer(token: str, headers: dict[str, str]) -> dict[str, str]:
    return {**({"Authorization": f"Bearer {token}"} if token else {}), **headers}


@asynccontextmanager
async def running(node: Node | None = None, credentials: Credentials = DEFAULT) -> AsyncIterator[Running]:
    here = Running(node or Node(), credentials)
    here.client = TestClient(TestServer(here.app, access_log=None))
    following = asyncio.get_running_loop().create_task(here.follower.run())
    async with here.client:
        yield here
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert following.cancelled(), following.exception()


def in_loop(test: Callable[Arguments, Coroutine[None, None, None]]) -> Callable[Arguments, None]:
    """The test, run by an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        asyncio.run(test(*arguments, **named))

    return run
