"""What an engine's paged KV cache is, as bytes: planes of pages, and where each byte of a block is in them.

An engine keeps one tensor a layer (or one for K and one for V). Whatever the order of its axes, each part of
a layer is a *plane view* ``[page, head, token, row]`` of uint8, a row being the ``head_dim`` numbers of one
head and token. Planes stand in the order of ``kvcache.block``: layer, then K, V. A store block is
``k`` pages; its canonical bytes are, plane after plane,

    [head][token = page_of_block * page_tokens + token_of_page][row]

What is moved are bytes, so fp16, bf16, fp8, fp32 and packed pages are all the same here. Where K and V or
the numbers themselves are packed in a way only the engine knows, a plane is opaque: read it as one head.

The sum: nothing here touches bytes; a ``Moves`` of 256 blocks is 100 us of Python and one copy of some KiB to
the device, made once a request however many layers follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

import torch

from kvcache.block import BlockSpec
from kvcache.device.checks import alignment, uploaded
from kvcache.errors import BadInput

LAYOUTS: Mapping[str, str] = {
    "flash_attention_nhd": "PNTHD",
    "flash_attention_hnd": "PNHTD",
    "flashinfer_nhd": "NPTHD",
    "flashinfer_hnd": "NPHTD",
    "triton_nhd": "NPTHD",
    "triton_hnd": "NPHTD",
    "content_nhd": "NTHC",
    "content_hnd": "NHTC",
    "single_nhd": "NTHD",
    "single_hnd": "NHTD",
    "mla": "NTD",
}
"""The axes of one tensor, as its shape names them: P part (K, V), N page, T token of the page, H head, D the
numbers of one head and token, C the same of K and then of V. ``single``: a tensor holds one plane (give those
of K and V in turn), or K and V packed together. Where an engine permutes strides and keeps the shape, the
shape counts."""


@dataclass(frozen=True, slots=True)
class Moves:
    """Which pages belong to which bytes of a slab. Made by ``PagedCache.moves``.

    ``table`` is int64 ``[block_count, 1 + pages_per_block]``, on the cache's device: the byte offset of the
    block in the slab, and then its pages, first token to last. Ready on the stream that was current when it
    was made.
    """

    cache: PagedCache
    spec: BlockSpec
    table: torch.Tensor
    alignment: int
    """The largest number of bytes, at most 16, that divides every offset."""
    end: int
    """One past the last byte of the slab that is touched."""
    pages_differ: bool
    """No page belongs to two blocks or twice to one."""

    @property
    def pages_per_block(self) -> int:
        return int(self.pages.shape[1])

    @property
    def block_count(self) -> int:
        return len(self.table)

    @property
    def offsets(self) -> torch.Tensor:
        return self.table[:, 0]

    @property
    def pages(self) -> torch.Tensor:
        return self.table[:, 1:]

    def alone(self, first: int, last: int) -> Moves:
        """The same pages, of these planes alone, and blocks one behind the other from byte 0 on. Ready on the
        current stream."""
        cache = self.cache.part(first, last)
        spec = cache.spec(self.pages_per_block)
        offsets = torch.arange(self.block_count, device=self.table.device) * spec.block_bytes
        table = torch.cat((offsets[:, None], self.pages), 1)
        end = self.block_count * spec.block_bytes
        return Moves(cache, spec, table, alignment(spec.block_bytes), end, self.pages_differ)


class PagedCache:
    """An engine's pages, as ``planes`` (uint8 ``[page, head, token, row]``), all of one shape and strides.

    ``tensors`` are the engine's, in the order of the layers; their memory is referred to, never copied.
    RAISES BadInput (unsupported_engine) that names the tensor and what about it is not served: an unknown
    layout, numbers that are not next to one another, pages that overlap, planes that differ.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], layout: str) -> None:
        if not tensors:
            raise _unsupported(
                "no tensor", "a cache has one a layer, at least", "register the engine's KV first"
            )
        planes = [
            plane for at, tensor in enumerate(tensors) for plane in planes_of(tensor, layout, f"tensor {at}")
        ]
        first = planes[0]
        for at, plane in enumerate(planes):
            for name, have, want in (
                ("shape", tuple(plane.shape), tuple(first.shape)),
                ("strides", plane.stride(), first.stride()),
                ("device", plane.device, first.device),
            ):
                if have != want:
                    raise _unsupported(
                        f"plane {at} has {name} {have} and plane 0 {want} (uint8 [page, head, token, row])",
                        "one launch moves all layers alike",
                        "serve layers that differ as groups of their own",
                    )
        self.planes = tuple(planes)
        self.device = first.device
        self.page_count: int
        self.head_count: int
        self.page_tokens: int
        self.row_bytes: int
        self.page_count, self.head_count, self.page_tokens, self.row_bytes = first.shape
        self.page_stride: int
        self.head_stride: int
        self.token_stride: int
        self.page_stride, self.head_stride, self.token_stride, _ = first.stride()
        self.addresses = torch.tensor([plane.data_ptr() for plane in planes], dtype=torch.int64).to(
            self.device
        )
        """Where each plane begins: int64 ``[plane]``, on the device."""
        steps = [step for step, size in zip(first.stride(), first.shape[:-1], strict=False) if size > 1]
        self.alignment = alignment(*(plane.data_ptr() for plane in planes), *steps)
        """The largest number of bytes, at most 16, that divides the address of every row."""

    @property
    def run_bytes(self) -> int:
        """How many bytes of a page are next to one another in the page and in a block, at least."""
        if self.token_stride != self.row_bytes and self.page_tokens > 1:
            return self.row_bytes
        return self.page_tokens * self.row_bytes

    def part(self, first: int, last: int) -> PagedCache:
        """Planes ``first`` to ``last`` alone, as a cache of their own: its blocks are those planes of blocks.
        REQUIRES: there are such."""
        made = copy(self)
        made.planes = self.planes[first:last]
        made.addresses = self.addresses[first:last]
        return made

    def spec(self, pages_per_block: int = 1) -> BlockSpec:
        """The shape of a block of so many pages. RAISES BadInput when it is none."""
        head_bytes = pages_per_block * self.page_tokens * self.row_bytes
        return BlockSpec(pages_per_block * self.page_tokens, len(self.planes), self.head_count, head_bytes)

    def moves(self, offsets: Sequence[int], pages: Sequence[Sequence[int]]) -> Moves:
        """Block i is the pages ``pages[i]`` and the ``block_bytes`` from byte ``offsets[i]`` of a slab.

        RAISES BadInput: no block, as many offsets as blocks or pages not given, a page that does not exist,
        an offset below 0, blocks that overlap in the slab.
        """
        if not offsets or len(offsets) != len(pages) or not pages[0]:
            raise _bad_moves(
                f"{len(offsets)} offsets and the pages of {len(pages)} blocks", "one of each a block"
            )
        per_block = len(pages[0])
        spec = self.spec(per_block)
        block_bytes = spec.block_bytes
        used = [page for of_block in pages for page in of_block]
        if any(len(of_block) != per_block for of_block in pages):
            raise _bad_moves("blocks of different numbers of pages", f"the first has {per_block}")
        if min(used) < 0 or max(used) >= self.page_count:
            wrong = next(page for page in used if not 0 <= page < self.page_count)
            raise _bad_moves(f"page {wrong}", f"the cache has pages 0 to {self.page_count - 1}")
        ordered = sorted(offsets)
        if ordered[0] < 0 or any(b - a < block_bytes for a, b in pairwise(ordered)):
            raise _bad_moves(
                "blocks that overlap in the slab, or begin before it", f"each has {block_bytes} bytes"
            )
        rows = [[offset, *of_block] for offset, of_block in zip(offsets, pages, strict=True)]
        return Moves(
            self,
            spec,
            uploaded(rows, self.device),
            alignment(*offsets),
            ordered[-1] + block_bytes,
            len(set(used)) == len(used),
        )


