"""Copies beside the engine: the cap on saves, what fails and what that leaves, and the end."""

from __future__ import annotations

import pytest

from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.device.cap import BURST_NS, Cap
from kvcache.device.copies import Step, copying
from kvcache.errors import BadInput, Unavailable
from tests.device.rigs import BLOCK, PATIENCE_S, SLOTS, Make, Refusing, rigs, value_of

make = pytest.fixture(rigs, name="make")


# --- the cap --------------------------------------------------------------------------------------


def test_saves_go_as_the_cap_lets_them(make: Make) -> None:
    rig = make(cap_bytes_s=1000 * BLOCK)  # One block a millisecond, ten saved up at most.
    copies = [rig.save(str(number), number, 0) for number in range(SLOTS)]
    assert sum(copy.event is not None for copy in copies) == 10
    for more in range(1, 6):
        rig.clock.advance_ms(1)
        rig.copies.pump()
        rig.copies.check()
        assert sum(copy.event is not None for copy in copies) == 10 + more
    rig.until(copies[:15])
    assert not copies[15].is_ended
    rig.clock.advance_ms(1)
    rig.until(copies)


def test_an_idle_hour_saves_up_no_more_than_a_burst() -> None:
    cap = Cap(1000.0, 0)
    taken = 0
    while cap.is_open(3_600 * NS_PER_S):
        cap.spend(1)
        taken += 1
    assert taken == 1000 * BURST_NS // NS_PER_S


def test_a_share_of_the_link_is_that_of_its_bytes_over_time() -> None:
    cap, taken = Cap.of_share(0.25, 4_000_000.0, 0), 0
    for now_ms in range(1, 1001):
        while cap.is_open(now_ms * NS_PER_MS):
            cap.spend(700)
            taken += 700
    burst = 1_000_000 * BURST_NS / NS_PER_S
    assert 1_000_000 <= taken <= 1_000_000 + burst + 700


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(BadInput, match="bad_config"):
        Cap.of_share(share, 1.0, 0)
    with pytest.raises(BadInput, match="bad_config"):
        Cap(min(share, 0.0), 0)


def test_a_save_of_many_steps_is_queued_in_parts(make: Make) -> None:
    rig = make(cap_bytes_s=100 * BLOCK)  # One block in ten milliseconds, one saved up.
    copy = rig.save("big", 0, 0, rig.parts(4))
    for done in range(1, 4):
        assert len(copy.steps) == 4 - done
        rig.clock.advance_ms(10)
        rig.copies.pump()
    assert copy.event is not None
    rig.until([copy])


def test_too_much_under_way_is_refused(make: Make) -> None:
    rig = make(inflight_bytes_max=2 * BLOCK)
    gate = rig.gate(rig.lane("host"))
    rig.save("a", 0, 0)
    rig.save("b", 1, 0)
    with pytest.raises(Unavailable, match="are under way, at most"):
        rig.save("c", 2, 0)
    gate.set()
    assert [name for name, _ in rig.ended] == []


# --- failures -------------------------------------------------------------------------------------


def _break() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def test_a_device_that_fails_is_lost_for_good(make: Make) -> None:
    rig = make(cap_bytes_s=1.0)
    gate = rig.gate(rig.lane("host"))
    broken = rig.save("broken", 0, 0, [Step(BLOCK, _break)])
    rig.save("waits", 1, 0)
    gate.set()
    assert rig.copies.wait([broken], PATIENCE_S)
    assert [name for name, _ in rig.ended] == ["waits", "broken"]
    assert all(failure is not None and "illegal memory access" in failure.why for _, failure in rig.ended)
    assert rig.lost == ["CUDA error: an illegal memory access was encountered"]
    with pytest.raises(Unavailable, match="illegal"):
        rig.save("later", 0, 0)
    with pytest.raises(Unavailable, match="illegal"):
        rig.slab.slots([0], BLOCK, rig.slab.ticket.incarnation)
    rig.copies.check()


def test_a_save_that_is_refused_in_the_middle_is_waited_for(make: Make) -> None:
    """A part of it may still be written: its slots are not used again before."""
    rig = make()
    lane = rig.lane("host")
    rig.copies._lanes["host"] = Refusing(lane, 1)
    gate = rig.gate(lane)
    copy = rig.save("a", 0, 0, rig.parts(2))
    rig.copies.pump()
    assert rig.ended == []
    gate.set()
    rig.until([copy])
    assert [(name, failure is None) for name, failure in rig.ended] == [("a", False)]
    assert rig.lost == [], "one copy failed, not the device"
    rig.until([rig.save("b", 0, 0)])


@pytest.mark.parametrize("steps", [0, 1])
def test_a_device_that_takes_no_event_is_lost(make: Make, steps: int) -> None:
    rig = make()
    rig.copies._lanes["host"] = Refusing(rig.lane("host"), steps, dead=True)
    copy = rig.save("a", 0, 0)
    assert copy.is_ended
    assert [(name, failure is None) for name, failure in rig.ended] == [("a", False)]
    assert rig.lost
    with pytest.raises(Unavailable):
        rig.save("b", 0, 0)


def test_an_engine_stream_that_is_gone_is_lost(make: Make) -> None:
    rig = make()
    rig.engine = Refusing(rig.engine, 0, dead=True)
    with pytest.raises(Unavailable, match="failed under a copy"):
        rig.save("a", 0, 0)
    assert rig.lost == ["it is gone"]
    assert rig.ended == []


def test_close_leaves_what_hangs_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slots are never used again: ``then`` is not called."""
    rig = make()
    monkeypatch.setattr(rig.streams, "close", lambda: None)
    gate = rig.gate(rig.lane("host"))
    near = Step(BLOCK, copying(rig.page(1), rig.page(0)))
    done = rig.copies.save("device", [near], rig.engine, rig.then("done"))
    rig.save("hangs", 0, 0)
    assert done.event is not None
    assert done.event.wait(PATIENCE_S)
    assert rig.copies.close(0.0) == 1
    assert rig.ended == [("done", None)]
    with pytest.raises(Unavailable, match="closed"):
        rig.save("late", 0, 0)
    gate.set()
    assert rig.copies.close(PATIENCE_S) == 0
    assert rig.ended[1:] == [("hangs", None)]


def test_close_waits_for_the_part_of_a_save_that_was_begun(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(cap_bytes_s=1.0)
    monkeypatch.setattr(rig.streams, "close", lambda: None)
    gate = rig.gate(rig.lane("host"))
    rig.save("half", 0, 0, rig.parts(2))
    assert rig.copies.close(0.0) == 1
    assert rig.ended == []
    gate.set()
    assert rig.copies.close(PATIENCE_S) == 0
    assert [(name, failure is None) for name, failure in rig.ended] == [("half", False)]


def test_after_a_failure_a_stream_does_nothing_more(make: Make) -> None:
    rig = make()
    rig.engine.run(_break)
    rig.compute(0, 1)
    for _ in range(2):
        with pytest.raises(Unavailable, match="illegal memory access"):
            rig.engine.mark().wait(PATIENCE_S)
    assert value_of(rig.page(0)) == 0


def test_close_ends_what_was_not_begun(make: Make) -> None:
    rig = make(cap_bytes_s=1.0)
    for number in range(3):
        rig.save(str(number), number, 0)
    assert rig.copies.close(PATIENCE_S) == 0
    assert sorted((name, failure is None) for name, failure in rig.ended) == [
        ("0", True),
        ("1", False),
        ("2", False),
    ]
