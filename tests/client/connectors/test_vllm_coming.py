"""Look-ups of blocks that the store still reads from NVMe: asked again, but neither always nor for ever."""

from __future__ import annotations

import pytest

from kvcache.client.connectors.vllm_request import ASK_AGAIN_NS_MAX, IDLE_WAIT_NS_MAX, IDLE_WAIT_NS_MIN
from kvcache.client.connectors.vllm_scheduler import STEP_BUDGET_NS
from kvcache.clock import NS_PER_MS
from tests.client.connectors.fake_store import FakeRequest, namespace
from tests.client.connectors.scheduler_rig import Rig, tokens

LOAD_WAIT_MS = 2_000
IDLE_WAIT_MS = IDLE_WAIT_NS_MIN // NS_PER_MS
NOT_YET = (None, False)


class Slow:
    """A rig whose request has ``held`` blocks in the store's memory and the rest of four on its disk."""

    def __init__(self, held: int = 0, *, busy: bool = True, ranks: int = 1, load_wait_ms: int = LOAD_WAIT_MS):
        self.rig = Rig(ranks, load_wait_ms)
        self.request = FakeRequest("r", tokens(18))
        self.names = self.rig.hold(self.request, 4)
        self.rig.store.on_disk = set(self.names[held:])
        self.busy = busy
        self.step(0)

    def step(self, milliseconds: float) -> None:
        """So much time passes in a step, in which a busy engine computes another request."""
        self.rig.step({"other": 1} if self.busy else {})
        self.rig.clock.ns += int(milliseconds * NS_PER_MS)

    def lookup(self, computed: int = 0) -> tuple[int | None, bool]:
        answer = self.rig.side.lookup(self.request, computed)
        self.rig.side.check()
        return answer

    def wait(self, step_ms: float) -> tuple[tuple[int | None, bool], int]:
        """Ask each step until there is an answer: (it, the milliseconds until then)."""
        begun_ns = self.rig.clock.ns
        while (answer := self.lookup()) == NOT_YET:
            assert not self.rig.store.leases, "nothing is held meanwhile"
            self.step(step_ms)
        return answer, (self.rig.clock.ns - begun_ns) // NS_PER_MS


def test_a_request_whose_blocks_are_coming_is_asked_for_again() -> None:
    slow = Slow()
    assert slow.lookup() == NOT_YET
    slow.rig.store.on_disk.clear()
    slow.step(20)
    assert slow.lookup() == (16, True)
    assert slow.rig.store.waits == [0, 0], "a busy engine does not wait in the store"
    assert slow.rig.tally.take() == {"lookups:coming": 1, "lookups:hit": 1, "hit_tokens": 16}
    assert list(slow.rig.store.leases.values()) == ["engine/r"]


def test_other_requests_go_on() -> None:
    slow = Slow()
    other = FakeRequest("other", tokens(18, first=100))
    slow.rig.hold(other, 3)
    assert slow.lookup() == NOT_YET
    assert slow.rig.side.lookup(other, 0) == (12, True)


@pytest.mark.parametrize(
    ("held", "answer", "outcome"), [(2, (8, True), "hit"), (0, (0, False), "not_in_time")]
)
def test_when_its_time_is_over_it_takes_what_is_there(
    held: int, answer: tuple[int, bool], outcome: str
) -> None:
    slow = Slow(held)
    found, waited_ms = slow.wait(step_ms=7)
    assert found == answer
    assert LOAD_WAIT_MS <= waited_ms <= LOAD_WAIT_MS + 7
    assert slow.rig.tally.take()[f"lookups:{outcome}"] == 1
    slow.rig.clock.ns += 60_000 * NS_PER_MS
    assert slow.lookup() == answer, "a request waits once"


@pytest.mark.parametrize("step_ms", [0.5, 30])
def test_a_busy_engine_asks_now_and_then(step_ms: float) -> None:
    slow = Slow()
    _, waited_ms = slow.wait(step_ms)
    assert len(slow.rig.store.waits) < 40
    assert waited_ms <= LOAD_WAIT_MS + step_ms + 1


def test_it_asks_soon_enough() -> None:
    """What was there after a while is found not much later."""
    for ready_ms in (6, 40, 300, 1_500):
        slow = Slow()
        begun_ns = slow.rig.clock.ns
        while slow.lookup() == NOT_YET:
            slow.step(1)
            if slow.rig.clock.ns - begun_ns >= ready_ms * NS_PER_MS:
                slow.rig.store.on_disk.clear()
        found_ms = (slow.rig.clock.ns - begun_ns) / NS_PER_MS
        assert found_ms <= min(ready_ms * 1.25 + 6, ready_ms + ASK_AGAIN_NS_MAX / NS_PER_MS + 2), ready_ms


