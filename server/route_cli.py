"""``kvcache route``: a router before a fleet of OpenAI workers, until it is told to stop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sys

import click

from kvcache.server.http_route_serve import Settings, descriptors, served

log = logging.getLogger("kvcache.server.route")

EXIT_BUG = 70


@click.command()
@click.option("--fleet", required=True, help="file of workers (TOML or JSON), see docs/routing.md")
@click.option("--bind", default="127.0.0.1:8230", show_default=True, help="HOST:PORT to serve on")
@click.option("--weights", default="", help="TOML file whose table [weights] changes what terms weigh")
@click.option(
    "--index",
    default="embedded",
    show_default=True,
    help="embedded (follow the fleet's events here), the address of a running index, or none",
)
@click.option("--index-size", default="1GiB", show_default=True, help="most memory for an embedded index")
@click.option("--index-ms", default=20, show_default=True, help="how long an index elsewhere is waited for")
@click.option("--credentials", default="", help="TOML file of tokens; that of the nodes, if they have one")
@click.option("--worker-token-file", default="", help="file with the token that workers are shown")
@click.option(
    "--tokenize-ms",
    default=200,
    show_default=True,
    help="how long a worker may take for tokens; 0: never asked",
)
@click.option("--requests-max", default=1_024, show_default=True, help="most requests at once")
@click.option("--attempts", default=3, show_default=True, help="workers tried before the first byte")
@click.option("--connect-ms", default=2_000, show_default=True, help="how long a connection may take")
@click.option(
    "--first-byte-ms", default=60_000, show_default=True, help="wait for the first byte of a stream"
)
@click.option("--idle-ms", default=60_000, show_default=True, help="longest silence within an answer")
@click.option("--request-ms", default=600_000, show_default=True, help="longest request in all")
@click.option("--seed", default=0, show_default=True, help="of choices by chance")
@click.option("--json", "as_json", is_flag=True, help="print the ready line as JSON")
@click.option("--verbose", is_flag=True, help="log more")
def route(as_json: bool, verbose: bool, **given: str | int) -> None:
    """Send each request of a model to the worker that has most of its prompt and least to do."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    asyncio.run(_run(Settings(**given), as_json))  # type: ignore[arg-type]  # click made them so.


async def _run(settings: Settings, as_json: bool) -> None:
    """RAISES BadInput for settings that cannot be used."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_end_at_a_bug)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _allow(descriptors(settings.requests_max))
    async with served(settings) as address:
        fact = {"ready": True, "pid": os.getpid(), "http": address}
        click.echo(json.dumps(fact) if as_json else f"ready: {address}")
        sys.stdout.flush()
        await stop.wait()


def _allow(wanted: int) -> None:
    """So many descriptors, if the system lets us: of old it gives 1,024, fewer than as many requests take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("%d descriptors are allowed, and all requests together may take %d", most, wanted)


def _end_at_a_bug(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """What nobody caught is a bug of ours. Only a connection's own end (OSError) is an event and no bug."""
    error = context.get("exception")
    if isinstance(error, OSError):
        log.info("%s: %s", context.get("message"), error)
        return
    described = error if isinstance(error, BaseException) else None
    log.critical("the router stops: %s", context.get("message"), exc_info=described)
    logging.shutdown()
    os._exit(EXIT_BUG)
