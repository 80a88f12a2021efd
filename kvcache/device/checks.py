"""What everything that moves or sums blocks asks of its arguments, and how it puts numbers on a device."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import torch

from kvcache.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Sequence

WORD_BYTES_MAX = 16
"""The widest word that a thread moves at once."""


def alignment(*positions: int) -> int:
    """The largest number of bytes, at most ``WORD_BYTES_MAX``, that divides all of them."""
    return gcd(WORD_BYTES_MAX, *positions)


def uploaded(numbers: Sequence[object], device: torch.device) -> torch.Tensor:
    """int64 of the (nested) list on the device: ready on its current stream, and not waited for."""
    table = torch.tensor(numbers, dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def check_planes(first: int, last: int | None, plane_count: int) -> int:
    """The end of the range, when it is one. RAISES BadInput."""
    end = plane_count if last is None else last
    if not 0 <= first < end <= plane_count:
        raise refused(
            f"planes {first} to {end}", f"a block has planes 0 to {plane_count}, and one is the least"
        )
    return end


def check_slab(slab: torch.Tensor, offsets: Sequence[int], block_bytes: int) -> None:
    """RAISES BadInput when the slab is not flat bytes, or the blocks are none or not in it."""
    if slab.ndim != 1 or slab.dtype != torch.uint8 or not slab.is_contiguous():
        raise refused(f"a slab of {slab.dtype} {tuple(slab.shape)}", "it is flat uint8 memory in one piece")
    if not offsets:
        raise refused("no block", "there is nothing to do")
    if min(offsets) < 0 or max(offsets) + block_bytes > len(slab):
        wrong = next(at for at in offsets if not 0 <= at <= len(slab) - block_bytes)
        raise refused(f"a block at byte {wrong}", f"the slab has {len(slab)} bytes, a block {block_bytes}")


def refused(what: str, why: str) -> BadInput:
    return BadInput(
        "bad_block", what, why, "nothing was touched; pass blocks, pages and slab that fit together"
    )
