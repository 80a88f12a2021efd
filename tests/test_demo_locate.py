"""The demo's one question over HTTP: what is asked, and what is made of every kind of answer."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvcache.demo_client import Setup
from kvcache.demo_locate import ask_locate

SETUP = Setup("", block_tokens=4, block_bytes=8_192, seed=3)


@contextlib.contextmanager
def router(status: int, reply: object) -> Iterator[tuple[str, list[bytes]]]:
    """An HTTP server that says one thing, and remembers what it was asked."""
    asked: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # The name is the library's.
            asked.append(self.path.encode() + b" " + self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        thread.join()


def source(name: str, blocks: int | None) -> dict[str, object]:
    tiers = None if blocks is None else {"hbm": 0, "host": blocks, "nvme": 0}
    return {"source": name, "state": "synced", "as_of": {"age_ms": 2}, "blocks": blocks, "tiers": tiers}


def test_who_holds_most_is_told() -> None:
    reply = {"asked_blocks": 5, "sources": [source("a", None), source("b", 4), source("c", 1)]}
    with router(200, reply) as (address, asked):
        found = ask_locate(address, SETUP, [7, 9])
    path, _, body = asked[0].partition(b" ")
    assert path == b"/v1/locate"
    assert json.loads(body)["tokens"] == [7] * 4 + [9] * 4
    assert (found.source, found.blocks, found.asked_blocks, found.tier) == ("b", 4, 5, "host")
    assert not found.error


@pytest.mark.parametrize(("status", "reply"), [(503, {"code": "unavailable"}), (200, {"sources": 1})])
def test_a_router_without_answer_is_told(status: int, reply: object) -> None:
    with router(status, reply) as (address, _):
        found = ask_locate(address, SETUP, [7])
    assert found.error
    assert found.blocks == 0


@pytest.mark.parametrize("address", ["", "http://127.0.0.1:9"])
def test_no_router_is_told(address: str) -> None:
    assert ask_locate(address, SETUP, [7]).error
