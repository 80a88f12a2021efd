"""Leases by themselves: what is asked, in which steps, while the node reads blocks from NVMe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec import structs

from kvcache.block import HASH_BYTES
from kvcache.client import leasing
from kvcache.client.link import Context
from kvcache.client.store import LEASE_MS, Lease
from kvcache.errors import Unavailable
from kvcache.testing.clock import FakeClock
from kvcache.wire import BATCH_BLOCKS_MAX, HBM, HOST, HbmLeased, Leased, Release, Reply, Request, TakeLease
from tests.client.script import Cancelled, Script, context_and_handle, hashes


class Disk:
    """A node that has the first ``held`` blocks of what is asked in memory, and of the others one more each
    ``block_ms``, up to ``found``. It waits as long as it may, and keeps count of its leases."""

    def __init__(self, clock: FakeClock, *, held: int = 0, found: int = 0, block_ms: int = 10) -> None:
        self.clock, self.held, self.found, self.block_ms = clock, held, found, block_ms
        self.begun_ns = clock.now_ns()
        self.asked: list[TakeLease] = []
        self.leases: dict[int, int] = {}

    def __call__(self, request: Request) -> Reply:
        assert isinstance(request, TakeLease)
        self.asked.append(request)
        wanted = len(request.prefix) // HASH_BYTES
        for _ in range(request.wait_ms):
            if self.there() < min(self.found, wanted):
                self.clock.advance_ms(1)
        count = min(self.there(), wanted)
        return leased(self.grant(count), count, max(0, min(self.found, wanted) - count))

    def there(self) -> int:
        passed_ms = (self.clock.now_ns() - self.begun_ns) // 1_000_000
        return min(self.held + passed_ms // self.block_ms, max(self.found, self.held))

    def grant(self, count: int) -> int:
        if not count:
            return 0
        number = len(self.asked)
        self.leases[number] = count
        return number


def leased(number: int, count: int, coming: int = 0) -> Leased:
    return Leased(number, count, [], [], bytes(16 * count), 0, LEASE_MS, coming)


class Rig:
    """``take`` drives one lease over ``node``; what is released ends at the node."""

    def __init__(self, running: int = 1, tokens_s: float = 0.0) -> None:
        self.clock = FakeClock()
        self.context, self.handle = context_and_handle(clock=self.clock, tokens_s=tokens_s)
        self.context.link.running = running
        self.script: Script | None = None

    def take(
        self,
        node: Callable[[Request], Reply],
        count: int,
        wait_ms: int,
        *,
        request: str = "",
        duration_ms: int = LEASE_MS,
        cancel_at: int = -1,
    ) -> Lease:
        self.script = Script(node, self.clock)
        operation = leasing.lease(self.context, self.handle, hashes(count), request, duration_ms, wait_ms)
        return self.script.drive(operation, cancel_at)

    def released(self) -> list[int]:
        assert self.script is not None
        return [request.lease for request in self.script.asked if isinstance(request, Release)]


def counted(context: Context, name: str) -> int:
    return context.tally.copy().get(name, 0)


@pytest.mark.parametrize("running", [1, 2])
@pytest.mark.parametrize("request_name", ["", "request"])
def test_what_is_coming_is_waited_for(running: int, request_name: str) -> None:
    rig = Rig(running)
    node = Disk(rig.clock, held=2, found=12, block_ms=50)
    lease = rig.take(node, 20, 2_000, request=request_name)
    assert (lease.count, lease.coming) == (12, 0)
    assert lease.grants[0].lease_id == len(node.asked)
    assert [*rig.released(), lease.grants[0].lease_id] == list(node.leases), "one lease is left"
    assert max(request.wait_ms for request in node.asked) == (200 if running == 1 else 2)
    assert rig.clock.now_ns() - node.begun_ns < 650_000_000, "ends soon after the last block is there"
    assert counted(rig.context, "lease_waits") == len(node.asked) - 1
    assert counted(rig.context, "coming_blocks") == 0


@pytest.mark.parametrize("running", [1, 2])
def test_a_wait_ends_with_what_is_there_by_then(running: int) -> None:
    rig = Rig(running)
    node = Disk(rig.clock, held=2, found=12, block_ms=100)
    lease = rig.take(node, 20, 550)
    assert (lease.count, lease.coming) == (7, 5)
    assert 549 <= (rig.clock.now_ns() - node.begun_ns) / 1e6 <= 552
    assert counted(rig.context, "coming_blocks") == 5
    assert len(node.leases) - len(rig.released()) == 1


def test_without_a_wait_it_is_asked_once() -> None:
    rig = Rig()
    node = Disk(rig.clock, held=2, found=12)
    lease = rig.take(node, 20, 0)
    assert (lease.count, lease.coming) == (2, 10)
    assert [request.wait_ms for request in node.asked] == [0]
    assert rig.released() == []


def test_a_wait_beside_others_is_about_25_short_calls() -> None:
    rig = Rig(running=2)
    node = Disk(rig.clock, found=1, block_ms=1 << 30)
    assert rig.take(node, 1, 2_000).coming == 1
    assert rig.script is not None
    assert len(node.asked) < 60
    assert max(rig.script.pauses_ms) <= 50


def test_a_node_that_does_not_wait_is_not_asked_without_end() -> None:
    """It says that blocks are coming, at once, though it was given time."""
    rig = Rig()
    asked: list[Request] = []

    def hasty(request: Request) -> Reply:
        asked.append(request)
        return leased(0, 0, 1)

    assert rig.take(hasty, 1, 2_000).coming == 1
    assert len(asked) < 60


def test_nothing_is_taken_behind_a_batch_that_is_not_whole() -> None:
    """The second batch could be held: it is of no use behind a gap, and its blocks are not asked for."""
    rig = Rig()
    answers = iter([leased(1, 1_000, 24), leased(2, 5)])
    lease = rig.take(lambda _: next(answers), BATCH_BLOCKS_MAX + 5, 0)
    assert (lease.count, lease.coming, len(lease.grants)) == (1_000, 24, 1)


def test_each_batch_has_what_is_left_of_the_wait() -> None:
    rig = Rig()
    nodes = {16 * BATCH_BLOCKS_MAX: Disk(rig.clock, held=1_014, found=BATCH_BLOCKS_MAX, block_ms=40)}
    node_of_rest = Disk(rig.clock, found=5, block_ms=1 << 30)

    def node(request: Request) -> Reply:
        assert isinstance(request, TakeLease)
        return nodes.get(len(request.prefix), node_of_rest)(request)

    lease = rig.take(node, BATCH_BLOCKS_MAX + 5, 1_000)
    assert (lease.count, lease.coming) == (BATCH_BLOCKS_MAX, 5)
    assert (rig.clock.now_ns() - node_of_rest.begun_ns) // 1_000_000 == 1_000


def test_a_lease_comes_with_most_of_its_time_left() -> None:
    """Its end is counted from when it was asked for, so the node may not use that up waiting."""
    rig = Rig()
    node = Disk(rig.clock, found=10, block_ms=30)
    rig.take(node, 10, 2_000, duration_ms=100)
    assert max(request.wait_ms for request in node.asked) == 50


def test_the_node_is_told_how_fast_the_engine_is() -> None:
    rig = Rig(tokens_s=9_999.9)
    node = Disk(rig.clock, held=1)
    rig.take(node, 1, 0)
    assert [request.prefill_tokens_s for request in node.asked] == [9_999]


def test_more_than_was_asked_for_is_not_believed() -> None:
    rig = Rig()
    lease = rig.take(lambda _: leased(1, 2, 2), 3, 0)
    assert (lease.count, lease.coming) == (0, 0)
    assert rig.context.link.broken == "bad_reply"


def test_a_node_that_goes_during_the_wait_leaves_nothing() -> None:
    rig = Rig()
    answers = iter([leased(1, 1, 1)])

    def going(_: Request) -> Reply:
        if (reply := next(answers, None)) is None:
            raise Unavailable("unavailable", "it went")
        return reply

    lease = rig.take(going, 3, 2_000)
    assert (lease.count, lease.coming, lease.grants) == (0, 0, ())


@pytest.mark.parametrize("running", [1, 2])
@pytest.mark.parametrize("cancel_at", range(10))
def test_a_cancelled_wait_holds_nothing(cancel_at: int, running: int) -> None:
    """Wherever the cancellation comes, each lease that the node gave is released once."""
    rig = Rig(running)
    node = Disk(rig.clock, held=1, found=12, block_ms=100)
    with pytest.raises(Cancelled):
        rig.take(node, 12, 60_000, cancel_at=cancel_at)
    assert rig.released() == list(node.leases)


@pytest.mark.parametrize("step", [1, 2])
def test_a_cancelled_wait_gives_back_what_is_leased_in_both_tiers(step: int) -> None:
    """In place of either step that gives one back."""
    rig = Rig()
    vars(rig.context.link)["_plans"] = True
    hot = HbmLeased(7, 1, [0], [1], bytes(16), b"i" * 16)

    def coming(_: Request) -> Reply:
        return structs.replace(leased(8, 1, 1), hbm=hot)

    script = Script(coming, rig.clock)
    with pytest.raises(Cancelled):
        script.drive(
            leasing.lease(rig.context, rig.handle, hashes(3), "", LEASE_MS, 2_000, hbm=True), cancel_at=step
        )
    released = [(each.lease, each.tier) for each in script.asked if isinstance(each, Release)]
    assert released == [(8, HOST), (7, HBM)]
