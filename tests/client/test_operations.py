"""Operations by themselves: what they ask for, step by step, of a node that is a few lines of test."""

from __future__ import annotations

import pytest

from kvcache.block import HASH_BYTES, BlockSpec
from kvcache.client import leasing, operations
from kvcache.client.link import Context, Tally, nowhere
from kvcache.client.operations import COMMIT_SUMS_BYTES_MAX
from kvcache.client.remote import TRANSFER_BYTES
from kvcache.client.steps import finished
from kvcache.client.store import NO_HINTS, Grant, Lease, SaveHints
from kvcache.errors import BadInput, NotAllowed, Unavailable
from kvcache.sums import SUM_BYTES
from kvcache.testing.clock import FakeClock
from kvcache.testing.stores import SIZE, SPEC
from kvcache.wire import (
    BATCH_BLOCKS_MAX,
    PREFIX_BLOCKS_MAX,
    Commit,
    Committed,
    Done,
    Match,
    Matched,
    Persist,
    Reply,
    Request,
    Reserve,
    Reserved,
    Write,
)
from tests.client.script import Script, context_and_handle, hashes


def roomy(request: Request) -> Reply:
    """A node that takes all."""
    match request:
        case Reserve():
            return Reserved(1, 0, len(request.prefix) // HASH_BYTES, [], [])
        case Write():
            return Done()
        case Commit():
            return Committed(len(request.sums) // (SPEC.chunk_count * SUM_BYTES))
    raise AssertionError(request)


def test_the_parent_of_a_batch_is_the_last_block_of_the_one_before() -> None:
    context, handle = context_and_handle()
    prefix = hashes(2 * BATCH_BLOCKS_MAX + 1)
    shared = bytes(SIZE)
    script = Script(roomy)
    hints = SaveHints("tool_call", 70, 5, 100, 9_000)
    held = script.drive(operations.save(context, handle, prefix, [[shared]] * len(prefix), b"p" * 16, hints))
    assert held == len(prefix)
    reserves = [request for request in script.asked if isinstance(request, Reserve)]
    assert [request.parent for request in reserves] == [
        b"p" * 16,
        prefix[BATCH_BLOCKS_MAX - 1],
        prefix[2 * BATCH_BLOCKS_MAX - 1],
    ]
    assert b"".join(request.prefix for request in reserves) == b"".join(prefix)
    told = {(r.hint, r.priority, r.session, r.gap_ms, r.keep_ms) for r in reserves}
    assert told == {("tool_call", 70, 5, 100, 9_000)}


@pytest.mark.parametrize("room", [0, 1, BATCH_BLOCKS_MAX - 1])
def test_a_node_that_fills_up_ends_the_save(room: int) -> None:
    context, handle = context_and_handle()

    def full(request: Request) -> Reply:
        if isinstance(request, Reserve):
            return Reserved(min(room, 1), 0, room, [], [], "full")
        return roomy(request)

    script = Script(full)
    prefix = hashes(BATCH_BLOCKS_MAX + 5)
    blocks = [[bytes(SIZE)]] * len(prefix)
    assert script.drive(operations.save(context, handle, prefix, blocks, b"", NO_HINTS)) == room
    assert sum(isinstance(request, Reserve) for request in script.asked) == 1
    assert context.tally.copy()["unsaved_blocks:full"] == len(prefix) - room


def test_what_is_held_already_is_not_sent() -> None:
    context, handle = context_and_handle()

    def partly(request: Request) -> Reply:
        return Reserved(1, 3, 2, [], []) if isinstance(request, Reserve) else roomy(request)

    script = Script(partly)
    blocks = [[bytes(SIZE)]] * 5
    assert script.drive(operations.save(context, handle, hashes(5), blocks, b"", NO_HINTS)) == 5
    assert sum(script.sent) == 2 * SIZE


def test_a_commit_and_a_transfer_stay_within_their_limits() -> None:
    """Many small chunks a block: the sums of a batch must fit a message, its bytes several transfers."""
    spec = BlockSpec(block_tokens=4, plane_count=4_096, head_count=1, head_bytes=256)
    context, handle = context_and_handle(spec)

    def answer(request: Request) -> Reply:
        if isinstance(request, Commit):
            assert len(request.sums) <= COMMIT_SUMS_BYTES_MAX
            return Committed(len(request.sums) // (spec.chunk_count * SUM_BYTES))
        return roomy(request)

    script = Script(answer)
    count = COMMIT_SUMS_BYTES_MAX // (spec.chunk_count * SUM_BYTES) + 1
    blocks = [[bytes(spec.block_bytes)]] * count
    assert script.drive(operations.save(context, handle, hashes(count), blocks, b"", NO_HINTS)) == count
    assert sum(isinstance(request, Commit) for request in script.asked) == 2
    assert max(script.sent) == TRANSFER_BYTES


def test_without_a_connection_operations_ask_nobody_and_answer_less() -> None:
    """One place for both drivers: what is answered and counted while the node is away."""
    _, handle = context_and_handle()
    context = Context(nowhere(), Tally(), FakeClock())
    prefix, blocks = hashes(4), [[bytearray(SIZE)] for _ in range(4)]
    lease = finished(leasing.lease(context, handle, prefix, "", 1_000, 60_000))
    assert (lease.count, lease.coming, lease.grants) == (0, 0, ())
    finished(leasing.release(context, lease))
    assert finished(operations.match(context, handle, prefix)) == 0
    assert finished(operations.persist(context, handle, prefix, 60_000)) == 0
    assert finished(operations.save(context, handle, prefix, blocks, b"", NO_HINTS)) == 0
    assert context.tally.copy() == {"missed_calls:away": 4, "unsaved_blocks:unavailable": 4}
    earlier = Lease(handle, tuple(prefix), (Grant(1, 0, 4, (), bytes(64), 1 << 62),), 1)
    assert finished(operations.load(context, earlier, blocks[:3], 1)) == {1, 2, 3}
    assert context.tally.copy()["failed_blocks:unavailable"] == 3
    with pytest.raises(BadInput):
        finished(operations.save(context, handle, prefix, blocks[:3], b"", NO_HINTS))


def test_a_match_says_how_fast_the_engine_is() -> None:
    context, handle = context_and_handle(tokens_s=1_234.5)
    script = Script(lambda request: Matched(0))
    script.drive(operations.match(context, handle, hashes(1)))
    (request,) = script.asked
    assert isinstance(request, Match)
    assert request.prefill_tokens_s == 1_234


class SlowDisk:
    """Makes one more block durable each ``block_ms``, and waits as long as it may for all of them."""

    def __init__(self, clock: FakeClock, block_ms: int, writes: int = 1 << 30) -> None:
        self.clock, self.block_ms, self.writes = clock, block_ms, writes
        self.begun_ns = clock.now_ns()
        self.waits: list[int] = []

    def __call__(self, request: Request) -> Reply:
        assert isinstance(request, Persist)
        self.waits.append(request.wait_ms)
        wanted = min(len(request.prefix) // HASH_BYTES, self.writes)
        for _ in range(request.wait_ms):
            if self.durable() < wanted:
                self.clock.advance_ms(1)
        return Matched(min(self.durable(), wanted))

    def durable(self) -> int:
        return (self.clock.now_ns() - self.begun_ns) // (self.block_ms * 1_000_000)


def persisted(clock: FakeClock, node: SlowDisk, wait_ms: int, running: int = 1) -> tuple[int, Script]:
    context, handle = context_and_handle(clock=clock)
    context.link.running = running
    script = Script(node, clock)
    count = script.drive(operations.persist(context, handle, hashes(10), wait_ms))
    assert context.tally.copy().get("persisted_blocks", 0) == count
    return count, script


@pytest.mark.parametrize("running", [1, 2])
def test_persist_asks_until_all_is_durable(running: int) -> None:
    clock = FakeClock()
    node = SlowDisk(clock, block_ms=50)
    count, script = persisted(clock, node, 10_000, running)
    assert count == 10
    assert node.waits[:2] == [200, 200] if running == 1 else node.waits[0] == 200
    assert bool(script.pauses_ms) is (running > 1), "others have the connection between"
    assert clock.now_ns() - node.begun_ns < 600_000_000


@pytest.mark.parametrize("running", [1, 2])
def test_persist_ends_with_what_is_durable_by_then(running: int) -> None:
    clock = FakeClock()
    count, _ = persisted(clock, SlowDisk(clock, block_ms=100), 450, running)
    assert count == 4


def test_persist_does_not_wait_for_a_node_that_has_nothing_to_wait_for() -> None:
    """It has no NVMe, or will not write more today: it answers before the time that it was given."""
    clock = FakeClock()
    node = SlowDisk(clock, block_ms=10, writes=3)
    assert persisted(clock, node, 10_000)[0] == 3
    assert node.waits == [200]
    assert persisted(clock, SlowDisk(clock, block_ms=10, writes=0), 10_000)[0] == 0


def test_what_the_node_begins_anew_each_time_has_ever_more_time() -> None:
    """To sync its disk takes 3 s, and it says nothing before it has; nor does it go on when it is late."""
    clock = FakeClock()
    waits: list[int] = []

    def syncing(request: Request) -> Reply:
        assert isinstance(request, Persist)
        waits.append(request.wait_ms)
        clock.advance_ms(min(request.wait_ms, 3_000))
        return Matched(10 if request.wait_ms >= 3_000 else 0)

    context, handle = context_and_handle(clock=clock)
    assert Script(syncing, clock).drive(operations.persist(context, handle, hashes(10), 10_000)) == 10
    assert waits == [200, 200, 400, 800, 1_600, 3_200]


def test_persist_without_a_wait_asks_once() -> None:
    clock = FakeClock()
    node = SlowDisk(clock, block_ms=10)
    assert persisted(clock, node, 0)[0] == 0
    assert node.waits == [0]


@pytest.mark.parametrize(
    "error", [NotAllowed("not_allowed", "a reader"), Unavailable("unavailable", "it went")]
)
def test_what_was_durable_before_the_node_failed_still_is(error: Exception) -> None:
    clock = FakeClock()
    answers = iter([Matched(4)])

    def failing(request: Request) -> Reply:
        assert isinstance(request, Persist)
        clock.advance_ms(request.wait_ms)
        if (reply := next(answers, None)) is None:
            raise error
        return reply

    context, handle = context_and_handle(clock=clock)
    assert Script(failing, clock).drive(operations.persist(context, handle, hashes(10), 10_000)) == 4


def test_a_node_that_persists_more_than_was_asked_for_is_not_believed() -> None:
    context, handle = context_and_handle()
    script = Script(lambda request: Matched(11))
    assert script.drive(operations.persist(context, handle, hashes(10), 0)) == 0
    assert context.link.broken == "bad_reply"


def test_a_prefix_too_long_for_one_message_is_persisted_as_far_as_it_goes() -> None:
    context, handle = context_and_handle()
    script = Script(lambda request: Matched(PREFIX_BLOCKS_MAX))
    prefix = hashes(PREFIX_BLOCKS_MAX + 1)
    assert script.drive(operations.persist(context, handle, prefix, 0)) == PREFIX_BLOCKS_MAX
