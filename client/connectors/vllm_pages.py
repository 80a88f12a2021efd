"""The engine's pages as the connector's worker needs them: as host memory, and as blocks of a device.

vLLM's CPU backend keeps one tensor a layer, ``[page, head, token, K and V]``. The interior of a page is
packed as the instruction set likes it (the namespace says how), so it is copied whole, as a plane of a block.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvcache.device.engine import EngineDevice, PagedBlocks
from kvcache.device.pages import PagedCache
from kvcache.errors import BadInput, Unavailable

if TYPE_CHECKING:
    from kvcache.block import BlockSpec

_log = logging.getLogger("vllm.kvcache")


class CpuPages:
    """In host memory. RAISES BadInput when the tensors are not what the namespace says."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], layers: Sequence[str], spec: BlockSpec) -> None:
        self._rows = []
        for name in layers:
            tensor = tensors[name]
            page_bytes = tensor[0].numel() * tensor.element_size()
            if tensor.device.type != "cpu" or not tensor[0].is_contiguous() or page_bytes != spec.plane_bytes:
                raise BadInput(
                    "unsupported_engine",
                    f"the KV cache of {name} is {tuple(tensor.shape)} {tensor.stride()} on {tensor.device}",
                    f"a contiguous page of {spec.plane_bytes} bytes on the CPU was expected",
                )
            self._rows.append(tensor.view(torch.uint8).flatten(1))
            assert self._rows[-1].data_ptr() == tensor.data_ptr(), "a view, not a copy"
        self._views = [rows.numpy() for rows in self._rows]
        self.spec = spec
        self.device = self._rows[0].device

    def planes(self, block_id: int) -> list[Any]:
        return [view[block_id] for view in self._views]

    def cache(self) -> PagedCache:
        """The same pages, for a device. RAISES BadInput."""
        shape = (self.spec.head_count, self.spec.block_tokens, -1)
        return PagedCache([rows.unflatten(1, shape) for rows in self._rows], "single_hnd")


class DevicePages:
    """Pages on a device of this process. ``cache``: block i of the engine is its page i."""

    def __init__(self, gpu: EngineDevice, cache: PagedCache) -> None:
        self.gpu = gpu
        self._cache = cache

    @property
    def has_slab(self) -> bool:
        """HBM of a node is mapped on it."""
        return self.gpu.has_slab

    def blocks(self, block_ids: Sequence[int]) -> PagedBlocks:
        """RAISES BadInput."""
        return PagedBlocks(self.gpu, self._cache, [[block_id] for block_id in block_ids])


def device_for(device: torch.device) -> EngineDevice | None:
    """None, and a line in the log, when its memory cannot be shared with a node."""
    try:
        return EngineDevice.of(device)
    except Unavailable as error:
        _log.warning("kvcache: HBM is not used: %s", error)
        return None
