"""A double of CUDA's driver, held to what the driver's manual says of the calls that ``vmm`` makes.

Several processes are several ``FakeDriver`` over one ``Machine``. An allocation is a memfd, so descriptors
are real, and what one process writes another reads. References are counted: an allocation is freed when
no handle, map and descriptor is left. What the manual forbids is an AssertionError.

Each call is first made of the real cuda-bindings where there is no driver: they check the arguments, and then
say that there is none. So a call that they would not take does not pass here either.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real

from kvcache.device.vmm import Mapping
from kvcache.errors import Unavailable

GRANULARITY = 2 << 20
SIZE_MAX = 1 << 40
LEFT = b"another's secret"
"""Found at both ends of new memory: the manual promises nothing of what is in it."""
TAKEN: set[tuple[object, ...]] = set()
"""Calls, by the types of their arguments, that the real bindings take: each is asked once, it is slow."""
Result = tuple[Any, ...]
UNDOING = frozenset(
    {"cuMemRelease", "cuMemUnmap", "cuMemAddressFree", "cuDevicePrimaryCtxRelease", "cuCtxPopCurrent"}
)


@dataclass
class Allocation:
    """``handles`` counts those of all processes."""

    memory: int  # A descriptor of the machine's own: the physical memory, in a way.
    size_bytes: int
    device: int
    handles: int = 0
    maps: int = 0


@dataclass
class Machine:
    """What processes share. ``uuids``: of the GPUs there are; ``joined``: pairs that can use each other's."""

    uuids: list[bytes] = field(default_factory=lambda: [b"GPU-zero".ljust(16), b"GPU-one".ljust(16)])
    joined: set[tuple[int, int]] = field(default_factory=set)
    allocations: list[Allocation] = field(default_factory=list)

    def of_descriptor(self, descriptor: int) -> Allocation | None:
        try:
            inode = os.fstat(descriptor).st_ino
        except OSError:
            return None
        return next((each for each in self.allocations if os.fstat(each.memory).st_ino == inode), None)

    def references(self) -> int:
        """All there are to any allocation: handles, maps, and descriptors open in this process."""
        count = 0
        for each in self.allocations:
            inode = os.fstat(each.memory).st_ino
            count += each.handles + each.maps + _open_descriptors(inode) - 1
        return count

    def close(self) -> None:
        for each in self.allocations:
            os.close(each.memory)


