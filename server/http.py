"""The HTTP process of a node: ``python -m kvcache.server.http``, started by the node as its child.

It is a client of the node like any other, and holds the locality index, of which routers ask over HTTP and in
raw frames. The token that it says Hello with
is in the environment (``KVCACHE_TOKEN``), never among the arguments. When it listens, it writes its
address as one line to standard output. When standard input is a pipe, the process ends when that does:
the node holds the other end, so no child outlives it, however it went.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.address import parse
from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.credentials import Credentials
from kvcache.errors import KVCacheError
from kvcache.locality import LocalityIndex
from kvcache.metrics import HttpMetrics
from kvcache.server.fleet_index import FleetIndex
from kvcache.server.http_app import HttpApp
from kvcache.server.http_follow import Follower
from kvcache.server.http_serving import HttpSite, checked_bind, work_until
from kvcache.server.locate_answers import IndexAnswers
from kvcache.server.locate_frames import LocateFrames
from kvcache.wire import PROTOCOL_VERSION, Hello

log = logging.getLogger("kvcache.server.http")

INDEX_BYTES_MAX = 256 << 20
CONNECT_NS = 5 * NS_PER_S
FAILED = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the process is told. ``token`` is for the node; ``bind`` is HOST:PORT."""

    node: str
    bind: str
    credentials: str
    token: str
    index_bytes: int
    listen: tuple[str, ...]


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
        sys.stdout.write(json.dumps([error.code, error.what, error.why, error.todo]) + "\n")  # For the node.
        return FAILED
    return 0


async def serve(settings: Settings) -> None:
    """RAISES BadInput when the credentials or the address cannot be used."""
    credentials = Credentials.named(settings.credentials)
    host, port = checked_bind(settings.bind, credentials, "bind")
    clock, metrics = SystemClock(), HttpMetrics()
    index = LocalityIndex(settings.index_bytes)

    async def connect() -> AsyncChannel:
        hello = Hello(PROTOCOL_VERSION, token=settings.token, client="http")
        return await AsyncChannel.connect(settings.node, hello, clock.now_ns() + CONNECT_NS)

    follower = Follower(connect, index, metrics, clock)
    fleet = FleetIndex(index, clock)  # Engines may register here, and somebody has to say how late it is.
    answers = IndexAnswers(index, clock, fleet.worker_sources, fleet.is_of)
    fleet.changed = answers.workers_changed
    frames = LocateFrames(answers, credentials, setting="index_listen")
    metrics.watch_lookups(lambda: (frames.asked, frames.connections))
    site = HttpSite(HttpApp(follower, fleet, metrics, credentials, clock).application())
    try:
        for address in settings.listen:
            frames.listen(parse(address))
        sys.stdout.write(await site.listen(host, port) + "\n")
        sys.stdout.flush()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work_until(stop, follower.run(), fleet.run())
    finally:
        await site.close()
        frames.close()
        await fleet.close()


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
    parser.add_argument(
        "--listen", action="append", default=[], help="where raw look-ups are answered (unix:// or tcp://)"
    )
    given = parser.parse_args(arguments)
    token = os.environ.pop("KVCACHE_TOKEN", "")
    return Settings(given.node, given.bind, given.credentials, token, given.index_bytes, tuple(given.listen))


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
