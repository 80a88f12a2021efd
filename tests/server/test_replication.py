"""Hot prefixes come to a peer by themselves, between real nodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.peer_world import Here
from tests.server.talk import SIZE

BLOCKS = [bytes([1, number]) * 8 for number in range(8)]
SETTINGS = {"replicate_hits": 3, "replicate_rate": str(64 * SIZE)}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def two(tmp_path: Path, stack: ExitStack, **settings: object) -> tuple[Here, Here]:
    there = f"unix://{tmp_path / 'b.sock'}"
    a = Here(tmp_path, "a", stack, peers=there, data="tcp://127.0.0.1:0", **settings)
    b = Here(tmp_path, "b", stack, data="tcp://127.0.0.1:0")
    a.until(lambda: a.stat("peers:ok") == 1, "b is followed")
    return a, b


def test_a_hot_prefix_is_copied_to_the_peer(tmp_path: Path, stack: ExitStack) -> None:
    a, b = two(tmp_path, stack, **SETTINGS)
    a.save(BLOCKS)
    for _ in range(3):
        assert a.load(BLOCKS) == len(BLOCKS)
    b.until(lambda: b.holds(BLOCKS) == len(BLOCKS), "all blocks are at b")
    assert b.load(BLOCKS) == len(BLOCKS)
    a.until(lambda: a.stat("replicated_blocks") == len(BLOCKS), "a has counted them")
    assert a.stat("replication_failures") == 0
    a.until_quiet()
    b.until_quiet()


def test_the_part_that_prompts_share_is_copied(tmp_path: Path, stack: ExitStack) -> None:
    a, b = two(tmp_path, stack, **SETTINGS)
    a.save(BLOCKS)
    for number in range(3):
        tail = [bytes([2, number]) * 8]
        a.save(tail, BLOCKS[-1])
        assert a.load(BLOCKS + tail) == len(BLOCKS) + 1
    b.until(lambda: b.holds(BLOCKS) == len(BLOCKS), "the shared blocks are at b")
    assert b.stat("stored_blocks:committed") == len(BLOCKS)


def test_what_is_used_seldom_stays(tmp_path: Path, stack: ExitStack) -> None:
    a, b = two(tmp_path, stack, **SETTINGS)
    a.save(BLOCKS)
    for _ in range(2):
        a.load(BLOCKS)
    other = [bytes([3, number]) * 8 for number in range(4)]
    a.save(other)
    for _ in range(3):
        a.load(other)
    b.until(lambda: b.holds(other) == len(other), "the hot ones are at b")
    assert b.holds(BLOCKS) == 0


def test_a_node_that_may_not_copies_nothing(tmp_path: Path, stack: ExitStack) -> None:
    a, _ = two(tmp_path, stack)
    assert a.node.core.bringing.replicator is None


def test_a_fetch_of_a_peer_is_no_use_of_an_engine(tmp_path: Path, stack: ExitStack) -> None:
    """Else a prefix that everybody has would never cool."""
    a, b = two(tmp_path, stack, **SETTINGS)
    a.save(BLOCKS)
    asking = a.connect(node="c")
    for _ in range(6):
        assert a.load(BLOCKS, channel=asking) == len(BLOCKS)
    other = [bytes([3, number]) * 8 for number in range(4)]
    a.save(other)
    for _ in range(3):
        a.load(other)
    b.until(lambda: b.holds(other) == len(other), "the hot ones are at b")
    assert b.holds(BLOCKS) == 0
