"""A node's host memory, registered with the GPU of an engine that maps it; over a double of the driver."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcache import memfd
from kvcache.client.async_store import AsyncNodeStore
from kvcache.client.link import Options
from kvcache.client.local import Slab
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.device.engine import EngineDevice, TensorBlocks
from kvcache.device.pinned import HostMap, Pins
from kvcache.device.slab import CpuMemory
from kvcache.device.vmm import Vmm
from kvcache.errors import Unavailable
from kvcache.testing.stores import EXAMPLE, SIZE, SPEC
from tests.device.driver_double import FakeDriver, Machine
from tests.device.hbm_rig import Engine, settings
from tests.server.conftest import EmbeddedNode

PATIENCE_S = 20
UNIT = 256 << 10
UNITS = 8


class Driver(FakeDriver):
    """Which gate stops the next registration, and what is registered and mapped when it is undone."""

    def __init__(self) -> None:
        super().__init__(Machine())
        self.gate = threading.Event()
        self.gate.set()
        self.refuse_from = 1 << 30
        self.undone = 0

    def _cuMemHostRegister(self, address: int, size: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.gate.wait(PATIENCE_S)
        if len(self.registered) >= self.refuse_from:
            return (self.CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
        return super()._cuMemHostRegister(address, size, flags)

    def _cuMemHostUnregister(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        assert is_mapped(address), "unmapped before it was undone"
        self.undone += 1
        return super()._cuMemHostUnregister(address)


class Rig:
    """A node's memory of 8 units, the second and third of which have some, mapped by an engine."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.device = EngineDevice(CpuMemory(), pinned=Pins(Vmm(self.driver), 0))
        self.counted: Counter[str] = Counter()
        self.descriptor = memfd.create("pinned", UNITS * UNIT)
        os.pwrite(self.descriptor, PATTERN_BYTES, UNIT)
        self.slab = Slab(self.descriptor, UNITS * UNIT)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.slab._view))  # type: ignore[arg-type]

    def pin(self) -> None:
        self.slab.pin(self.device, self.descriptor, UNIT, self._count)

    def _count(self, name: str, by: int) -> None:
        self.counted[name] += by

    def registered(self) -> list[int]:
        """Units. Who registers them counts each last."""
        if self.counted["pinned_bytes"] < UNIT * len(self.driver.registered):
            return []
        return sorted((at - self.start) // UNIT for at in list(self.driver.registered))

    def resident(self) -> int:
        return os.fstat(self.descriptor).st_blocks * 512

    def views(self, *offsets: int) -> list[memoryview]:
        return self.slab.slots(offsets, SIZE)

    def close(self) -> None:
        self.driver.gate.set()
        self.slab.close()
        eventually(self.driver.is_clean)
        os.close(self.descriptor)


PATTERN_BYTES = (bytes(range(1, 251)) * (2 * UNIT // 250 + 1))[: 2 * UNIT]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def eventually(holds: Callable[[], bool]) -> None:
    end_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
    while not holds():
        assert SystemClock().now_ns() < end_ns, "it never came to hold"


def over() -> bool:
    return True


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= address < int(last, 16):
            return "memfd:kvcache-" in line
    return False


def into(rig: Rig, count: int) -> tuple[torch.Tensor, TensorBlocks]:
    memory = torch.zeros(count, SIZE, dtype=torch.uint8)
    return memory, TensorBlocks(rig.device, memory, SPEC)


def test_what_has_memory_is_registered_and_nothing_else(rig: Rig) -> None:
    before = rig.resident()
    rig.pin()
    eventually(lambda: rig.registered() == [1, 2])
    assert rig.counted["pinned_bytes"] == 2 * UNIT
    assert rig.resident() == before


def test_what_is_copied_from_is_registered_next(rig: Rig) -> None:
    rig.driver.gate.clear()
    rig.pin()
    memory, blocks = into(rig, 2)
    os.pwrite(rig.descriptor, PATTERN_BYTES[:SIZE], 6 * UNIT)
    blocks.put(rig.views(6 * UNIT, UNIT), 0)  # Nobody waits for the registration.
    assert memory[0].numpy().tobytes() == memory[1].numpy().tobytes() == PATTERN_BYTES[:SIZE]
    assert not rig.registered()
    rig.driver.gate.set()
    eventually(lambda: rig.registered() == [1, 2, 6])
    assert rig.resident() == 3 * UNIT
    blocks.put(rig.views(6 * UNIT, UNIT), 0)
    assert rig.counted["pinned_bytes"] == 3 * UNIT


def test_no_copy_crosses_an_edge(rig: Rig) -> None:
    """The driver takes none that is half in registered memory."""
    rig.pin()
    at = 2 * UNIT - 1000
    with rig.device.host(rig.views(at, UNIT), over) as cut:
        assert [[len(piece) for piece in each] for each in cut] == [[1000, SIZE - 1000], [SIZE]]
    memory, blocks = into(rig, 1)
    blocks.put(rig.views(at), 0)
    assert memory[0].numpy().tobytes() == PATTERN_BYTES[at - UNIT :][:SIZE]


def test_a_connection_that_ends_while_a_copy_runs(rig: Rig) -> None:
    rig.pin()
    eventually(lambda: rig.registered() == [1, 2])
    start = rig.start
    with rig.device.host(rig.views(UNIT), over) as cut:
        rig.slab.close()
        rig.slab.close()
        (held,) = rig.device._pinned._maps
        assert not held._may_undo()
        assert rig.registered() == [1, 2]
        assert int(cut[0][0][0]) == 1
        del cut, held
    eventually(lambda: rig.driver.is_clean() and not is_mapped(start + UNIT))
    assert rig.driver.undone == 2
    assert not rig.device._pinned._maps


def test_a_copy_that_may_still_run_keeps_the_map_for_good(rig: Rig) -> None:
    rig.pin()
    eventually(lambda: rig.registered() == [1, 2])
    (held,) = rig.device._pinned._maps
    with pytest.raises(KeyboardInterrupt), rig.device.host(rig.views(UNIT), lambda: False):
        raise KeyboardInterrupt
    rig.slab.close()
    assert not held._may_undo()
    assert is_mapped(rig.start + UNIT)
    with held._changed:
        held._users = 0
        held._changed.notify_all()


def test_a_copy_that_comes_too_late_is_a_miss(rig: Rig) -> None:
    rig.pin()
    eventually(lambda: rig.registered() == [1, 2])
    views = rig.views(UNIT)
    (held,) = rig.device._pinned._maps
    rig.slab.close()
    eventually(lambda: rig.driver.is_clean())
    with pytest.raises(Unavailable, match="not mapped any more"), held.used(over):
        pass
    del views


def test_a_connection_that_ends_while_it_is_registered(rig: Rig) -> None:
    rig.driver.gate.clear()
    rig.pin()
    rig.slab.close()
    start = rig.start
    assert is_mapped(start + UNIT)
    rig.driver.gate.set()
    eventually(lambda: rig.driver.is_clean() and not is_mapped(start + UNIT))
    assert rig.counted["pinned_bytes"] <= UNIT, "it goes on with nothing"


def test_a_driver_that_refuses_costs_speed_and_nothing_else(rig: Rig) -> None:
    rig.driver.refuse_from = 1
    rig.pin()
    eventually(lambda: rig.counted["failed_pins"] == 1)
    memory, blocks = into(rig, 2)
    at = 2 * UNIT - 1000  # Half in it.
    blocks.put(rig.views(at, 5 * UNIT), 0)
    assert memory[0].numpy().tobytes() == PATTERN_BYTES[at - UNIT :][:SIZE]
    assert rig.registered() == [1]
    assert rig.counted["failed_pins"] == 1
    (held,) = rig.device._pinned._maps
    eventually(lambda: held._wanted is None)  # Nor does a list of wishes grow.


def test_a_process_without_more_threads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        rig.pin()
    assert rig.counted["failed_pins"] == 1
    memory, blocks = into(rig, 1)
    blocks.put(rig.views(UNIT), 0)
    assert memory[0].numpy().tobytes() == PATTERN_BYTES[:SIZE]
    assert not rig.device._pinned._maps


def test_what_cannot_be_undone_stays_mapped(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU may still use it."""
    rig.pin()
    eventually(lambda: rig.registered() == [1, 2])
    (held,) = rig.device._pinned._maps
    with monkeypatch.context() as patched:
        patched.setattr(Vmm, "unregister", lambda *_: False)
        rig.slab.close()
        eventually(lambda: held._is_undone)
        eventually(lambda: not any(each.name == "kvcache-pin" for each in threading.enumerate()))
    assert is_mapped(rig.start + UNIT)
    for at in list(rig.driver.registered):
        assert held._vmm.unregister(0, at)


@pytest.mark.parametrize(("unit", "piece"), [(1 << 18, 1 << 18), (256 << 20, 16 << 20), (24 << 20, 24 << 20)])
def test_pieces_lie_within_units(unit: int, piece: int) -> None:
    memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
    made = HostMap(Vmm(Driver()), 0, memory, unit, lambda name, by: None, lambda ended: None)
    assert made.piece_bytes == piece


CREDENTIALS = """
master_key = "%s"
credential = [
  { token = "aaaaaaaaaaaaaaaa", tenant = "a", roles = ["reader", "writer"] },
  { token = "bbbbbbbbbbbbbbbb", tenant = "b", roles = ["reader", "writer"] },
]
""" % ("0f" * 32)


def test_memory_that_goes_to_another_tenant(tmp_path: Path) -> None:
    """The engine that pins it loses its connection, undoes what it registered, and goes on without."""
    credentials = tmp_path / "credentials"
    credentials.write_text(CREDENTIALS)
    credentials.chmod(0o600)
    node = EmbeddedNode(settings(tmp_path, hbm="none", credentials=str(credentials)))
    driver = Driver()
    device = EngineDevice(CpuMemory(), pinned=Pins(Vmm(driver), 0))
    mine = Engine(node.node.address, device=device, token="a" * 16)
    theirs = Engine(node.node.address, token="b" * 16)
    count = (1 << 20) // SIZE
    path = mine.path(count)
    assert mine.save_below(path) == count
    mine.load(path[:4])
    eventually(lambda: mine.store.counters.get("pinned_bytes", 0) > 0)
    assert theirs.save_below(theirs.path(4)) == 4
    eventually(lambda: mine.load(path[:4])[0] >= 0 and mine.store.counters["connects"] == 2)
    eventually(driver.is_clean)
    held, failed = mine.load(path)
    assert 0 < held < count
    assert not failed
    for engine in (mine, theirs):
        engine.close()
    node.close()


def test_an_engine_over_a_node(tmp_path: Path) -> None:
    driver = Driver()
    node = EmbeddedNode(settings(tmp_path, hbm="none"))
    engine = Engine(node.node.address, device=EngineDevice(CpuMemory(), pinned=Pins(Vmm(driver), 0)))
    path = engine.path(8)
    assert engine.save_below(path) == 8
    assert engine.load(path) == (8, frozenset())
    eventually(lambda: engine.store.counters.get("pinned_bytes", 0) > 0)
    assert engine.load(path) == (8, frozenset())
    assert node.call(lambda: node.node.core.host.pin_count) == 1
    engine.store.close()
    eventually(driver.is_clean)
    eventually(lambda: node.call(lambda: node.node.core.host.pin_count) == 0)
    engine.close()
    node.close()


def test_an_asynchronous_engine(tmp_path: Path) -> None:
    driver = Driver()
    node = EmbeddedNode(settings(tmp_path, hbm="none"))
    device = EngineDevice(CpuMemory(), pinned=Pins(Vmm(driver), 0))

    async def use() -> None:
        store = AsyncNodeStore(Options(node.node.address, timeout_ms=20_000, device=device), SystemClock())
        handle = await store.open(EXAMPLE, SPEC)
        path = handle.hashes(list(range(4 * SPEC.block_tokens)))
        assert await store.save(handle, path, [[PATTERN_BYTES[:SIZE]]] * 4) == 4
        lease = await store.lease_device(handle, path)
        into = torch.zeros(4, SIZE, dtype=torch.uint8)
        assert not await store.load_device(lease, TensorBlocks(device, into, SPEC))
        assert into.numpy().tobytes() == 4 * PATTERN_BYTES[:SIZE]
        eventually(lambda: store.counters.get("pinned_bytes", 0) > 0)
        await store.close()

    asyncio.run(use())
    eventually(driver.is_clean)
    node.close()


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    unit = 2 << 20
    descriptor = memfd.create("pinned", 8 * unit)
    content = torch.arange(8 * unit, dtype=torch.int64).mul(31).remainder(251).to(torch.uint8)
    os.pwrite(descriptor, content.numpy().tobytes(), 0)
    device, counted = EngineDevice.of(torch.device("cuda")), Counter[str]()
    slab = Slab(descriptor, 8 * unit)
    slab.pin(device, descriptor, unit, lambda name, by: counted.update({name: by}))
    eventually(lambda: counted["pinned_bytes"] == 8 * unit)
    offsets = [unit - 1000, 0, 5 * unit, 7 * unit - SIZE // 2]
    into = torch.zeros(len(offsets), SIZE, dtype=torch.uint8, device="cuda")
    views = slab.slots(offsets, SIZE)
    assert all(torch.frombuffer(view, dtype=torch.uint8).is_pinned() for view in views)
    TensorBlocks(device, into, SPEC).put(views, 0)
    assert torch.equal(into.cpu(), torch.stack([content[at : at + SIZE] for at in offsets]))
    del views
    slab.close()
    eventually(lambda: not device._pinned._maps)
    assert not counted["failed_pins"]
    os.close(descriptor)
