"""``kvcache index``: one index of many nodes and engines, asked over HTTP and in raw frames.

    fleet file, --follow ──► FleetIndex ──► HTTP (aiohttp, this thread)
                                        └─► raw frames (a thread a connection)

Any number of them may run: each follows everybody by itself, and none knows of the others.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import click

from kvcache.address import parse
from kvcache.clock import SystemClock
from kvcache.config import parse_size
from kvcache.credentials import Credentials
from kvcache.errors import BadInput
from kvcache.fleet import Fleet, token, token_of
from kvcache.locality import LocalityIndex
from kvcache.metrics import HttpMetrics
from kvcache.server.fleet_index import FleetIndex, Followed
from kvcache.server.http_app import HttpApp
from kvcache.server.http_fleet import FleetSubject
from kvcache.server.http_serving import HttpSite, checked_bind, work_until
from kvcache.server.locate_answers import IndexAnswers
from kvcache.server.locate_frames import LocateFrames

EXIT_BUG = 70
BYTES_MIN = 1 << 20
SWITCH_S = 0.000_2
"""A thread that answers waits at most so long for the one that applies events."""
REPORT_S = 0.25

NOBODY = (
    "following nobody, so nothing is known of any prompt: name nodes with --follow ADDRESS,... or in "
    "--fleet FILE, or let engines register over HTTP (docs/index.md)"
)

Say = Callable[[str, dict[str, object]], None]


@dataclass(frozen=True, slots=True)
class Settings:
    fleet: Fleet
    follow: tuple[str, ...]
    token: str
    http: str
    listen: tuple[str, ...]
    bytes_max: int
    credentials: Credentials


@click.command()
@click.option("--fleet", default="", help="TOML or JSON file of workers and nodes (docs/index.md)")
@click.option("--follow", default="", help="control addresses of more nodes, with commas")
@click.option("--token-file", default="", help="file with the token for these (else $KVCACHE_TOKEN)")
@click.option(
    "--http",
    default="127.0.0.1:8220",
    show_default=True,
    help="HOST:PORT for routers, metrics and operators, or none",
)
@click.option("--listen", default="", help="where raw look-ups are answered: unix:///PATH,tcp://HOST:PORT")
@click.option("--bytes", "bytes_max", default="1GiB", show_default=True, help="most memory for what is known")
@click.option("--credentials", default="", help="TOML file of tokens and users")
@click.option("--json", "as_json", is_flag=True, help="print a JSON object a line")
@click.option("--verbose", is_flag=True, help="log more")
def index(
    fleet: str,
    follow: str,
    token_file: str,
    http: str,
    listen: str,
    bytes_max: str,
    credentials: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Follow nodes and engines, and tell routers who holds how much of a prompt."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    settings = Settings(
        Fleet.from_file(fleet) if fleet else Fleet(),
        _addresses(follow, "follow"),
        token(token_file) or token_of(os.environ.get("KVCACHE_TOKEN", ""), "KVCACHE_TOKEN"),
        http,
        _addresses(listen, "listen"),
        parse_size(bytes_max, "bytes"),
        Credentials.named(credentials),
    )
    if settings.bytes_max < BYTES_MIN:
        raise BadInput("bad_config", f"bytes is {bytes_max!r}", "an index takes 1 MiB at least")
    if http == "none" and not settings.listen:
        raise BadInput("bad_config", "no address to serve on", "", "give --http or --listen")
    sys.setswitchinterval(SWITCH_S)
    threading.excepthook = _end_at_a_threads_bug
    asyncio.run(_run(settings, _say_json if as_json else _say))


async def _run(settings: Settings, say: Say) -> None:
    clock, metrics, loop = SystemClock(), HttpMetrics(), asyncio.get_running_loop()
    loop.set_exception_handler(_end_at_a_bug)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    known = LocalityIndex(settings.bytes_max)
    fleet = FleetIndex(known, clock, resynced=lambda reason: metrics.index_resyncs.labels(reason).inc())
    answers = IndexAnswers(known, clock, fleet.worker_sources, fleet.is_of)
    fleet.changed = answers.workers_changed
    frames = LocateFrames(answers, settings.credentials)
    metrics.watch_lookups(lambda: (frames.asked, frames.connections))
    subject = FleetSubject(fleet, metrics)
    site = HttpSite(HttpApp(subject, fleet, metrics, settings.credentials, clock).application())
    try:
        places = [frames.listen(parse(address)) for address in settings.listen]
        if settings.http != "none":
            places.insert(0, await site.listen(*checked_bind(settings.http, settings.credentials, "http")))
        fleet.follow(settings.fleet)
        for address in settings.follow:
            fleet.add_node(address, settings.token)
        followed = fleet.followed()
        say(
            f"ready: {', '.join(places)}, following {len(followed)} with {len(fleet.workers)} workers",
            {"ready": True, "pid": os.getpid(), "places": places, "following": len(followed)},
        )
        if not followed:
            say(NOBODY, {"state": "following nobody", "trouble": NOBODY})
        await work_until(stop, fleet.run(), _report(fleet, say))
    finally:
        await site.close()
        frames.close()
        await fleet.close()


async def _report(fleet: FleetIndex, say: Say) -> None:
    """A line for each that is followed, whenever it is or is not."""
    told: dict[str, str] = {}
    while True:
        await asyncio.sleep(REPORT_S)
        told = _say_changes(fleet, told, say)


def _say_changes(fleet: FleetIndex, told: dict[str, str], say: Say) -> dict[str, str]:
    """The states as they are now; those that ``told`` does not have are said. A node is known by its address,
    as its source may not be known; an engine's stream by its source, as two may have one address."""
    synced = {state.source: state.synced for state in fleet.index.sources()}
    states = {}
    for each in fleet.followed():
        key = each.address if each.kind == "node" else each.source
        states[key] = "following" if each.connected and synced.get(each.source) else "not following"
        if told.get(key) != states[key]:
            _say_state(each, states[key], fleet.index.entries_of(each.source), say)
    return states


