"""Slabs: what may be mapped, what a stale or lost one gives, and what is left when a process dies."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvcache.device.slab import CpuMemory, CudaMemory, Slab, SlabTicket
from kvcache.device.vmm import Vmm
from kvcache.errors import BadInput, Unavailable
from tests.device.driver_double import LEFT, FakeDriver, Machine, over_double
from tests.device.rigs import BLOCK, DEVICES, PATIENCE_S, SLOTS, memory_of, value_of
from tests.device.slab_process import packed, unpacked

SIZE = SLOTS * BLOCK


@pytest.fixture
def slab() -> Iterator[Slab]:
    slab = Slab.create(CpuMemory(), "test", SIZE)
    yield slab
    slab.close()


def maps_and_descriptors() -> tuple[int, int]:
    """Of slabs, in this process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("kvcache-")
    descriptors = [each for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return maps, sum("kvcache-" in str(each.readlink()) for each in descriptors if each.exists())


# --- what is mapped -------------------------------------------------------------------------------


def test_a_slab_is_let_go_with_its_last_tensor() -> None:
    before = maps_and_descriptors()
    owner = Slab.create(CpuMemory(), "test", SIZE)
    mine = Slab.open(CpuMemory(), owner.ticket, owner.descriptor)
    assert maps_and_descriptors() > before
    slot = mine.slots([0], BLOCK, owner.ticket.incarnation)[0]
    owner.tensor(0, BLOCK).fill_(3)
    owner.close()
    mine.close()
    mine.close()
    assert value_of(slot) == 3, "a tensor that was given keeps the memory"
    del slot
    assert maps_and_descriptors() == before


def test_the_map_does_not_reach_forked_children(slab: Slab) -> None:
    maps = Path("/proc/self/smaps").read_text()
    flags = maps.partition("kvcache-test")[2].partition("VmFlags:")[2].splitlines()[0].split()
    assert "dc" in flags, "do not copy on fork"
    assert slab.trouble == ""


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW])
def test_memory_that_could_be_taken_away_is_not_mapped(slab: Slab, seals: int) -> None:
    descriptor = os.memfd_create("slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(BadInput, match="not sealed"):
        Slab.open(CpuMemory(), slab.ticket, descriptor)
    os.close(descriptor)


def test_less_memory_than_the_ticket_says_is_not_mapped(slab: Slab) -> None:
    with pytest.raises(BadInput, match="were announced"):
        Slab.open(CpuMemory(), replace(slab.ticket, size_bytes=SIZE + 1), slab.descriptor)


def test_a_gpu_slab_is_not_mapped_as_cpu_memory_nor_another_gpus(slab: Slab) -> None:
    machine = Machine()
    memory = CudaMemory(Vmm(FakeDriver(machine)), machine.uuids[0], over=over_double)
    with pytest.raises(BadInput, match="unsafe_slab"):
        Slab.open(memory, slab.ticket, slab.descriptor)
    theirs = SlabTicket("cuda", SIZE, machine.uuids[1], b"")
    for mine in (memory, CpuMemory()):
        with pytest.raises(BadInput, match="unsafe_slab"):
            Slab.open(mine, theirs, slab.descriptor)
    machine.close()


def test_new_memory_of_a_gpu_has_nothing_of_who_had_it_before() -> None:
    """Not in the process that made it, nor in one that maps it."""
    machine = Machine()
    memory = CudaMemory(Vmm(FakeDriver(machine)), machine.uuids[0], over=over_double)
    made = Slab.create(memory, "test", SIZE)
    other = CudaMemory(Vmm(FakeDriver(machine)), machine.uuids[0], over=over_double)
    mapped = Slab.open(other, made.ticket, made.descriptor)
    for slab in (made, mapped):
        assert not slab.whole(made.ticket.incarnation).any()
    [allocation] = machine.allocations
    assert os.pread(allocation.memory, len(LEFT), allocation.size_bytes - len(LEFT)) == bytes(len(LEFT))
    for each in (made, mapped):
        each.close()
    machine.close()


# --- what it gives --------------------------------------------------------------------------------


def test_a_lease_of_other_memory_is_a_miss(slab: Slab) -> None:
    """The node was started again, and its slots of the same numbers hold something else."""
    again = Slab.create(CpuMemory(), "test", SIZE)
    assert again.ticket.incarnation != slab.ticket.incarnation
    with pytest.raises(Unavailable, match="not mapped any more"):
        again.slots([0], BLOCK, slab.ticket.incarnation)
    with pytest.raises(Unavailable, match="not mapped any more"):
        again.whole(slab.ticket.incarnation)
    again.close()


@pytest.mark.parametrize("how", ["close", "lose"])
def test_what_is_closed_or_lost_is_a_miss(slab: Slab, how: str) -> None:
    assert slab.trouble == ""
    if how == "close":
        slab.close()
    else:
        slab.lose("the GPU was reset")
    for ask in (
        lambda: slab.whole(slab.ticket.incarnation),
        lambda: slab.slots([0], BLOCK, slab.ticket.incarnation),
        lambda: slab.tensor(0, BLOCK),
    ):
        with pytest.raises(Unavailable, match=slab.trouble):
            ask()


@pytest.mark.parametrize("offset", [-1, SIZE - BLOCK + 1, SIZE, 1 << 60])
def test_a_slot_outside_is_refused(slab: Slab, offset: int) -> None:
    with pytest.raises(BadInput, match="bad_slice"):
        slab.slots([0, offset], BLOCK, slab.ticket.incarnation)
    with pytest.raises(BadInput, match="bad_slice"):
        slab.tensor(offset, BLOCK)


def test_more_than_there_is_is_refused_and_nobody_killed_for_it() -> None:
    with pytest.raises(Unavailable, match="give the HBM tier less"):
        Slab.create(CpuMemory(), "test", 1 << 60)


# --- two processes --------------------------------------------------------------------------------


class Other:
    """``slab_process``."""

    def __init__(self, kind: str) -> None:
        self.line, theirs = socket.socketpair()
        self.line.settimeout(PATIENCE_S)
        with theirs:
            command = [sys.executable, "-m", "tests.device.slab_process", str(theirs.fileno()), kind]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def write(self) -> None:
        """One slot whole, one by half."""
        self.line.sendall(b"w")
        assert self.line.recv(1) == b"w"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(PATIENCE_S) == -signal.SIGKILL
        self.line.close()


@pytest.fixture
def others() -> Iterator[list[Other]]:
    started: list[Other] = []
    yield started
    for other in started:
        other.process.kill()
        other.process.wait(PATIENCE_S)
        other.line.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEVICES)
