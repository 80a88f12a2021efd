"""A node inside this process, on a thread of its own, with every setting small."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from kvcache.config import NodeConfig
from kvcache.server import node as shell
from kvcache.server.node import Node

Result = TypeVar("Result")
START_S = 30


class EmbeddedNode:
    """The node and the loop that runs it. ``run`` does something on that loop, as the node would."""

    def __init__(self, config: NodeConfig, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.before_close: list[Callable[[], object]] = []
        """Lets go on what a test holds up, also where the test failed: or closing would wait for that."""
        try:
            self.node = self.run(_started(config))
        except BaseException:
            self._stop()
            raise

    def run(self, work: Coroutine[None, None, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    def call(self, function: Callable[[], Result]) -> Result:
        async def work() -> Result:
            return function()

        return self.run(work())

    def close(self) -> None:
        for let_go in self.before_close:
            let_go()
        self.call(self.node.core.check)
        self.run(self.node.close())
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_S)
        self._loop.close()


async def _started(config: NodeConfig) -> Node:
    node = Node(config)
    try:
        await node.start()
    except BaseException:
        await node.close()
        raise
    return node


Serve = Callable[..., EmbeddedNode]
NewEventLoop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(autouse=True)
def _patient_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk: a node that has started knows what its NVMe tier holds."""
    monkeypatch.setattr(shell, "NVME_WAIT_S", START_S - 10)


@pytest.fixture(params=["asyncio", "uvloop"])
def new_event_loop(request: pytest.FixtureRequest) -> NewEventLoop:
    """A node runs on either; the command takes uvloop where it is installed."""
    made: NewEventLoop = pytest.importorskip(request.param).new_event_loop
    return made


@pytest.fixture
def serve(tmp_path: Path, new_event_loop: NewEventLoop) -> Iterator[Serve]:
    """Start nodes with the given settings; each is checked and closed at the end."""
    nodes: list[EmbeddedNode] = []

    def start(**settings: object) -> EmbeddedNode:
        defaults = {"socket": str(tmp_path / "node.sock"), "http": "none", "capacity": "8MiB"}
        node = EmbeddedNode(NodeConfig(**{**defaults, **settings}), new_event_loop())  # type: ignore[arg-type]
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        node.close()
