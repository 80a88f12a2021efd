"""``kvcache check``: is what lies on NVMe as it was written? Offline by itself, online by asking the node.

    kvcache check [--repair] PATH...     no node runs on the directories; see kvcache/tiers/nvme_check.py
    kvcache check --node ADDRESS         the node scrubs everything once, while it serves

Exit status: 0 all is well, 1 something is wrong (also when it was repaired), 2 usage.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import click

from kvcache.channel import BlockingChannel
from kvcache.cli_info import readable
from kvcache.clock import NS_PER_S
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.node_channel import connected
from kvcache.tiers import nvme_check
from kvcache.tiers.nvme import DeviceFault
from kvcache.tiers.nvme_check import WORDS, Report
from kvcache.wire import Scrub, Stats, StatsReply

DEADLINE_S = 10
LOOK_S = 0.5
_COUNTED = ("scrubbed_blocks", "scrub_bad_blocks", "scrub_passes")


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--repair", is_flag=True, help="drop what is wrong; what is right stays")
@click.option("--node", "address", default="", metavar="ADDRESS", help="ask this running node instead")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def check(paths: tuple[Path, ...], repair: bool, address: str, as_json: bool) -> None:
    """Verify every block of the NVMe directories PATH...

    No node may run on them; ask a running node with --node (role operator; a token is read from
    KVCACHE_TOKEN). Nothing is changed without --repair.
    """
    if paths and address:
        raise click.UsageError("Give directories or --node ADDRESS, not both: a node checks its own.")
    if not paths and not address:
        raise click.UsageError("Give the directories of a node that does not run, or --node ADDRESS.")
    if address and repair:
        raise click.UsageError("A running node drops what is wrong by itself: leave --repair out.")
    fine = _check_node(address, as_json) if address else _check_paths(paths, repair, as_json)
    sys.exit(0 if fine else 1)


class Bar:
    """How far it is, on standard error, where a person watches."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._what = ""
        self._began_s = 0.0
        self._from = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._what:
            click.echo("\r\x1b[2K", nl=False, err=True)

    def show(self, what: str, done: int, total: int) -> None:
        """``total`` 0: nothing is known yet."""
        if not self._shown:
            return
        if what != self._what:
            self._what, self._began_s, self._from = what, time.monotonic(), done
        seconds = time.monotonic() - self._began_s
        click.echo("\r\x1b[2K" + bar_text(what, done, total, done - self._from, seconds), nl=False, err=True)


def bar_text(what: str, done: int, total: int, moved: int, seconds: float) -> str:
    """``reading blocks [######----]  58%  1.9 GiB/s  12 s left``."""
    share = done / total if total else 0.0
    filled = int(share * 24)
    text = f"{what} [{'#' * filled}{'-' * (24 - filled)}] {share:4.0%}"
    if seconds < 1 or not moved:
        return text
    rate = moved / seconds
    size = readable("_bytes", rate) if what == "reading blocks" else f"{rate:,.0f}"
    return f"{text}  {size}/s  {max(0, total - done) / rate:,.0f} s left"


# --- offline ------------------------------------------------------------------------------------


def _check_paths(paths: tuple[Path, ...], repair: bool, as_json: bool) -> bool:
    """Is all well? A directory that cannot be looked at does not keep the others from it."""
    fine, told = True, []
    for path in paths:
        try:
            with Bar(not as_json) as bar:
                report = _look(path, repair, bar.show)
        except KVCacheError as error:
            fine = False
            told.append({"path": str(path), "ok": False, "refused": _error_map(error)})
            if not as_json:
                click.echo(f"{path}: not checked: {error}")
            continue
        fine = fine and report.ok
        told.append(report_map(report))
        if not as_json:
            click.echo(report_text(report))
    if as_json:
        click.echo(json.dumps({"ok": fine, "directories": told}))
    return fine


def _look(path: Path, repair: bool, progress: Callable[[str, int, int], None]) -> Report:
    """RAISES BadInput, and Unavailable where the device does not answer as one."""
    try:
        return nvme_check.check(path, repair=repair, progress=progress)
    except BadInput as error:
        if error.code != "address_in_use":
            raise
        todo = "stop it, or ask the node: kvcache check --node ADDRESS"
        raise BadInput(error.code, f"{path} is in use", "a node runs on it", todo) from error
    except DeviceFault as fault:
        todo = "look at the system's log for what is wrong with the device"
        raise Unavailable("unavailable", f"{path} cannot be read", str(fault), todo) from fault


