"""``kvcache demo``: two nodes, several clients, a trace, a kill. Needs no GPU and no engine.

    demo ──starts──► node (kvcache serve) ◄──sockets, shared memory── clients (kvcache.demo_client) x n
      └── prompts, one at a time (kvcache.demo_feed) ──────────────────►│
      ◄── outcomes ─────────────────────────────────────────────────────┘

Half way the node is killed with SIGKILL and started again; clients compute what they cannot load, find
the new node by themselves, and find there, on NVMe, what the old one had written. Every byte loaded is
compared with what its key says it must be. Memory is smaller than what the prompts need, so that blocks
are evicted all the time, and read back from NVMe.

All processes end with this one: clients when their input does, the node when it is told to. Nothing is
left behind but what was printed.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import click
import msgspec
from click.core import ParameterSource

from kvcache import demo_report
from kvcache.clock import NS_PER_S
from kvcache.config import parse_size
from kvcache.demo_client import Setup
from kvcache.demo_feed import Client, Feed, full_blocks
from kvcache.demo_locate import Located, ask_locate
from kvcache.demo_nodes import Nodes, NodeSettings
from kvcache.demo_report import MODEL, Kill, Nvme, Report, Totals
from kvcache.errors import BadInput
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace, read_trace

CLIENTS = 3
NODES = 2
SECONDS = 20.0
CAPACITY = "1GiB"
NVME = "3GiB"
DISK_SHARE = 2
BLOCKS_HELD = 4_096
"""About as many blocks fit in the tier, fewer for a small trace: their size follows from the capacity."""
HELD_SHARE = 3
BLOCK_BYTES_MIN = 4_096
BLOCK_BYTES_MAX = 2 << 20
GENERATED_REQUESTS = 40_000
TICK_S = 0.1
LOCATE_S = 10


@dataclass(frozen=True, slots=True)
class Options:
    """What to replay and for how long: until ``seconds`` have passed, ``request_count`` prompts are done
    (0: no limit), or the trace ends."""

    trace: Path | None = None
    request_count: int = 0
    seconds: float = SECONDS
    seed: int = 1
    capacity: str = CAPACITY
    nvme: str = NVME
    clients: int = CLIENTS
    nodes: int = NODES


class Teller:
    """Says what happens: lines on standard output, and where a person watches, one line that changes."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._shown = False

    def line(self, text: str) -> None:
        self.clear()
        if not self._quiet:
            print(text, flush=True)

    def progress(self, text: str) -> None:
        if self._live:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def clear(self) -> None:
        """Take the changing line away."""
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._shown = False


