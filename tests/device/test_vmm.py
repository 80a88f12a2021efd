"""GPU memory by descriptors: the calls in their order, what a failure of each leaves, who keeps what."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

import pytest
import torch

from kvcache.device.pinned import Pinned
from kvcache.device.slab import CudaMemory, Slab
from kvcache.device.vmm import Vmm
from kvcache.errors import Unavailable
from tests.device.driver_double import GRANULARITY, UNDOING, FakeDriver, Machine, over_double

SIZE = 3 * GRANULARITY


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """What is there already is not searched by every ``gc.collect``."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def memory(driver: FakeDriver, at: int = 0) -> CudaMemory:
    return CudaMemory(Vmm(driver), driver.machine.uuids[at], over=over_double)


def test_a_slab_is_made_in_this_order_and_undone(machine: Machine) -> None:
    driver = FakeDriver(machine)
    vmm = Vmm(driver)
    mapping, descriptor = vmm.create(0, SIZE - 1)
    assert (mapping.size_bytes, mapping.ordinals) == (SIZE, (0,))
    assert not os.get_inheritable(descriptor), "a child of an engine would hold the memory for good"
    made = [name for name in driver.calls if name.startswith("cuMem")]
    assert made == [
        "cuMemGetAllocationGranularity",
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemRelease",
    ]
    assert machine.references() == 2, "a map and a descriptor, no handle"
    before = len(driver.calls)
    del mapping
    gc.collect()
    undone = [name for name in driver.calls[before:] if name.startswith(("cuMem", "cuCtxSync"))]
    assert undone == ["cuCtxSynchronize", "cuMemUnmap", "cuMemAddressFree"]
    os.close(descriptor)
    assert machine.references() == 0
    assert driver.is_clean()


def calls_of(machine: Machine, what: str) -> list[str]:
    driver = FakeDriver(machine)
    do(driver, what)
    return driver.calls


def do(driver: FakeDriver, what: str) -> None:
    """Make a slab and close it; or open another process's and close it."""
    if what == "create":
        slab = Slab.create(memory(driver), "one", SIZE)
        slab.close()
        return
    owner = FakeDriver(driver.machine)
    theirs = Slab.create(memory(owner), "one", SIZE)
    try:
        Slab.open(memory(driver), theirs.ticket, theirs.descriptor).close()
    finally:
        theirs.close()
        gc.collect()
        assert owner.is_clean()


@pytest.mark.parametrize(
    "error", ["CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_UNKNOWN", "CUDA_ERROR_NOT_SUPPORTED"]
)
@pytest.mark.parametrize("what", ["create", "open"])
def test_whatever_call_fails_nothing_leaks(machine: Machine, what: str, error: str) -> None:
    calls = calls_of(machine, what)
    assert {"cuMemMap", "cuMemSetAccess", "cuMemAddressReserve"} < set(calls)
    refused = 0
    for number, name in enumerate(calls):
        driver = FakeDriver(machine)
        driver.fail[number] = error
        if name in UNDOING or name == "cuCtxSynchronize" or number > calls.index("cuMemSetAccess"):
            do(driver, what)  # The undoing itself: nothing is raised.
            continue
        with pytest.raises(Unavailable) as caught:
            do(driver, what)
        refused += 1
        assert name in caught.value.what
        assert caught.value.why == error
        assert caught.value.todo
        del caught
        gc.collect()
        assert driver.is_clean(), name
        assert machine.references() == 0, name
        machine.allocations.clear()
    assert refused >= 9


