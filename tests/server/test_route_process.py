"""``kvcache route`` as an operator runs it: two workers and a node, and a prompt that goes to its blocks."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvcache.block import chain
from kvcache.credentials import Credentials
from kvcache.testing.processes import NodeProcess
from tests.server.talk import connected, example, opened, save

pytestmark = pytest.mark.slow

TOKENS = list(range(64))
KEY = Credentials.default().tenant_key("default")
HASHES = chain(example(tenant="default").root(KEY), KEY, TOKENS, 16)
ASKS_MAX = 20_000
PATIENCE_S = 20.0


class Engine(BaseHTTPRequestHandler):
    """An OpenAI worker that says its port."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"port": self.server.server_address[1]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return None


@contextmanager
def engine() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def router(fleet: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address, and its process."""
    command = [
        sys.executable,
        "-m",
        "kvcache",
        "route",
        "--fleet",
        str(fleet),
        "--bind",
        "127.0.0.1:0",
        "--json",
    ]
    with (fleet.parent / "route.log").open("w") as log:
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
        line = process.stdout.readline() if ready else ""
        assert line, (fleet.parent / "route.log").read_text()
        yield json.loads(line)["http"], process
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, (fleet.parent / "route.log").read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close() if process.stdout else None


def ask(url: str, tokens: list[int]) -> tuple[dict[str, str], Any]:
    body = json.dumps({"model": "m", "prompt": tokens, "max_tokens": 1}).encode()
    request = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        return dict(reply.headers), json.load(reply)


def write_fleet(path: Path, urls: list[str], nodes: list[str]) -> Path:
    lines = []
    for number, (url, node) in enumerate(zip(urls, nodes, strict=True)):
        lines += ["[[worker]]", f'name = "w{number}"', f'url = "{url}"', 'model = "m"', f'node = "{node}"']
    path.write_text("\n".join(lines))
    return path


def test_a_prompt_goes_where_its_blocks_are_and_on_when_the_node_dies(tmp_path: Path) -> None:
    settings = {"socket": str(tmp_path / "node.sock"), "http": "none", "capacity": "8MiB"}
    nobody = f"unix://{tmp_path}/nobody.sock"
    with engine() as first, engine() as second, NodeProcess(settings, tmp_path / "node.log") as node:
        fleet = write_fleet(tmp_path / "fleet.toml", [first, second], [nobody, node.socket])
        with connected(node.socket) as channel:
            assert save(channel, opened(channel), list(HASHES)) == 4
        with router(fleet) as (url, _):
            for _ in range(ASKS_MAX):
                headers, answer = ask(url, TOKENS)
                if "host" in headers["x-kvcache-why"]:
                    break
            assert headers["x-kvcache-worker"] == "w1" and answer == {"port": int(second.rpartition(":")[2])}
            assert "the index knows nothing of w0" in headers["x-kvcache-why"]
            node.kill()
            for _ in range(ASKS_MAX):
                headers, _ = ask(url, TOKENS)
                if "the index knows nothing of these workers" in headers["x-kvcache-why"]:
                    break
            else:
                raise AssertionError(headers)


def test_settings_that_cannot_be_used_are_said_in_plain_words(tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path / "fleet.toml", ["http://127.0.0.1:1"], [f"unix://{tmp_path}/n.sock"])
    weights = tmp_path / "weights.toml"
    weights.write_text("[weights]\nload_hosts = 1\n")
    command = [sys.executable, "-m", "kvcache", "route", "--fleet", str(fleet)]
    for arguments, said in (
        (["--bind", "0.0.0.0:0"], "unsafe_bind"),
        (["--weights", str(weights)], "did you mean 'load_host'"),
        (["--attempts", "0"], "attempts is 0"),
    ):
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 1 and said in done.stderr, done.stderr
