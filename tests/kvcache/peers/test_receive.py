"""Blocks are received while a peer writes them: soon, whole or not at all, once for all who ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.clock import NS_PER_S
from kvcache.metrics_stats import STREAM_FAILURES
from kvcache.peers import receive
from kvcache.peers.stream import FAILURES
from tests.kvcache.peers.stream_world import PLANES, World, worlds
from tests.server.peer_world import Flipper
from tests.server.talk import HASHES, SIZE, SPEC

FOUR = HASHES[:4]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield from worlds(tmp_path)


@pytest.fixture
def two(world: World) -> World:
    world.start()
    return world


class TestItComes:
    def test_all_but_the_last_plane_are_here_before_the_commit(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR)
        wanted = two.want(FOUR)
        for plane in range(1, PLANES):
            two.until_follows()
            engine.advance()
            two.until_came(4 * plane)
        assert (two.a.holds(FOUR), two.b.holds(FOUR)) == (0, 0)
        engine.commit()
        assert wanted.result() == 4
        told = two.b.stats()
        assert (told["streamed_blocks"], told["streamed_bytes"]) == (4, 4 * SIZE)
        assert told.get("peer_fetched_blocks", 0) == 0
        two.until_quiet()

    def test_it_is_had_here_when_the_last_plane_is(self, two: World) -> None:
        engine = two.engine()
        wanted = two.want(FOUR)
        two.until_follows()
        engine.reserve(FOUR)
        engine.advance(PLANES)
        assert wanted.result() == 4
        assert (two.a.holds(FOUR), two.b.holds(FOUR)) == (0, 4)
        engine.commit()
        two.until_quiet()

    def test_who_asks_before_anybody_has_opened_its_model_there(self, two: World) -> None:
        two.a.embedded.call(two.a.node.core.namespaces._known.clear)
        wanted = two.want(FOUR)
        two.until_follows()
        engine = two.engine()
        engine.reserve(FOUR)
        engine.advance()
        engine.commit()
        assert wanted.result() == 4
        two.until_quiet()

    def test_a_prompt_that_is_computed_in_parts(self, two: World) -> None:
        engine = two.engine()
        wanted = two.want(HASHES[:9])
        for start in (0, 3, 6):
            two.until_follows()
            engine.reserve(HASHES[start : start + 3], HASHES[start - 1] if start else b"")
            engine.advance(2)
            engine.commit()
        assert wanted.result() == 9
        assert two.b.stat("streamed_blocks") + two.b.stat("peer_fetched_blocks") == 9
        two.until_quiet()

    def test_what_the_peer_held_before_is_fetched_and_what_is_here_stays(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(HASHES[:3])
        engine.commit()
        assert two.want(HASHES[:1]).result() == 1
        engine.reserve(HASHES[3:6], HASHES[2])
        engine.advance()
        wanted = two.want(HASHES[:6])
        two.until_came(3)
        engine.commit()
        assert wanted.result() == 6
        assert (two.b.stat("peer_fetched_blocks"), two.b.stat("streamed_blocks")) == (3, 3)
        two.until_quiet()

    def test_part_of_what_is_written_there_is_here(self, two: World) -> None:
        there, here = two.engine(), two.engine(two.b)
        here.reserve(FOUR[:2])
        here.commit()
        there.reserve(FOUR)
        there.advance()
        wanted = two.want(FOUR)
        two.until_came(2)
        there.commit()
        assert wanted.result() == 4
        assert two.b.stat("streamed_blocks") == 2
        two.until_quiet()

    def test_the_end_of_a_prompt(self, two: World) -> None:
        """A request that says what comes before it."""
        there, here = two.engine(), two.engine(two.b)
        for engine in (there, here):
            engine.reserve(FOUR[:2])
            engine.commit()
        there.reserve(FOUR[2:], FOUR[1])
        there.advance()
        wanted = two.want(FOUR[2:], parent=FOUR[1])
        two.until_came(2)
        there.commit()
        assert wanted.result() == 2
        assert two.b.holds(FOUR) == 4
        two.until_quiet()

    def test_what_others_hold_is_not_waited_for(self, two: World) -> None:
        """The named peer has nothing of it, but another has."""
        engine = two.engine()
        engine.reserve(FOUR)
        engine.commit()
        c = two.add("c")
        c.until(lambda: c.stat("peers:ok") == 2 and c.stat("peer_known_blocks") == 4, "it knows both")
        assert two.want(FOUR, at=c, source="b").result() == 4


class TestItIsShared:
    def test_ten_who_ask_cause_one_stream(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR)
        wanted = [two.want(FOUR) for _ in range(10)]
        two.until_follows()
        engine.advance()
        two.until_came(4)
        wanted += [two.want(FOUR) for _ in range(3)]
        engine.advance()
        engine.commit()
        assert [each.result() for each in wanted] == [4] * 13
        assert two.b.stat("streamed_planes") == two.a.stat("lent_planes") == 4 * PLANES
        two.until_quiet()

    def test_who_wants_less_goes_when_that_is_here(self, two: World) -> None:
        engine = two.engine()
        long, short = two.want(HASHES[:6]), two.want(HASHES[:3])
        two.until_follows()
        engine.reserve(HASHES[:3])
        engine.advance(PLANES)
        assert short.result() == 3
        assert not long.done()
        engine.commit()
        engine.reserve(HASHES[3:6], HASHES[2])
        engine.advance()
        engine.commit()
        assert long.result() == 6
        two.until_quiet()

    def test_who_wants_more_shares_what_is_coming(self, two: World) -> None:
        engine = two.engine()
        short = two.want(HASHES[:3])
        two.until_follows()
        long = two.want(HASHES[:6])
        two.b.until(lambda: two.b.stat("requests:lease") == 2, "both have asked")
        engine.reserve(HASHES[:6])
        engine.advance()
        engine.commit()
        assert (short.result(), long.result()) == (3, 6)
        assert two.b.stat("streamed_blocks") + two.b.stat("peer_fetched_blocks") == 6
        two.until_quiet()

    def test_who_does_not_wait_is_told_that_it_is_coming(self, two: World) -> None:
        """Once the peer has begun; and it is one look-up."""
        leased = two.b.lease(FOUR, wait_ms=0, source="a")
        assert (leased.count, leased.coming) == (0, 0)
        two.until_follows()
        engine = two.engine()
        engine.reserve(FOUR)
        engine.advance()
        two.until_came(4)
        leased = two.b.lease(FOUR, wait_ms=0, source="a")
        assert (leased.count, leased.coming) == (0, 4)
        assert two.b.stat("lookup_tokens") == 0
        engine.advance(PLANES - 1)
        assert two.want(FOUR).result() == 4
        assert two.b.stat("lookup_tokens") == 4 * SPEC.block_tokens


class TestItFails:
    """Then nothing of the run is here, and it is a miss."""

    def failed(self, two: World, reason: str) -> None:
        two.until_quiet()
        assert two.b.holds(FOUR) == 0
        failures = {name: value for name, value in two.b.stats().items() if "receive_failures" in name}
        assert failures == {f"receive_failures:{reason}": 1}

    def test_the_writer_vanishes(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR)
        wanted = two.want(FOUR)
        two.until_follows()
        engine.advance(2)
        two.until_came(8)
        engine.vanish()
        assert wanted.result() == 0
        self.failed(two, "gone")

    def test_the_writer_aborts(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR)
        wanted = two.want(FOUR)
        two.until_follows()
        engine.advance()
        two.until_came(4)
        engine.abort()
        assert wanted.result() == 0
        self.failed(two, "gone")
        engine.reserve(FOUR)
        engine.commit()
        two.b.until(lambda: two.want(FOUR).result() == 4, "the next time it is had")

    @pytest.mark.parametrize("plane", range(PLANES))
    def test_the_sums_of_a_plane_are_wrong(self, two: World, plane: int) -> None:
        engine = two.engine()
        engine.reserve(FOUR)
        wanted = two.want(FOUR)
        two.until_follows()
        for each in range(PLANES):
            engine.advance(1, engine.wrong_sums() if each == plane else None)
            if each <= plane:  # The next has come too when this is judged.
                two.until_came(4 * (each + 1))
        assert wanted.result() == 0
        engine.abort()
        self.failed(two, "sums")
        assert two.b.stat("peer_rejected_blocks:checksum") == 4

    def test_the_bytes_change_on_the_way(self, two: World) -> None:
        two.b.on_the_way(Flipper)
        engine = two.engine()
        engine.reserve(FOUR)
        engine.advance(PLANES)
        assert two.want(FOUR).result() == 0
        engine.abort()
        self.failed(two, "sums")

    def test_it_never_begins(self, two: World) -> None:
        two.patience(begin_ns=50)
        assert two.want(FOUR).result() == 0
        self.failed(two, "none")

    def test_it_does_not_go_on(self, two: World) -> None:
        two.patience(stall_ns=50)
        engine = two.engine()
        engine.reserve(FOUR)
        engine.advance()
        assert two.want(FOUR).result() == 0
        engine.abort()
        self.failed(two, "stalled")

    def test_the_peer_ends(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR)
        wanted = two.want(FOUR)
        two.until_follows()
        engine.advance()
        two.until_came(4)
        two.a.end()
        assert wanted.result() == 0
        two.b.until(lambda: two.b.stat("receive_failures:lost") == 1, "it is counted")
        assert two.b.holds(FOUR) == 0
        two.b.until_quiet()

    def test_there_is_no_room_here(self, world: World) -> None:
        world.start(capacity="256KiB")
        room = (256 << 10) // SIZE
        world.b.save(HASHES[20 : 20 + room])
        leased = world.b.lease(HASHES[20 : 20 + room])
        engine = world.engine()
        engine.reserve(FOUR)
        engine.advance()
        assert world.want(FOUR).result() == 0
        engine.abort()
        assert world.b.stat("receive_failures:full") == 1
        world.b.release(leased.lease)
        self.failed(world, "full")

    def test_there_is_room_for_some(self, world: World) -> None:
        world.start(capacity="256KiB")
        room = (256 << 10) // SIZE
        world.b.save(HASHES[20 : 20 + room - 2])
        leased = world.b.lease(HASHES[20 : 20 + room - 2])
        engine = world.engine()
        engine.reserve(FOUR)
        engine.advance(2)
        wanted = world.want(FOUR)
        world.until_came(4)
        engine.commit()
        assert wanted.result() == 2
        world.b.release(leased.lease)
        world.until_quiet()

    def test_somebody_writes_it_here(self, two: World) -> None:
        there, here = two.engine(), two.engine(two.b)
        here.reserve(FOUR)
        there.reserve(FOUR)
        there.advance()
        assert two.want(FOUR).result() == 0
        assert two.b.stat("receive_failures:busy") == 1
        here.commit()
        there.abort()
        assert two.want(FOUR).result() == 4

    def test_what_did_not_come_is_not_waited_for_again_at_once(
        self, two: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(receive, "REST_NS", 3_600 * NS_PER_S)
        two.patience(begin_ns=50)
        assert two.want(FOUR).result() == 0
        asked = two.a.stat("requests:follow")
        assert two.want(FOUR).result() == 0
        assert two.a.stat("requests:follow") == asked

    def test_a_node_that_ends_gives_up(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(FOUR)
        engine.advance()
        two.want(FOUR, wait_ms=1).result()
        two.until_came(4)
        two.b.close()
        two.a.until(lambda: two.a.stat("tickets") == 0, "the ticket was given back")
        engine.abort()
        two.a.until_quiet()


def test_a_run_is_as_large_as_there_is_room_for(two: World) -> None:
    """Something else is on its way: what the peer writes together comes in parts."""
    receiver = two.b.node.core.bringing.receiver
    assert receiver is not None
    receiver._bytes_max = 3 * SIZE
    two.b.node.core.host.coming_bytes += 1
    engine = two.engine()
    engine.reserve(HASHES[:5])
    engine.advance(PLANES)
    assert two.want(HASHES[:5]).result() == 5
    assert two.b.stat("streamed_blocks") == 5
    engine.commit()
    two.b.node.core.host.coming_bytes -= 1
    two.until_quiet()


def test_every_reason_is_a_label() -> None:
    assert STREAM_FAILURES == FAILURES