def planes_of(tensor: torch.Tensor, layout: str, name: str = "the tensor") -> list[torch.Tensor]:
    """The planes of one tensor of an engine: one, or that of K and that of V, as uint8 ``[page, head, token,
    row]`` views of its memory. RAISES BadInput (unsupported_engine)."""
    axes = LAYOUTS.get(layout)
    if axes is None:
        raise _unsupported(f"the layout {layout!r}", f"known are {', '.join(LAYOUTS)}", "name one of them")
    _check_memory(tensor, name)
    parts = tensor.shape[axes.index("P")] if "P" in axes and tensor.ndim == len(axes) else 2
    if tensor.ndim != len(axes) or parts != 2 or 0 in tensor.shape or ("C" in axes and tensor.shape[-1] % 2):
        raise _unsupported(
            f"{name} has shape {tuple(tensor.shape)}",
            f"{layout} is {_spelled(axes)}",
            "name the layout that the engine's attention backend uses",
        )
    if tensor.stride(-1) != 1:
        raise _unsupported(
            f"the numbers of a row of {name} stand {tensor.stride(-1)} apart",
            f"{layout} is {_spelled(axes)}, each row in one piece",
            "use a layout whose last axis is contiguous",
        )
    letters, content = axes, tensor.view(torch.uint8)
    if "H" not in letters:
        letters, content = f"{letters[:-1]}H{letters[-1]}", content.unsqueeze(-2)
    if "C" in letters:
        letters, content = f"{letters[:-1]}PD", content.unflatten(-1, (2, content.shape[-1] // 2))
    if "P" not in letters:
        letters, content = f"P{letters}", content.unsqueeze(0)
    planes = content.permute([letters.index(letter) for letter in "PNHTD"])
    for plane in planes:
        _check_apart(plane, name)
    return list(planes)


def _check_memory(tensor: torch.Tensor, name: str) -> None:
    kind = tensor.layout if tensor.layout != torch.strided else tensor.dtype
    if tensor.layout != torch.strided or tensor.is_complex():
        raise _unsupported(
            f"{name} is {kind}",
            "a page is plain numbers in memory",
            "keep the cache in fp16, bf16, fp32, fp8, or bytes",
        )


def _check_apart(plane: torch.Tensor, name: str) -> None:
    """No two rows share memory: an axis steps over all that smaller steps reach."""
    steps = sorted((step, size) for step, size in zip(plane.stride(), plane.shape, strict=True) if size > 1)
    reach = 1
    for step, size in steps:
        if step < reach:
            raise _unsupported(
                f"{name} has strides {plane.stride()} for {tuple(plane.shape)} (page, head, token, row)",
                "rows share memory, so writing one page would change another",
                "pass the tensor that the engine allocated, not an expanded view",
            )
        reach = step * (size - 1) + reach


def _spelled(axes: str) -> str:
    words = {"P": "2", "N": "pages", "T": "tokens", "H": "heads", "D": "head_dim", "C": "2 * head_dim"}
    return f"[{', '.join(words[axis] for axis in axes)}]"


def _unsupported(what: str, why: str, todo: str) -> BadInput:
    return BadInput("unsupported_engine", f"this KV cache cannot be served: {what}", why, todo)


def _bad_moves(what: str, why: str) -> BadInput:
    return BadInput("bad_block", what, why, "nothing was moved; pass the engine's block table and free slots")