def test_an_idle_engine_waits_in_the_store_once_a_step() -> None:
    slow = Slow(busy=False)
    second = FakeRequest("second", tokens(18, first=100))
    slow.rig.store.on_disk |= set(slow.rig.hold(second, 4))

    def pass_wait(wait_ms: int) -> None:
        slow.rig.clock.ns += wait_ms * NS_PER_MS

    slow.rig.store.pass_wait = pass_wait
    for _ in range(3):
        assert slow.lookup() == NOT_YET
        assert slow.rig.side.lookup(second, 0) == NOT_YET
        slow.step(0)
    waits = slow.rig.store.waits
    assert waits.count(IDLE_WAIT_MS) == 3
    assert set(waits) == {IDLE_WAIT_MS, 0}


def test_an_idle_engine_is_told_at_once() -> None:
    slow = Slow(busy=False)
    slow.rig.store.pass_wait = lambda wait_ms: slow.rig.store.on_disk.clear()
    assert slow.lookup() == (16, True)
    assert slow.rig.store.waits == [IDLE_WAIT_MS]


def test_an_idle_engine_does_not_spin() -> None:
    """Each step with nothing to compute takes the time of its wait: about 100 in two seconds."""
    slow, steps = Slow(busy=False), 0

    def pass_wait(wait_ms: int) -> None:
        slow.rig.clock.ns += wait_ms * NS_PER_MS

    slow.rig.store.pass_wait = pass_wait
    while slow.lookup() == NOT_YET:
        steps += 1
        slow.step(0)
    assert steps < 120
    assert max(slow.rig.store.waits) * NS_PER_MS == IDLE_WAIT_NS_MAX


def test_the_ranks_share_one_wait() -> None:
    slow = Slow(busy=False, ranks=2)

    def pass_wait(wait_ms: int) -> None:
        slow.rig.clock.ns += (wait_ms - 2) * NS_PER_MS

    slow.rig.store.pass_wait = pass_wait
    assert slow.lookup() == NOT_YET
    assert slow.rig.store.waits == [IDLE_WAIT_MS, 2], "the rest of it"


def test_with_no_time_to_wait_what_is_there_is_taken_at_once() -> None:
    slow = Slow(2, busy=False, load_wait_ms=0)
    assert slow.lookup() == (8, True)
    assert slow.rig.store.waits == [0]


def test_what_comes_behind_a_missing_block_of_another_rank_is_not_waited_for() -> None:
    slow = Slow(2, ranks=2)
    del slow.rig.store.blocks[namespace(1, 2).namespace_id(), slow.names[2]]
    assert slow.lookup() == (8, True)


def test_what_the_engine_has_itself_is_not_waited_for() -> None:
    slow = Slow()
    assert slow.lookup(computed=12) == NOT_YET
    slow = Slow()
    del slow.rig.store.blocks[namespace().namespace_id(), slow.names[3]]
    assert slow.lookup(computed=12) == (0, False)
    assert slow.rig.tally.take() == {"lookups:miss": 1}


def test_waiting_requests_leave_the_step_its_budget() -> None:
    """Twenty of them, a slow store: a new request is still looked up in the first step that has time."""
    slow = Slow()
    store, clock, lease = slow.rig.store, slow.rig.clock, slow.rig.store.lease
    waiting = [FakeRequest(f"w{number}", tokens(18, first=100 * number)) for number in range(1, 21)]
    for request in waiting:
        store.on_disk |= set(slow.rig.hold(request, 4))

    def slowly(*arguments: object, **keywords: object) -> object:
        clock.ns += STEP_BUDGET_NS // 10
        return lease(*arguments, **keywords)  # type: ignore[arg-type]

    store.lease = slowly  # type: ignore[assignment, method-assign]
    new = FakeRequest("new", tokens(18, first=5_000))
    slow.rig.hold(new, 3)
    for _ in range(40):
        answers = [slow.rig.side.lookup(request, 0) for request in waiting]
        assert set(answers) == {NOT_YET}
        if slow.rig.side.lookup(new, 0) == (12, True):
            break
        slow.step(0)
    else:
        pytest.fail("the new request was never looked up")


def test_a_request_that_ends_while_its_blocks_are_coming_leaves_nothing() -> None:
    slow = Slow(2)
    assert slow.lookup() == NOT_YET
    assert not slow.rig.side.ended("r")
    assert slow.rig.store.leases == {}
    assert slow.rig.step().forgotten == ("r",)


def test_the_store_is_told_how_fast_the_engine_prefills() -> None:
    rig = Rig()
    long = FakeRequest("long", tokens(2_000))
    rig.side.known(long)
    for _ in range(4):
        plan = rig.step({"long": 500})
        rig.clock.ns += 250 * NS_PER_MS
        rig.side.absorb([], [], {}, plan.timed)
        long.num_computed_tokens += 500
    assert rig.side.lookup(FakeRequest("r", tokens(18)), 0) == (0, False)
    assert rig.store.prefill_tokens_s == pytest.approx(2_000)


def test_steps_that_generate_are_not_timed() -> None:
    rig = Rig()
    request = FakeRequest("r", tokens(300), num_computed_tokens=300, prompt_tokens=300)
    rig.side.known(request)
    assert rig.step({"r": 200}).timed == 0
    assert rig.step({"unknown": 200}).timed == 0
