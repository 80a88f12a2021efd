"""Blocks from a device by themselves, into HBM and host memory."""

from __future__ import annotations

import pytest

from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.sums import sum_chunks
from kvcache.testing.stores import SIZE, SPEC
from kvcache.wire import (
    HBM,
    HOST,
    Abort,
    Commit,
    Reserve,
    Write,
)
from tests.client.hbm_script import COUNT, Rig, counted
from tests.client.script import Cancelled


def test_without_a_slab_nothing_is_asked_of_hbm() -> None:
    rig = Rig(on_device=False)
    lease = rig.take()
    assert [grant.tier for grant in lease.grants] == [HOST]
    rig.empty()
    assert rig.save() == COUNT
    assert [each.tier for each in rig.asked if isinstance(each, Reserve | Commit)] == [HOST, HOST]
    assert rig.below_bytes()[SIZE:] == b"".join(rig.content[1:])
    assert not counted(rig.context, "hbm_saved_blocks")


def test_a_save_goes_into_hbm() -> None:
    rig = Rig()
    rig.device.memory[:] = bytes(16 * SIZE)
    assert rig.save() == COUNT
    assert rig.device.memory[SIZE : COUNT * SIZE] == b"".join(rig.content[1:])
    [reserve, commit] = rig.asked
    assert isinstance(reserve, Reserve)
    assert isinstance(commit, Commit)
    assert (reserve.tier, commit.tier) == (HBM, HBM)
    assert commit.sums == sum_chunks(rig.content[1:], SPEC.chunk_bytes)


def test_nothing_is_given_back_before_copies_end_also_when_the_wait_is_interrupted() -> None:
    rig = Rig()
    rig.empty()
    rig.device.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        rig.save()
    [going] = rig.device.going
    assert not going.ended
    assert not any(isinstance(each, Abort | Commit) for each in rig.asked)
    rig.context.link.end_writings()  # As the driver does, whose connection this was.
    assert going.ended


def test_what_hbm_has_no_room_for_goes_to_host_memory_with_what_stands_before_it() -> None:
    rig = Rig()
    rig.empty()
    rig.room = 3
    assert rig.save() == COUNT
    assert rig.device.memory[SIZE : COUNT * SIZE] == b"".join(rig.content[1:3]) + bytes(3 * SIZE)
    assert rig.below_bytes()[SIZE:] == b"".join(rig.content[1:])
    assert counted(rig.context, "hbm_unsaved_blocks:full") == COUNT - 3
    assert counted(rig.context, "hbm_saved_blocks") == 2


@pytest.mark.parametrize(
    "error",
    [BadInput("bad_prefix", "its parent is not held", ""), Unavailable("unavailable", "gone", "")],
    ids=["parent", "unavailable"],
)
def test_hbm_that_refuses_is_gone_by(error: KVCacheError) -> None:
    rig = Rig()
    rig.refuses[HBM] = error
    assert rig.save() == COUNT
    reason = "parent" if isinstance(error, BadInput) else "unavailable"
    assert counted(rig.context, f"hbm_unsaved_blocks:{reason}") == COUNT


def test_what_neither_takes_is_counted_by_what_the_last_one_said() -> None:
    rig = Rig()
    rig.room = 2
    rig.refuses[HOST] = BadInput("bad_prefix", "its parent is not held", "")
    assert rig.save() == 2, "what HBM holds"
    assert counted(rig.context, "unsaved_blocks:parent") == COUNT - 2


def test_a_save_that_the_device_does_not_do_is_given_back() -> None:
    rig = Rig()
    rig.device.failing = 2
    assert rig.save() == 1, "what was held"
    assert [each for each in rig.asked if isinstance(each, Abort)] == [Abort(7, HBM), Abort(8, HOST)]
    assert counted(rig.context, "unsaved_blocks:refused") == COUNT - 1
    assert not rig.context.link.broken


def test_a_slab_that_fails_costs_hbm_and_no_more() -> None:
    rig = Rig()
    rig.empty()
    rig.device.failing = 1
    assert rig.save() == COUNT
    assert rig.below_bytes()[SIZE:] == b"".join(rig.content[1:])


def test_a_device_that_is_lost_is_not_saved_to() -> None:
    """What the node holds there is of no use to this engine."""
    rig = Rig()
    rig.empty()
    rig.held, rig.device.lost = COUNT, True
    assert rig.save() == COUNT
    assert {each.tier for each in rig.asked if isinstance(each, Reserve)} == {HOST}


@pytest.mark.parametrize("mapped", [True, False])
def test_what_the_link_gives_wrong_is_never_committed(mapped: bool) -> None:
    rig = Rig(on_device=False)
    rig.mapped = mapped
    rig.device.flips = True
    assert rig.save() == 1, "what was held"
    assert rig.asked[-1] == Abort(8, HOST)
    assert not any(isinstance(each, Commit) for each in rig.asked)
    assert counted(rig.context, "failed_copies") == 1
    assert counted(rig.context, "unsaved_blocks:refused") == COUNT - 1


def test_without_a_map_blocks_go_over_the_wire() -> None:
    rig = Rig(on_device=False)
    rig.mapped, rig.context.link.slab = False, None
    assert rig.save() == COUNT
    commit = rig.asked[-1]
    assert isinstance(commit, Commit)
    assert commit.sums == sum_chunks(rig.content[1:], SPEC.chunk_bytes)
    assert [each.count for each in rig.asked if isinstance(each, Write)] == [COUNT - 1]


def test_a_save_that_is_cancelled_leaves_no_reservation_behind() -> None:
    """At every step of one that goes to both."""
    for step in range(1, 20):
        rig = Rig()
        rig.room = 3
        try:
            rig.save(cancel_at=step)
        except Cancelled:
            ended = [each.reservation for each in rig.asked if isinstance(each, Commit | Abort)]
            made = [{HBM: 7, HOST: 8}[each.tier] for each in rig.asked if isinstance(each, Reserve)]
            assert set(made) == set(ended)
            continue
        break
    assert step > 5


def test_a_save_waits_until_the_device_lets_it() -> None:
    rig = Rig(on_device=False)
    rig.device.delay_ns = 5 * NS_PER_MS
    assert rig.save() == COUNT
    assert rig.pauses_ms == [5]
    assert [going.ended for going in rig.device.going] == [True]
