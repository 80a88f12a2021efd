"""A stack with real devices in a directory, for tests: what a node does with it, one call a step."""

from __future__ import annotations

import asyncio
import errno
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from kvcache.block import HASH_BYTES, HINT_BYTES, BlockSpec, NamespaceId, StorageKey, split_hints
from kvcache.clock import NS_PER_MS, NS_PER_S, SystemClock
from kvcache.events import TIER_HOST, TIER_NVME, Publisher
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.ledger import Ledger
from kvcache.namespace import Namespace
from kvcache.policy import RequestContext
from kvcache.sums import block_checksum, sum_chunks
from kvcache.tiers import stack as stack_module
from kvcache.tiers.demote import Rules
from kvcache.tiers.drive import NamespaceMap, Place
from kvcache.tiers.host import HostTier
from kvcache.tiers.nvme import Device, DeviceFault
from kvcache.tiers.scrub import ScrubSettings
from kvcache.tiers.space import Space, slot_arena, slot_offset
from kvcache.tiers.stack import Stack, StackRules

SPEC = BlockSpec(block_tokens=16, plane_count=4, head_count=2, head_bytes=512)
SIZE = SPEC.block_bytes
NAMESPACE = Namespace(
    model="m", weights="w", dtype="float32", layout="canonical", shape="4x2x512", block_tokens=16
)
NAME = NAMESPACE.namespace_id()
PATIENCE_S = 20
SEGMENT = 1 << 20
HOST_UNIT = 1 << 20
PROBE_S = 0.01
READ = "_read_run"  # What every read of a device goes through.
ME = "me"


def path_of(*names: int) -> list[StorageKey]:
    """The keys of a path; each block is named by all numbers up to it."""
    return [StorageKey(NAME + sha256(bytes(names[:end])).digest()[:16]) for end in range(1, len(names) + 1)]


