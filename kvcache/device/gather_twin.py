"""``kvcache/device/kernels`` in torch: the fallback where Triton is not, and the oracle for it.

Works on any device. The functions are those of ``kvcache.device.gather``, which has checked what they get.

The sum: an index_select and a copy a plane and a copy a block; on CUDA that is three launches a plane, on
the CPU two passes over the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvcache.device import sums

if TYPE_CHECKING:
    from kvcache.device.pages import Moves, PagedCache


def gather(cache: PagedCache, slab: torch.Tensor, moves: Moves, first: int, last: int) -> None:
    for block, content in zip(
        _in_slab(cache, slab, moves, first, last), _gathered(cache, moves, first, last), strict=True
    ):
        block.copy_(content)


def scatter(cache: PagedCache, slab: torch.Tensor, moves: Moves, first: int, last: int) -> None:
    _scatter(cache, torch.stack(_in_slab(cache, slab, moves, first, last)), moves, first)


def gather_and_sum(
    cache: PagedCache, slab: torch.Tensor, moves: Moves, first: int, last: int
) -> torch.Tensor:
    gather(cache, slab, moves, first, last)
    return sums.sum_blocks(
        _in_slab(cache, slab, moves, first, last), cache.spec(moves.pages_per_block).chunk_bytes
    )


def scatter_and_sum(
    cache: PagedCache, slab: torch.Tensor, moves: Moves, first: int, last: int
) -> torch.Tensor:
    blocks = torch.stack(_in_slab(cache, slab, moves, first, last))  # What is summed is what is written.
    _scatter(cache, blocks, moves, first)
    return sums.sum_blocks(list(blocks), cache.spec(moves.pages_per_block).chunk_bytes)


def _in_slab(
    cache: PagedCache, slab: torch.Tensor, moves: Moves, first: int, last: int
) -> list[torch.Tensor]:
    """Of each block, the bytes of these planes."""
    plane_bytes = cache.spec(moves.pages_per_block).plane_bytes
    starts = (moves.offsets + first * plane_bytes).tolist()
    return [slab.narrow(0, start, (last - first) * plane_bytes) for start in starts]


def _gathered(cache: PagedCache, moves: Moves, first: int, last: int) -> torch.Tensor:
    """uint8 ``[block, byte of these planes]``."""
    count, per_block = moves.pages.shape
    planes = []
    for plane in cache.planes[first:last]:
        pages = plane[moves.pages.reshape(-1)].unflatten(0, (count, per_block))
        planes.append(
            pages.transpose(1, 2).reshape(count, -1)
        )  # [block, head, page of the block, token, row]
    return torch.cat(planes, 1)


def _scatter(cache: PagedCache, blocks: torch.Tensor, moves: Moves, first: int) -> None:
    """``blocks``: uint8 ``[block, byte of the planes from first on]``."""
    _, heads, tokens, row = cache.planes[0].shape
    count, per_block = moves.pages.shape
    planes = blocks.view(count, -1, heads, per_block, tokens, row)
    for at in range(planes.shape[1]):
        pages = planes[:, at].transpose(1, 2).reshape(count * per_block, heads, tokens, row)
        cache.planes[first + at][moves.pages.reshape(-1)] = pages
