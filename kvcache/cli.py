"""The command ``kvcache``: a table of subcommands, each loaded when it is asked for.

Stands above all packages, and nothing imports it. ``kvcache --help`` imports click and nothing else
that is heavy. Exit status: 0 done, 1 something is wrong with what was asked, 2 usage,
130 interrupted by Ctrl-C (what serves until it is told to end, ends with 0 then).
"""

from __future__ import annotations

import difflib
import errno
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import click

from kvcache import __version__
from kvcache.errors import KVCacheError, plainly

EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Subcommand:
    """Where a command is (``module:name``), and its one line in the list of commands."""

    target: str
    help: str


SUBCOMMANDS: dict[str, Subcommand] = {
    "serve": Subcommand("kvcache.server.cli:serve", "Run one node."),
    "route": Subcommand("kvcache.server.route_cli:route", "Send requests to the workers that suit them."),
    "index": Subcommand("kvcache.server.index_cli:index", "Say which worker holds how much of a prompt."),
    "demo": Subcommand("kvcache.demo:demo", "Two nodes, a trace, a kill and a restart, every byte compared."),
    "info": Subcommand("kvcache.cli_info:info", "What a node holds and has done so far."),
    "check": Subcommand(
        "kvcache.cli_check:check", "Verify every block on NVMe; --repair drops what is wrong."
    ),
    "simulate": Subcommand(
        "kvcache.cli_simulate:simulate_command", "Compare ways of routing on request traces."
    ),
    "policy": Subcommand("kvcache.cli_policy:policy", "Look at eviction policies, and try yours."),
    "tune": Subcommand(
        "kvcache.eviction.commands.tune:tune", "Try policies and sizes of the cache on traces."
    ),
    "trace": Subcommand("kvcache.eviction.commands.trace:trace", "Look at, convert, make and record traces."),
}


class LazyGroup(click.Group):
    """A group whose commands are the table's; listing them loads none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return None
        module, _, name = SUBCOMMANDS[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command), SUBCOMMANDS[cmd_name]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in SUBCOMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], SUBCOMMANDS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The commands are {', '.join(SUBCOMMANDS)}."
            ctx.fail(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Ctrl-C ends any command as a shell expects, and not as something that went wrong."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("kvcache: interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, subcommand.help) for name, subcommand in SUBCOMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvcache", message="%(prog)s %(version)s")
def commands() -> None:
    """KV cache kept outside the engine: found by prefix, verified, reused.

    A miss is always a right answer; wrong bytes never are.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave the process with its exit status."""
    if not __debug__:
        _fail("python runs with -O", "asserts are part of how wrong bytes are kept out", "run without -O")
    try:
        commands.main(arguments, prog_name="kvcache")
    except KVCacheError as error:
        _fail(f"{error.what} [{error.code}]", error.why, error.todo)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _fail("what it prints cannot be written", plainly(error), "make room where the output goes to")
    sys.exit(0)


def _fail(what: str, why: str, todo: str) -> NoReturn:
    lines = [f"kvcache: {what}"]
    lines += [f"  why:   {why}"] if why else []
    lines += [f"  to do: {todo}"] if todo else []
    click.echo("\n".join(lines), err=True)
    sys.exit(1)
