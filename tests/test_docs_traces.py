"""What docs/traces.md tells to type works, and what it shows is what comes out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcache.errors import BadInput
from kvcache.eviction.commands.trace import trace
from kvcache.eviction.traces.files import open_trace
from kvcache.testing.processes import NodeProcess
from tests.server.talk import HASHES, connected, lease, opened

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "traces.md").read_text()


def commands() -> list[list[str]]:
    """What follows ``kvcache trace`` on each line, in order."""
    lines = "".join(re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    found = [shlex.split(line) for line in lines]
    assert all(words[:2] == ["kvcache", "trace"] for words in found)
    return [words[2:] for words in found]


def run(words: list[str]) -> str:
    done = CliRunner().invoke(trace, words, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output


def shown(text: str) -> str:
    [block] = [each for each in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) if text in each]
    return str(block)


@pytest.mark.slow
def test_every_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"socket": str(tmp_path / "node.sock"), "http": "none", "capacity": "8MiB"}
    monkeypatch.setenv("KVCACHE_SOCKET", settings["socket"])
    with NodeProcess(settings, tmp_path / "log") as node, connected(node.socket) as channel:
        monkeypatch.chdir(tmp_path)  # Not before: a node that was not installed is found where the tests run.
        for words in commands():
            said = run(words)
            if words == ["info", "made.npz"]:
                expected = shown("made.npz: 2,000 requests")
                assert said.startswith(expected.rstrip("\n")), said
            if words[:2] == ["record", "begin"]:
                lease(channel, opened(channel), HASHES[:9])
    assert open_trace(tmp_path / "mine.npz").request_count == 1
    assert open_trace(tmp_path / "again.npz").request_count == 2_000


def test_the_refusal_is_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chat = '{{"chat_id": {0}, "timestamp": {1}, "input_length": 16, "output_length": 1, "hash_ids": [1]}}\n'
    times = [0, 1, 2, 3, 3.1, 3.12, 2.98]
    Path("chats.jsonl").write_text("".join(chat.format(*each) for each in enumerate(times)))
    with pytest.raises(BadInput) as caught:
        open_trace("chats.jsonl")
    error = caught.value
    expected = f"kvcache: {error.what} [{error.code}]\n  why:   {error.why}\n  to do: {error.todo}\n"
    assert shown("time never runs back") == expected


def test_the_settings_are_settings() -> None:
    import tomllib

    from kvcache.config import NodeConfig
    from kvcache.server.recording import Plan

    [text] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    plan = Plan.of(NodeConfig(**tomllib.loads(text)))
    assert plan == Plan(Path("/var/lib/kvcache/recordings"), 256 << 20, 1.0)
