"""The slab: memory of one device for blocks, owned by the node, mapped by the engines of that device.

    node    Slab.create ─► ticket + descriptor ──(unix socket)──► Slab.open    engine
               │                                                     │
            close, or the node dies                               close, when its socket ends
               └── the memory lives until both have let go, and the last tensor over it ──┘

``CudaMemory`` is GPU memory (``kvcache.device.vmm``); ``CpuMemory`` is a sealed memfd with the same
contract, for machines without a GPU and for tests. Who may write is who may map: a slab is one trust
domain's, as an arena of the host tier is.

Invariants: a slab that is closed, lost, or of another incarnation than a lease names gives no tensor: that
is a miss, never a read. Tensors that were given keep the memory mapped, so none of them ever points at
nothing. Truth about what a slot holds is in the ledger, never in the slab.

The sum: a slab is made or opened once, in milliseconds (clearing it: 0.5 ms a GiB; a memfd: 0.3 s); a tensor
of a slot costs 2 us.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvcache import memfd
from kvcache.device.streams import streams_of
from kvcache.device.vmm import Mapping, Vmm
from kvcache.errors import BadInput, Unavailable
from kvcache.tiers.host import memory_available_bytes

INCARNATION_BYTES = 16
CLEAR_S = 20.0


@dataclass(frozen=True, slots=True)
class SlabTicket:
    """What another process needs beside the descriptor. ``uuid`` names the GPU, empty on the CPU;
    ``incarnation`` names this memory and no other: every lease of its slots carries it."""

    kind: str
    size_bytes: int
    uuid: bytes
    incarnation: bytes


class Memory(Protocol):
    """Where slabs come from. One a device and process."""

    kind: str
    device: torch.device
    uuid: bytes

    def create(self, name: str, size_bytes: int) -> tuple[torch.Tensor, int]:
        """New memory, uint8 [size_bytes or more], all 0, and a descriptor, the caller's. RAISES
        Unavailable."""

    def open(self, descriptor: int, size_bytes: int) -> torch.Tensor:
        """All of another process's. RAISES BadInput (unsafe_slab), Unavailable."""


