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
    from kvcache.device.pages import Moves


def gather(moves: Moves, slab: torch.Tensor, first: int, last: int) -> None:
    for block, content in zip(_in_slab(moves, slab, first, last), _gathered(moves, first, last), strict=True):
        block.copy_(content)


def scatter(moves: Moves, slab: torch.Tensor, first: int, last: int) -> None:
    _scatter(moves, torch.stack(_in_slab(moves, slab, first, last)), first)


def gather_and_sum(moves: Moves, slab: torch.Tensor, first: int, last: int) -> torch.Tensor:
    gather(moves, slab, first, last)
    return sums.sum_blocks(_in_slab(moves, slab, first, last), moves.spec.chunk_bytes)


def scatter_and_sum(moves: Moves, slab: torch.Tensor, first: int, last: int) -> torch.Tensor:
    blocks = torch.stack(_in_slab(moves, slab, first, last))  # What is summed is what is written.
    _scatter(moves, blocks, first)
    return sums.sum_blocks(list(blocks), moves.spec.chunk_bytes)


def _in_slab(moves: Moves, slab: torch.Tensor, first: int, last: int) -> list[torch.Tensor]:
    """Of each block, the bytes of these planes."""
    plane_bytes = moves.spec.plane_bytes
    starts = (moves.offsets + first * plane_bytes).tolist()
    return [slab.narrow(0, start, (last - first) * plane_bytes) for start in starts]


def _gathered(moves: Moves, first: int, last: int) -> torch.Tensor:
    """uint8 ``[block, byte of these planes]``."""
    count, per_block = moves.pages.shape
    planes = []
    for plane in moves.cache.planes[first:last]:
        pages = plane[moves.pages.reshape(-1)].unflatten(0, (count, per_block))
        planes.append(
            pages.transpose(1, 2).reshape(count, -1)
        )  # [block, head, page of the block, token, row]
    return torch.cat(planes, 1)


def _scatter(moves: Moves, blocks: torch.Tensor, first: int) -> None:
    """``blocks``: uint8 ``[block, byte of the planes from first on]``."""
    _, heads, tokens, row = moves.cache.planes[0].shape
    count, per_block = moves.pages.shape
    planes = blocks.view(count, -1, heads, per_block, tokens, row)
    for at in range(planes.shape[1]):
        pages = planes[:, at].transpose(1, 2).reshape(count * per_block, heads, tokens, row)
        moves.cache.planes[first + at][moves.pages.reshape(-1)] = pages
