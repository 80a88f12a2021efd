"""``kvcache/device/kernels`` in torch: the fallback where Triton is not, and the oracle for it.

Works on any device, and on tensors that an engine made in inference mode. The functions are those of
``kvcache.device.gather``, which has checked what they get.

The sum: an index_select and a copy a plane and a copy a block; on CUDA that is three launches a plane, on
the CPU two passes over the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvcache.device import sums
from kvcache.device.checks import alignment

if TYPE_CHECKING:
    from kvcache.device.pages import Moves


def gather(moves: Moves, slab: torch.Tensor, first: int, last: int) -> None:
    _fill(_in_slab(moves, slab, first, last), _gathered(moves, first, last))


def scatter(moves: Moves, slab: torch.Tensor, first: int, last: int) -> None:
    _scatter(moves, torch.stack(_in_slab(moves, slab, first, last)), first)


def gather_and_sum(moves: Moves, slab: torch.Tensor, first: int, last: int) -> torch.Tensor:
    contents = _gathered(moves, first, last)  # Others may write to the slab.
    _fill(_in_slab(moves, slab, first, last), contents)
    return sums.sum_blocks(list(contents), moves.spec.chunk_bytes)


def scatter_and_sum(moves: Moves, slab: torch.Tensor, first: int, last: int) -> torch.Tensor:
    blocks = torch.stack(_in_slab(moves, slab, first, last))  # What is summed is what is written.
    _scatter(moves, blocks, first)
    return sums.sum_blocks(list(blocks), moves.spec.chunk_bytes)


def _fill(blocks: list[torch.Tensor], contents: torch.Tensor) -> None:
    with torch.inference_mode():
        for block, content in zip(blocks, contents, strict=True):
            block.copy_(content)


def _in_slab(moves: Moves, slab: torch.Tensor, first: int, last: int) -> list[torch.Tensor]:
    """Of each block, the bytes of these planes."""
    plane_bytes = moves.spec.plane_bytes
    starts = (moves.offsets + first * plane_bytes).tolist()
    return [slab.narrow(0, start, (last - first) * plane_bytes) for start in starts]


def _gathered(moves: Moves, first: int, last: int) -> torch.Tensor:
    """uint8 ``[block, byte of these planes]``."""
    count, per_block = moves.pages.shape
    planes = []
    for plane in _planes(moves, first, last):
        pages = plane[moves.pages.reshape(-1)].unflatten(0, (count, per_block))
        planes.append(
            pages.transpose(1, 2).reshape(count, -1)
        )  # [block, head, page of the block, token, row]
    return torch.cat(planes, 1).view(torch.uint8)


def _scatter(moves: Moves, blocks: torch.Tensor, first: int) -> None:
    """``blocks``: uint8 ``[block, byte of the planes from first on]``."""
    last = first + blocks.shape[1] // moves.spec.plane_bytes
    planes = _planes(moves, first, last)
    count, per_block = moves.pages.shape
    _, heads, tokens, row = planes[0].shape
    content = blocks.view(planes[0].dtype).view(count, len(planes), heads, per_block, tokens, row)
    with torch.inference_mode():
        for at, plane in enumerate(planes):
            pages = content[:, at].transpose(1, 2).reshape(count * per_block, heads, tokens, row)
            plane[moves.pages.reshape(-1)] = pages


def _planes(moves: Moves, first: int, last: int) -> list[torch.Tensor]:
    """In words of 8 bytes where they are whole: torch moves a word as fast as a byte."""
    cache = moves.cache
    offsets = [plane.storage_offset() for plane in cache.planes[first:last]]
    whole = alignment(cache.alignment, cache.row_bytes, *offsets) >= 8
    return [plane.view(torch.int64) if whole else plane for plane in cache.planes[first:last]]