class CpuMemory:
    """Host memory, as a device that copies and computes on the CPU."""

    kind = "cpu"
    uuid = b""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def create(self, name: str, size_bytes: int) -> tuple[torch.Tensor, int]:
        descriptor = -1
        try:
            # Taken at once, as a GPU's is; asked for too much, the kernel would kill some process or other.
            if size_bytes > memory_available_bytes():
                raise OSError(f"{memory_available_bytes()} are free")
            descriptor = memfd.create(name, size_bytes)
            os.posix_fallocate(descriptor, 0, size_bytes)
            return _mapped(descriptor, size_bytes), descriptor
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise Unavailable(
                "unavailable",
                f"no {size_bytes} bytes of memory for a slab",
                str(error),
                "give the HBM tier less",
            ) from error

    def open(self, descriptor: int, size_bytes: int) -> torch.Tensor:
        memfd.check(descriptor, size_bytes)
        try:
            return _mapped(descriptor, size_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise memfd.unsafe(f"it cannot be mapped: {error}") from error


class CudaMemory:
    """A GPU's. ``home`` is where the memory lies, ``device`` where this process computes: the same GPU,
    or one joined to it."""

    kind = "cuda"

    def __init__(
        self,
        vmm: Vmm,
        uuid: bytes,
        device: torch.device | None = None,
        over: Callable[[Mapping, torch.device], torch.Tensor] | None = None,
    ) -> None:
        """``device``: this process's, the GPU itself unless told. RAISES Unavailable when this process does
        not see the GPU."""
        self.uuid = uuid
        self._vmm = vmm
        self._home = vmm.ordinal(uuid)
        self.device = torch.device("cuda", self._home) if device is None else device
        self._over = over_mapping if over is None else over

    def create(self, name: str, size_bytes: int) -> tuple[torch.Tensor, int]:
        mapping, descriptor = self._vmm.create(self._home, size_bytes)
        try:
            memory = self._over(mapping, torch.device("cuda", self._home))
            clear(memory)
            return memory, descriptor
        except BaseException:
            os.close(descriptor)
            raise

    def open(self, descriptor: int, size_bytes: int) -> torch.Tensor:
        readers = [self._home if self.device.index is None else self.device.index]
        mapping = self._vmm.open(descriptor, size_bytes, self._home, readers)
        return self._over(mapping, torch.device("cuda", self._home))


class Slab:
    """One process's hold on one slab. ``lose`` and ``close`` may be called from any thread."""

    def __init__(self, ticket: SlabTicket, memory: torch.Tensor, descriptor: int = -1) -> None:
        """``create`` and ``open`` make them. ``memory``: uint8 [size_bytes]."""
        assert memory.dtype == torch.uint8
        assert memory.shape == (ticket.size_bytes,)
        self.ticket = ticket
        self.device = memory.device
        self._memory: torch.Tensor | None = memory
        self._descriptor = descriptor
        self._lost = ""

    @classmethod
    def create(cls, memory: Memory, name: str, size_bytes: int) -> Slab:
        """A new one, this process its owner; all 0. RAISES Unavailable."""
        tensor, descriptor = memory.create(name, size_bytes)
        incarnation = secrets.token_bytes(INCARNATION_BYTES)
        ticket = SlabTicket(memory.kind, size_bytes, memory.uuid, incarnation)
        return cls(ticket, tensor[:size_bytes], descriptor)

    @classmethod
    def open(cls, memory: Memory, ticket: SlabTicket, descriptor: int) -> Slab:
        """Another process's. The descriptor stays the caller's, and is to be closed afterwards.

        RAISES BadInput (unsafe_slab) when it is not what the ticket says; Unavailable."""
        if (ticket.kind, ticket.uuid) != (memory.kind, memory.uuid):
            raise memfd.unsafe(
                f"it is memory of {_named(ticket)}, and this process uses {_named(memory)} here"
            )
        return cls(ticket, memory.open(descriptor, ticket.size_bytes)[: ticket.size_bytes])

    @property
    def size_bytes(self) -> int:
        return self.ticket.size_bytes

    @property
    def descriptor(self) -> int:
        """To be handed to who may map it. REQUIRES: this process made the slab, and has not closed it."""
        assert self._descriptor >= 0
        return self._descriptor

    @property
    def trouble(self) -> str:
        """Why it gives no tensor, in plain words; empty while it does."""
        if self._lost:
            return self._lost
        return "it was closed" if self._memory is None else ""

    def whole(self, incarnation: bytes) -> torch.Tensor:
        """All of it, uint8 [size_bytes]: what gather and scatter take. ``incarnation``: of the lease.

        RAISES Unavailable when it is closed or lost, or the lease is of other memory: a miss."""
        if incarnation != self.ticket.incarnation:
            raise _no(
                "the lease is of memory that is not mapped any more", "the node has made a new slab since"
            )
        return self._whole()

    def slots(self, offsets: Sequence[int], block_bytes: int, incarnation: bytes) -> list[torch.Tensor]:
        """The slots at these offsets, each uint8 [block_bytes], no copy.

        RAISES as ``whole``; BadInput (bad_slice) when a slot is not within the slab."""
        memory = self.whole(incarnation)
        for offset in offsets:
            self._check_range(offset, block_bytes)
        return [memory[offset : offset + block_bytes] for offset in offsets]

    def tensor(self, offset: int, length: int) -> torch.Tensor:
        """As ``slots``, for the owner, who needs no lease."""
        self._check_range(offset, length)
        return self._whole()[offset : offset + length]

    def lose(self, why: str) -> None:
        """The device was reset or failed: nothing in it counts any more. For good; the first reason stays."""
        self._lost = self._lost or why

    def close(self) -> None:
        """Let go: the memory is unmapped with the last tensor over it. May be called twice."""
        self._memory = None
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _whole(self) -> torch.Tensor:
        memory = self._memory  # Once: it may be closed meanwhile.
        if memory is None or self._lost:
            raise _no("the slab cannot be used any more", self.trouble)
        return memory

    def _check_range(self, offset: int, length: int) -> None:
        if not 0 <= offset <= self.size_bytes - length:
            raise BadInput(
                "bad_slice",
                f"{length} bytes from {offset} of a slab",
                f"it has {self.size_bytes} bytes",
                "run the same release of kvcache on both sides",
            )


def over_mapping(mapping: Mapping, device: torch.device) -> torch.Tensor:
    """A tensor over the map, uint8 [size_bytes], which holds it. RAISES Unavailable."""
    try:
        with torch.cuda.device(device):  # Whose memory it is, torch asks of the GPU that is current.
            tensor = torch.as_tensor(mapping, device=device)
    except RuntimeError as error:
        raise _no(f"torch cannot use the memory of {device}", str(error)) from error
    if tensor.data_ptr() != mapping.address:
        raise _no(f"torch cannot use the memory of {device}", "it would copy it")
    return tensor


def clear(memory: torch.Tensor) -> None:
    """Another process may have left something there. RAISES Unavailable; when it returns it is done, so that
    nothing which is written afterwards is cleared."""
    stream = streams_of(memory.device).current()
    stream.run(lambda: _zero(memory))
    if not stream.mark().wait(CLEAR_S):
        raise _no(f"the memory of {memory.device} cannot be cleared", f"it took over {CLEAR_S} s")


def _zero(memory: torch.Tensor) -> None:
    memory.zero_()


def _mapped(descriptor: int, size_bytes: int) -> torch.Tensor:
    memory = mmap.mmap(descriptor, size_bytes)
    memory.madvise(mmap.MADV_DONTFORK)
    # torch keeps the view, and the view the map, which is never closed but goes with the last tensor.
    return torch.frombuffer(memoryview(memory), dtype=torch.uint8)


def _named(memory: SlabTicket | Memory) -> str:
    return f"the GPU {memory.uuid.hex()}" if memory.uuid else f"the {memory.kind}"


def _no(what: str, why: str) -> Unavailable:
    return Unavailable(
        "unavailable", what, why, "recompute; the blocks are read from the tiers below, or not"
    )