def _say_state(each: Followed, state: str, blocks: int, say: Say) -> None:
    knows = f", {blocks:,} blocks" if state == "following" else f": {each.trouble or 'it is loading'}"
    name = f" as {each.source}" if each.source else ""
    facts: dict[str, object] = {
        "state": state,
        "kind": each.kind,
        "address": each.address,
        "source": each.source,
        "blocks": blocks,
        "trouble": each.trouble,
    }
    say(f"{state} {each.kind} {each.address}{name}{knows}", facts)


def _addresses(text: str, setting: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",")) if text else ()
    for each in found:
        try:
            parse(each)
        except BadInput as error:
            raise BadInput(error.code, f"{setting} is {text!r}", error.what, error.todo) from error
    if len(set(found)) < len(found):
        raise BadInput("bad_config", f"{setting} is {text!r}", "an address is named twice", "name it once")
    return found


def _say(line: str, _: dict[str, object]) -> None:
    click.echo(line)
    sys.stdout.flush()


def _say_json(_: str, facts: dict[str, object]) -> None:
    click.echo(json.dumps(facts))
    sys.stdout.flush()


def _end_at_a_bug(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """What nobody caught is a bug of ours; only a connection's own end (OSError) is an event and no bug."""
    error = context.get("exception")
    if isinstance(error, OSError):
        logging.getLogger("kvcache.server.index").info("%s: %s", context.get("message"), error)
        return
    _end(str(context.get("message")), error if isinstance(error, BaseException) else None)


def _end_at_a_threads_bug(ended: threading.ExceptHookArgs) -> None:
    _end("a thread ended", ended.exc_value)


def _end(what: str, error: BaseException | None) -> None:
    logging.critical("the index stops: %s", what, exc_info=error)
    logging.shutdown()
    os._exit(EXIT_BUG)
