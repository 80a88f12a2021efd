"""A real node with a proxy before it, and stores over it whose clock a test can move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kvcache.client.blocking_store import BlockingNodeStore
from kvcache.client.link import Options
from kvcache.client.store import Handle
from kvcache.clock import NS_PER_MS, NS_PER_S, SystemClock
from kvcache.config import NodeConfig
from kvcache.testing.stores import EXAMPLE, SPEC
from tests.client.proxy import Proxy
from tests.server.conftest import EmbeddedNode

PATIENCE_S = 20
TROUBLE = ("missed_calls:away", "ended:", "refused_connects")


class MovableClock:
    """The system's clock, moved ahead; once it is stopped, by the test alone."""

    def __init__(self) -> None:
        self.ahead_ns = 0
        self._stopped_ns = 0

    def now_ns(self) -> int:
        return (self._stopped_ns or SystemClock().now_ns()) + self.ahead_ns

    def stop(self) -> None:
        """However long the machine takes for the rest, to the store it is one moment. What gets no answer
        waits for ever."""
        self._stopped_ns = SystemClock().now_ns()

    def advance_ms(self, milliseconds: int) -> None:
        self.ahead_ns += milliseconds * NS_PER_MS


def eventually(holds: Callable[[], bool]) -> None:
    """Ask until it holds: what is asked is the only clock."""
    end_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
    while not holds():
        assert SystemClock().now_ns() < end_ns, "it never came to hold"


@dataclass(frozen=True, slots=True)
class Rig:
    """``store`` reaches ``node`` through ``proxy``; ``clock`` is the store's."""

    node: EmbeddedNode
    proxy: Proxy
    clock: MovableClock
    store: BlockingNodeStore
    handle: Handle

    def stats(self) -> dict[str, float]:
        return self.node.call(self.node.node.core.stats)

    def recover(self) -> None:
        """Past any back-off, until calls are answered again, and the node has seen that connections ended."""

        def troubles() -> int:
            counts = self.store.counters.items()
            return sum(count for name, count in counts if name.startswith(TROUBLE))

        def answered() -> bool:
            if not self.store._connecting:  # Or its time would be over before it had any.
                self.clock.advance_ms(3_000)
            before = troubles()
            self.store.match(self.handle, self.handle.hashes(range(4)))
            return troubles() == before

        eventually(answered)
        eventually(lambda: not self.stats()["reservations"])


TIMEOUT_MS = 20_000


def options(address: str, mapped: bool, timeout_ms: int = TIMEOUT_MS) -> Options:
    return Options(address, timeout_ms=timeout_ms, mapped=mapped)


@contextmanager
def impatient(store: BlockingNodeStore, timeout_ms: int) -> Iterator[None]:
    """For calls that get no answer: all others have their time also where the machine looks away."""
    patient = store._options
    store._options = replace(patient, timeout_ms=timeout_ms)
    yield
    store._options = patient


@pytest.fixture
def node(tmp_path: Path) -> Iterator[EmbeddedNode]:
    settings = NodeConfig(socket=str(tmp_path / "node.sock"), http="none", capacity="4MiB")
    made = EmbeddedNode(settings)
    yield made
    made.close()


@pytest.fixture
def proxy(node: EmbeddedNode, tmp_path: Path) -> Iterator[Proxy]:
    made = Proxy(node.node.socket_path, tmp_path / "proxy.sock")
    yield made
    made.close()


@pytest.fixture(params=["mapped", "wire"])
def rig(request: pytest.FixtureRequest, node: EmbeddedNode, proxy: Proxy) -> Iterator[Rig]:
    clock = MovableClock()
    store = BlockingNodeStore(options(proxy.address, request.param == "mapped"), clock)
    yield Rig(node, proxy, clock, store, store.open(EXAMPLE, SPEC))
    store.close()