class Demo:
    """One run. Use as a context manager: no process outlives it."""

    def __init__(self, options: Options, tell: Teller) -> None:
        """RAISES BadInput for a trace or a capacity that is none."""
        self._options = options
        self._tell = tell
        self._trace = _trace(options)
        self._capacity_bytes = parse_size(options.capacity, "capacity")
        self._directory = tempfile.TemporaryDirectory(prefix="kvcache-demo-")
        self._home = Path(self._directory.name)
        self._nvme_bytes = self._room_on_disk(
            parse_size(options.nvme, "nvme") if options.nvme != "none" else 0
        )
        self._nodes = Nodes(NodeSettings(self._home, options.nodes, options.capacity, self._nvme_bytes))
        self._setup = Setup(
            address=self._nodes.address(0),
            block_tokens=self._trace.block_tokens,
            block_bytes=block_bytes_for(self._trace, self._capacity_bytes),
            seed=options.seed,
        )
        totals = Totals(self._trace.block_tokens, self._setup.block_bytes)
        self._feed = Feed(self._trace, options.request_count or self._trace.request_count, totals)
        self._clients: list[Client] = []
        self._started_ns = 0
        self._kill: Kill | None = None
        self._located = Located()

    def __enter__(self) -> Demo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._feed.close()
        for client in self._clients:
            client.close()
        self._nodes.close()
        self._directory.cleanup()
        self._tell.clear()

    def run(self) -> Report:
        """Replay, with the kill in the middle. RAISES Unavailable when the node or a client ends early."""
        self._nodes.start()
        self._tell.line(self._opening())
        for number in range(self._options.clients):
            setup = msgspec.structs.replace(
                self._setup, address=self._nodes.address(number % self._options.nodes)
            )
            self._clients.append(Client(setup, self._feed, self._home / f"client-{number}.log"))
        self._started_ns = time.monotonic_ns()
        for client in self._clients:
            client.begin()
        while any(client.running for client in self._clients):
            time.sleep(TICK_S)
            self._tick()
        for client in self._clients:
            client.check()
        seconds = self._elapsed_s
        self._locate_at_last()
        values = self._nodes.counted()
        return Report(
            source=self._source,
            clients=self._options.clients,
            nodes=self._options.nodes,
            capacity_bytes=self._capacity_bytes,
            seconds=seconds,
            totals=self._feed.totals,
            kill=self._kill,
            hit_again_s=self._feed.hit_again_s,
            evicted_blocks=values.get("removed_blocks:evicted", 0),
            nvme=Nvme(
                self._nvme_bytes,
                values.get("nvme_written_blocks", 0),
                values.get("nvme_restored_blocks", 0),
                values.get("nvme_read_blocks", 0),
            ),
            located=self._located,
            fetched_blocks=values.get("peer_fetched_blocks", 0),
        )

    # --- while it runs --------------------------------------------------------------------------

    def _tick(self) -> None:
        share = max(self._elapsed_s / self._options.seconds, self._feed.done_share)
        self._tell.progress(demo_report.progress(share, self._feed.totals, f"{self._elapsed_s:4.1f} s"))
        if share >= 1:
            self._feed.close()
        elif share >= 0.5 and self._kill is None:
            self._kill_node()
        elif share >= 0.75 and not self._located.blocks:
            self._located = self._locate()

    def _kill_node(self) -> None:
        """SIGKILL to the first, then a new node on the same socket. All clients go on meanwhile."""
        killed_s, requests = self._elapsed_s, self._feed.totals.requests
        self._happened(f"node-1 is killed (SIGKILL to process {self._nodes.first_pid})")
        self._nodes.kill_first()
        self._feed.watch_for_hit()
        self._nodes.restart_first()
        self._kill = Kill(killed_s, requests, self._elapsed_s - killed_s)
        self._happened(f"a new node answers on the same socket, {self._nodes.http[0]}")
        if self._nvme_bytes:
            self._happened(f"it found {self._nodes.ask(0).get('nvme_restored_blocks', 0):,} blocks on NVMe")

    def _room_on_disk(self, wanted_bytes: int) -> int:
        """A demo must not fill the disk of who tries it: nothing, if that is near."""
        free_bytes = shutil.disk_usage(self._home).free
        if wanted_bytes * DISK_SHARE <= free_bytes:
            return wanted_bytes
        self._tell.line(f"no NVMe tier: {self._home} has only {free_bytes:,} bytes free")
        return 0

    def _locate(self) -> Located:
        """Ask over HTTP, as a router would: who holds how much of a prompt that was just hit?"""
        request = self._feed.last_hit
        if request is None:
            return Located()
        return ask_locate(self._nodes.http[0], self._setup, full_blocks(request, self._setup.block_tokens))

    def _locate_at_last(self) -> None:
        """After a short replay the new node's index may still be reading what the node holds."""
        end_ns = time.monotonic_ns() + LOCATE_S * NS_PER_S
        while not self._located.blocks and time.monotonic_ns() < end_ns:
            self._located = self._locate()
            time.sleep(TICK_S)

    # --- words ----------------------------------------------------------------------------------

    @property
    def _elapsed_s(self) -> float:
        return (time.monotonic_ns() - self._started_ns) / NS_PER_S

    @property
    def _source(self) -> str:
        return self._options.trace.name if self._options.trace else f"generated (seed {self._options.seed})"

    def _happened(self, text: str) -> None:
        self._tell.line(f"  {self._elapsed_s:5.1f} s  {text}")

    def _opening(self) -> str:
        setup, options = self._setup, self._options
        peers = ", which fetch blocks from one another over tcp://" if options.nodes > 1 else ""
        nodes = f"{options.nodes} of {options.capacity} of host memory{peers}"
        return "\n".join(
            [
                f"trace      {self._source}, in blocks of {setup.block_tokens} tokens",
                f"nodes      {nodes if options.nodes > 1 else f'{options.capacity} of host memory'}",
                f"NVMe       {self._nvme_bytes / (1 << 30):.1f} GiB of disk in {self._home / 'tier'}, "
                "written behind by node-1",
                f"HTTP       {'  '.join(self._nodes.http)}  (/metrics, /v1/locate; while this runs)",
                f"clients    {options.clients} processes over shared memory, in turn at each node",
                f"blocks     {setup.block_bytes:,} bytes that follow from the key; one of {MODEL.name} "
                f"has {setup.block_tokens * MODEL.kv_bytes_a_token:,}",
                "",
            ]
        )