class FakeDriver(ModuleType):
    """One process's ``cuda.bindings.driver``. Its ordinals are ``visible``, of the machine's GPUs."""

    def __init__(self, machine: Machine, visible: tuple[int, ...] = (0, 1)) -> None:
        super().__init__("fake_cuda_driver")
        self.machine = machine
        self.visible = visible
        self.calls: list[str] = []
        self.fail: dict[int, str] = {}
        """What the nth call gives instead, n from 0."""
        self.supported = True
        self.full = False
        self.busy: set[int] = set()
        """Ordinals with work that uses whatever is mapped. Ends when it is waited for."""
        self.handles: dict[int, Allocation] = {}
        self.reserved: dict[int, mmap.mmap] = {}
        self.mapped: dict[int, tuple[Allocation, list[int]]] = {}
        self.registered: dict[int, int] = {}
        self.capture_mode = real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        self.contexts: dict[int, int] = {}
        self.current: list[int] = []
        self.hidden: list[mmap.mmap] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)
        function = getattr(real, name)
        answer = getattr(type(self), f"_{name}")

        def call(*arguments: Any) -> Result:
            shape = (name, *map(type, arguments))
            if NO_DRIVER and shape not in TAKEN:
                with pytest.raises(RuntimeError):  # There is no driver; the arguments were taken.
                    function(*arguments)
                TAKEN.add(shape)
            number = len(self.calls)
            self.calls.append(name)
            if number in self.fail:
                return (getattr(real.CUresult, self.fail[number]), *[None] * 2)
            result: Result = answer(self, *arguments)
            return result

        return call

    def is_clean(self) -> bool:
        """Does this process hold nothing?"""
        held = (self.handles, self.reserved, self.mapped, self.registered, self.current)
        return not any(held) and not any(self.contexts.values())

    # --- devices --------------------------------------------------------------------------------

    def _cuInit(self, flags: int) -> Result:  # noqa: N802 - As the driver has it, here and below.
        assert flags == 0
        return (OK,)

    def _cuDeviceGetCount(self) -> Result:  # noqa: N802
        return OK, len(self.visible)

    def _cuDeviceGet(self, ordinal: int) -> Result:  # noqa: N802
        known = 0 <= ordinal < len(self.visible)
        return (OK, ordinal) if known else (real.CUresult.CUDA_ERROR_INVALID_DEVICE, None)

    def _cuDeviceGetUuid(self, device: int) -> Result:  # noqa: N802
        @dataclass
        class Uuid:
            bytes: bytes

        return OK, Uuid(self.machine.uuids[self.visible[device]])

    def _cuDeviceGetAttribute(self, attribute: Any, device: int) -> Result:  # noqa: N802
        return OK, int(self.supported)

    def _cuDeviceCanAccessPeer(self, device: int, peer: int) -> Result:  # noqa: N802
        return OK, int((self.visible[device], self.visible[peer]) in self.machine.joined)

    def _cuDevicePrimaryCtxRetain(self, device: int) -> Result:  # noqa: N802
        self.contexts[device] = self.contexts.get(device, 0) + 1
        return OK, 100 + device

    def _cuDevicePrimaryCtxRelease(self, device: int) -> Result:  # noqa: N802
        assert self.contexts[device] > 0, "released more often than retained"
        self.contexts[device] -= 1
        return (OK,)

    def _cuCtxPushCurrent(self, context: int) -> Result:  # noqa: N802
        assert self.contexts[context - 100] > 0
        self.current.append(context - 100)
        return (OK,)

    def _cuCtxPopCurrent(self) -> Result:  # noqa: N802
        return OK, 100 + self.current.pop()

    def _cuCtxSynchronize(self) -> Result:  # noqa: N802
        if not self.current:
            return (real.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        self.busy.discard(self.current[-1])
        return (OK,)

    # --- memory ---------------------------------------------------------------------------------

    def _cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> Result:  # noqa: N802
        return OK, GRANULARITY

    def _cuMemCreate(self, size: int, properties: Any, flags: int) -> Result:  # noqa: N802
        assert flags == 0
        assert size % GRANULARITY == 0
        assert properties.type == real.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        assert properties.location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        assert properties.requestedHandleTypes == FILE, "else it cannot be exported"
        if self.full or size > SIZE_MAX:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        memory = os.memfd_create("fake-cuda")
        os.ftruncate(memory, size)
        for at in (0, size - len(LEFT)):
            os.pwrite(memory, LEFT, at)
        allocation = Allocation(memory, size, self.visible[properties.location.id])
        self.machine.allocations.append(allocation)
        return OK, self._handle(allocation)

    def _handle(self, allocation: Allocation) -> int:
        handle = 1 + len(self.calls)
        self.handles[handle] = allocation
        allocation.handles += 1
        return handle

    def _cuMemRelease(self, handle: int) -> Result:  # noqa: N802
        self.handles.pop(handle).handles -= 1
        return (OK,)

    def _cuMemExportToShareableHandle(self, handle: int, kind: Any, flags: int) -> Result:  # noqa: N802
        assert kind == FILE
        assert flags == 0
        descriptor = os.dup(self.handles[handle].memory)
        os.set_inheritable(descriptor, True)  # As the driver leaves it.
        return OK, descriptor

    def _cuMemImportFromShareableHandle(self, descriptor: int, kind: Any) -> Result:  # noqa: N802
        assert kind == FILE
        allocation = self.machine.of_descriptor(descriptor)
        if allocation is None:
            return real.CUresult.CUDA_ERROR_INVALID_VALUE, None
        return OK, self._handle(allocation)  # The descriptor stays the caller's.

    def _cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> Result:  # noqa: N802
        assert (alignment, address, flags) == (0, 0, 0)
        assert size % GRANULARITY == 0
        reserved = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(reserved))
        self.reserved[address] = reserved
        return OK, address

    def _cuMemAddressFree(self, address: int, size: int) -> Result:  # noqa: N802
        if address in self.mapped:
            return (real.CUresult.CUDA_ERROR_INVALID_VALUE,)
        assert len(self.reserved[address]) == size
        # Python cannot unmap it by address; the test's process may keep it.
        self.hidden.append(self.reserved.pop(address))
        return (OK,)

    def _cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> Result:  # noqa: N802
        assert (offset, flags) == (0, 0)
        assert address not in self.mapped
        assert len(self.reserved[address]) == size
        allocation = self.handles[handle]
        if size > allocation.size_bytes:
            return (real.CUresult.CUDA_ERROR_INVALID_VALUE,)
        fixed = mmap.MAP_SHARED | 0x10  # MAP_FIXED: over the reservation.
        place = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, fixed, allocation.memory, 0)
        assert place == address
        allocation.maps += 1
        self.mapped[address] = (allocation, [])
        return (OK,)

    def _cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> Result:  # noqa: N802
        assert count == len(access)
        allocation, ordinals = self.mapped[address]
        for each in access:
            assert each.flags == real.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            home = self.visible[each.location.id]
            assert home == allocation.device or (home, allocation.device) in self.machine.joined
            ordinals.append(each.location.id)
        return (OK,)

    def _cuMemUnmap(self, address: int, size: int) -> Result:  # noqa: N802
        allocation, ordinals = self.mapped.pop(address)
        assert len(self.reserved[address]) == size, "a part of a map cannot be undone"
        assert not self.busy.intersection(ordinals), "unmapped under work that may use it"
        allocation.maps -= 1
        return (OK,)

    # --- host memory ----------------------------------------------------------------------------

    def _cuThreadExchangeStreamCaptureMode(self, mode: Any) -> Result:  # noqa: N802
        before, self.capture_mode = self.capture_mode, mode
        return OK, before

    def _cuMemHostRegister(self, address: int, size: int, flags: int) -> Result:  # noqa: N802
        assert flags == real.CU_MEMHOSTREGISTER_PORTABLE
        assert self.capture_mode == RELAXED, "a graph that another thread captures would end"
        if not self.current:
            return (real.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        assert size > 0
        for start, length in self.registered.items():
            if address < start + length and start < address + size:
                return (real.CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,)
        self.registered[address] = size
        _libc.madvise(address, size, _MADV_POPULATE_WRITE)  # All of its pages become resident.
        return (OK,)

    def _cuMemHostUnregister(self, address: int) -> Result:  # noqa: N802
        assert self.capture_mode == RELAXED, "a graph that another thread captures would end"
        if address not in self.registered:
            return (real.CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,)
        del self.registered[address]
        return (OK,)


def over_double(mapping: Mapping, device: torch.device) -> torch.Tensor:
    """As ``slab.over_mapping``: the double's addresses are the host's."""
    array = (ctypes.c_ubyte * mapping.size_bytes).from_address(mapping.address)
    array.held = mapping  # type: ignore[attr-defined]  # As torch holds what it was made over.
    return torch.frombuffer(array, dtype=torch.uint8)


def _open_descriptors(inode: int) -> int:
    count = 0
    for each in Path("/proc/self/fd").iterdir():
        try:
            count += each.stat().st_ino == inode and "fake-cuda" in str(each.readlink())
        except OSError:
            continue  # It was the one that lists the folder.
    return count


def _has_no_driver() -> bool:
    try:
        real.cuInit(0)
    except RuntimeError:
        return True
    return False


_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_size_t
_libc.mmap.argtypes = (
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.madvise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_WRITE = 23
OK = real.CUresult.CUDA_SUCCESS
RELAXED = real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
FILE = real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
NO_DRIVER = _has_no_driver()
__all__ = ["GRANULARITY", "UNDOING", "FakeDriver", "Machine", "Unavailable", "over_double"]
