"""``kvcache info``: one node's numbers, for a person or, with ``--json``, for a script."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import click

from kvcache.address import default_address
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.node_channel import connected
from kvcache.wire import Stats, StatsReply, Welcome

DEADLINE_S = 5
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@click.command()
@click.option("--address", default="", help="unix:///path or tcp://host:port (default: this user's node)")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def info(address: str, as_json: bool) -> None:
    """Ask a node what it holds and has done so far.

    A token, where the node wants one, is read from KVCACHE_TOKEN.
    """
    where = address or default_address()
    welcome, told = ask(where, os.environ.get("KVCACHE_TOKEN", ""))
    if as_json:
        found = {
            "address": where,
            "node": welcome.node,
            "tenant": welcome.tenant,
            "roles": welcome.roles,
            "values": told.values,
            "troubles": told.troubles,
        }
        click.echo(json.dumps(found))
        return
    click.echo(table(where, welcome, told.values))
    for trouble in told.troubles:
        click.echo(f"trouble: {trouble}", err=True)


def ask(address: str, token: str) -> tuple[Welcome, StatsReply]:
    """One Stats call. RAISES Unavailable, BadInput, NotAllowed."""
    deadline_ns = SystemClock().now_ns() + DEADLINE_S * NS_PER_S
    with connected(address, token, "kvcache info", deadline_ns) as channel:
        reply = channel.call(Stats(), deadline_ns)
        assert isinstance(reply, StatsReply), reply
        return channel.welcome, reply


def table(address: str, welcome: Welcome, values: Mapping[str, float]) -> str:
    """Identity first, then every number by name, aligned."""
    rows = [
        ("node", welcome.node),
        ("address", address),
        ("tenant", welcome.tenant),
        ("roles", ", ".join(welcome.roles)),
        ("hit ratio", hit_ratio(values)),
        *((name, readable(name, value)) for name, value in sorted(values.items())),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def hit_ratio(values: Mapping[str, float]) -> str:
    """Of all that was looked up since the node started."""
    asked, hit = values.get("lookup_tokens", 0), values.get("hit_tokens", 0)
    return f"{hit / asked:.1%} of {asked:,.0f} tokens looked up" if asked else "nothing was looked up yet"


def readable(name: str, value: float) -> str:
    """``1073741824`` of something in bytes is ``1.0 GiB``; whole numbers have no decimals."""
    if name.partition(":")[0].endswith("_bytes"):
        return _readable_bytes(value)
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def _readable_bytes(value: float) -> str:
    for unit in _UNITS[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"
