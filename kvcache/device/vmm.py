"""GPU memory that processes share by descriptors: CUDA's virtual memory management, through cuda-bindings.

    create  cuMemCreate ─► export a descriptor ─┐
    open    import a descriptor ────────────────┴► reserve an address ─► map ─► set access ─► Mapping
    Mapping closed or forgotten: wait for its devices ─► unmap ─► free the address ─► let the contexts go

The memory lives while anybody has a descriptor of it or a map: a node that dies takes nothing away from an
engine (plain CUDA IPC would: there an owner's exit ends the memory under its readers). It also means that
a descriptor left open keeps GPU memory for good: each is closed on exec, and by who received it.

Invariants: a step that fails undoes those before it; the handle of an allocation is never kept beyond its
map; an address is given back only after each device that may touch it has ended its work, and stays mapped
until the process ends when that cannot be known. Nothing here is called while a graph is captured, and
nothing is undone in a forked child, where CUDA does not work.

Every driver call is made here, by name, so that a double can stand in for all of it. Errors are Unavailable.
The sum: mapping takes milliseconds, once a connection; afterwards nothing here runs.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from types import ModuleType

from kvcache.errors import Unavailable

UUID_BYTES = 16

_ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "give the HBM tier less, or the engine less of the GPU",
    "CUDA_ERROR_NOT_SUPPORTED": "run without an HBM tier on this machine",
    "CUDA_ERROR_NOT_PERMITTED": "run without an HBM tier, or let this container share GPU memory",
    "CUDA_ERROR_NO_DEVICE": "run without an HBM tier, or make the GPU visible to this process",
    "CUDA_ERROR_NOT_INITIALIZED": "use the GPU in the process that began with it, not in a forked child",
}
_ADVICE_ELSE = "look for Xid in the kernel's log; restart this process once the GPU works again"


class Mapping:
    """GPU memory in this process's addresses, readable by ``ordinals``. It goes when the last reference does:
    a tensor made over it holds one."""

    def __init__(self, address: int, size_bytes: int, ordinals: Sequence[int]) -> None:
        """``ordinals``: where the memory is, then who else may read and write it. Made by ``Vmm``."""
        self.address = address
        self.size_bytes = size_bytes
        self.ordinals = tuple(ordinals)
        self.__cuda_array_interface__ = {
            "version": 2,
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
        }


class Vmm:
    """The driver of one process. Any thread; creates no context but the primary ones, which torch uses."""

    def __init__(self, driver: ModuleType | None = None) -> None:
        """``driver``: ``cuda.bindings.driver``, which is imported when none is given.

        RAISES Unavailable: no cuda-bindings, no driver, no GPU."""
        if driver is None:
            try:
                driver = import_module("cuda.bindings.driver")
            except ImportError as error:
                raise _no(
                    "cuda-bindings cannot be imported", str(error), "pip install 'kvcache[torch]'"
                ) from error
        self._driver = driver
        self.kept_maps = 0
        """Maps that could not be undone safely, and stay until the process ends."""
        self._call("cuInit", 0)

    # --- devices --------------------------------------------------------------------------------

    def device_count(self) -> int:
        """How many GPUs this process sees. RAISES Unavailable."""
        return int(self._call("cuDeviceGetCount"))

    def uuid(self, ordinal: int) -> bytes:
        """The same in every process, whatever its CUDA_VISIBLE_DEVICES. RAISES Unavailable."""
        return bytes(self._call("cuDeviceGetUuid", self._device(ordinal)).bytes)

    def ordinal(self, uuid: bytes) -> int:
        """What this process calls that GPU. RAISES Unavailable when it does not see it."""
        for each in range(self.device_count()):
            if self.uuid(each) == uuid:
                return each
        raise _no(
            f"the GPU {uuid.hex()} cannot be used",
            "this process does not see it",
            "name it in CUDA_VISIBLE_DEVICES, or use the tiers below",
        )

    def granularity(self, ordinal: int) -> int:
        """Sizes are multiples of it: 2 MiB as a rule. RAISES Unavailable."""
        flags = self._driver.CUmemAllocationGranularity_flags
        option = flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(self._call("cuMemGetAllocationGranularity", self._properties(ordinal), option))

    # --- memory ---------------------------------------------------------------------------------

    def create(self, ordinal: int, size_bytes: int) -> tuple[Mapping, int]:
        """New memory on that GPU, mapped here, and a descriptor of it, which is the caller's to close.

        Its content is whatever was there before. ``size_bytes`` is rounded up to the granularity.
        RAISES Unavailable, and then nothing is held."""
        self._check_support(ordinal)
        size_bytes = self._whole(ordinal, size_bytes)
        handle = self._call("cuMemCreate", size_bytes, self._properties(ordinal), 0)
        descriptor = -1
        try:
            descriptor = int(self._call("cuMemExportToShareableHandle", handle, self._descriptor_type(), 0))
            os.set_inheritable(descriptor, False)
            return self._map(handle, size_bytes, [ordinal]), descriptor
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        finally:
            self._quietly("cuMemRelease", handle)

    def open(self, descriptor: int, size_bytes: int, ordinal: int, readers: Sequence[int] = ()) -> Mapping:
        """Map memory that another process created on GPU ``ordinal``; ``readers``, GPUs joined to it by
        NVLink or PCIe, may use it too. The descriptor stays the caller's, and may be closed afterwards.
        ``size_bytes`` is rounded up as by ``create``. RAISES Unavailable, and then nothing is held."""
        ordinals = [ordinal, *(each for each in readers if each != ordinal)]
        for reader in ordinals[1:]:
            if not self._call("cuDeviceCanAccessPeer", self._device(reader), self._device(ordinal)):
                raise _no(
                    f"GPU {reader} cannot use the memory of GPU {ordinal}",
                    "no path joins them",
                    "use the HBM tier of its own GPU, or the host tier",
                )
        size_bytes = self._whole(ordinal, size_bytes)
        handle = self._call("cuMemImportFromShareableHandle", descriptor, self._descriptor_type())
        try:
            return self._map(handle, size_bytes, ordinals)
        finally:
            self._quietly("cuMemRelease", handle)

    # --- host memory ----------------------------------------------------------------------------

    def register(self, ordinal: int, address: int, length: int) -> None:
        """Lock host memory for copies of this process's GPUs. REQUIRES: whole pages, not registered yet.

        All of its pages become resident. RAISES Unavailable; the memory can be copied from and to all the
        same, slower."""
        assert length > 0
        with self._current(ordinal), self._beside_captures():
            self._call("cuMemHostRegister", address, length, self._driver.CU_MEMHOSTREGISTER_PORTABLE)

    def unregister(self, ordinal: int, address: int) -> bool:
        """Undo ``register``. REQUIRES: no copy over it is under way. Did it work?"""
        try:
            with self._current(ordinal), self._beside_captures():
                self._call("cuMemHostUnregister", address)
        except Unavailable:
            return False
        return True

    # --- parts ----------------------------------------------------------------------------------

    def _map(self, handle: object, size_bytes: int, ordinals: Sequence[int]) -> Mapping:
        with ExitStack() as undo:
            for ordinal in ordinals:
                device = self._device(ordinal)
                self._call("cuDevicePrimaryCtxRetain", device)
                undo.callback(self._quietly, "cuDevicePrimaryCtxRelease", device)
            address = int(self._call("cuMemAddressReserve", size_bytes, 0, 0, 0))
            undo.callback(self._quietly, "cuMemAddressFree", address, size_bytes)
            self._call("cuMemMap", address, size_bytes, 0, handle, 0)
            undo.callback(self._quietly, "cuMemUnmap", address, size_bytes)
            access = [self._access(ordinal) for ordinal in ordinals]
            self._call("cuMemSetAccess", address, size_bytes, access, len(access))
            mapping = Mapping(address, size_bytes, ordinals)
            ended = weakref.finalize(mapping, self._unmap, mapping.ordinals, os.getpid(), undo.pop_all())
            ended.atexit = False  # Whatever is mapped then goes with the process, and its work before it.
        return mapping

    def _unmap(self, ordinals: Sequence[int], owner: int, undo: ExitStack) -> None:
        """Never raises: it runs when the last tensor goes, wherever that is."""
        if os.getpid() != owner:
            return
        try:
            for ordinal in ordinals:
                with self._current(ordinal):
                    self._call("cuCtxSynchronize")
        except Unavailable:
            self.kept_maps += 1
            return
        undo.close()

    @contextlib.contextmanager
    def _current(self, ordinal: int) -> Iterator[None]:
        """With that GPU's primary context current in this thread. RAISES Unavailable."""
        device = self._device(ordinal)
        context = self._call("cuDevicePrimaryCtxRetain", device)
        try:
            self._call("cuCtxPushCurrent", context)
            try:
                yield
            finally:
                self._quietly("cuCtxPopCurrent")
        finally:
            self._quietly("cuDevicePrimaryCtxRelease", device)

    @contextlib.contextmanager
    def _beside_captures(self) -> Iterator[None]:
        """Another thread may be capturing a graph: what is done here is none of its business, and would end
        it otherwise. RAISES Unavailable."""
        relaxed = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = self._call("cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            yield
        finally:
            self._quietly("cuThreadExchangeStreamCaptureMode", before)

    def _check_support(self, ordinal: int) -> None:
        attributes = self._driver.CUdevice_attribute
        for attribute, words in (
            (attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "virtual memory management"),
            (attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, "file descriptors"),
        ):
            if not self._call("cuDeviceGetAttribute", attribute, self._device(ordinal)):
                raise _no(
                    f"GPU {ordinal} cannot share its memory",
                    f"its driver does not do {words}",
                    _ADVICE["CUDA_ERROR_NOT_SUPPORTED"],
                )

    def _whole(self, ordinal: int, size_bytes: int) -> int:
        """So many bytes have to be allocated and mapped for these."""
        step = self.granularity(ordinal)
        return -(-size_bytes // step) * step

    def _device(self, ordinal: int) -> object:
        device: object = self._call("cuDeviceGet", ordinal)
        return device

    def _descriptor_type(self) -> object:
        kind: object = self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return kind

    def _properties(self, ordinal: int) -> object:
        properties = self._driver.CUmemAllocationProp()
        properties.type = self._driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = self._descriptor_type()
        properties.location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = ordinal
        return properties

    def _access(self, ordinal: int) -> object:
        access = self._driver.CUmemAccessDesc()
        access.location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = ordinal
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return access

    def _call(self, name: str, *arguments: object):  # type: ignore[no-untyped-def]  # As the driver has it.
        """What the driver's function gives beside its status. RAISES Unavailable."""
        try:
            status, *values = getattr(self._driver, name)(*arguments)
        except RuntimeError as error:  # How cuda-bindings says that there is no libcuda, or no such function.
            raise _no(
                f"the GPU's driver cannot be called ({name})", str(error), "install the driver"
            ) from error
        if int(status) != 0:
            raise _no(
                f"the GPU's driver refused {name}",
                status.name,
                _ADVICE.get(status.name, _ADVICE_ELSE),
            )
        return values[0] if values else None

    def _quietly(self, name: str, *arguments: object) -> None:
        """Where an error changes nothing: the GPU is lost, and the process's end undoes it."""
        with contextlib.suppress(Unavailable):
            self._call(name, *arguments)


def _no(what: str, why: str, todo: str) -> Unavailable:
    return Unavailable("unavailable", what, why, todo)
