"""The engine's pages as the connector's worker needs them: as host memory, and as blocks of a device.

vLLM keeps one tensor a layer, by its shape ``[page, head, token, K and V]``, whatever the order of its
strides (``KVCacheLayout``). A layer is a plane of a block, in the order of that shape: so engines on GPUs
whose layouts differ share blocks. Where a backend takes smaller pages than the scheduler hands out, several
in a row are one. On the CPU the interior of a page is packed as the instruction set likes it (the namespace
says how): it is copied as it lies.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvcache.device.engine import EngineDevice, PagedBlocks
from kvcache.device.pages import PagedCache
from kvcache.device.streams import Event, Streams, streams_of
from kvcache.errors import BadInput, Unavailable

if TYPE_CHECKING:
    from kvcache.block import BlockSpec


class CpuPages:
    """In host memory. RAISES BadInput when the tensors are not what the namespace says."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], layers: Sequence[str], spec: BlockSpec) -> None:
        self._rows = []
        for name in layers:
            tensor = tensors[name]
            page_bytes = tensor[0].numel() * tensor.element_size()
            if tensor.device.type != "cpu" or not tensor[0].is_contiguous() or page_bytes != spec.plane_bytes:
                raise _unlike(name, tensor, f"a contiguous page of {spec.plane_bytes} bytes on the CPU")
            self._rows.append(tensor.view(torch.uint8).flatten(1).numpy())
            assert self._rows[-1].ctypes.data == tensor.data_ptr(), "a view, not a copy"

    def planes(self, block_id: int) -> list[Any]:
        return [rows[block_id] for rows in self._rows]


class DevicePages:
    """On a device of this process. ``mark`` is the engine's thread's to call, the rest that of another, whose
    work goes on a stream of its own.

    RAISES BadInput when the tensors are not what the namespace says."""

    def __init__(
        self,
        gpu: EngineDevice,
        tensors: Mapping[str, torch.Tensor],
        layers: Sequence[str],
        spec: BlockSpec,
        streams: Streams | None = None,
    ) -> None:
        self.gpu = gpu
        self._cache = PagedCache([tensors[name] for name in layers], "single_hnd")
        self._pieces = max(1, spec.block_tokens // self._cache.page_tokens)
        if self._cache.spec(self._pieces) != spec:
            raise _unlike(layers[0], tensors[layers[0]], f"pages that make up {spec}")
        self._streams = streams or streams_of(self._cache.device)
        self._own = threading.local()

    @property
    def has_slab(self) -> bool:
        """HBM of a node is mapped on it."""
        return self.gpu.has_slab

    def mark(self) -> Event:
        """What the engine has queued by now. RAISES Unavailable."""
        return self._streams.current().mark()

    def follow(self, behind: Event) -> None:
        """What this thread queues from now on begins behind that. RAISES Unavailable."""
        self._use_own_stream()
        self._streams.current().after(behind)

    def blocks(self, block_ids: Sequence[int]) -> PagedBlocks:
        """RAISES BadInput, Unavailable."""
        pieces = range(self._pieces)
        pages = [[block_id * self._pieces + piece for piece in pieces] for block_id in block_ids]
        return PagedBlocks(self.gpu, self._cache, pages)

    def _use_own_stream(self) -> None:
        """For all that this thread does: what it moves waits for no step of the engine that comes later."""
        device = self._cache.device
        if device.type == "cuda" and not hasattr(self._own, "stream"):
            torch.cuda.set_device(device)
            self._own.stream = torch.cuda.Stream(device)
            torch.cuda.set_stream(self._own.stream)


def device_for(device: torch.device) -> EngineDevice:
    """RAISES BadInput when its memory cannot be shared with a node."""
    try:
        return EngineDevice.of(device)
    except Unavailable as error:
        raise BadInput(
            "unsupported_engine", f"kvcache cannot use {device}", str(error), "install cuda-bindings"
        ) from error


def _unlike(name: str, tensor: torch.Tensor, expected: str) -> BadInput:
    return BadInput(
        "unsupported_engine",
        f"the KV cache of {name} is {tuple(tensor.shape)} {tensor.stride()} on {tensor.device}",
        f"{expected} was expected",
    )
