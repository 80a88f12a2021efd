"""``kvcache trace``: look at traces, convert, anonymize, split and make them.

    kvcache trace info TRACE ...            what it is like: ideal hit, reuse times, depth, working set
    kvcache trace convert TRACE OUT         another format, larger blocks, requests in order
    kvcache trace anonymize TRACE OUT       what tuning needs, and no more
    kvcache trace split TRACE A B           by time or by session
    kvcache trace generate OUT              made up, or with parameters fitted from another (--like)
    kvcache trace record begin|end|tell     what a node is asked (``trace_record``)

TRACE is in any format that ``kvcache.eviction.traces.files`` knows. Exit status: 0 done, 1 wrong settings or
trace, 2 usage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from kvcache.errors import BadInput
from kvcache.eviction.commands.progress import bar
from kvcache.eviction.commands.trace_record import record
from kvcache.eviction.traces.edit import (
    anonymized,
    coarsened,
    parse_share,
    split_by_session,
    split_by_time,
    with_sessions,
)
from kvcache.eviction.traces.files import WRITABLE, Reading, bytes_of, format_of, open_trace, save_trace
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.shape import picture, shape_of
from kvcache.eviction.traces.tester import SPREAD_S
from kvcache.eviction.traces.trace import Trace

Command = Callable[..., None]
TRACE = click.Path(path_type=Path)


@click.group()
def trace() -> None:
    """Look at request traces, convert, anonymize, split and make them."""


trace.add_command(record)


def _reads(command: Command) -> Command:
    """The options of every command that reads a trace of others."""
    for option in (
        click.option("--block-tokens", default=0, help="tokens a block, where the file does not say it"),
        click.option("--sort", is_flag=True, help="put requests in order of their time"),
        click.option(
            "--spread", default=float(SPREAD_S), help="seconds over which sessions without a start begin"
        ),
        click.option("--seed", default=1, show_default=True, help="for what is drawn by chance"),
    ):
        command = option(command)
    return command


def _says(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="one JSON object a line")(command)


def _writes(command: Command) -> Command:
    option = click.option(
        "--format", "form", default="", help=f"{', '.join(WRITABLE)} (default: by the name, .npz)"
    )
    return option(command)


@trace.command()
@click.argument("traces", nargs=-1, required=True, type=TRACE, metavar="TRACE...")
@_reads
@_says
def info(
    traces: tuple[Path, ...], block_tokens: int, sort: bool, spread: float, seed: int, as_json: bool
) -> None:
    """What traces are like: their ideal hit, reuse times, depth and working set."""
    for path in traces:
        read = _read(path, Reading(block_tokens, sort, spread, seed))
        with _watched(path.name, read.request_count) as progress:
            shape = shape_of(read, progress)
        if as_json:
            found = {"trace": str(path), "format": format_of(path), **shape.as_dict()}
            click.echo(json.dumps(found))
        else:
            click.echo(picture(path.name, shape))


@trace.command()
@click.argument("source", type=TRACE, metavar="TRACE")
@click.argument("out", type=TRACE)
@click.option("--to-block-tokens", default=0, help="make so many tokens one block")
@click.option("--sessions", is_flag=True, help="guess which requests without a session belong together")
@_writes
@_reads
@_says
def convert(
    source: Path,
    out: Path,
    to_block_tokens: int,
    sessions: bool,
    form: str,
    block_tokens: int,
    sort: bool,
    spread: float,
    seed: int,
    as_json: bool,
) -> None:
    """Write a trace in another format, with larger blocks, or in order of its time."""
    read = _read(source, Reading(block_tokens, sort, spread, seed))
    made = coarsened(read, to_block_tokens) if to_block_tokens else read
    _write(out, with_sessions(made) if sessions else made, form, as_json)


@trace.command()
@click.argument("source", type=TRACE, metavar="TRACE")
@click.argument("out", type=TRACE)
@click.option("--round-ms", default=1, show_default=True, help="times in steps of so many milliseconds")
@click.option("--no-kinds", is_flag=True, help="leave out how requests ended")
@click.option("--no-sessions", is_flag=True, help="leave out which requests belong together")
@_writes
@_reads
@_says
def anonymize(
    source: Path,
    out: Path,
    round_ms: int,
    no_kinds: bool,
    no_sessions: bool,
    form: str,
    block_tokens: int,
    sort: bool,
    spread: float,
    seed: int,
    as_json: bool,
) -> None:
    """Keep what tuning needs, and no more: lengths, times from 0, and what prompts share."""
    read = _read(source, Reading(block_tokens, sort, spread, seed))
    made = anonymized(read, round_ms=round_ms, kinds=not no_kinds, sessions=not no_sessions)
    _write(out, made, form, as_json)


@trace.command()
@click.argument("source", type=TRACE, metavar="TRACE")
@click.argument("first", type=TRACE)
@click.argument("rest", type=TRACE)
@click.option("--by", type=click.Choice(["time", "session"]), default="time", show_default=True)
@click.option("--share", default="50%", show_default=True, help="how much of it is in the first part")
@_writes
@_reads
@_says
def split(
    source: Path,
    first: Path,
    rest: Path,
    by: str,
    share: str,
    form: str,
    block_tokens: int,
    sort: bool,
    spread: float,
    seed: int,
    as_json: bool,
) -> None:
    """Two parts: choose a setting on the one, and see on the other whether it was right."""
    if first.resolve() == rest.resolve():
        raise BadInput("bad_config", f"both parts are {first}", "the one would be written over the other")
    read = _read(source, Reading(block_tokens, sort, spread, seed))
    part = parse_share(share)
    one, other = split_by_time(read, part) if by == "time" else split_by_session(read, part, seed)
    _write(first, one, form, as_json)
    _write(rest, other, form, as_json)


@trace.command(name="generate")
@click.argument("out", type=TRACE)
@click.option("--like", type=TRACE, metavar="TRACE", help="fit what is made to this trace")
@click.option("--requests", default=0, help="how many (default: 1,000, or as many as --like has)")
@click.option("--to-block-tokens", default=0, help="tokens a block (default: 16, or as --like has)")
@_writes
@_reads
@_says
def make(
    out: Path,
    like: Path | None,
    requests: int,
    to_block_tokens: int,
    form: str,
    block_tokens: int,
    sort: bool,
    spread: float,
    seed: int,
    as_json: bool,
) -> None:
    """Make up a trace in which prompts share beginnings. The same options give the same trace."""
    if like is None:
        count = requests or 1_000
        workload = Workload(request_count=count, block_tokens=to_block_tokens or 16, seed=seed)
        with _watched(out.name, count) as progress:
            made = generate(workload, progress)
    else:
        from kvcache.eviction.traces.generate_like import fit, generate_like

        read = _read(like, Reading(block_tokens, sort, spread, seed))
        model = fit(coarsened(read, to_block_tokens) if to_block_tokens else read)
        count = requests or read.request_count
        with _watched(out.name, count) as progress:
            made = generate_like(model, count, seed, progress)
    _write(out, made, form, as_json)


def _write(out: Path, made: Trace, form: str, as_json: bool) -> None:
    form = save_trace(out, made, form)
    if as_json:
        facts = {"written": str(out), "format": form, "requests": made.request_count}
        click.echo(json.dumps({**facts, "blocks": made.block_count, "block_tokens": made.block_tokens}))
    else:
        click.echo(
            f"{out}: {made.request_count:,} requests, {made.block_count:,} blocks of {made.block_tokens} "
            f"tokens ({form})"
        )


def _read(path: Path, how: Reading) -> Trace:
    with _watched(f"reading {path.name}", bytes_of(path)) as progress:
        return open_trace(path, how, progress)


@contextmanager
def _watched(label: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar, where a person watches; it is gone at the end."""
    shown = bar(label, total)
    try:
        yield (
            None if shown is None else lambda done: shown(done // 64 * 64)
        )  # It looks at round numbers only.
    finally:
        if shown is not None:
            shown(max(total, 1))
