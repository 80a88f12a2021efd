"""``kvcache serve``: settings from everywhere, one node, until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, NoReturn

import click

from kvcache.config import NodeConfig, load

if TYPE_CHECKING:
    from kvcache.server.node import Node

EXIT_ERROR = 1
EXIT_BUG = 70

SETTINGS: dict[str, str] = {
    "socket": "path of the unix socket (default: $KVCACHE_SOCKET, else the user's runtime directory)",
    "tcp": "HOST:PORT for clients of other hosts, or none",
    "http": "HOST:PORT for routers, metrics and operators, or none",
    "index_listen": "where raw look-ups are answered (unix:// or tcp://), auto (beside the socket), or none",
    "index_bytes": "most memory for the locality index, for instance 1GiB",
    "name": "what events and replies call this node",
    "capacity": "memory for blocks, for instance 4GiB",
    "unit": "bytes an extent, a power of two, or auto",
    "huge_pages": "auto, on or off",
    "policy": "which block goes first (kvcache policy list)",
    "policy_params": "its parameters: samples=16,decay=0.95 (kvcache policy show NAME)",
    "hbm": "memory of each GPU for blocks, for instance 20GiB, or none (docs/hbm.md)",
    "hbm_device": "cuda; or cpu: shared memory in place of a GPU's, to try it",
    "hbm_policy": "which block leaves a GPU first",
    "hbm_demote_rate": "bytes a second at most to copy out of a GPU, for instance 10GB (0: no limit)",
    "credentials": "TOML file of tokens and users",
    "lease_ms_max": "longest lease in milliseconds",
    "quarantine_ms": "how long the slot of a wrong block stays unused",
    "handshake_ms": "how long a new connection may take to say who it is",
    "connections_max": "most connections at once",
    "namespaces_max": "most namespaces at once",
    "data": "where transports listen for peers: tcp://HOST:PORT,..., auto (as tcp), or none",
    "peers": "control addresses of other nodes, with commas (tcp://HOST:PORT or unix:///PATH), or none",
    "peer_token_file": "file with the token that this node shows its peers",
    "peer_keep": "keep (blocks from peers are like any other) or pass (in memory only, and worth little)",
    "peer_wait_ms": "how long one try to get blocks from a peer may take",
    "replicate_rate": "bytes a second at most to copy hot prefixes to peers, for instance 50MB (0: off)",
    "replicate_hits": "uses within a minute that make a prefix hot",
    "nvme": "PATH:SIZE of a directory for blocks, several with commas, one a device; or none",
    "nvme_segment": "bytes a file of the NVMe tier, or auto",
    "nvme_write": "through (at once), back (after nvme_back_ms), or evict (before memory lets go)",
    "nvme_back_ms": "how long a block must have lived to be written, with nvme_write back",
    "nvme_admission": "all; or what has earned it: touched>=2, branch-reused or hazard (docs/nvme.md)",
    "nvme_write_rate": "bytes a second at most to write there, for instance 500MB (0: no limit)",
    "nvme_writes_a_day": "drive writes a day: how often its capacity is written in 24 hours (0: no limit)",
    "nvme_late_ms": "a read that takes longer is late; several in a row fence the device",
    "nvme_direct": "auto, on or off: past the page cache",
    "shadow": "policies to try beside the one that decides (docs/tuning-online.md), with commas, or none",
    "shadow_sizes": "sizes to try, in per cent of the capacity, with commas",
    "shadow_sample": "share of the blocks that shadow caches look at, over 0 to 1",
    "shadow_cpu": "share of the node's processor time that shadow caches may take",
    "record": "folder to record what is asked into, for tuning (docs/traces.md), or none",
    "record_bytes": "most bytes of recordings in it; the oldest go",
    "record_sample": "share of the sessions that is recorded, over 0 to 1",
    "nvme_scrub_share": "share of the read bandwidth that verifying what is stored may take (0: off)",
}


def _with_settings(command: click.Command) -> click.Command:
    """Their defaults stand in the help alone: an option that is not given leaves room for the environment."""
    usual = NodeConfig()
    for name, text in SETTINGS.items():
        default = getattr(usual, name)
        shown = text if default == "" else f"{text}  [default: {default}]"
        command.params.append(click.Option([f"--{name.replace('_', '-')}"], help=shown))
    return command


@click.command()
@click.option("--config", help="TOML file with these settings")
@click.option("--populate/--no-populate", default=None, help="take all memory at start, or at first touch")
@click.option(
    "--trust-network",
    is_flag=True,
    default=None,
    help="allow transports that any host which reaches their port can abuse (ucx, nixl)",
)
@click.option("--json", "as_json", is_flag=True, help="print the ready line as JSON")
@click.option("--verbose", is_flag=True, help="log more")
def _serve(as_json: bool, verbose: bool, **flags: str | bool | None) -> None:
    """Run one node: host memory for blocks, a socket for engines, HTTP for routers and operators.

    Each setting can also stand in the environment (KVCACHE_CAPACITY) or in the --config file."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    config = load({name: value for name, value in flags.items() if value is not None}, os.environ)
    _run_node(_run(config, as_json))


