"""The command's face: what it prints, what it loads, and with which status it leaves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvcache import __version__, cli, cli_info
from kvcache.errors import BadInput
from kvcache.wire import PROTOCOL_VERSION, StatsReply, Welcome

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("aiohttp", "asyncio", "msgpack", "msgspec", "numpy", "prometheus_client", "torch", "uvloop")


def kvcache(*arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-m", "kvcache", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def loaded_by(*arguments: str) -> set[str]:
    """The top-level modules a command has imported when it ends."""
    done = kvcache(*arguments, flags=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}


def test_help_lists_every_command_and_loads_none() -> None:
    done = kvcache("--help")
    assert done.returncode == 0
    for name, subcommand in cli.SUBCOMMANDS.items():
        assert name in done.stdout
        assert subcommand.help in done.stdout
    modules = loaded_by("--help")
    assert "click" in modules
    assert not modules & set(HEAVY)


def test_info_loads_no_server() -> None:
    assert not loaded_by("info", "--help") & {"aiohttp", "prometheus_client", "torch", "uvloop"}


def test_ctrl_c_is_told_in_one_line_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def long() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: long)
    done = CliRunner().invoke(cli.commands, ["tune"])
    assert (done.exit_code, done.stderr, done.stdout) == (130, "kvcache: interrupted\n", "")


@pytest.mark.parametrize("name", list(cli.SUBCOMMANDS))
def test_every_command_of_the_table_is_there(name: str) -> None:
    command = cli.LazyGroup().get_command(click.Context(cli.commands), name)
    assert command is not None
    assert command.help


def test_what_runs_on_one_host_listens_on_ports_of_its_own() -> None:
    """A node, the index that follows it, and the router that asks that."""
    ports = []
    for name, option in (("serve", "--http"), ("index", "--http"), ("route", "--bind")):
        shown = " ".join(CliRunner().invoke(cli.commands, [name, "--help"]).output.split())
        told = re.search(rf"{option} TEXT .*?\[default: 127\.0\.0\.1:(\d+)\]", shown)
        assert told, name
        ports.append(told[1])
    assert len(set(ports)) == 3, ports


def test_asserts_are_needed() -> None:
    done = kvcache("--version", flags=("-O",))
    assert done.returncode == 1
    assert "to do: run without -O" in done.stderr


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"kvcache {__version__}\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_output_to_a_full_disk_is_no_bug_of_ours() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvcache", "policy", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "kvcache: what it prints cannot be written\n  why:   No space left on device\n"
    )
    assert "Traceback" not in done.stderr


def test_usage_is_two_and_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "serv")
    assert status == 2
    assert "Did you mean 'serve'?" in err
    assert run(capsys, "info", "--no-such-flag")[0] == 2


def test_an_error_says_what_why_and_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def refuse() -> None:
        raise BadInput("bad_config", "a thing is wrong", "because of this", "mend it")

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: refuse)
    expected = "kvcache: a thing is wrong [bad_config]\n  why:   because of this\n  to do: mend it\n"
    assert run(capsys, "info") == (1, "", expected)


def test_info_without_a_node(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "info", "--address", f"unix://{tmp_path}/node.sock")
    assert (status, out) == (1, "")
    assert "no node answers" in err
    assert "kvcache serve" in err


def test_info_refuses_what_is_no_address(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "info", "--address", "node.sock")
    assert status == 1
    assert "'node.sock' is no address" in err


WELCOME = Welcome(PROTOCOL_VERSION, "host-1", 7, "default", ["reader", "writer"], b"", 0)


def test_info_as_table_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"capacity_bytes": float(3 << 30), "lookup_tokens": 2000.0, "hit_tokens": 1234.0}
    tokens: list[str] = []

    def ask(address: str, token: str) -> tuple[Welcome, StatsReply]:
        tokens.append(token)
        return WELCOME, StatsReply(values, ["the NVMe directory /x is not used: it broke"])

    monkeypatch.setattr(cli_info, "ask", ask)
    runner = CliRunner(env={**os.environ, "KVCACHE_TOKEN": "secret"})
    printed = runner.invoke(cli_info.info, ["--address", "tcp://h:1"])
    assert printed.output.splitlines() == [
        "node            host-1",
        "address         tcp://h:1",
        "tenant          default",
        "roles           reader, writer",
        "hit ratio       61.7% of 2,000 tokens looked up",
        "capacity_bytes  3.0 GiB",
        "hit_tokens      1,234",
        "lookup_tokens   2,000",
        "trouble: the NVMe directory /x is not used: it broke",
    ]
    as_json = runner.invoke(cli_info.info, ["--address", "tcp://h:1", "--json"]).output
    assert as_json == (
        '{"address": "tcp://h:1", "node": "host-1", "tenant": "default", "roles": ["reader", "writer"], '
        '"values": {"capacity_bytes": 3221225472.0, "lookup_tokens": 2000.0, "hit_tokens": 1234.0}, '
        '"troubles": ["the NVMe directory /x is not used: it broke"]}\n'
    )
    assert tokens == ["secret", "secret"]
    values.clear()
    assert "nothing was looked up yet" in runner.invoke(cli_info.info, ["--address", "tcp://h:1"]).output


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("used_bytes", 0.0, "0 bytes"),
        ("used_bytes", 1023.0, "1023 bytes"),
        ("used_bytes", 1024.0, "1.0 KiB"),
        ("read_bytes:host", 5 * 1024.0**4, "5.0 TiB"),
        ("read_bytes", 5 * 1024.0**5, "5120.0 TiB"),
        ("hits", 1e6, "1,000,000"),
        ("ratio", 0.25, "0.250"),
    ],
)
def test_numbers_are_readable(name: str, value: float, expected: str) -> None:
    assert cli_info.readable(name, value) == expected