def test_an_owner_that_is_killed_takes_nothing_away(others: list[Other], kind: str) -> None:
    before = maps_and_descriptors()
    others.append(node := Other(kind))
    node.line.sendall(b"o")
    data, descriptors, _, _ = socket.recv_fds(node.line, 4096, 1)
    mine = Slab.open(memory_of(kind), unpacked(data), descriptors[0])
    os.close(descriptors[0])
    node.write()
    incarnation = mine.ticket.incarnation
    slots = mine.slots([0, BLOCK], BLOCK, incarnation)
    node.kill()
    assert value_of(slots[0].cpu()) == 1
    assert value_of(slots[1][: BLOCK // 2].cpu()) == 2
    slots[0].fill_(5)
    assert value_of(mine.slots([0], BLOCK, incarnation)[0].cpu()) == 5
    del slots
    mine.close()
    assert maps_and_descriptors() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEVICES)
def test_an_engine_that_is_killed_in_a_copy_harms_its_own_slots_only(others: list[Other], kind: str) -> None:
    before = maps_and_descriptors()
    slab = Slab.create(memory_of(kind), "test", SIZE)
    slab.tensor(0, SIZE).fill_(9)
    assert value_of(slab.tensor(0, SIZE).cpu()) == 9
    others.append(engine := Other(kind))
    engine.line.sendall(b"r")
    socket.send_fds(engine.line, [packed(slab.ticket)], [slab.descriptor])
    assert engine.line.recv(1) == b"r"
    engine.write()
    engine.kill()
    assert value_of(slab.tensor(0, BLOCK).cpu()) == 1
    assert value_of(slab.tensor(BLOCK, BLOCK).cpu()) == -1, "half written: the ledger never publishes it"
    assert value_of(slab.tensor(2 * BLOCK, SIZE - 2 * BLOCK).cpu()) == 9
    others.append(second := Other(kind))
    second.line.sendall(b"r")
    socket.send_fds(second.line, [packed(slab.ticket)], [slab.descriptor])
    assert second.line.recv(1) == b"r"
    second.write()
    assert value_of(slab.tensor(0, BLOCK).cpu()) == 1
    slab.close()
    assert maps_and_descriptors() == before
