"""Blocks to and from a device by themselves: a device that is a list, and a node of a few lines."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from kvcache.block import BlockSpec, storage_key
from kvcache.client import hbm_operations, hbm_saving, leasing
from kvcache.client.hbm import Count, Mapped, Pin
from kvcache.client.link import Context
from kvcache.client.local import Slab
from kvcache.client.steps import Operation
from kvcache.client.store import COUNTERS, LEASE_MS, NO_HINTS, Lease
from kvcache.errors import BadInput, KVCacheError, Unavailable
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
    Write,
)
from tests.client.script import Result, Script, context_and_handle, hashes

SLAB = HbmSlab("cpu", 16 * SIZE, b"", b"i" * 16)
COUNT = 6


class List:
    """A device whose memory is a bytearray. ``failing``: how many of its copies from now on do not work.
    ``flips``: its link gives one bit wrong. ``lost``: it knows that it failed. ``going``: all saves that were
    begun; the next may go on after ``delay_ns``. ``interrupts``: as many waits for an end."""

    gpu = b""
    joined = ()
    pins = False
    is_stuck = False

    def __init__(self) -> None:
        self.memory = bytearray(16 * SIZE)
        self.opened: list[bytes] = []
        self.failing = 0
        self.flips = self.lost = False
        self.going: list[Going] = []
        self.delay_ns = self.interrupts = 0

    def open(self, slab: HbmSlab, descriptor: int) -> None:
        self.opened.append(slab.incarnation)

    def close(self, incarnation: bytes) -> None:
        self.opened.remove(incarnation)

    def pin(self, memory: memoryview, descriptor: int, unit_bytes: int, count: Count) -> Pin:
        raise AssertionError("it cannot")

    def is_lost(self, incarnation: bytes) -> bool:
        return self.lost

    def copied(self) -> None:
        if self.failing:
            self.failing -= 1
            raise Unavailable("unavailable", "the device failed under a copy", "it fell off the bus")


class Blocks:
    """Places on it."""

    def __init__(self, device: List, count: int) -> None:
        self.device = device
        self.places = [bytearray(SIZE) for _ in range(count)]
        self.is_placed = True

    def __len__(self) -> int:
        return len(self.places)

    def check(self, spec: BlockSpec) -> None:
        if spec != SPEC:
            raise BadInput("bad_block", "another shape", "", "")

    def follow(self) -> None:
        if not self.is_placed:
            raise Unavailable("unavailable", "no place in what is queued", "the device failed")

    def load(self, incarnation: bytes, offsets: Sequence[int], first: int) -> bytes:
        self._try(incarnation)
        return self.put([memoryview(self.device.memory)[at : at + SIZE] for at in offsets], first)

    def into_slab(self, incarnation: bytes, offsets: Sequence[int], first: int) -> Going:
        assert incarnation in self.device.opened
        slots = [memoryview(self.device.memory)[at : at + SIZE] for at in offsets]
        return Going(self.device, self.places[first : first + len(offsets)], slots)

    def into_host(self, blocks: Sequence[memoryview], first: int) -> Going:
        return Going(self.device, self.places[first : first + len(blocks)], blocks, crosses=True)

    def put(self, blocks: Sequence[memoryview], first: int) -> bytes:
        for place, block in zip(self.places[first:], blocks, strict=False):
            place[:] = block
        return sum_chunks(self.places[first : first + len(blocks)], SPEC.chunk_bytes)

    def _try(self, incarnation: bytes) -> None:
        assert incarnation in self.device.opened
        self.device.copied()


class Going:
    """Blocks that are being saved: each ``go_on`` copies one plane of all, when the device lets it."""

    def __init__(
        self,
        device: List,
        places: Sequence[bytearray],
        targets: Sequence[memoryview],
        *,
        crosses: bool = False,
    ) -> None:
        self.device, self.places, self.targets, self.crosses = device, places, targets, crosses
        self.ready = self.planes = 0
        self.ended = False
        device.going.append(self)

    def advance(self, planes: int) -> None:
        assert not self.ended
        self.ready = planes

    @property
    def is_done(self) -> bool:
        return self.planes == SPEC.plane_count

    def delay_ns(self) -> int:
        delay_ns, self.device.delay_ns = self.device.delay_ns, 0
        return delay_ns

    def go_on(self) -> bytes:
        self.device.copied()
        assert not self.ended
        assert self.planes < self.ready
        span = slice(self.planes * SPEC.plane_bytes, (self.planes + 1) * SPEC.plane_bytes)
        for place, target in zip(self.places, self.targets, strict=True):
            target[span] = place[span]
        self.planes += 1
        if self.device.flips and self.crosses:
            self.targets[-1][7 + self.planes] ^= 1
        return b""

    def sums(self) -> bytes:
        assert self.is_done
        return sum_chunks(self.places, SPEC.chunk_bytes)

    def end(self) -> None:
        if self.device.interrupts:
            self.device.interrupts -= 1
            raise KeyboardInterrupt
        self.ended = True


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
        self.pauses_ms: list[float] = []
        self.leases = 0
        self.below = COUNT
        self.held, self.room = 1, COUNT
        self.refuses: dict[str, KVCacheError] = {}
        self.mapped = True
        self.reserved = 0

    def drive(self, operation: Operation[Result], cancel_at: int = -1) -> Result:
        script = Script(self.answer)
        try:
            return script.drive(operation, cancel_at)
        finally:
            self.asked += script.asked
            self.pauses_ms += script.pauses_ms
            assert self.context.tally.copy().keys() <= COUNTERS.keys(), "a counter that nobody explains"

    def answer(self, request: Request) -> Reply:
        match request:
            case TakeLease():
                return self.leased(request)
            case Release():
                return Released(True)
            case Reserve():
                if request.tier in self.refuses:
                    raise self.refuses[request.tier]
                first = self.names.index(request.prefix[:16])  # type: ignore[arg-type]
                last = self.room if request.tier == HBM else COUNT
                start = max(0, min(self.held, last) - first)
                count = max(0, last - first - start)
                places = [SIZE * at for at in range(first + start, last)] if self.mapped else []
                number = {HBM: 7, HOST: 8}[request.tier] if count else 0
                self.reserved = count
                return Reserved(number, start, count, places, [1] * len(places), "" if count else "full")
            case Write():
                return Done()
            case Commit():
                return Committed(self.reserved)
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

    def save(self, cancel_at: int = -1) -> int:
        blocks = Blocks(self.device, COUNT)
        for place, content in zip(blocks.places, self.content, strict=True):
            place[:] = content
        operation = hbm_saving.save(self.context, self.handle, self.names, blocks, b"", NO_HINTS)
        return self.drive(operation, cancel_at)

    def empty(self) -> None:
        """Nothing is in the node's memory."""
        self.device.memory[:] = bytes(16 * SIZE)
        with mmap.mmap(self.descriptor, 16 * SIZE) as memory:
            memory[:] = bytes(16 * SIZE)

    def below_bytes(self) -> bytes:
        """The places of all blocks in host memory."""
        with mmap.mmap(self.descriptor, 16 * SIZE) as memory:
            return memory[: COUNT * SIZE]

    def released(self) -> list[tuple[str, list[int]]]:
        return [(each.tier, each.failed) for each in self.asked if isinstance(each, Release)]

    def let_go(self, lease: Lease) -> None:
        self.drive(leasing.release(self.context, lease))


def counted(context: Context, name: str) -> int:
    return context.tally.copy().get(name, 0)
