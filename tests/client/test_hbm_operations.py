"""Blocks to and from a device by themselves, over a device that is a list and a node of a few lines."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

import pytest

from kvcache.block import BlockSpec, storage_key
from kvcache.client import hbm_operations, leasing
from kvcache.client.hbm import Mapped
from kvcache.client.link import Context
from kvcache.client.local import Slab
from kvcache.client.steps import Operation
from kvcache.client.store import LEASE_MS, NO_HINTS, Lease
from kvcache.errors import BadInput, Unavailable
from kvcache.memfd import create
from kvcache.sums import block_checksum, sum_chunks
from kvcache.testing.stores import SIZE, SPEC
from kvcache.wire import (
    HBM,
    HOST,
    Abort,
    Commit,
    Committed,
    Done,
    HbmLeased,
    HbmSlab,
    Leased,
    Release,
    Released,
    Reply,
    Request,
    Reserve,
    Reserved,
    TakeLease,
)
from tests.client.script import Cancelled, Result, Script, context_and_handle, hashes

SLAB = HbmSlab("cpu", 16 * SIZE, b"", b"i" * 16)
COUNT = 6


class List:
    """A device whose memory is a bytearray. ``failing``: how many of its copies from now on do not work."""

    gpu = b""
    joined = ()

    def __init__(self) -> None:
        self.memory = bytearray(16 * SIZE)
        self.opened: list[bytes] = []
        self.failing = 0

    def open(self, slab: HbmSlab, descriptor: int) -> None:
        self.opened.append(slab.incarnation)

    def close(self, incarnation: bytes) -> None:
        self.opened.remove(incarnation)


class Blocks:
    """Places on it."""

    def __init__(self, device: List, count: int) -> None:
        self.device = device
        self.places = [bytearray(SIZE) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def check(self, spec: BlockSpec) -> None:
        if spec != SPEC:
            raise BadInput("bad_block", "another shape", "", "")

    def load(self, incarnation: bytes, offsets: Sequence[int], first: int) -> bytes:
        self._try(incarnation)
        return self.put([memoryview(self.device.memory)[at : at + SIZE] for at in offsets], first)

    def save(self, incarnation: bytes, offsets: Sequence[int], first: int) -> bytes:
        self._try(incarnation)
        for place, at in zip(self.places[first:], offsets, strict=False):
            self.device.memory[at : at + SIZE] = place
        return sum_chunks(self.places[first : first + len(offsets)], SPEC.chunk_bytes)

    def put(self, blocks: Sequence[memoryview], first: int) -> bytes:
        for place, block in zip(self.places[first:], blocks, strict=False):
            place[:] = block
        return sum_chunks(self.places[first : first + len(blocks)], SPEC.chunk_bytes)

    def _try(self, incarnation: bytes) -> None:
        assert incarnation in self.device.opened
        if self.device.failing:
            self.device.failing -= 1
            raise Unavailable("unavailable", "the device failed under a copy", "it fell off the bus")


class Rig:
    """The node has all blocks in its mapped memory, block i at i; the first ``hot`` in HBM as well."""

    def __init__(self, hot: int = 3, *, on_device: bool = True) -> None:
        self.context, self.handle = context_and_handle()
        self.device, self.hot = List(), hot
        self.names = hashes(COUNT)
        self.content = [bytes([1 + at]) * SIZE for at in range(COUNT)]
        self.descriptor = create("slab", 16 * SIZE)
        with mmap.mmap(self.descriptor, 16 * SIZE) as memory:
            memory[: COUNT * SIZE] = b"".join(self.content)
        self.device.memory[: COUNT * SIZE] = b"".join(self.content)
        self.context.link.slab = Slab(self.descriptor, 16 * SIZE)
        self.context.link.hbm = Mapped(self.device, SLAB, -1) if on_device else None
        self.asked: list[Request] = []
        self.leases = 0
        self.below = COUNT

    def drive(self, operation: Operation[Result], cancel_at: int = -1) -> Result:
        script = Script(self.answer)
        try:
            return script.drive(operation, cancel_at)
        finally:
            self.asked += script.asked

    def answer(self, request: Request) -> Reply:
        match request:
            case TakeLease():
                return self.leased(request)
            case Release():
                return Released(True)
            case Reserve():
                return Reserved(7, 1, COUNT - 1, [SIZE * at for at in range(1, COUNT)], [1] * (COUNT - 1))
            case Commit():
                return Committed(COUNT - 1)
            case Abort():
                return Done()
        raise AssertionError(request)

    def leased(self, request: TakeLease) -> Leased:
        first = self.names.index(request.prefix[:16])  # type: ignore[arg-type]
        count = len(request.prefix) // 16
        hot = min(self.hot, count) if request.hbm else 0
        held = max(0, min(self.below, first + count) - first - hot)
        self.leases += 2
        places = [SIZE * at for at in range(first, first + count)]
        sums = [self.checksum(at) for at in range(first, first + count)]
        return Leased(
            self.leases if held else 0,
            held,
            places[hot : hot + held],
            [1] * held,
            b"".join(sums[hot : hot + held]),
            0,
            LEASE_MS,
            hbm=HbmLeased(
                self.leases if hot else 0,
                hot,
                places[:hot],
                [1] * hot,
                b"".join(sums[:hot]),
                SLAB.incarnation,
            ),
        )

    def checksum(self, at: int) -> bytes:
        sums = sum_chunks([self.content[at]], SPEC.chunk_bytes)
        key = storage_key(self.handle.namespace_id, self.names[at])
        return block_checksum(key, SIZE, SPEC.chunk_bytes, sums)

    def take(self, hbm: bool = True) -> Lease:
        operation = leasing.lease(self.context, self.handle, self.names, "", LEASE_MS, 0, hbm=hbm)
        return self.drive(operation)

    def load(
        self, lease: Lease, start: int = 0, cancel_at: int = -1
    ) -> tuple[list[bytearray], frozenset[int]]:
        into = Blocks(self.device, lease.count - start)
        operation = hbm_operations.load(self.context, lease, into, start)
        return into.places, self.drive(operation, cancel_at)

    def save(self) -> int:
        blocks = Blocks(self.device, COUNT)
        for place, content in zip(blocks.places, self.content, strict=True):
            place[:] = content
        operation = hbm_operations.save(self.context, self.handle, self.names, blocks, b"", NO_HINTS)
        return self.drive(operation)

    def released(self) -> list[tuple[str, list[int]]]:
        return [(each.tier, each.failed) for each in self.asked if isinstance(each, Release)]

    def let_go(self, lease: Lease) -> None:
        self.drive(leasing.release(self.context, lease))


def counted(context: Context, name: str) -> int:
    return context.tally.copy().get(name, 0)


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


def test_without_a_slab_nothing_is_asked_of_hbm() -> None:
    rig = Rig(on_device=False)
    lease = rig.take()
    assert [grant.tier for grant in lease.grants] == [HOST]
    assert rig.save() == 0
    assert counted(rig.context, "unsaved_blocks:no_hbm") == COUNT


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


def test_a_save_that_the_device_does_not_do_is_given_back() -> None:
    rig = Rig()
    rig.device.failing = 1
    assert rig.save() == 1, "what was held"
    assert rig.asked[-1] == Abort(7, HBM)
    assert counted(rig.context, "unsaved_blocks:refused") == COUNT - 1
    assert not rig.context.link.broken


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
