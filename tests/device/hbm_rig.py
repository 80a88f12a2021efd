"""A node with a slab of HBM on the CPU, and an engine whose device is the CPU: small, and full of poison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kvcache.block import HINT_BYTES, BlockHash, storage_key
from kvcache.client.blocking_store import BlockingNodeStore
from kvcache.client.link import Options
from kvcache.client.store import Handle
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.config import NodeConfig
from kvcache.device.engine import EngineDevice, TensorBlocks
from kvcache.device.slab import CpuMemory
from kvcache.errors import Unavailable
from kvcache.testing.pattern import Pattern
from kvcache.testing.stores import EXAMPLE, SIZE, SPEC
from kvcache.tiers.hbm_demote import HbmDemoter
from kvcache.tiers.space import slot_offset
from kvcache.wire import EventBatch
from tests.server.conftest import EmbeddedNode

POISON = 0xA5
PATTERN = Pattern(7, SIZE)
PATIENCE_S = 20
HBM_BLOCKS = 64
HBM = f"{HBM_BLOCKS * SIZE}"
TIMEOUT_MS = 20_000
WAIT_MS = 10_000


def settings(folder: Path, **given: object) -> NodeConfig:
    small = {"socket": str(folder / "node.sock"), "http": "none", "capacity": "1MiB"}
    return NodeConfig(**{**small, "hbm": HBM, "hbm_device": "cpu", **given})  # type: ignore[arg-type]


class Engine:
    """One engine process' store and device. ``path(n)`` is a prompt of n blocks, another for each seed."""

    def __init__(
        self, address: str, name: str = "", device: EngineDevice | None = None, token: str = ""
    ) -> None:
        self.device = device or EngineDevice(CpuMemory())
        options = Options(address, token, TIMEOUT_MS, name=name, device=self.device)
        self.store = BlockingNodeStore(options, SystemClock())
        self.handle: Handle = self.store.open(EXAMPLE, SPEC)

    def path(self, count: int, seed: int = 0) -> list[BlockHash]:
        return self.handle.hashes([seed, *range(1, count * SPEC.block_tokens)])

    def content(self, block: BlockHash) -> bytes:
        """What this block is to hold."""
        made = bytearray(SIZE)
        PATTERN.fill(made, storage_key(self.handle.namespace_id, block))
        return bytes(made)

    def memory(self, blocks: Sequence[BlockHash]) -> torch.Tensor:
        made = [torch.frombuffer(bytearray(self.content(block)), dtype=torch.uint8) for block in blocks]
        return torch.stack(made)

    def blocks(self, memory: torch.Tensor) -> TensorBlocks:
        return TensorBlocks(self.device, memory, SPEC)

    def save(self, path: Sequence[BlockHash], parent: bytes = b"") -> int:
        """Into HBM."""
        return self.store.save_device(self.handle, path, self.blocks(self.memory(path)), parent)

    def save_below(self, path: Sequence[BlockHash], parent: bytes = b"") -> int:
        """Into host memory."""
        whole = [[bytearray(self.content(block))] for block in path]
        return self.store.save(self.handle, path, whole, parent)

    def load(self, path: Sequence[BlockHash]) -> tuple[int, frozenset[int]]:
        """How many were leased, and which of them could not be had. The others are what they should be, and
        nothing beside them was touched."""
        lease = self.store.lease_device(self.handle, path, wait_ms=WAIT_MS)
        try:
            if not lease.count:
                return 0, frozenset()
            around = torch.full((lease.count + 2, SIZE), POISON, dtype=torch.uint8)
            failed = self.store.load_device(lease, self.blocks(around[1:-1]))
            assert bool((around[0] == POISON).all())
            assert bool((around[-1] == POISON).all())
            for at in set(range(lease.count)) - failed:
                found = around[1 + at].numpy().tobytes()
                assert found == self.content(path[at]), f"block {at} is wrong, and was not reported"
            return lease.count, failed
        finally:
            self.store.release(lease)

    def counted(self, name: str) -> int:
        return self.store.counters.get(name, 0)

    def close(self) -> None:
        self.store.close()


