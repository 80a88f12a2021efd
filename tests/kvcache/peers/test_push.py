"""Blocks are brought to a peer while they are written: all of them or none, and nobody here waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.peers import outlet, push
from tests.kvcache.peers.stream_world import PLANES, World, worlds
from tests.server.talk import HASHES, SIZE, SPEC

FOUR = HASHES[:4]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield from worlds(tmp_path)


@pytest.fixture
def two(world: World) -> World:
    world.start(pushes=True)
    return world


def posted(world: World, planes: int) -> None:
    """So many planes are in ``b``, none of them to be found."""
    size = planes * SPEC.plane_bytes
    world.b.until(lambda: world.b.stat("posted_bytes") == size, f"{planes} planes came")


class TestItComes:
    def test_all_but_the_last_plane_are_there_before_the_commit(self, two: World) -> None:
        engine = two.engine()
        wanted = two.want(FOUR, pushed=True)
        engine.reserve(FOUR, push="b")
        for plane in range(1, PLANES):
            engine.advance()
            posted(two, 4 * plane)
        assert (two.a.holds(FOUR), two.b.holds(FOUR)) == (0, 0)
        engine.commit()
        assert wanted.result() == 4
        assert (two.a.stat("pushed_blocks"), two.a.stat("pushed_bytes")) == (4, 4 * SIZE)
        assert two.b.stat("requests:post") == PLANES
        two.until_quiet()

    def test_an_ordinary_save_comes_whole(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.commit()
        assert two.want(FOUR, pushed=True).result() == 4
        assert two.b.stat("requests:post") == 1
        two.until_quiet()

    def test_it_is_published_when_it_is_committed_at_its_writer(self, two: World) -> None:
        engine = two.engine()
        for _ in range(2):
            engine.reserve(FOUR, push="b")
            engine.advance(PLANES)
            posted(two, 4 * PLANES)
            assert [two.b.holds(FOUR) for _ in range(50)] == [0] * 50
            engine.abort()
            two.until_quiet()
            two.b.node.core.counters["posted_bytes"] = 0
        engine.reserve(FOUR, push="b")
        engine.commit()
        assert two.want(FOUR, pushed=True).result() == 4
        two.until_quiet()

    def test_a_prompt_that_is_computed_in_parts(self, two: World) -> None:
        engine = two.engine()
        wanted = two.want(HASHES[:9], pushed=True)
        for start in (0, 3, 6):
            engine.reserve(HASHES[start : start + 3], HASHES[start - 1] if start else b"", push="b")
            engine.advance(2)
            engine.commit()
        assert wanted.result() == 9
        assert two.a.stat("pushed_blocks") == 9
        two.until_quiet()

    def test_what_comes_before_it_is_copied_first(self, two: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(push, "COPY_BLOCKS_MAX", 2)
        engine = two.engine()
        engine.reserve(HASHES[:5])
        engine.commit()
        engine.reserve(HASHES[5:8], HASHES[4], push="b")
        engine.advance()
        posted(two, 5 * PLANES + 3)
        engine.commit()
        assert two.want(HASHES[:8], pushed=True).result() == 8
        assert two.a.stat("pushed_blocks") == 8
        two.until_quiet()

    @pytest.mark.parametrize("count", [2, 4])
    def test_what_is_there_is_not_brought_again(self, two: World, count: int) -> None:
        there, here = two.engine(two.b), two.engine()
        there.reserve(FOUR[:count])
        there.commit()
        here.reserve(FOUR, push="b")
        here.commit()
        assert two.want(FOUR, pushed=True).result() == 4
        two.until_quiet()
        assert two.a.stat("pushed_blocks") == 4 - count
        assert not any("push_failures" in name for name in two.a.stats())

    def test_a_ticket_is_for_so_much(self, two: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outlet, "TICKET_BYTES_MAX", 3 * SPEC.plane_bytes)
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance(2)
        engine.commit()
        assert two.want(FOUR, pushed=True).result() == 4
        assert two.b.stat("requests:post") == 2 * PLANES
        two.until_quiet()

    @pytest.mark.slow
    def test_it_is_written_to_the_disk_there(self, world: World, tmp_path: Path) -> None:
        world.start(pushes=True, nvme=f"{tmp_path}/disk:64MiB")
        engine = world.engine()
        engine.reserve(FOUR, push="b")
        engine.commit()
        assert world.want(FOUR, pushed=True).result() == 4
        world.b.until(lambda: world.b.stat("nvme_written_blocks") == 4, "they are on the disk")


class TestWhoWaits:
    def test_ten_wait_for_one_push(self, two: World) -> None:
        engine = two.engine()
        wanted = [two.want(FOUR, pushed=True) for _ in range(10)]
        engine.reserve(FOUR, push="b")
        engine.advance()
        engine.commit()
        assert [each.result() for each in wanted] == [4] * 10
        two.until_quiet()

    def test_who_names_the_source_waits_for_what_it_brings(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        posted(two, 4)
        wanted = two.want(FOUR)
        engine.advance()
        posted(two, 8)
        assert not wanted.done()
        engine.commit()
        assert wanted.result() == 4
        two.until_quiet()

    def test_who_names_nobody_does_not(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        posted(two, 4)
        assert two.want(FOUR, source="").result() == 0
        assert two.b.lease(FOUR, source="a", wait_ms=0).coming == 4
        assert two.b.lease(FOUR, pushed=True, wait_ms=0).coming == 4
        assert two.b.lease(FOUR, wait_ms=0).coming == 0
        engine.abort()
        two.until_quiet()

    def test_an_abort_wakes_them(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        wanted = [two.want(FOUR, pushed=True), two.want(FOUR)]
        posted(two, 4)
        engine.abort()
        assert [each.result() for each in wanted] == [0, 0]
        two.until_quiet()

    def test_their_time_ends(self, two: World) -> None:
        assert two.want(FOUR, wait_ms=20, pushed=True).result() == 0
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        assert two.want(FOUR, wait_ms=20, pushed=True).result() == 0
        engine.commit()
        assert two.want(FOUR, pushed=True).result() == 4
        two.until_quiet()


class TestItFails:
    """Then nothing of it is at the peer, and the writer has its block all the same."""

    def failed(self, two: World, reason: str) -> None:
        two.a.until(lambda: two.a.stat(f"push_failures:{reason}") == 1, f"it failed: {reason}")
        two.until_quiet()
        assert two.b.holds(FOUR) == 0
        failures = {name: value for name, value in two.a.stats().items() if "push_failures" in name}
        assert failures == {f"push_failures:{reason}": 1}

    def test_nobody_is_called_so(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR, push="nobody")
        engine.advance()
        assert engine.commit() == 4
        self.failed(two, "unknown")

    def test_a_node_without_peers(self, world: World) -> None:
        world.start()
        engine = world.engine()
        engine.reserve(FOUR, push="b")
        assert engine.commit() == 4
        assert world.a.stat("push_failures:unknown") == 1

    def test_too_many(self, two: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(push, "PUSHES_MAX", 0)
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        assert engine.commit() == 4
        self.failed(two, "queue")

    def test_the_writer_vanishes(self, two: World) -> None:
        engine = two.engine()
        wanted = two.want(FOUR, pushed=True)
        engine.reserve(FOUR, push="b")
        engine.advance(2)
        posted(two, 8)
        engine.vanish()
        assert wanted.result() == 0
        two.until_quiet()
        assert two.b.holds(FOUR) == 0

    def test_the_sums_are_wrong(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.commit(flipped=True)
        self.failed(two, "sums")

    def test_no_room_there(self, world: World) -> None:
        world.start(pushes=True, capacity="256KiB")
        room = (256 << 10) // SIZE
        world.b.save(HASHES[20 : 20 + room])
        leased = world.b.lease(HASHES[20 : 20 + room])
        engine = world.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        assert engine.commit() == 4
        world.a.until(lambda: world.a.stat("push_failures:full") == 1, "it was full")
        world.b.release(leased.lease)
        self.failed(world, "full")

    def test_room_for_some_there(self, world: World) -> None:
        world.start(pushes=True, capacity="256KiB")
        room = (256 << 10) // SIZE
        world.b.save(HASHES[20 : 20 + room - 2])
        leased = world.b.lease(HASHES[20 : 20 + room - 2])
        engine = world.engine()
        engine.reserve(FOUR, push="b")
        assert engine.commit() == 4
        world.a.until(lambda: world.a.stat("pushed_blocks") == 2, "two had room")
        assert world.want(FOUR, source="").result() == 2
        world.b.release(leased.lease)
        world.until_quiet()

    def test_somebody_writes_it_there(self, two: World) -> None:
        there, here = two.engine(two.b), two.engine()
        there.reserve(FOUR)
        here.reserve(FOUR, push="b")
        here.commit()
        two.a.until(lambda: two.a.stat("push_failures:busy") == 1, "it is being written there")
        there.abort()
        self.failed(two, "busy")

    def test_the_peer_ends(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        posted(two, 4)
        two.b.end()
        engine.advance()
        assert engine.commit() == 4
        two.a.until(lambda: two.a.stat("push_failures:lost") == 1, "it is counted")
        two.a.until_quiet()
        assert two.a.holds(FOUR) == 4

    def test_the_writer_does_not_go_on(self, two: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(push, "STALL_NS", 10_000_000)
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        two.a.until(lambda: two.a.stat("push_failures:stalled") == 1, "it is given up")
        assert engine.commit() == 4
        self.failed(two, "stalled")

    def test_a_node_that_ends_gives_up(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        posted(two, 4)
        two.a.end()
        two.b.until_quiet()
        assert two.b.holds(FOUR) == 0
