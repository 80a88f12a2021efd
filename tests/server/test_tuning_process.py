"""A node in a process of its own gets another policy while clients load and save: every byte stays right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvcache.block import BlockHash, BlockSpec, storage_key
from kvcache.client import connect_blocking
from kvcache.client.store import Handle, SaveHints
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.namespace import Namespace, shape_of
from kvcache.request_hints import RequestHints
from kvcache.testing.pattern import Pattern
from kvcache.testing.processes import NodeProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SPEC = BlockSpec(block_tokens=16, plane_count=2, head_count=1, head_bytes=2_048)
NAMESPACE = Namespace(
    model="m", weights="w", dtype="float32", layout="canonical", block_tokens=16, shape=shape_of(SPEC)
)
OPERATOR, ROUTER = "o" * 32, "r" * 32
CREDENTIALS = f"""
master_key = "{"5" * 64}"
[[credential]]
uid = {os.getuid()}
tenant = "default"
roles = ["reader", "writer", "operator"]
[[credential]]
token = "{OPERATOR}"
tenant = "default"
roles = ["operator"]
[[credential]]
token = "{ROUTER}"
tenant = "default"
roles = ["router"]
"""
PATIENCE_S = 100
PATIENCE_NS = PATIENCE_S * NS_PER_S
CLIENTS = 2
SESSIONS = 60


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    known = tmp_path / "credentials.toml"
    known.write_text(CREDENTIALS)
    known.chmod(0o600)
    settings = {
        "socket": str(tmp_path / "node.sock"),
        "http": "127.0.0.1:0",
        "capacity": "2MiB",
        "credentials": str(known),
    }
    with NodeProcess(settings, tmp_path / "node.log") as process:
        end_ns = SystemClock().now_ns() + PATIENCE_NS
        while ask(process, "/readyz")[0] != 200:
            assert SystemClock().now_ns() < end_ns
        yield process


def ask(node: NodeProcess, path: str, body: object = None, token: str = OPERATOR) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(node.http + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


class Engine(threading.Thread):
    """Serves the requests of some sessions, each a little longer than the one before, until told to stop."""

    def __init__(self, address: str, number: int) -> None:
        super().__init__(daemon=True)
        self._random = Random(number)
        self._pattern = Pattern(1, SPEC.block_bytes)
        self._address = address
        self._turns = [1] * SESSIONS
        self._number = number
        self.stop = threading.Event()
        self.served = self.hit_blocks = self.wrong_bytes = self.failed_blocks = 0
        self.troubles: dict[str, int] = {}

    def run(self) -> None:
        store = connect_blocking(self._address, timeout_ms=PATIENCE_S * 1_000)
        handle = store.open(NAMESPACE, SPEC)
        while not self.stop.is_set():
            session = self._random.randrange(SESSIONS)
            self._turns[session] = 1 + self._turns[session] % 20
            tokens = [self._number, session, *range(2, 16)] * self._turns[session]
            hints = RequestHints("turn_end", session=session)
            self._serve(store, handle, handle.hashes(tokens), hints)
            self.served += 1
        self.troubles = {
            name: count
            for name, count in store.counters.items()
            if name.startswith(("failed_blocks:", "ended:", "missed_calls:", "unsaved_blocks:refused"))
        }
        store.close()

    def _serve(self, store: Any, handle: Handle, prefix: list[BlockHash], hints: RequestHints) -> None:
        lease = store.lease(handle, prefix, hints=hints)
        blocks = [bytearray(SPEC.block_bytes) for _ in range(lease.count)]
        self.failed_blocks += len(store.load(lease, [[block] for block in blocks]))
        store.release(lease)
        for name, block in zip(prefix, blocks, strict=False):
            self.wrong_bytes += self._pattern.wrong_bytes(block, storage_key(handle.namespace_id, name))
        self.hit_blocks += lease.count
        fresh = prefix[lease.count :]
        made = [bytearray(SPEC.block_bytes) for _ in fresh]
        for name, block in zip(fresh, made, strict=True):
            self._pattern.fill(block, storage_key(handle.namespace_id, name))
        parent = prefix[lease.count - 1] if lease.count else b""
        if fresh:
            store.save(handle, fresh, [[block] for block in made], parent, SaveHints.of(hints))


def served(engines: list[Engine], more: int) -> None:
    """Wait until each engine has served so many more requests."""
    wanted = [engine.served + more for engine in engines]
    end_ns = SystemClock().now_ns() + PATIENCE_NS
    while any(engine.served < count for engine, count in zip(engines, wanted, strict=True)):
        assert SystemClock().now_ns() < end_ns
        assert all(engine.is_alive() for engine in engines)
        engines[0].stop.wait(0.01)


def decides(node: NodeProcess, policy: str) -> dict[str, Any]:
    end_ns = SystemClock().now_ns() + PATIENCE_NS
    while True:
        status, told = ask(node, "/v1/tuning")
        assert status == 200
        if told["tiers"]["host"]["policy"] == policy:
            return dict(told["tiers"]["host"])
        assert SystemClock().now_ns() < end_ns, told


def test_a_policy_takes_over_under_load(node: NodeProcess) -> None:
    engines = [Engine(node.socket, number) for number in range(CLIENTS)]
    for engine in engines:
        engine.start()
    try:
        served(engines, 150)
        status, told = ask(node, "/v1/tuning", {"policy": "leaf-hazard", "params": {"samples": 8}})
        assert status == 200, told
        now = decides(node, "leaf-hazard")
        assert now["params"] == {"samples": 8}
        assert now["fault"] == ""
        served(engines, 150)
        for policy in ("leaf-arc", "leaf-hazard+keep", "leaf-lru", "leaf-hazard"):  # And on, and on.
            assert ask(node, "/v1/tuning", {"policy": policy})[0] == 200
            decides(node, policy)
            served(engines, 30)
    finally:
        for engine in engines:
            engine.stop.set()
        for engine in engines:
            engine.join(PATIENCE_S)
    _, told = ask(node, "/v1/stats")
    values = told["values"]
    assert values["policy_changes"] == 5
    assert values["policy_faults"] == 0
    assert values["removed_blocks:evicted"] > 0, "there was room for everything: the load was none"
    for engine in engines:
        assert engine.hit_blocks > 0
        assert (engine.wrong_bytes, engine.failed_blocks, engine.troubles) == (0, 0, {})


def test_what_http_refuses(node: NodeProcess) -> None:
    for body, words in (
        ({"policy": "leaf_lru"}, "did you mean 'leaf-lru'"),
        ({"policy": "leaf-hazard", "params": {"samples": -1}}, "is possible"),
        ({"policy": "leaf-lru", "tier": "nvme"}, "this node has host"),
        ({"policy": "leaf-lru", "tier": "hbm"}, "tier"),
        ({"policy": "leaf-lru", "now": True}, "now"),
        ({"policy": 5}, "policy"),
        ({}, "policy"),
    ):
        status, problem = ask(node, "/v1/tuning", body)
        assert status == 400, body
        assert words in json.dumps(problem), problem
    assert ask(node, "/v1/tuning", {"policy": "leaf-arc"}, ROUTER)[0] == 404, "a router may only look"
    assert ask(node, "/v1/tuning", token=ROUTER)[1]["tiers"]["host"]["policy"] == "leaf-lru"


def run(node: NodeProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvcache", "tune", *arguments, "--address", node.socket]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_the_command(node: NodeProcess) -> None:
    done = run(node, "set", "--policy", "leaf-hazard", "--param", "samples=16", "--param", "decay=0.9")
    assert done.returncode == 0, done.stderr
    assert "leaf-hazard (samples=16, decay=0.9) decides over 0 blocks" in done.stdout
    assert "took over from leaf-lru" in done.stdout
    told = json.loads(run(node, "tell", "--json").stdout)
    assert told["tiers"]["host"]["policy"] == "leaf-hazard"
    for wrong, words in (
        (("set", "--policy", "leaf-hazrd"), "did you mean 'leaf-hazard'"),
        (("set", "--policy", "leaf-hazard", "--param", "samples"), "name=number"),
        (("set", "--policy", "leaf-hazard", "--param", "sampels=4"), "did you mean 'samples'"),
    ):
        refused = run(node, *wrong)
        assert refused.returncode == 1
        assert words in refused.stderr
