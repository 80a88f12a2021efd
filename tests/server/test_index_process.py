"""``kvcache index`` as it runs: beside two nodes, one killed and started again; and how it ends."""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcache.block import BlockHash, chain, hints
from kvcache.cli import commands
from kvcache.credentials import Credentials
from kvcache.errors import BadInput
from kvcache.locator import Locator, Source
from kvcache.testing.processes import NodeProcess
from tests.server.talk import connected, example, held, opened, save

pytestmark = pytest.mark.slow

READY_S = 60.0
ASKS_MAX = 200_000
LATE_S = 60.0
"""Far more than the three beats after which a node is dropped: the machine may be busy."""
KEY = Credentials.default().tenant_key("default")
PREFIXES = [
    [
        BlockHash(each)
        for each in chain(example(tenant="default").root(KEY), KEY, range(number, number + 64), 16)
    ]
    for number in range(0, 4_000, 100)
]


class IndexProcess:
    def __init__(self, arguments: list[str], log: Path) -> None:
        command = [sys.executable, "-m", "kvcache", "index", "--json", *arguments]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True)
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(READY_S) else ""
        self.ready = json.loads(line)

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        self.rest = [json.loads(line) for line in self.process.stdout]
        self.process.stdout.close()
        return self.process.wait(20)


@contextmanager
def node(folder: Path, name: str) -> Iterator[NodeProcess]:
    """It holds 32 blocks."""
    settings = {"socket": str(folder / f"{name}.sock"), "http": "none", "name": name, "capacity": "1MiB"}
    with NodeProcess(settings, folder / f"{name}.log") as process:
        yield process


def states(locator: Locator) -> dict[str, Source]:
    return {each.source: each for each in locator.sources() or ()}


def until(wanted: Callable[[], bool]) -> float:
    """Ask until it holds; returns after how many seconds."""
    began = time.monotonic()
    for _ in range(ASKS_MAX):
        if wanted():
            return time.monotonic() - began
        if time.monotonic() - began > LATE_S:
            break
    raise AssertionError("it never came to that")


def fill(address: str, first: int) -> None:
    """More prefixes than fit."""
    with connected(address) as channel:
        namespace = opened(channel)
        for prefix in PREFIXES[first : first + 20]:
            save(channel, namespace, list(prefix))


def truth(address: str) -> dict[int, int]:
    with connected(address) as channel:
        namespace = opened(channel)
        found = {at: held(channel, namespace, list(prefix)) for at, prefix in enumerate(PREFIXES)}
    return {at: count for at, count in found.items() if count}


def known(locator: Locator, source: str) -> dict[int, int]:
    found = {}
    for at, prefix in enumerate(PREFIXES):
        answer = locator.match(hints(prefix))
        assert answer is not None, locator.trouble
        for row in range(answer.rows):
            if answer.source(row) == source:
                found[at] = answer.blocks[row]
    return found


def test_nodes_are_followed_through_kill_and_restart(tmp_path: Path) -> None:
    with ExitStack() as stack:
        a, b = (stack.enter_context(node(tmp_path, name)) for name in ("node-a", "node-b"))
        follow, listen = f"{a.socket},{b.socket}", f"unix://{tmp_path}/index.sock"
        arguments = ["--follow", follow, "--listen", f"{listen},tcp://127.0.0.1:0", "--http", "127.0.0.1:0"]
        index = IndexProcess(arguments, tmp_path / "index.log")
        stack.callback(index.process.kill)
        locator = stack.enter_context(Locator(listen, timeout_ms=20_000))
        until(lambda: [each.state for each in states(locator).values()] == ["synced"] * 2)
        fill(a.socket, 0)
        fill(b.socket, 10)
        for each in (a, b):
            name = f"node-{'a' if each is a else 'b'}"
            held_there = truth(each.socket)
            assert 0 < sum(held_there.values()) <= 32, "some were evicted"
            until(lambda: known(locator, name) == held_there)  # noqa: B023
        [tcp] = [place for place in index.ready["places"] if place.startswith("tcp://")]
        with Locator(tcp, timeout_ms=20_000) as over_tcp:
            assert known(over_tcp, "node-b") == truth(b.socket)

        before = known(locator, "node-a")
        a.kill()
        until(lambda: states(locator)["node-a"].state != "synced")
        answer = locator.match(hints(PREFIXES[next(iter(before))]))
        assert answer is not None
        suspect = {answer.source(row): answer.suspect[row] for row in range(answer.rows)}
        assert suspect.get("node-a", 1) == 1 and suspect.get("node-b", 0) == 0, "or it is dropped already"
        until(lambda: states(locator)["node-a"].state == "unknown")
        assert known(locator, "node-a") == {}
        until(lambda: states(locator)["node-b"].state == "synced")

        a.start()
        fill(a.socket, 20)
        held_again = truth(a.socket)
        until(lambda: states(locator)["node-a"].state == "synced")
        until(lambda: known(locator, "node-a") == held_again)
        assert known(locator, "node-b") == truth(b.socket)
        assert index.close() == 0
        said = [(each["state"], each["source"]) for each in index.rest]
        assert ("not following", "node-a") in said and ("following", "node-b") in said, said
        assert locator.match(hints(PREFIXES[0])) is None and locator.trouble


