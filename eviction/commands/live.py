"""``kvcache tune set`` and ``tell``: another eviction policy for a running node, and what decides there now.

kvcache tune set --policy leaf-hazard --param samples=16 [--tier nvme]
kvcache tune tell
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping

import click
import msgspec

from kvcache.address import default_address
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.errors import BadInput
from kvcache.eviction.choice import parse_params
from kvcache.node_channel import connected
from kvcache.wire import Tune, Tuned
from kvcache.wire_tuning import SET, TELL, InForce

DEADLINE_S = 10
PAUSE_S = 0.1
WAIT_S_MAX = 3_600

_ADDRESS = click.option(
    "--address", default="", help="unix:///path or tcp://host:port (default: this user's node)"
)
_JSON = click.option("--json", "as_json", is_flag=True, help="one JSON object")


@click.command("set")
@click.option("--policy", required=True, help="which block goes first (kvcache policy list)")
@click.option(
    "--param", "params", multiple=True, help="name=number, as often as needed (kvcache policy show)"
)
@click.option("--tier", default="host", show_default=True, help="host, nvme or hbm")
@click.option(
    "--wait",
    "wait_s",
    type=click.IntRange(0, WAIT_S_MAX),
    default=60,
    show_default=True,
    help="seconds until it decides; 0: do not wait",
)
@_ADDRESS
@_JSON
def set_command(
    policy: str, params: tuple[str, ...], tier: str, wait_s: int, address: str, as_json: bool
) -> None:
    """Have another policy decide in a running node. Nothing that is held is lost.

    It takes over once it has been told of everything, a second or so for 300,000 blocks. It does not outlive
    the node: put it into the node's settings, too. A token, where the node wants one, is read from
    KVCACHE_TOKEN.
    """
    given = parse_params(params, "--param")
    end_s = time.monotonic() + wait_s
    told = ask(address, Tune(SET, tier, policy, given))
    while told.tiers[tier].coming and time.monotonic() < end_s:
        time.sleep(PAUSE_S)
        told = ask(address, Tune(TELL))
    _show(told, as_json, [tier])
    if (now := told.tiers[tier]).policy != policy and not now.coming:
        raise BadInput("bad_config", f"{policy} does not decide", now.said)


@click.command("tell")
@_ADDRESS
@_JSON
def tell_command(address: str, as_json: bool) -> None:
    """What decides in each tier of a running node, and what it would advise.

    A token, where the node wants one, is read from KVCACHE_TOKEN.
    """
    _show(ask(address, Tune(TELL)), as_json)


def ask(address: str, request: Tune) -> Tuned:
    """RAISES Unavailable, BadInput, NotAllowed."""
    where, token = address or default_address(), os.environ.get("KVCACHE_TOKEN", "")
    deadline_ns = SystemClock().now_ns() + DEADLINE_S * NS_PER_S
    with connected(where, token, "kvcache tune", deadline_ns) as channel:
        reply = channel.call(request, deadline_ns)
        assert isinstance(reply, Tuned), reply
        return reply


def _show(told: Tuned, as_json: bool, tiers: list[str] | None = None) -> None:
    if as_json:
        plain = msgspec.to_builtins(told)
        click.echo(json.dumps({name: value for name, value in plain.items() if name != "type"}))
        return
    for name, tier in told.tiers.items():
        if tiers is None or name in tiers:
            click.echo(f"{name}: {_line(tier)}")
    if tiers is None:
        for text in told.advice:
            click.echo(text)


def _line(tier: InForce) -> str:
    parts = [f"{_named(tier.policy, tier.params)} decides over {tier.blocks:,} blocks"]
    if tier.fault:
        parts = [f"leaf-lru decides, as {_named(tier.policy, tier.params)} broke the contract: {tier.fault}"]
    if tier.coming:
        parts.append(f"{tier.coming} is to take over, and was told of {tier.told_blocks:,}")
    return "; ".join([*parts, tier.said] if tier.said else parts)


def _named(policy: str, params: Mapping[str, float]) -> str:
    given = ", ".join(f"{key}={value:g}" for key, value in params.items())
    return f"{policy} ({given})" if given else policy