serve = _with_settings(_serve)


def _run_node(work: Coroutine[None, None, None]) -> None:
    """With uvloop when it is there (extra [uvloop]): 2.3 times the requests a second."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


async def _run(config: NodeConfig, as_json: bool) -> None:
    from kvcache.server.node import Node

    node = Node(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_end_at_a_bug)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopped = loop.create_task(stop.wait())
    started = loop.create_task(_start(node))
    try:
        await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            await started
            _say_ready(node, config, as_json)
            await stopped
    finally:
        started.cancel()
        await asyncio.gather(started, return_exceptions=True)
        await node.close()
        if node.is_stuck:
            _end_without_threads(sys.exc_info()[1])


def _end_without_threads(error: BaseException | None) -> NoReturn:
    """The interpreter would wait for the thread that hangs in a device, for as long as that takes."""
    if error is not None:
        logging.error("the node ends: %s", error)
    logging.shutdown()
    os._exit(EXIT_ERROR if error is not None else 0)


async def _start(node: Node) -> None:
    """While it reads what it holds, the collector would look at a million new objects again and again; and
    later, in the middle of a request, if they were not taken out of its sight."""
    gc.disable()
    try:
        await node.start()
    finally:
        gc.enable()
    gc.freeze()


def _end_at_a_bug(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """What nobody caught is a bug of ours, and what it left behind is unknown: engines do better without.

    Only a connection's own end (OSError) is an event and no bug."""
    error = context.get("exception")
    if isinstance(error, OSError):
        logging.getLogger("kvcache.server").info("%s: %s", context.get("message"), error)
        return
    described = error if isinstance(error, BaseException) else None
    logging.critical("the node stops: %s", context.get("message"), exc_info=described)
    logging.shutdown()
    os._exit(EXIT_BUG)


def _say_ready(node: Node, config: NodeConfig, as_json: bool) -> None:
    """One line on standard output once clients can connect: scripts wait for it."""
    places = {"socket": node.address, "tcp": node.tcp_address, "http": node.http_address}
    data = node.data_addresses
    if as_json:
        facts = {"ready": True, "pid": os.getpid(), "capacity": config.capacity}
        line = json.dumps({**facts, **places, "data": data})
    else:
        moves = f"blocks of peers at {' '.join(data)}" if data else ""
        hbm = f"{config.hbm} of each GPU" if config.hbm_bytes else ""
        said = [f"{config.capacity} for blocks", hbm, _nvme_words(node), *places.values(), moves]
        line = "ready: " + ", ".join(text for text in said if text)
    click.echo(line)
    sys.stdout.flush()


def _nvme_words(node: Node) -> str:
    """The log has said why, if it is not all of them."""
    drives = node.core.stack.drives if node.core.stack is not None else []
    in_use = sum(drive.readable for drive in drives)
    return f"{in_use} of {len(drives)} NVMe directories in use" if drives else ""
