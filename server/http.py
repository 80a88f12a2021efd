"""The HTTP process of a node: ``python -m kvcache.server.http``, started by the node as its child.

It is a client of the node like any other, and holds the locality index. The token that it says Hello with
is in the environment (``KVCACHE_TOKEN``), never among the arguments. When it listens, it writes its
address as one line to standard output. When standard input is a pipe, the process ends when that does:
the node holds the other end, so no child outlives it, however it went.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.config import is_loopback, parse_bind
from kvcache.credentials import Credentials
from kvcache.errors import BadInput, KVCacheError
from kvcache.locality import LocalityIndex
from kvcache.metrics import HttpMetrics
from kvcache.server.http_app import HttpApp
from kvcache.server.http_follow import Follower
from kvcache.wire import PROTOCOL_VERSION, Hello

log = logging.getLogger("kvcache.server.http")

INDEX_BYTES_MAX = 256 << 20
CONNECT_NS = 5 * NS_PER_S
SHUTDOWN_S = 1.0
BACKLOG = 128
FAILED = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the process is told. ``token`` is for the node; ``bind`` is HOST:PORT."""

    node: str
    bind: str
    credentials: str
    token: str
    index_bytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop. Returns the exit status."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    settings = _settings(arguments)
    _end_with_input(sys.stdin.fileno())
    try:
        asyncio.run(serve(settings))
    except KVCacheError as error:
        log.error("%s", error)
        return FAILED
    return 0


async def serve(settings: Settings) -> None:
    """RAISES BadInput when the credentials or the address cannot be used."""
    credentials = (
        Credentials.from_file(settings.credentials) if settings.credentials else Credentials.default()
    )
    host, port = _checked_bind(settings.bind, credentials)
    clock, metrics = SystemClock(), HttpMetrics()

    async def connect() -> AsyncChannel:
        hello = Hello(PROTOCOL_VERSION, token=settings.token, client="http")
        return await AsyncChannel.connect(settings.node, hello, clock.now_ns() + CONNECT_NS)

    follower = Follower(connect, LocalityIndex(settings.index_bytes), metrics, clock)
    app = HttpApp(follower, metrics, credentials, clock).application()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        await _listen(runner, host, port)
        await _until_stopped(asyncio.get_running_loop().create_task(follower.run()))
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, host: str, port: int) -> None:
    site = web.TCPSite(runner, host, port, backlog=BACKLOG)
    try:
        await site.start()
    except OSError as error:
        raise BadInput(
            "address_in_use", f"http://{host}:{port} cannot be bound", str(error), "give another --http"
        ) from error
    chosen = runner.addresses[0][1]
    sys.stdout.write(f"http://[{host}]:{chosen}\n" if ":" in host else f"http://{host}:{chosen}\n")
    sys.stdout.flush()


async def _until_stopped(following: asyncio.Task[None]) -> None:
    """Until a signal; an error in following is our own, and ends the process."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    following.add_done_callback(lambda _: stop.set())
    await stop.wait()
    if following.done():
        await following
    following.cancel()


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m kvcache.server.http", description="HTTP of a node.")
    parser.add_argument(
        "--node", required=True, help="address of the node, for instance unix:///run/node.sock"
    )
    parser.add_argument("--bind", default="127.0.0.1:8210", help="HOST:PORT to serve on")
    parser.add_argument("--credentials", default="", help="TOML file of tokens and users")
    parser.add_argument(
        "--index-bytes", type=int, default=INDEX_BYTES_MAX, help="most memory for the locality index"
    )
    given = parser.parse_args(arguments)
    token = os.environ.pop("KVCACHE_TOKEN", "")
    return Settings(given.node, given.bind, given.credentials, token, given.index_bytes)


def _checked_bind(bind: str, credentials: Credentials) -> tuple[str, int]:
    address = parse_bind(bind, "bind")
    if address is None:
        raise BadInput("bad_config", "no address to serve on", "--bind is none", "give HOST:PORT")
    if not is_loopback(address[0]) and not credentials.has_tokens:
        raise BadInput(
            "unsafe_bind",
            f"HTTP would listen on {address[0]}, which others can reach",
            "no token is configured, so anybody could ask what is stored",
            "bind 127.0.0.1, or give --credentials with at least one token",
        )
    return address


def _end_with_input(descriptor: int) -> None:
    """From a thread, so that even a stuck event loop does not outlive the node."""
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
        return

    def wait() -> None:
        while os.read(descriptor, 4096):
            pass
        os._exit(0)

    threading.Thread(target=wait, name="kvcache-lifeline", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
