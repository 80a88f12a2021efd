"""What a peer says, and those who wait for it, hold up nobody else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.block import BlockSpec, StorageKey
from kvcache.peers import peer
from kvcache.server.streams import Streams
from kvcache.sums import SUM_BYTES
from tests.kvcache.peers.stream_world import World, worlds
from tests.server.talk import HASHES, SIZE

FOUR = HASHES[:4]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield from worlds(tmp_path)


def test_what_the_peer_holds_is_had_while_others_wait_for_what_it_has_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "STREAMS_MAX", 2)
    world.start()
    engine = world.engine()
    engine.reserve(FOUR)
    engine.commit()
    others = [world.want(HASHES[at : at + 2]) for at in (10, 20)]
    world.until_follows(2)
    assert world.want(FOUR).result() == 4
    assert not any(other.done() for other in others)
    for at in (10, 20):
        engine.reserve(HASHES[at : at + 2])
        engine.commit()
    assert [other.result() for other in others] == [2, 2]
    world.until_quiet()


def test_a_peer_that_says_something_else_each_time_is_asked_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for a part of what it says it writes; of that part it says another."""
    world.start()
    receiver = world.b.node.core.bringing.receiver
    assert receiver is not None
    receiver._bytes_max = 3 * SIZE
    world.b.node.core.host.coming_bytes += 1

    async def lie(
        streams: Streams, request: wire.Follow, spec: BlockSpec, keys: Sequence[StorageKey]
    ) -> wire.Followed:
        if not keys:
            return wire.Followed("none")
        count = len(keys) if len(keys) > 3 else 1
        sums = bytes(count * spec.plane_bytes // spec.chunk_bytes * SUM_BYTES)
        return wire.Followed("writing", count, 1, world.a.node.core.plane.addresses[0], b"t", sums, 1_000)

    monkeypatch.setattr(Streams, "_follow", lie)
    assert world.want(FOUR).result() == 0
    assert world.b.stat("receive_failures:gone") == 1
    world.b.node.core.host.coming_bytes -= 1
    world.until_quiet()