def content_of(key: StorageKey) -> bytes:
    return key[16:] * (SIZE // 16)


class Faults:
    """What the devices' calls do, by directory. Other calls are the real ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken: dict[Path, int] = {}
        for name in (READ, "write", "probe"):
            monkeypatch.setattr(Device, name, self._wrapped(getattr(Device, name)))
        monkeypatch.setattr(stack_module, "PROBE_S_MIN", PROBE_S)
        monkeypatch.setattr(stack_module, "PROBE_S_MAX", PROBE_S)

    def _wrapped(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(device: Device, *args: object, **named: object) -> object:
            number = self.broken.get(device.path, 0)
            if number and not (number == errno.ENOSPC and real.__name__ == READ):
                raise DeviceFault(number, f"{real.__name__} failed")
            return real(device, *args, **named)

        return call


class Rig:
    """One node's tiers; ``start`` again after ``close`` is the next node, with nothing in memory."""

    def __init__(self, folder: Path, drives: int = 2, host_bytes: int = 8 << 20, **rules: object) -> None:
        self.paths = [folder / f"tier{number}" for number in range(drives)]
        self.nvme_bytes = 8 << 20
        self.host_bytes = host_bytes
        self.rules = Rules("through", "all", 0)
        self.known = True
        self.clock = SystemClock()
        self.late_ms = 30_000
        self.bytes_a_day: int | None = None

    async def start(self) -> None:
        self.counters: Counter[str] = Counter()
        self.faults: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.faults.append(_described(context))
        )
        self.space = Space(self.host_bytes, HOST_UNIT)
        self.host = Ledger(self.space, LeafLru)
        self.memory = HostTier(self.host_bytes, HOST_UNIT)
        self.arena = self.memory.add_arena("a")
        assert self.space.add_arena() == self.arena
        self.publisher = Publisher("rig", 1)
        self.namespaces: dict[NamespaceId, tuple[BlockSpec, NamespaceMap]] = {}
        if self.known:
            self.namespaces[NAME] = (SPEC, NAMESPACE.to_map())
        places = [
            Place(path, self.nvme_bytes, SEGMENT, "auto", self.late_ms * NS_PER_MS, self.bytes_a_day)
            for path in self.paths
        ]
        self.stack = Stack(
            StackRules(places, self.rules, lambda: 0, ScrubSettings(0.0)),
            self.host,
            self.memory,
            LeafLru,
            self.namespaces.get,
            self.clock,
            self.counters,
            self.settle,
        )
        async with asyncio.timeout(PATIENCE_S):
            await self.stack.start(self.remember, PATIENCE_S)

    async def close(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.stack.close()
        assert not self.stack.is_stuck
        self.memory.close()
        assert not self.faults, self.faults[0]

    def remember(self, fields: NamespaceMap) -> None:
        namespace = Namespace.from_map(fields)
        self.namespaces[namespace.namespace_id()] = (SPEC, namespace.to_map())

    def settle(self) -> None:
        moves = self.space.take_moves()
        if moves:
            self.memory.apply(moves)
        self.publisher.publish(self.host.take_changes(), TIER_HOST)
        self.publisher.publish(self.stack.take_changes(), TIER_NVME)

    def check(self) -> None:
        self.settle()
        self.host.check()
        self.space.check()
        self.stack.check()
        self.publisher.check()
        nvme = self.stack.ledger
        told = self.told()
        entries = [entry for drive in self.stack.drives for entry in drive.entries.values()]
        kept = {entry.key[HASH_BYTES:][:HINT_BYTES]: entry.key for entry in entries}
        for block in told:
            if (key := kept.get(block)) is None:  # Of a drive whose blocks are leaving, a part a turn.
                assert not all(drive.readable for drive in self.stack.drives)
                continue
            slot = nvme.slot_of(key)
            assert slot is not None
            assert self.stack.drives[slot_arena(slot)].entries[slot_offset(slot)].key == key
        assert len(told) <= nvme.stats()["blocks"]
        assert not self.faults, self.faults[0]

    def told(self) -> list[bytes]:
        """The blocks that routers were told to be on NVMe."""
        return [
            block
            for page in self.publisher.snapshot()
            for event in page.events
            if (event.tier, event.namespace) == (TIER_NVME, NAME)
            for block in split_hints(event.hashes)
        ]

    # --- as clients do --------------------------------------------------------------------------

    def context(self) -> RequestContext:
        return RequestContext(now_ns=self.clock.now_ns())

    def save(self, keys: Sequence[StorageKey]) -> int:
        """How many leading blocks are in memory then."""
        reserved = self.host.reserve(self.arena, None, keys, SIZE, ME, self.context())
        self.settle()
        if reserved.reservation_id:
            sums = []
            for key, slot in zip(reserved.keys, reserved.slots, strict=True):
                self.memory.view(slot, SIZE)[:] = content_of(key)
                sums.append(sum_chunks([content_of(key)], SPEC.chunk_bytes))
            checksums = [
                block_checksum(key, SIZE, SPEC.chunk_bytes, each)
                for key, each in zip(reserved.keys, sums, strict=True)
            ]
            self.host.commit(reserved.reservation_id, ME, checksums, sums)
            self.stack.committed(reserved.keys)
            self.settle()
        return self.host.match(keys)

    async def persist(self, keys: Sequence[StorageKey]) -> int:
        async with asyncio.timeout(2 * PATIENCE_S):
            return await self.stack.persist(keys, PATIENCE_S * NS_PER_S)

    def ask(self, keys: Sequence[StorageKey]) -> int:
        return self.stack.ask(keys, self.arena, SPEC.block_tokens, 0)

    async def load(self, keys: Sequence[StorageKey]) -> int:
        """How many blocks were served; each is compared."""
        self.ask(keys)
        async with asyncio.timeout(PATIENCE_S):
            await self.stack.wait(keys, PATIENCE_S * NS_PER_S)
        lease = self.host.lease(keys, ME, self.clock.now_ns() + NS_PER_S * 60, self.context())
        self.stack.touched(lease.keys)
        for key, slot, checksum in zip(lease.keys, lease.slots, lease.checksums, strict=True):
            content = bytes(self.memory.view(slot, SIZE))
            assert content == content_of(key), "wrong bytes were served"
            sums = sum_chunks([content], SPEC.chunk_bytes)
            assert checksum == block_checksum(key, SIZE, SPEC.chunk_bytes, sums)
        if lease.lease_id:
            self.host.release(lease.lease_id, ME, self.clock.now_ns())
        return len(lease.keys)

    def forget_in_memory(self) -> None:
        """Everything that nobody holds leaves memory."""
        self.host.make_room(self.context(), self.arena, SIZE, self.host_bytes // SIZE)
        self.settle()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.stack.tick()
                await asyncio.sleep(PROBE_S)

    async def healed(self) -> None:
        await self.until(lambda: self.stack.troubles() == [])


def _described(context: Mapping[str, object]) -> str:
    error = context.get("exception")
    trace = "".join(traceback.format_exception(error)) if isinstance(error, BaseException) else ""
    return f"{context.get('message')}: {trace}"
