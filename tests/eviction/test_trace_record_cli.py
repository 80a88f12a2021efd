"""``kvcache trace record``: what it asks a node, and how it says what the node answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcache.channel import BlockingChannel
from kvcache.errors import BadInput, Unavailable
from kvcache.eviction.commands import trace_record as trace_record_cli
from kvcache.eviction.commands.trace import trace
from kvcache.eviction.traces.recorded import read_recorded
from kvcache.testing.processes import NodeProcess
from kvcache.wire import Record, StatsReply
from tests.server.talk import HASHES, connected, lease, opened

VALUES = {
    "recording": 1.0,
    "recorded_requests": 1234.0,
    "recorded_bytes": 9999.0,
    "record_lost_batches": 0.0,
    "record_failures": 0.0,
}


def run(*arguments: str) -> str:
    done = CliRunner().invoke(trace, ["record", *arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    found: list[Record] = []

    def ask(address: str, token: str, request: Record) -> StatsReply:
        found.append(request)
        return StatsReply(VALUES, ["recording into /x"])

    monkeypatch.setattr(trace_record_cli, "ask", ask)
    return found


def test_what_is_asked_and_said(asked: list[Record]) -> None:
    assert run("begin", "--folder", "/x", "--bytes", "2MiB", "--sample", "12.5%") == (
        "recording into /x\n"
        "recorded_requests 1,234, recorded_bytes 9,999, record_lost_batches 0, record_failures 0\n"
    )
    assert json.loads(run("tell", "--json")) == {"said": "recording into /x", **VALUES}
    assert asked == [Record("begin", "/x", 2 << 20, 125_000), Record("tell")]


@pytest.mark.parametrize(
    "arguments",
    [
        ("begin", "--sample", "0"),
        ("begin", "--sample", "150%"),
        ("begin", "--sample", "nan"),
        ("begin", "--bytes", "much"),
        ("end", "--folder", "/x"),
        ("tell", "--sample", "1"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: list[Record], arguments: tuple[str, ...]) -> None:
    with pytest.raises(BadInput):
        run(*arguments)
    assert not asked


def test_a_recording_that_could_not_begin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    said = StatsReply({**VALUES, "recording": 0.0}, ["not recording: no space"])
    monkeypatch.setattr(trace_record_cli, "ask", lambda *_: said)
    for more in ([], ["--json"]):
        with pytest.raises(BadInput, match=r"nothing is recorded.*no space"):
            run("begin", "--folder", "/x", *more)
    assert "no space" in run("tell")


def test_no_node(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no node answers"):
        run("tell", "--address", f"unix://{tmp_path}/none.sock")


@pytest.mark.slow
def test_a_node_that_is_killed_leaves_what_it_had_written(tmp_path: Path) -> None:
    settings = {"socket": str(tmp_path / "node.sock"), "http": "none", "capacity": "8MiB"}
    folder = tmp_path / "rec"
    with NodeProcess(settings, tmp_path / "log") as node:
        assert "recording into" in run("begin", "--folder", str(folder), "--address", node.socket)
        with connected(node.socket) as channel:
            ask_much(channel)
            while written(folder) < 20:
                lease(channel, opened(channel), HASHES[:2])
        node.kill()
    found = read_recorded(folder)
    assert found.request_count >= 20
    assert found.block_tokens == 128


def written(folder: Path) -> int:
    """How many requests are in the files by now. It writes once a second, perhaps in the middle of them."""
    try:
        return read_recorded(folder).request_count
    except BadInput:  # Nothing yet.
        return 0


def ask_much(channel: BlockingChannel) -> None:
    namespace = opened(channel)
    for count in range(1, 21):
        lease(channel, namespace, HASHES[:count])