def test_an_address_in_use_stays_mapped(machine: Machine) -> None:
    """That the device has ended cannot be known: the map stays, and is counted."""
    driver = FakeDriver(machine)
    vmm = Vmm(driver)
    mapping, descriptor = vmm.create(0, SIZE)
    driver.busy = {0}
    synchronize = len(driver.calls) + 3  # Behind three that make the GPU's context current.
    driver.fail = {synchronize: "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}
    del mapping
    gc.collect()
    assert driver.calls[synchronize] == "cuCtxSynchronize"
    assert vmm.kept_maps == 1
    assert len(driver.mapped) == 1
    os.close(descriptor)


def test_no_address_is_given_back_under_work(machine: Machine) -> None:
    """Of whichever GPU may use it: the double asserts that each has ended."""
    machine.joined = {(1, 0)}
    driver, owner = FakeDriver(machine), FakeDriver(machine)
    theirs = Slab.create(memory(owner), "one", SIZE)
    mapping = Vmm(driver).open(theirs.descriptor, SIZE, 0, readers=[0, 1])
    assert mapping.ordinals == (0, 1)
    driver.busy = {0, 1}
    del mapping
    gc.collect()
    assert driver.is_clean()
    theirs.close()


def test_the_memory_outlives_its_owner_and_not_its_last_reader(machine: Machine) -> None:
    owner, engine = FakeDriver(machine), FakeDriver(machine)
    theirs = Slab.create(memory(owner), "one", SIZE)
    mine = Slab.open(memory(engine), theirs.ticket, theirs.descriptor)
    theirs.tensor(64, 8).fill_(7)
    slot = mine.slots([64], 8, theirs.ticket.incarnation)[0]
    theirs.close()
    gc.collect()
    assert owner.is_clean()
    assert machine.references() == 1, "the engine's map alone"
    assert slot.tolist() == [7] * 8
    mine.close()
    gc.collect()
    assert slot.tolist() == [7] * 8, "a tensor that was given keeps the memory"
    assert machine.references() == 1
    del slot
    gc.collect()
    assert machine.references() == 0
    assert engine.is_clean()


def test_a_gpu_is_found_by_what_it_is_not_by_its_number(machine: Machine) -> None:
    engine = FakeDriver(machine, visible=(1,))
    assert Vmm(engine).ordinal(machine.uuids[1]) == 0
    with pytest.raises(Unavailable, match="does not see it"):
        memory(engine, at=0)


def test_what_the_machine_does_not_do_is_said_in_words(machine: Machine) -> None:
    driver = FakeDriver(machine)
    driver.supported = False
    with pytest.raises(Unavailable, match=r"cannot share its memory.*virtual memory management"):
        Vmm(driver).create(0, SIZE)
    driver.supported, driver.full = True, True
    with pytest.raises(Unavailable, match=r"OUT_OF_MEMORY.*give the HBM tier less"):
        Vmm(driver).create(0, SIZE)
    with pytest.raises(Unavailable, match="no path joins them"):
        Vmm(driver).open(0, SIZE, 0, readers=[1])
    with pytest.raises(Unavailable, match="cuMemImportFromShareableHandle"):
        Vmm(driver).open(0, SIZE, 0)
    assert driver.is_clean()


def test_a_slab_of_a_size_that_no_map_has(machine: Machine) -> None:
    """A small one: its units are smaller than what a GPU maps at once."""
    owner, engine = memory(FakeDriver(machine)), memory(FakeDriver(machine))
    theirs = Slab.create(owner, "one", SIZE - GRANULARITY // 2)
    ours = Slab.open(engine, theirs.ticket, theirs.descriptor)
    assert ours.size_bytes == SIZE - GRANULARITY // 2
    theirs.tensor(ours.size_bytes - 1, 1).fill_(7)
    assert ours.tensor(ours.size_bytes - 1, 1).tolist() == [7]
    for slab in (ours, theirs):
        slab.close()


def test_a_slab_that_is_smaller_than_its_ticket_is_not_mapped(machine: Machine) -> None:
    owner, engine = FakeDriver(machine), FakeDriver(machine)
    theirs = Slab.create(memory(owner), "one", SIZE)
    with pytest.raises(Unavailable, match="cuMemMap"):
        Vmm(engine).open(theirs.descriptor, SIZE + GRANULARITY, 0)
    assert engine.is_clean()
    theirs.close()


def test_a_forked_child_undoes_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(machine)
    mapping, descriptor = Vmm(driver).create(0, SIZE)
    before = len(driver.calls)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    del mapping
    gc.collect()
    assert driver.calls[before:] == []
    os.close(descriptor)


def test_host_memory_is_registered_once_and_undone(machine: Machine) -> None:
    driver = FakeDriver(machine)
    vmm = Vmm(driver)
    vmm.register(0, 1 << 20, 4096)
    with pytest.raises(Unavailable, match="ALREADY_REGISTERED"):
        vmm.register(0, 1 << 20, 4096)
    assert vmm.unregister(0, 1 << 20)
    assert not vmm.unregister(0, 1 << 20)
    assert driver.is_clean()


def test_pinned_memory_is_registered_until_it_is_closed(machine: Machine) -> None:
    driver = FakeDriver(machine)
    host = torch.zeros(1 << 16, dtype=torch.uint8)
    pinned = Pinned(Vmm(driver), 0, host)
    assert driver.registered == {host.data_ptr(): 1 << 16}
    with pytest.raises(Unavailable, match="ALREADY_REGISTERED"):
        Pinned(Vmm(driver), 0, host)
    pinned.close()
    pinned.close()
    assert driver.is_clean()


def test_whatever_call_fails_memory_is_registered_or_not(machine: Machine) -> None:
    driver = FakeDriver(machine)
    host = torch.zeros(1 << 16, dtype=torch.uint8)
    Pinned(Vmm(driver), 0, host).close()
    calls = driver.calls
    first, last = calls.index("cuMemHostRegister") + 4, calls.index("cuMemHostUnregister")
    for number in range(len(calls)):
        driver = FakeDriver(machine)
        driver.fail[number] = "CUDA_ERROR_UNKNOWN"
        with contextlib.suppress(Unavailable):
            Pinned(Vmm(driver), 0, host).close()
        assert bool(driver.registered) == (first <= number <= last), (
            "registered unless it failed to be undone"
        )
        assert not any(driver.contexts.values()) or calls[number] == "cuDevicePrimaryCtxRelease"
