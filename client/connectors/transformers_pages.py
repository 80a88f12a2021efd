"""The KV of a prefix in a transformers model as pages of its device: block i is page i, each layer's keys and
values are planes.

    device     memory of the node, HBM or host ◄─ one launch ─► planes    kvcache.device.engine
    staged     store ◄─► locked host memory ◄─ one copy ─► GPU memory ◄─ one launch ─► planes

The planes are the cache's own tensors, [1, head, token, dim], and are only looked at. On its way to host
memory a batch is gathered into one piece: so it crosses the link in one copy, not in two for each layer.

The sum: a batch of 64 MiB is 1.3 ms of PCIe at 50 GB/s and one launch; layer by layer it would be 64 copies
for 32 layers, of strided memory, each waited for. Figures on a GPU: not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvcache.block import BlockSpec
from kvcache.device.engine import PagedBlocks
from kvcache.device.gather import gather, scatter
from kvcache.device.pages import PagedCache
from kvcache.errors import BadInput

if TYPE_CHECKING:
    from transformers import DynamicCache

    from kvcache.client.store import BlockingStore, Lease
    from kvcache.device.engine import EngineDevice

BATCH_BYTES = 64 << 20
LAYOUT = "single_hnd"


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the KV of one model, in blocks of ``tokens``."""

    layers: int
    heads: int
    tokens: int
    dim: int
    dtype: torch.dtype

    @property
    def spec(self) -> BlockSpec:
        item_bytes = torch.empty((), dtype=self.dtype).element_size()
        return BlockSpec(self.tokens, 2 * self.layers, self.heads, self.tokens * self.dim * item_bytes)

    def rows(self, count: int, *, locked: bool = False) -> torch.Tensor:
        """Host memory for so many blocks: [block, layer, part, head, token, dim]."""
        sizes = (count, self.layers, 2, self.heads, self.tokens, self.dim)
        return torch.empty(sizes, dtype=self.dtype, pin_memory=locked)

    def room(self, count: int, device: torch.device) -> torch.Tensor:
        """Memory of the device: [layer, part, batch of 1, head, token of all blocks, dim]."""
        sizes = (self.layers, 2, 1, self.heads, count * self.tokens, self.dim)
        return torch.empty(sizes, dtype=self.dtype, device=device)

    def batch(self) -> int:
        """So many blocks go through host memory at once."""
        return max(1, BATCH_BYTES // self.spec.block_bytes)


def kept(cache: DynamicCache, shape: Shape, count: int) -> list[torch.Tensor]:
    """The keys and values of its layers, in turn, of the leading ``count`` blocks.

    RAISES BadInput when they are not what the shape says."""
    found = []
    wanted = (1, shape.heads, count * shape.tokens, shape.dim)
    for index, layer in enumerate(cache.layers):
        for states in (layer.keys, layer.values):
            whole = states[:, :, : count * shape.tokens]
            if tuple(whole.shape) != wanted or whole.dtype != shape.dtype:
                raise unsupported(f"layer {index} holds {tuple(whole.shape)} {whole.dtype}")
            found.append(whole)
    return found


def paged(planes: Sequence[torch.Tensor], shape: Shape) -> PagedCache:
    """``planes``: [1, head, token, dim] of whole blocks. RAISES BadInput when one launch cannot move them."""
    pages = [plane[0].unflatten(1, (-1, shape.tokens)).transpose(0, 1) for plane in planes]
    return PagedCache(pages, LAYOUT)


def every(pages: PagedCache, gpu: EngineDevice) -> PagedBlocks:
    """All of its blocks, for the store to load or save. RAISES Unavailable when the device failed."""
    return PagedBlocks(gpu, pages, [[page] for page in range(pages.page_count)])


def load_staged(store: BlockingStore, lease: Lease, pages: PagedCache, shape: Shape) -> frozenset[int]:
    """Fill the pages with the blocks of the lease, as ``store.load``; none behind one that failed."""
    for start in range(0, lease.count, shape.batch()):
        end = min(start + shape.batch(), lease.count)
        rows = shape.rows(end - start, locked=_is_locked(pages))
        failed = store.load(lease, buffers(rows), start)
        near = _flat(rows).to(pages.device)
        scatter(pages.moves(*_named(start, end, shape)), near)
        if failed:
            return failed
    return frozenset()


def staged(pages: PagedCache, start: int, end: int, shape: Shape) -> torch.Tensor:
    """Blocks ``start`` to ``end`` in host memory: [block, layer, part, head, token, dim]."""
    rows = shape.rows(end - start, locked=_is_locked(pages))
    near = torch.empty_like(_flat(rows), device=pages.device)
    gather(pages.moves(*_named(start, end, shape)), near)
    _flat(rows).copy_(near)
    return rows


def buffers(rows: torch.Tensor) -> list[list[Any]]:
    """The memory of each block, as the store takes it."""
    return [[row.reshape(-1).view(torch.uint8).numpy()] for row in rows]


def unsupported(why: str) -> BadInput:
    return BadInput(
        "unsupported_engine",
        f"kvcache cannot serve this model: {why}",
        "its blocks would be wrong or incomplete",
        "generate without kvcache; docs/transformers.md lists what is served",
    )


def _named(start: int, end: int, shape: Shape) -> tuple[list[int], list[list[int]]]:
    """Where blocks ``start`` to ``end`` lie in memory that holds just them, and their pages."""
    size = shape.spec.block_bytes
    return [at * size for at in range(end - start)], [[page] for page in range(start, end)]


def _flat(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(-1).view(torch.uint8)


def _is_locked(pages: PagedCache) -> bool:
    """A GPU copies from locked memory at the link's speed."""
    return bool(pages.device.type == "cuda")