def report_text(report: Report) -> str:
    """What a person is told of one directory."""
    rate = readable("_bytes", report.read_bytes / report.seconds if report.seconds else 0.0)
    lines = [
        f"{report.path}: {report.blocks:,} blocks looked at in {report.seconds:.1f} s ({rate}/s)",
        f"  {report.fine_blocks:>9,}  fine, {readable('_bytes', float(report.fine_bytes))}",
    ]
    if report.apart_blocks:
        lines.append(
            f"  {report.apart_blocks:>9,}  fine, too, behind blocks that are on another device, or gone"
        )
    lines += [f"  {count:>9,}  {WORDS.get(reason, reason)}" for reason, count in report.bad.most_common()]
    lines += [f"  {finding}" for finding in report.findings]
    if report.stopped:
        lines.append(f"  stopped: {report.stopped}; the device is failing, so nothing was dropped")
    elif report.ok:
        lines.append("  all is well; nothing was changed")
    elif report.repaired:
        dropped = report.blocks - report.fine_blocks - report.apart_blocks
        lines.append(f"  repaired: {dropped:,} dropped, the index written anew; run it again to see all well")
    else:
        lines.append("  nothing was changed; a node serves none of what is wrong; --repair drops it")
    return "\n".join(lines)


def report_map(report: Report) -> dict[str, object]:
    """The same for a script."""
    return {
        "path": report.path,
        "ok": report.ok,
        "blocks": report.blocks,
        "fine_blocks": report.fine_blocks,
        "fine_bytes": report.fine_bytes,
        "apart_blocks": report.apart_blocks,
        "bad": dict(report.bad),
        "findings": report.findings,
        "stopped": report.stopped,
        "repaired": report.repaired,
        "seconds": round(report.seconds, 3),
    }


def _error_map(error: KVCacheError) -> dict[str, str]:
    return {"code": error.code, "what": error.what, "why": error.why, "todo": error.todo}


# --- online -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """What the node did for us. ``ended``: the pass we asked for is over."""

    blocks: int
    bad: int
    troubles: tuple[str, ...]


def _check_node(address: str, as_json: bool) -> bool:
    token = os.environ.get("KVCACHE_TOKEN", "")
    todo = "give the address of a running node, or check its directories: kvcache check PATH..."
    with connected(address, token, "kvcache check", _deadline_ns(), todo) as channel:
        began_s = time.monotonic()
        with Bar(not as_json) as bar:
            done = follow(ChannelNode(channel), bar.show, time.sleep)
    seconds = time.monotonic() - began_s
    if as_json:
        told = {"ok": not done.bad, "node": address, "blocks": done.blocks, "bad_blocks": done.bad}
        click.echo(json.dumps({**told, "troubles": list(done.troubles), "seconds": round(seconds, 3)}))
    else:
        click.echo(scrubbed_text(address, done, seconds))
    return not done.bad and not done.troubles


class Node(Protocol):
    """The two questions that are asked of a node."""

    def scrub(self) -> None: ...

    def stats(self) -> StatsReply: ...


class ChannelNode:
    """A ``Node`` behind a channel."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel

    def scrub(self) -> None:
        """RAISES BadInput, NotAllowed, Unavailable."""
        self._channel.call(Scrub(), _deadline_ns())

    def stats(self) -> StatsReply:
        """RAISES Unavailable."""
        reply = self._channel.call(Stats(), _deadline_ns())
        assert isinstance(reply, StatsReply), reply
        return reply


def follow(node: Node, show: Callable[[str, int, int], None], sleep: Callable[[float], None]) -> Scrubbed:
    """Ask for a pass and wait until it is over. RAISES what ``Node`` does.

    Once the pass was asked for, none that was begun before can end any more; blocks are left until ours does.
    """
    before = _counts(node.stats().values)
    node.scrub()
    reply = node.stats()
    start = _counts(reply.values)
    total = int(reply.values.get("scrub_left_blocks", 0))
    while (left := int(reply.values.get("scrub_left_blocks", 0))) and (
        _counts(reply.values)["scrub_passes"] == start["scrub_passes"]
    ):
        show("verifying", max(0, total - left), total)
        sleep(LOOK_S)
        reply = node.stats()
    end = _counts(reply.values)
    blocks = end["scrubbed_blocks"] - before["scrubbed_blocks"]
    return Scrubbed(blocks, end["scrub_bad_blocks"] - before["scrub_bad_blocks"], tuple(reply.troubles))


def scrubbed_text(address: str, done: Scrubbed, seconds: float) -> str:
    lines = [f"{address}: {done.blocks:,} blocks verified in {seconds:.1f} s, {done.bad:,} wrong"]
    lines += [f"  {trouble}" for trouble in done.troubles]
    if done.bad:
        lines.append("  what was wrong is served no more; kvcache info counts it by reason")
    elif not done.troubles:
        lines.append("  all is well")
    return "\n".join(lines)


def _counts(values: Mapping[str, float]) -> dict[str, int]:
    return {name: int(values.get(name, 0)) for name in _COUNTED}


def _deadline_ns() -> int:
    return time.monotonic_ns() + DEADLINE_S * NS_PER_S
