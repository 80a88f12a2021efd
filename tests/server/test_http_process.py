"""The HTTP process beside a real node: what it learns, and that it never outlives the node."""

from __future__ import annotations

import json
import os
import select
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcache.block import chain
from kvcache.credentials import Credentials
from kvcache.metrics_stats import STATS
from kvcache.testing.processes import NodeProcess
from tests.server.talk import connected, example, opened, save

pytestmark = pytest.mark.slow

PATIENCE_MS = 20_000
ASKS_MAX = 20_000
TOKENS = list(range(64))
MODEL = {"model": "m", "weights": "w", "block_tokens": 16}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    settings = {"socket": str(tmp_path / "node.sock"), "http": "127.0.0.1:0", "capacity": "8MiB"}
    with NodeProcess(settings, tmp_path / "node.log") as process:
        yield process


def ask(node: NodeProcess, path: str, body: object = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(node.http + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_MS / 1_000) as reply:
            text = reply.read()
            return reply.status, json.loads(text) if reply.headers["Content-Type"].endswith("json") else text
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def located(node: NodeProcess, blocks: int) -> dict[str, Any]:
    """Ask where the tokens are until so many blocks are; the answers are the only clock."""
    for _ in range(ASKS_MAX):
        status, found = ask(node, "/v1/locate", {"model": MODEL, "tokens": TOKENS})
        assert status == 200, found
        if found["complete"] and found["sources"][0]["blocks"] == blocks:
            return dict(found["sources"][0])
    raise AssertionError(found)


def ready(node: NodeProcess) -> None:
    for _ in range(ASKS_MAX):
        if ask(node, "/readyz")[0] == 200:
            return
    raise AssertionError(ask(node, "/readyz"))


def child_of(pid: int) -> int:
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(PATIENCE_MS))


def test_what_is_saved_is_located_and_counted(node: NodeProcess) -> None:
    ready(node)
    key = Credentials.default().tenant_key("default")
    hashes = chain(example(tenant="default").root(key), key, TOKENS, 16)
    with connected(node.socket) as channel:
        namespace = opened(channel)
        assert save(channel, namespace, list(hashes)) == 4
        source = located(node, blocks=4)
    assert (source["state"], source["tokens"]) == ("synced", 64)
    assert source["tiers"] == {"hbm": 0, "host": 4, "nvme": 0}
    assert source["shards"][0]["namespace"] == namespace.hex()
    status, stats = ask(node, "/v1/stats")
    assert status == 200 and stats["values"]["saved_tokens"] == 64
    assert stats["index"]["entries"] == 4
    status, page = ask(node, "/metrics")
    lines = page.decode().splitlines()
    assert "kvcache_saved_tokens_total 64.0" in lines and "kvcache_index_entries 4.0" in lines
    shown = [stat for stat in STATS if not stat.is_open]  # The others, once somebody names their values.
    assert all(any(line.startswith(stat.metric) for line in lines) for stat in shown)


def test_it_ends_with_its_node_even_when_that_is_killed(node: NodeProcess) -> None:
    ready(node)
    descriptor = os.pidfd_open(child_of(node.pid))
    try:
        node.kill()
        assert ended(descriptor)
    finally:
        os.close(descriptor)


def test_it_is_started_again_when_it_is_killed_and_learns_everything_anew(node: NodeProcess) -> None:
    ready(node)
    key = Credentials.default().tenant_key("default")
    hashes = chain(example(tenant="default").root(key), key, TOKENS, 16)
    with connected(node.socket) as channel:
        save(channel, opened(channel), list(hashes))
        os.kill(child_of(node.pid), 9)
        for _ in range(ASKS_MAX * 100):
            try:
                ask(node, "/healthz")
                break
            except (OSError, ValueError):
                continue
        located(node, blocks=4)