def test_a_node_that_stands_still_is_suspect_by_its_beats(tmp_path: Path) -> None:
    with ExitStack() as stack:
        a = stack.enter_context(node(tmp_path, "node-a"))
        listen = f"unix://{tmp_path}/index.sock"
        index = IndexProcess(["--follow", a.socket, "--listen", listen, "--http", "none"], tmp_path / "i.log")
        stack.callback(index.process.kill)
        locator = stack.enter_context(Locator(listen, timeout_ms=20_000))
        until(lambda: "node-a" in states(locator) and states(locator)["node-a"].state == "synced")

        def is_suspect() -> bool:
            """Else this process stood still itself, until it was dropped."""
            a.pause()
            until(lambda: states(locator)["node-a"].state != "synced")
            state = states(locator)["node-a"].state
            a.wake()
            until(lambda: states(locator)["node-a"].state == "synced")
            return state == "suspect"

        until(is_suspect)
        assert index.close() == 0


def test_a_nodes_own_process_answers_frames_too(tmp_path: Path) -> None:
    settings = {"socket": str(tmp_path / "node.sock"), "http": "127.0.0.1:0", "capacity": "1MiB", "name": "n"}
    with NodeProcess(settings, tmp_path / "node.log") as process:
        fill(process.socket, 0)
        with Locator(f"unix://{tmp_path}/node.index.sock", timeout_ms=20_000) as locator:
            held_there = truth(process.socket)
            until(lambda: known(locator, "n") == held_there)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fleet", "none.toml"], "No such file"),
        (["--follow", "nowhere"], "nowhere"),
        (["--http", "none"], "no address to serve on"),
        (["--bytes", "1KiB"], "at least"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], said: str) -> None:
    error = CliRunner().invoke(commands, ["index", *arguments]).exception
    assert isinstance(error, BadInput) and said in str(error)


def test_a_wide_bind_without_a_token_ends_it() -> None:
    command = [sys.executable, "-m", "kvcache", "index", "--listen", "tcp://0.0.0.0:0", "--http", "none"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "unsafe_bind" in ended.stderr, ended.stderr


def test_what_is_known_is_json(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[[worker]]\nname = "w"\nnode = "unix://{tmp_path}/none.sock"\n')
    index = IndexProcess(["--fleet", str(fleet), "--http", "127.0.0.1:0"], tmp_path / "index.log")
    facts: Mapping[str, object] = index.ready
    assert facts["ready"] is True and facts["following"] == 1 and facts["pid"] == index.process.pid
    assert index.close() == 0
    assert all(told["state"] != "following nobody" for told in index.rest)


def test_one_that_follows_nobody_says_so_and_what_helps(tmp_path: Path) -> None:
    index = IndexProcess(["--http", "127.0.0.1:0"], tmp_path / "index.log")
    assert index.ready["following"] == 0
    assert index.close() == 0
    [told] = index.rest
    assert told["state"] == "following nobody"
    assert "--follow" in told["trouble"] and "--fleet" in told["trouble"]
