"""``kvcache trace record``: turn a node's recording on and off, or ask what it does.

kvcache trace record begin --folder DIR [--bytes 256MiB] [--sample 10%]
kvcache trace record end | tell
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from kvcache.address import default_address
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.config import parse_size
from kvcache.errors import BadInput
from kvcache.eviction.traces.edit import parse_share
from kvcache.node_channel import connected
from kvcache.wire import Record, StatsReply
from kvcache.wire_record import BEGIN, END, SAMPLE_ALL, TELL

DEADLINE_S = 10
_SHOWN = ("recorded_requests", "recorded_bytes", "record_lost_batches", "record_failures")


@click.command()
@click.argument("action", type=click.Choice([BEGIN, END, TELL]))
@click.option("--address", default="", help="unix:///path or tcp://host:port (default: this user's node)")
@click.option("--folder", default="", help="where to (default: the node's setting record)")
@click.option(
    "--bytes", "bytes_max", default="", help="most bytes of recordings there (setting record_bytes)"
)
@click.option("--sample", default="", help="share of the sessions, for instance 10% (setting record_sample)")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def record(action: str, address: str, folder: str, bytes_max: str, sample: str, as_json: bool) -> None:
    """Begin or end recording what a node is asked, or tell what it records.

    What is recorded, and what is not, is in docs/traces.md. A token, where the node wants one, is read from
    KVCACHE_TOKEN.
    """
    if action != BEGIN and (folder or bytes_max or sample):
        raise BadInput("bad_config", f"{action} takes no folder, bytes or sample", f"they are for {BEGIN}")
    wanted = Record(
        action,
        str(Path(folder).expanduser().absolute()) if folder else "",
        parse_size(bytes_max, "--bytes") if bytes_max else 0,
        _millionths(sample) if sample else 0,
    )
    told = ask(address or default_address(), os.environ.get("KVCACHE_TOKEN", ""), wanted)
    if action == BEGIN and not told.values["recording"]:
        todo = "give it a folder of its own, into which the node's user may write"
        raise BadInput("bad_config", "nothing is recorded", " ".join(told.troubles), todo)
    if as_json:
        click.echo(json.dumps({"said": " ".join(told.troubles), **told.values}))
        return
    click.echo(" ".join(told.troubles))
    click.echo(", ".join(f"{name} {told.values[name]:,.0f}" for name in _SHOWN))


def _millionths(sample: str) -> int:
    share = parse_share(sample)
    if not 1 / SAMPLE_ALL <= share <= 1:
        raise BadInput("bad_config", f"a sample of {sample}", "it is over 0, and 100% at most")
    return round(share * SAMPLE_ALL)


def ask(address: str, token: str, request: Record) -> StatsReply:
    """RAISES Unavailable, BadInput, NotAllowed."""
    deadline_ns = SystemClock().now_ns() + DEADLINE_S * NS_PER_S
    with connected(address, token, "kvcache trace record", deadline_ns) as channel:
        reply = channel.call(request, deadline_ns)
        assert isinstance(reply, StatsReply), reply
        return reply