def block_bytes_for(trace: Trace, capacity_bytes: int) -> int:
    """A power of two, so that the tier holds ``BLOCKS_HELD`` or so, and not over a third of the trace's
    blocks; never more than a real block has."""
    held = max(1, min(BLOCKS_HELD, trace.block_count // HELD_SHARE))
    most = min(BLOCK_BYTES_MAX, trace.block_tokens * MODEL.kv_bytes_a_token)
    wanted = 1 << (capacity_bytes // held - 1).bit_length()
    return max(BLOCK_BYTES_MIN, min(wanted, 1 << most.bit_length() - 1))


def _trace(options: Options) -> Trace:
    if options.trace is None:
        count = options.request_count or GENERATED_REQUESTS
        return generate(Workload(request_count=count, seed=options.seed))
    trace = read_trace(options.trace)
    if trace.request_count == 0:
        raise BadInput("bad_trace", f"{options.trace} has no requests", "there is nothing to replay")
    return trace


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _with_engines(context: click.Context, as_json: bool) -> int:
    """``--engine``. RAISES UsageError for options of the other demo."""
    from kvcache.demo_engine import run

    given = [
        name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if others := sorted(set(given) - {"engine", "as_json"}):
        raise click.UsageError(f"--engine replays no trace: it takes no --{others[0]}", context)
    return run(Teller(quiet=as_json), as_json)


@click.command()
@click.option("--trace", type=click.Path(path_type=Path), help="kvtrace-v1 .npz file (default: generated)")
@click.option("--requests", type=click.IntRange(1), help="stop after so many prompts")
@click.option(
    "--seconds", type=click.FloatRange(1, 600), default=SECONDS, show_default=True, help="stop after"
)
@click.option(
    "--seed", type=click.IntRange(0, (1 << 63) - 1), default=1, show_default=True, help="of trace and bytes"
)
@click.option("--capacity", default=CAPACITY, show_default=True, help="host memory of each node")
@click.option("--nvme", default=NVME, show_default=True, help="disk of the first node, or none")
@click.option("--clients", type=click.IntRange(1, 64), default=CLIENTS, show_default=True, help="processes")
@click.option("--nodes", type=click.IntRange(1, 8), default=NODES, show_default=True, help="peers")
@click.option("--engine", is_flag=True, help="two real vLLM processes instead; takes --json beside it")
@click.option("--json", "as_json", is_flag=True, help="end with one JSON object, and print nothing else")
@click.pass_context
def demo(
    context: click.Context,
    trace: Path | None,
    requests: int | None,
    seconds: float,
    seed: int,
    capacity: str,
    nvme: str,
    clients: int,
    nodes: int,
    engine: bool,
    as_json: bool,
) -> None:
    """Two nodes, several clients, a trace, a kill and a restart; every byte compared.

    Needs no GPU. Exit status 1 when a byte was wrong or nothing was found again."""
    signal.signal(signal.SIGTERM, _stop)
    if engine:
        sys.exit(_with_engines(context, as_json))
    options = Options(trace, requests or 0, seconds, seed, capacity, nvme, clients, nodes)
    with Demo(options, Teller(quiet=as_json)) as run:
        report = run.run()
    click.echo(json.dumps(demo_report.as_json(report)) if as_json else demo_report.summary(report))
    sys.exit(report.exit_status)
