"""Between an engine's pages and whole blocks in a slab: all layers and blocks of a request in one launch.

    gather    pages -> slab        scatter    slab -> pages

The slab is flat uint8 memory of the cache's device; where a block lies in it, and which pages it is, says a
``Moves`` (``kvcache.device.pages``). Planes ``first`` to ``last`` may be moved alone, so that layer i goes
while layer i + 1 is computed; the same ``Moves`` serves them all. ``..._and_sum`` also give the chunk sums
that ``kvcache.sums`` would, of the bytes that were moved, at one more small launch.

On CUDA with Triton ``kvcache/device/kernels`` does it; otherwise ``kvcache/device/gather_twin`` (torch)
does the same, one copy a layer, and is the oracle. Work is queued on the current stream of the cache's
device and no call waits for it: slab, pages and moves must stay as they are until it is done (an event says
when).

* Bad input is refused before anything is queued.
* Bytes outside of the planes and blocks that were named are neither written nor read.

The sum: every byte is read once and written once, so a copy's 4.3 TB/s (read and write, H200) are the
ceiling: 32 MiB take 16 us, 2 MiB 1 us; a launch costs 20 to 30 us of Python and 3 to 5 us of GPU. So a
request is bound by the launch up to some 64 MiB, and index_select + copy, at two launches a layer and part,
takes 64 times that for 32 layers. PCIe (50 GB/s) needs 650 us for 32 MiB: beside it the gather hides.
Figures on a GPU: not measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcache.device import gather_twin
from kvcache.device.checks import check_planes, check_slab, refused
from kvcache.device.sums import kernels_for

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from kvcache.device.pages import Moves


def gather(moves: Moves, slab: torch.Tensor, first: int = 0, last: int | None = None) -> None:
    """Copy planes ``first`` to ``last`` (default: all) of every block of ``moves`` from its pages into the
    slab.

    RAISES BadInput (bad_block) when slab and moves do not fit one another."""
    last = _checked(moves, slab, first, last)
    _chosen(moves).gather(moves, slab, first, last)


def scatter(moves: Moves, slab: torch.Tensor, first: int = 0, last: int | None = None) -> None:
    """Copy planes ``first`` to ``last`` (default: all) of every block of ``moves`` from the slab into its
    pages.

    RAISES BadInput (bad_block) as ``gather``, and when a page is named twice."""
    last = _checked(moves, slab, first, last)
    _check_pages(moves)
    _chosen(moves).scatter(moves, slab, first, last)


def gather_and_sum(moves: Moves, slab: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
    """As ``gather``; returns the sums of the chunks of those planes, of the bytes that were written.

    int64 ``[block, chunk]`` on the device: the bits of the u64 that ``kvcache.sums`` has. RAISES BadInput."""
    last = _checked(moves, slab, first, last)
    return _chosen(moves).gather_and_sum(moves, slab, first, last)


def scatter_and_sum(
    moves: Moves, slab: torch.Tensor, first: int = 0, last: int | None = None
) -> torch.Tensor:
    """As ``scatter``; returns the sums of the chunks of those planes, of the bytes that were read and
    written.

    int64 ``[block, chunk]`` on the device. The pages are to be used only when the sums are right. RAISES
    BadInput.
    """
    last = _checked(moves, slab, first, last)
    _check_pages(moves)
    return _chosen(moves).scatter_and_sum(moves, slab, first, last)


def _chosen(moves: Moves) -> ModuleType:
    return kernels_for(moves.cache.device) or gather_twin


def _checked(moves: Moves, slab: torch.Tensor, first: int, last: int | None) -> int:
    """The end of the range of planes, when all fits."""
    end = check_planes(first, last, moves.spec.plane_count)
    check_slab(slab, [moves.end - moves.spec.block_bytes], moves.spec.block_bytes)
    if slab.device != moves.cache.device:
        where = f"a slab on {slab.device} and a cache on {moves.cache.device}"
        raise refused(where, "one launch moves within one device")
    return end


def _check_pages(moves: Moves) -> None:
    if not moves.pages_differ:
        raise refused("a page that is named twice", "two blocks would be written to it, in no order")
