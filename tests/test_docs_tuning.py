"""What docs/tuning.md tells to type works, in its order, and what it shows is what comes out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcache.eviction.commands.trace import trace
from kvcache.eviction.commands.tune import tune
from kvcache.testing.processes import NodeProcess

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tuning.md").read_text()
GROUPS = {"trace": trace, "tune": tune}


def commands() -> list[list[str]]:
    """What follows ``kvcache`` on each line, in order."""
    lines = "".join(re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    found = [shlex.split(line) for line in lines]
    assert all(words[0] == "kvcache" and words[1] in GROUPS for words in found)
    return [words[1:] for words in found]


def run(words: list[str]) -> str:
    done = CliRunner().invoke(GROUPS[words[0]], words[1:], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output


def shown(text: str) -> str:
    [block] = [each for each in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) if text in each]
    return str(block)


def notes(text: str) -> list[str]:
    """What the advice speaks about, in order: figures move a little whenever a policy gets better."""
    return re.findall(r"^  ([a-z][a-z ]{1,11}[a-z])  +\S", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"socket": str(tmp_path / "node.sock"), "http": "none", "capacity": "8MiB"}
    monkeypatch.setenv("KVCACHE_SOCKET", settings["socket"])
    said: dict[str, str] = {}
    with NodeProcess(settings, tmp_path / "log"):
        monkeypatch.chdir(tmp_path)  # Not before: a node that was not installed is found where the tests run.
        for words in commands():
            said[" ".join(words[:2]) + (" tell" if "tell" in words else "")] = run(words)
    assert shown("capacity   blocks").strip() in said["tune mrc"]
    assert notes(shown("it buys")) == notes(said["tune advise"]) != []
    assert shown("it buys").splitlines()[0] in said["tune advise"]
    assert "leaf-hazard" in said["tune tell tell"]
    assert "buy" in said["tune size"]
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([a-z-]+\.md)\)", PAGE):
        assert (Path(__file__).resolve().parent.parent / "docs" / target).exists(), target