class World:
    """A node and an engine on it."""

    def __init__(
        self,
        folder: Path,
        on: EngineDevice | None = None,
        devices: object = None,
        token: str = "",
        **given: object,
    ) -> None:
        """``on``: the engine's device. ``devices``: the node's, the CPU alone unless given."""
        self.node = EmbeddedNode(settings(folder, **given))
        if devices is not None:
            vars(self.node.node.core.hbm)["_devices"] = devices
        self.engine = Engine(self.node.node.address, device=on, token=token)

    def stats(self) -> dict[str, float]:
        return self.node.call(self.node.node.core.stats)

    def slab(self) -> torch.Tensor:
        """The node's memory, all of it."""
        hbm = self.node.node.core.hbm
        assert hbm is not None
        return hbm[0].memory.start(0, HBM_BLOCKS * SIZE)

    def flip(self, block: BlockHash) -> None:
        """A bit of it, in HBM."""
        self.slab()[self.place(block) + SIZE // 2] ^= 1

    def place(self, block: BlockHash) -> int:
        """Where it lies in HBM."""
        hbm = self.node.node.core.hbm
        assert hbm is not None
        key = storage_key(self.engine.handle.namespace_id, block)
        slot = self.node.call(lambda: hbm[0].ledger.slot_of(key))
        assert slot is not None, "it is not in HBM"
        return slot_offset(slot)

    def in_host(self, path: Sequence[BlockHash]) -> int:
        keys = [storage_key(self.engine.handle.namespace_id, block) for block in path]
        return self.node.call(lambda: self.node.node.core.ledger.match(keys))

    def in_hbm(self, path: Sequence[BlockHash]) -> int:
        keys = [storage_key(self.engine.handle.namespace_id, block) for block in path]
        hbm = self.node.node.core.hbm
        assert hbm is not None
        return self.node.call(lambda: hbm[0].match(keys))

    def eventually(self, holds: Callable[[], bool]) -> None:
        """What is asked, over and over, is the only clock."""
        end_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
        while not holds():
            assert SystemClock().now_ns() < end_ns, "it never came to hold"

    def pages(self) -> list[EventBatch]:
        """What a new follower is told."""

        def ask() -> list[EventBatch]:
            self.node.node.core.tell_all()
            return list(self.node.node.core.telling._publisher.snapshot())

        return self.node.call(ask)

    def told(self, tier: str) -> int:
        """How many blocks of this tier followers know of."""
        events = [event for page in self.pages() for event in page.events if event.tier == tier]
        return sum(len(event.hashes) for event in events) // HINT_BYTES

    def demoter(self, number: int = 0) -> HbmDemoter:
        hbm = self.node.node.core.hbm
        assert hbm is not None
        return hbm._demoters[number]

    def check(self) -> None:
        self.node.call(self.node.node.core.check)

    def close(self) -> None:
        self.engine.close()
        self.node.close()


def hold(world: World, number: int = 0) -> Callable[[], None]:
    """Nothing is copied from that GPU into host memory until what is returned is called."""
    demoter = world.demoter(number)
    tips = demoter._tips

    def stop() -> None:
        demoter._tips = lambda: []  # type: ignore[method-assign]

    def go_on() -> None:
        demoter._tips = tips  # type: ignore[method-assign]
        demoter.cool()

    world.node.call(stop)
    world.eventually(lambda: not demoter.is_busy)
    return lambda: world.node.call(go_on)


def lose(world: World, why: str = "it was reset") -> None:
    """The node's GPU."""
    hbm = world.node.node.core.hbm
    assert hbm is not None
    world.node.call(lambda: hbm.lose(0, why))


class Failing:
    """An outlet on a GPU that fails under each copy; ``is_stuck``: and may go on with it."""

    def __init__(self, is_stuck: bool = False) -> None:
        self.is_stuck = is_stuck

    def copy(self, sources: object, targets: object, chunk_bytes: int) -> list[bytes]:
        raise Unavailable("unavailable", "the device failed under a copy", "it fell off the bus")

    def probe(self, source: object) -> None:
        self.copy(source, None, 0)

    def close(self) -> None:
        """Nothing is held."""
