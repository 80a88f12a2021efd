"""Others' ways between an engine's pages and host memory, for ``gpu_copies.py``. Each moves whole pages and
keeps the engine's order of bytes (ours are in canonical order, and summed).

``IndexSelect``   what simple connectors do: a layer at a time, index_select and a copy
``SwapKernel``    vLLM's kernel for small pieces, rebuilt (``gpu_swap.py``); the GPU reads pinned memory
``Batched``       vLLM's way for larger pieces: one cuMemcpyBatchAsync of all of them, by the copy engines
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from gpu_rig import Case, Rig

from kvcache.device.checks import uploaded

_ORDER_STREAM = 1
TRY_S = 120.0


class Rival(Protocol):
    """``save`` and ``load`` queue all on the current stream. Made for one case; RAISES RuntimeError when it
    cannot be had here."""

    name: str

    def __init__(self, rig: Rig, case: Case, pages: Sequence[Sequence[int]], host: torch.Tensor) -> None: ...

    def save(self) -> None: ...

    def load(self) -> None: ...


class IndexSelect:
    name = "index_select"

    def __init__(self, rig: Rig, case: Case, pages: Sequence[Sequence[int]], host: torch.Tensor) -> None:
        flat = [page for block in pages for page in block]
        self._tensors = rig.tensors
        self._pages = torch.tensor(flat, device=rig.device)
        one = rig.tensors[0]
        shape = (2, len(flat), *one.shape[2:])
        layer_bytes = one[:, 0].nbytes * len(flat)
        self._host = [
            host[at * layer_bytes : (at + 1) * layer_bytes].view(one.dtype).view(shape)
            for at in range(len(rig.tensors))
        ]

    def save(self) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            host.copy_(tensor.index_select(1, self._pages), non_blocking=True)

    def load(self) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.index_copy_(1, self._pages, host.to(tensor.device, non_blocking=True))


class _Pieces:
    """Addresses: a piece a page of K or of V of a layer, one after the other in host memory."""

    def __init__(self, rig: Rig, case: Case, pages: Sequence[Sequence[int]], host: torch.Tensor) -> None:
        cache = rig.cache
        self.piece_bytes = rig.sizes.page_bytes // len(cache.planes)
        flat = [page for block in pages for page in block]
        self.pages = [plane.data_ptr() + page * cache.page_stride for plane in cache.planes for page in flat]
        self.host = [host.data_ptr() + at * self.piece_bytes for at in range(len(self.pages))]


class SwapKernel:
    name = "vllm_kernel"

    def __init__(self, rig: Rig, case: Case, pages: Sequence[Sequence[int]], host: torch.Tensor) -> None:
        try:
            from gpu_swap import swap
        except ImportError as error:
            raise RuntimeError(f"Triton cannot be imported: {error}") from error
        self._swap = swap
        pieces = _Pieces(rig, case, pages, host)
        self._bytes = pieces.piece_bytes
        self._saves = uploaded(list(zip(pieces.pages, pieces.host, strict=True)), rig.device)
        self._loads = uploaded(list(zip(pieces.host, pieces.pages, strict=True)), rig.device)

    def save(self) -> None:
        self._swap(self._saves, self._bytes)

    def load(self) -> None:
        self._swap(self._loads, self._bytes)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


class Batched:
    name = "vllm_batch"

    def __init__(self, rig: Rig, case: Case, pages: Sequence[Sequence[int]], host: torch.Tensor) -> None:
        if not rig.is_cuda:
            raise RuntimeError("cuMemcpyBatchAsync is the GPU driver's")
        if why := _batch_trouble():
            raise RuntimeError(why)
        pieces = _Pieces(rig, case, pages, host)
        self._batch = _Batch(pieces.pages, pieces.host, pieces.piece_bytes)

    def save(self) -> None:
        self._batch.save()

    def load(self) -> None:
        self._batch.load()


class _Batch:
    """The driver's call as of CUDA 12.8, on a stream of its own: it refuses the default one."""

    def __init__(self, pages: Sequence[int], host: Sequence[int], piece_bytes: int) -> None:
        try:
            self._call: Any = ctypes.CDLL("libcuda.so.1").cuMemcpyBatchAsync
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"the driver has no cuMemcpyBatchAsync: {error}") from error
        self._count = len(pages)
        addresses = ctypes.c_uint64 * self._count
        self._pages, self._host = addresses(*pages), addresses(*host)
        self._sizes = (ctypes.c_size_t * self._count)(*[piece_bytes] * self._count)
        self._attributes = _Attributes(order=_ORDER_STREAM)
        self._stream = torch.cuda.Stream()

    def save(self) -> None:
        self._copy(self._host, self._pages)

    def load(self) -> None:
        self._copy(self._pages, self._host)

    def _copy(self, targets: object, sources: object) -> None:
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        self._stream.wait_stream(torch.cuda.current_stream())
        status = self._call(
            targets, sources, self._sizes, ctypes.c_size_t(self._count), ctypes.byref(self._attributes),
            ctypes.byref(first), ctypes.c_size_t(1), ctypes.byref(failed),
            ctypes.c_void_p(self._stream.cuda_stream),
        )  # fmt: skip
        torch.cuda.current_stream().wait_stream(self._stream)
        if status != 0:
            raise RuntimeError(f"cuMemcpyBatchAsync says {status} for piece {failed.value}")


@lru_cache(maxsize=1)
def _batch_trouble() -> str:
    """Why the driver's call does not work here; empty when it does. Tried in a process of its own, because a
    driver with another idea of the arguments would end this one."""
    command = [sys.executable, __file__]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=TRY_S, check=False)
    except subprocess.TimeoutExpired:
        return "cuMemcpyBatchAsync: it does not come back"
    return "" if tried.returncode == 0 else f"cuMemcpyBatchAsync: {tried.stderr.strip()[-200:]}"


def _try_batch() -> None:
    count, size = 64, 32 << 10
    pages = torch.randint(0, 256, (count, size), dtype=torch.uint8, device="cuda")
    host = torch.zeros(count, size, dtype=torch.uint8, pin_memory=True)
    want = pages.clone()
    addresses = [[each[at].data_ptr() for at in range(count)] for each in (pages, host)]
    batch = _Batch(addresses[0], addresses[1], size)
    batch.save()
    torch.cuda.synchronize()
    assert torch.equal(host, want.cpu())
    pages.zero_()
    batch.load()
    torch.cuda.synchronize()
    assert torch.equal(pages, want)


RIVALS: tuple[type[Rival], ...] = (IndexSelect, SwapKernel, Batched)

if __name__ == "__main__":
    _try_batch()
