"""The contract of a store over a real node: both drivers, each way the bytes can go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.client import connect, connect_blocking
from kvcache.client.store import BlockStore
from kvcache.config import NodeConfig
from kvcache.testing.processes import NodeProcess
from kvcache.testing.stores_layered import LayeredContract
from kvcache.testing.threaded import Threaded
from tests.server.conftest import EmbeddedNode

PATHS = ("mapped", "unix", "tcp")
TIMEOUT_MS = 20_000


def made(driver: str, path: str, unix: str, tcp: str) -> BlockStore:
    address = tcp if path == "tcp" else unix
    if driver == "async":
        return connect(address, timeout_ms=TIMEOUT_MS, mapped=path == "mapped")
    return Threaded(connect_blocking(address, timeout_ms=TIMEOUT_MS, mapped=path == "mapped"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("driver", ["async", "blocking"])
class TestOverANodeInThisProcess(LayeredContract):
    @pytest.fixture(autouse=True)
    def _node(self, driver: str, path: str, tmp_path: Path) -> Iterator[None]:
        socket = str(tmp_path / "node.sock")
        self.node = EmbeddedNode(NodeConfig(socket=socket, tcp="127.0.0.1:0", http="none", capacity="8MiB"))
        self.how = (driver, path)
        yield
        self.node.close()

    def make(self) -> BlockStore:
        return made(*self.how, self.node.node.address, self.node.node.tcp_address)


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["async", "blocking"])
class TestOverANodeWithNvme(LayeredContract):
    @pytest.fixture(autouse=True)
    def _node(self, driver: str, tmp_path: Path) -> Iterator[None]:
        settings = NodeConfig(
            socket=str(tmp_path / "node.sock"), http="none", capacity="8MiB", nvme=f"{tmp_path}/nvme:32MiB"
        )
        self.node = EmbeddedNode(settings)
        self.driver = driver
        yield
        self.node.close()

    def make(self) -> BlockStore:
        return made(self.driver, "mapped", self.node.node.address, "")


@pytest.mark.slow
@pytest.mark.parametrize(("driver", "path"), [("async", "tcp"), ("blocking", "mapped")])
class TestOverANodeProcess(LayeredContract):
    @pytest.fixture(autouse=True)
    def _node(self, driver: str, path: str, tmp_path: Path) -> Iterator[None]:
        self.how = (driver, path)
        socket = str(tmp_path / "node.sock")
        settings = {"socket": socket, "tcp": "127.0.0.1:0", "http": "none", "capacity": "8MiB"}
        with NodeProcess(settings) as self.process:
            yield

    def make(self) -> BlockStore:
        return made(*self.how, self.process.socket, self.process.tcp)
