"""XXH3-64 of every chunk of blocks in a slab, where they lie: ``kvcache.sums`` for device memory, bit for
bit.

So a device copy is verified for 8 bytes a chunk over PCIe (512 bytes for a block of 64 planes of one chunk
each), not for the block. On CUDA with Triton ``kvcache/device/kernels`` does it, else ``sums_twin``
(torch); on the CPU ``kvcache.sums``. Work is queued on the current stream and not waited for.

The sum: a block is read once: 32 MiB at 4.3 TB/s take 8 us, and the chain of rounds behind it some 3 us more;
over PCIe it would be 650 us. What was summed while it was moved (``gather_and_sum``) is not read again.
Figures on a GPU: not measured.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from kvcache import sums
from kvcache.device import sums_twin
from kvcache.device.checks import alignment, check_planes, check_slab, uploaded
from kvcache.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from kvcache.block import BlockSpec

try:
    from kvcache.device import kernels as _kernels
except ImportError:  # No Triton here.
    _triton: ModuleType | None = None
else:
    _triton = _kernels

log = logging.getLogger("kvcache.device")


@lru_cache(maxsize=64)
def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels, where they are used: on CUDA, with Triton and what it compiles with. Waits for the device
    when it is first asked for it."""
    if device.type != "cuda" or _triton is None:
        return None
    try:
        _triton.check(device)
    except Unavailable as error:
        log.warning("blocks are moved and summed by torch, slower: %s", error)
        return None
    return _triton


def sum_chunks(
    slab: torch.Tensor, offsets: Sequence[int], spec: BlockSpec, first: int = 0, last: int | None = None
) -> torch.Tensor:
    """The sums of the chunks of planes ``first`` to ``last`` (default: all) of the blocks that begin at these
    bytes of the slab, which is flat uint8 memory.

    int64 ``[block, chunk]`` on the slab's device: the bits of the u64 that ``kvcache.sums`` has. RAISES
    BadInput (bad_block): no block, planes that a block does not have, a block outside of the slab."""
    end = check_planes(first, last, spec.plane_count)
    check_slab(slab, offsets, spec.block_bytes)
    if slab.device.type == "cpu":
        starts = [offset + first * spec.plane_bytes for offset in offsets]
        width = (end - first) * spec.plane_bytes
        return sum_blocks([slab[start : start + width] for start in starts], spec.chunk_bytes)
    table = uploaded(list(offsets), slab.device)
    if kernels := kernels_for(slab.device):
        return kernels.sum_chunks(slab, table, alignment(*offsets), spec, first, end)
    return sums_twin.sum_in_slab(slab, table, spec, first, end)


def sum_blocks(blocks: Sequence[torch.Tensor], chunk_bytes: int) -> torch.Tensor:
    """As ``sum_chunks``, of flat uint8 tensors of whole chunks and equal length, wherever they are."""
    if blocks[0].device.type != "cpu":
        return sums_twin.sum_chunks(torch.stack(list(blocks)), chunk_bytes)
    joined = sums.sum_chunks([block.numpy() for block in blocks], chunk_bytes)
    return torch.frombuffer(bytearray(joined), dtype=torch.int64).view(len(blocks), -1)


def joined(chunk_sums: torch.Tensor) -> list[bytes]:
    """Of each block, its sums as ``kvcache.sums`` gives them. Waits for the device."""
    return [row.numpy().tobytes() for row in chunk_sums.cpu()]
