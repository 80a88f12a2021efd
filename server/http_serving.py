"""An HTTP address: who may ask there, bound, served, closed. For a node's HTTP process, an index, a router.

Limits: ``connections_max`` at once, more are closed as they come; ``IDLE_S`` until the header of the next
request is whole, the first one too. What a request itself may take is for the application to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

from kvcache.config import parse_bind
from kvcache.credentials import Credentials
from kvcache.errors import BadInput
from kvcache.server.binding import refuse_unsafe_bind
from kvcache.server.listening import not_bound

SHUTDOWN_S = 1.0
BACKLOG = 512
IDLE_S = 75.0
CONNECTIONS_MAX = 512


class HttpSite:
    """One application at one address. ``close`` may be called twice."""

    def __init__(
        self,
        app: web.Application,
        connections_max: int = CONNECTIONS_MAX,
        *,
        setting: str = "http",
        shutdown_s: float = SHUTDOWN_S,
        cancels: bool = False,
    ) -> None:
        """``setting``: what the option for the address is called. ``cancels``: who leaves ends his
        request."""
        self._runner = web.AppRunner(
            app,
            access_log=None,
            shutdown_timeout=shutdown_s,
            handler_cancellation=cancels,
            keepalive_timeout=IDLE_S,
        )
        self._setting = setting
        self._connections_max = connections_max
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> str:
        """Returns the address, with its port if the system chose it. RAISES BadInput."""
        await self._runner.setup()
        assert self._runner.server is not None
        door = _Door(self._runner.server, self._connections_max)
        try:
            self._server = await asyncio.get_running_loop().create_server(door, host, port, backlog=BACKLOG)
        except OSError as error:
            raise not_bound(f"http://{host}:{port}", error, f"give another --{self._setting}") from error
        chosen = self._server.sockets[0].getsockname()[1]
        return f"http://[{host}]:{chosen}" if ":" in host else f"http://{host}:{chosen}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()


class _Door:
    """Makes the protocol of each connection that comes."""

    def __init__(self, server: web.Server, connections_max: int) -> None:
        self._server = server
        self._connections_max = connections_max

    def __call__(self) -> asyncio.Protocol:
        return self._server() if len(self._server.connections) < self._connections_max else _Full()


class _Full(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def checked_bind(
    bind: str,
    credentials: Credentials,
    setting: str,
    *,
    who: str = "HTTP",
    harm: str = "ask what is stored",
) -> tuple[str, int]:
    """Host and port. ``harm``: what anybody could do there, where ``who`` listens. RAISES BadInput for
    ``none``, and for what strangers can reach without a token."""
    address = parse_bind(bind, setting)
    if address is None:
        raise BadInput("bad_config", "no address to serve on", f"--{setting} is none", "give HOST:PORT")
    refuse_unsafe_bind(address, credentials, who, harm)
    return address


async def work_until(stop: asyncio.Event, *work: Coroutine[Any, Any, None]) -> None:
    """Until somebody stops it; an error in the work is our own, and is raised."""
    tasks = [asyncio.get_running_loop().create_task(each) for each in work]
    for task in tasks:
        task.add_done_callback(lambda _: stop.set())
    await stop.wait()
    for task in tasks:
        if task.done():
            await task
        task.cancel()
