"""Connections whose processes register the host slab with a GPU: while they live, its memory stays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvcache.channel import BlockingChannel
from kvcache.clock import SystemClock
from kvcache.errors import Unavailable
from kvcache.peers.plane import DataPlane
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.talk import SIZE, connected, deadline, held, opened, save, stats

BLOCKS = (8 << 20) // SIZE
NAMES = [bytes([number % 251, number // 251, 255, 255]) * 4 for number in range(1, BLOCKS + 1)]

TOKENS = {tenant: tenant * 16 for tenant in ("a", "b")}
CREDENTIALS = f"""
master_key = "{"0f" * 32}"
credential = [
  {{ token = "{TOKENS["a"]}", tenant = "a", roles = ["reader", "writer", "router", "operator"] }},
  {{ token = "{TOKENS["b"]}", tenant = "b", roles = ["reader", "writer", "router", "operator"] }},
]
"""


@pytest.fixture
def node(serve: Serve, tmp_path: Path) -> EmbeddedNode:
    path = tmp_path / "credentials"
    path.write_text(CREDENTIALS)
    path.chmod(0o600)
    return serve(credentials=str(path))


def engine(
    node: EmbeddedNode, tenant: str, *, maps: bool = True, pins: bool = True
) -> AbstractContextManager[BlockingChannel]:
    return connected(node.node.address, TOKENS[tenant], map=maps, pins=pins)


def eventually(holds: Callable[[], bool]) -> None:
    end_ns = deadline()
    while not holds():
        assert SystemClock().now_ns() < end_ns, "it never came to hold"


def test_it_is_told_the_unit(node: EmbeddedNode) -> None:
    unit = node.node.config.unit_bytes
    with connected(node.node.address, TOKENS["a"]) as watcher:
        for maps, pins, told in ((True, True, unit), (True, False, 0), (False, True, 0)):
            with engine(node, "a", maps=maps, pins=pins) as channel:
                assert channel.welcome.pinned_unit == told
                assert stats(watcher)["pins"] == (told > 0)
            eventually(lambda: stats(watcher)["pins"] == 0)


def test_a_connection_is_ended_before_memory_leaves_its_arena(node: EmbeddedNode) -> None:
    with engine(node, "a") as first, engine(node, "b") as second:
        assert first.welcome.pinned_unit
        assert second.welcome.pinned_unit, "nobody holds blocks yet"
        mine, theirs = opened(first), opened(second)
        for at in range(0, BLOCKS, 64):
            save(first, mine, NAMES[at : at + 64], NAMES[at - 1] if at else b"")
        assert held(first, mine, NAMES) == BLOCKS
        assert stats(second)["pins"] == 2
        assert save(second, theirs, NAMES[:8]) == 8
        with pytest.raises(Unavailable):
            held(first, mine, NAMES)
        said = stats(second)
        assert (said["pins"], said["ended_pins"]) == (1, 1), "who writes keeps its own"
        with engine(node, "a") as again:
            assert again.welcome.pinned_unit == 0, "another holds blocks, and may need the memory"
            assert 0 < held(again, opened(again), NAMES) < BLOCKS


def test_one_alone_is_never_ended(node: EmbeddedNode) -> None:
    with engine(node, "a") as channel:
        namespace = opened(channel)
        for first in (0, BLOCKS // 2):
            for at in range(0, BLOCKS // 2, 64):
                part = NAMES[first + at : first + at + 64]
                save(channel, namespace, [bytes([7]) + name[1:] for name in part])
                save(channel, namespace, part)
        assert (stats(channel)["pins"], stats(channel)["ended_pins"]) == (1, 0)


class Told:
    """The views of memory that the data plane was told to register, and how many to forget."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.views: dict[int, memoryview] = {}
        self.forgotten = 0
        register, forget = DataPlane.register, DataPlane.forget

        def registering(plane: DataPlane, memory: memoryview) -> None:
            register(plane, memory)
            self.views[id(memory)] = memory

        def forgetting(plane: DataPlane, memory: memoryview) -> None:
            assert any(self.views.pop(id(memory))), "punched before it was told"
            self.forgotten += 1
            forget(plane, memory)

        monkeypatch.setattr(DataPlane, "register", registering)
        monkeypatch.setattr(DataPlane, "forget", forgetting)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def test_transports_are_told_before_memory_leaves_its_arena(told: Told, node: EmbeddedNode) -> None:
    units = (8 << 20) // node.node.config.unit_bytes
    with engine(node, "a", pins=False) as first, engine(node, "b", pins=False) as second:
        assert not told.views, "nobody holds blocks"
        mine, theirs = opened(first), opened(second)
        for at in range(0, BLOCKS, 64):
            save(first, mine, NAMES[at : at + 64], NAMES[at - 1] if at else b"")
        assert (len(told.views), told.forgotten) == (units, 0)
        assert save(second, theirs, NAMES[:8]) == 8
        assert told.forgotten > 0
        assert len(told.views) <= units
        assert held(second, theirs, NAMES[:8]) == 8
