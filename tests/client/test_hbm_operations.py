"""Blocks to a device by themselves, from HBM and host memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcache.client import leasing
from kvcache.client.hbm import Mapped
from kvcache.client.store import LEASE_MS
from kvcache.testing.stores import SIZE
from kvcache.wire import (
    HBM,
    HOST,
    HbmLeased,
    Leased,
    Reply,
    Request,
    TakeLease,
)
from tests.client.hbm_script import COUNT, SLAB, List, Rig, counted
from tests.client.script import Cancelled, Script


def test_each_tier_has_a_grant_and_is_released() -> None:
    rig = Rig()
    lease = rig.take()
    assert [(grant.tier, grant.start, grant.count) for grant in lease.grants] == [(HBM, 0, 3), (HOST, 3, 3)]
    assert rig.load(lease) == ([bytearray(each) for each in rig.content], frozenset())
    rig.let_go(lease)
    assert rig.released() == [(HBM, []), (HOST, [])]
    assert not rig.context.link.holds((HBM, lease.grants[0].lease_id))


@pytest.mark.parametrize("at", range(3))
def test_a_wrong_block_is_had_from_below_and_reported_to_hbm_alone(at: int) -> None:
    rig = Rig()
    rig.device.memory[at * SIZE + 5] ^= 1
    lease = rig.take()
    assert rig.load(lease) == ([bytearray(each) for each in rig.content], frozenset())
    rig.let_go(lease)
    assert rig.released() == [(HOST, []), (HBM, [at]), (HOST, [])]
    assert counted(rig.context, "fallback_blocks") == 1
    assert counted(rig.context, "hbm_loaded_blocks") == 2


def test_what_is_wrong_there_and_not_below_is_a_miss() -> None:
    rig = Rig()
    lease = rig.take()
    rig.device.memory[SIZE] ^= 1
    rig.below = 1
    assert rig.load(lease)[1] == {1}


def test_only_runs_that_failed_are_asked_for_again() -> None:
    rig = Rig(hot=COUNT)
    for at in (0, 1, 4):
        rig.device.memory[at * SIZE] ^= 1
    lease = rig.take()
    assert rig.load(lease) == ([bytearray(each) for each in rig.content], frozenset())
    again = [each for each in rig.asked if isinstance(each, TakeLease)][1:]
    assert [each.prefix for each in again] == [b"".join(rig.names[:2]), rig.names[4]]
    assert not any(each.hbm for each in again)


def test_a_part_of_the_lease_from_the_middle_of_hbm() -> None:
    rig = Rig()
    rig.device.memory[2 * SIZE] ^= 1
    lease = rig.take()
    assert rig.load(lease, start=1) == ([bytearray(each) for each in rig.content[1:]], frozenset())


def test_a_device_that_does_not_copy_costs_time_only() -> None:
    rig = Rig()
    lease = rig.take()
    rig.device.failing = 1
    assert rig.load(lease) == ([bytearray(each) for each in rig.content], frozenset())
    rig.let_go(lease)
    assert (HBM, []) in rig.released(), "nobody said that the blocks are wrong"


def test_a_caller_that_is_cancelled_leaves_no_lease_behind() -> None:
    """At every step of a load that falls back."""
    for step in range(1, 20):
        rig = Rig()
        rig.device.memory[SIZE] ^= 1
        lease = rig.take()
        try:
            rig.load(lease, cancel_at=step)
        except Cancelled:
            assert sum(rig.context.link._holders.values()) == 2, "those of the caller's own lease"
            continue
        break
    assert step > 3


@pytest.mark.parametrize(
    "change",
    [
        lambda hot: HbmLeased(hot.lease, hot.count, [], [], hot.checksums, b""),
        lambda hot: HbmLeased(hot.lease, hot.count, hot.offsets, [], b"", b""),
        lambda hot: HbmLeased(0, hot.count, hot.offsets, [], hot.checksums, b""),
        lambda hot: HbmLeased(hot.lease, 9, [0] * 9, [], bytes(144), b""),
    ],
    ids=["offsets", "checksums", "no lease", "too many"],
)
def test_a_reply_without_sense(change: Callable[[HbmLeased], HbmLeased]) -> None:
    rig = Rig()

    def node(request: Request) -> Reply:
        assert isinstance(request, TakeLease)
        reply = rig.leased(request)
        return Leased(
            reply.lease,
            reply.count,
            reply.offsets,
            reply.generations,
            reply.checksums,
            0,
            LEASE_MS,
            hbm=change(reply.hbm),
        )

    operation = leasing.lease(rig.context, rig.handle, rig.names, "", LEASE_MS, 0, hbm=True)
    assert Script(node).drive(operation).count == 0
    assert rig.context.link.broken == "bad_reply"


def test_hbm_that_was_not_asked_for() -> None:
    rig = Rig()
    operation = leasing.lease(rig.context, rig.handle, rig.names, "", LEASE_MS, 0)
    always = TakeLease(b"", b"".join(rig.names), hbm=True)
    assert Script(lambda request: rig.leased(always)).drive(operation).count == 0
    assert rig.context.link.broken == "bad_reply"


def test_a_slab_that_goes_while_it_is_asked_for_is_lost() -> None:
    """Its connection ends in another thread, between any two looks at what maps it."""

    class Leaving(Mapped):
        def __getattribute__(self, name: str) -> object:
            found = super().__getattribute__(name)
            if name == "_device":
                self._device = None
            return found

    device = List()
    assert not Mapped(device, SLAB, -1).is_lost
    leaving = Leaving(device, SLAB, -1)
    assert not leaving.is_lost
    assert leaving.is_lost
