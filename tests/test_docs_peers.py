"""What docs/peers.md tells to type works: its nodes find each other, and blocks go from one to the other."""

from __future__ import annotations

import os
import random
import re
import shlex
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.credentials import Credentials
from kvcache.testing.processes import NodeProcess
from tests.server.talk import HASHES, connected, deadline, opened, save

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "peers.md").read_text()
TOKEN = "0123456789abcdef" * 4
Settings = dict[str, str]


def commands() -> list[Settings]:
    """The settings of each ``kvcache serve``, in order."""
    blocks = re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines]
    assert all(words[:2] == ["kvcache", "serve"] for words in found)
    return [
        {
            flag.removeprefix("--").replace("-", "_"): value
            for flag, value in zip(*[iter(words[2:])] * 2, strict=True)
        }
        for words in found
    ]


def free_ports(count: int) -> list[int]:
    """None of those that the system gives to who asks for any: a test beside this one does all the time."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    others = [port for port in range(1_024, 65_536) if not first <= port <= last]
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.sample(others, len(others)):
            with suppress(OSError):
                found.append(stack.enter_context(socket.create_server(("127.0.0.1", port))).getsockname()[1])
            if len(found) == count:
                break
    return found


def placed(settings: Settings, folder: Path, places: dict[str, str]) -> Settings:
    """On this machine: other ports, other folders, little memory."""
    found = {"socket": str(folder / f"{settings['name']}.sock"), "http": "none", "capacity": "8MiB"}
    for name, value in settings.items():
        for told, here in places.items():
            value = value.replace(told, here)
        found[name] = value
    return found


def eventually(channel: BlockingChannel, namespace: bytes, blocks: list[bytes]) -> int:
    """How many can be had, when the nodes have found each other."""
    end_ns = SystemClock().now_ns() + 60 * NS_PER_S
    while SystemClock().now_ns() < end_ns:
        request = wire.TakeLease(namespace, b"".join(blocks), wait_ms=20_000)
        leased = channel.call(request, deadline())
        assert isinstance(leased, wire.Leased)
        if leased.count:
            return leased.count
    return 0


def share(first: Settings, second: Settings, folder: Path) -> None:
    with ExitStack() as stack:
        one = stack.enter_context(NodeProcess(first, folder / "log.1"))
        two = stack.enter_context(NodeProcess(second, folder / "log.2"))
        here = stack.enter_context(connected(one.socket))
        there = stack.enter_context(connected(two.socket))
        assert save(here, opened(here), HASHES[:4]) == 4
        assert eventually(there, opened(there), HASHES[:4]) == 4, (folder / "log.2").read_text()
        for log in ("log.1", "log.2"):
            assert TOKEN not in (folder / log).read_text()


def credentials(folder: Path) -> Path:
    """The file of the page, and those that it names."""
    [text] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    for name, content in (
        (
            "credentials.toml",
            text.replace("replace me: openssl rand -hex 32", TOKEN).replace("1000", str(os.getuid())),
        ),
        ("master.key", "m" * 32),
        ("node.token", f"{TOKEN}\n"),
    ):
        (folder / name).touch(0o600)
        (folder / name).write_text(content)
    return folder / "credentials.toml"


def test_the_credentials_file_is_one(tmp_path: Path) -> None:
    known = Credentials.from_file(credentials(tmp_path))
    node, engine = known.by_token(TOKEN), known.by_uid(os.getuid())
    assert node is not None
    assert engine is not None
    assert known.acting_for(node, engine.tenant) is not None
    assert known.acting_for(engine, node.tenant) is None


@pytest.mark.slow
def test_two_nodes_on_one_host(tmp_path: Path) -> None:
    ports = free_ports(2)
    places = {"8211": str(ports[0]), "8212": str(ports[1]), "/tmp/": f"{tmp_path}/"}
    first, second = (placed(each, tmp_path, places) for each in commands()[:2])
    share(first, second, tmp_path)


@pytest.mark.slow
def test_two_nodes_with_credentials(tmp_path: Path) -> None:
    credentials(tmp_path)
    [told] = commands()[2:]
    a, data, b, other = map(str, free_ports(4))
    files = {"/etc/kvcache": str(tmp_path)}
    peers = {"10.8.0.1:8211": f"127.0.0.1:{a}", "10.8.0.2:8211": f"127.0.0.1:{b}"}
    first = placed(told, tmp_path, {**files, **peers, "10.8.0.1:8212": f"127.0.0.1:{data}"})
    mirrored = {**told, "name": "b", "tcp": "10.8.0.2:8211"}
    second = placed(mirrored, tmp_path, {**files, **peers, "10.8.0.1:8212": f"127.0.0.1:{other}"})
    share(first, second, tmp_path)
