"""Engines' caches with known content, in every layout, and what blocks of them must be: the oracle of these
tests.

Written without ``kvcache.device``: the content is one array ``[plane, page, head, token, row]``, each
layout is laid out by hand, and a block is cut from the content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from kvcache.device.pages import PagedCache

POISON = 0xA5
GAP = 48
"""Bytes of poison behind each page of a padded cache."""

Planes = np.ndarray
"""uint8 ``[part, page, head, token, row]`` of one layer."""


def _content(parts: Planes, axes: str) -> Planes:
    """K and then V in each row."""
    return np.concatenate([parts[0], parts[1]], axis=-1).transpose(["NHTC".index(axis) for axis in axes])


def _parts(parts: Planes, axes: str) -> Planes:
    return parts.transpose(["PNHTD".index(axis) for axis in axes])


LAID: Mapping[str, Callable[[Planes], Sequence[Planes]]] = {
    "flash_attention_nhd": lambda parts: [_parts(parts, "PNTHD")],
    "flash_attention_hnd": lambda parts: [_parts(parts, "PNHTD")],
    "flashinfer_nhd": lambda parts: [_parts(parts, "NPTHD")],
    "flashinfer_hnd": lambda parts: [_parts(parts, "NPHTD")],
    "triton_nhd": lambda parts: [_parts(parts, "NPTHD")],
    "triton_hnd": lambda parts: [_parts(parts, "NPHTD")],
    "content_nhd": lambda parts: [_content(parts, "NTHC")],
    "content_hnd": lambda parts: [_content(parts, "NHTC")],
    "single_nhd": lambda parts: [part.transpose(0, 2, 1, 3) for part in parts],
    "single_hnd": lambda parts: list(parts),
    "mla": lambda parts: [part[:, 0] for part in parts],  # One head, and each part a layer.
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a cache. ``row`` is in bytes."""

    layers: int = 2
    pages: int = 7
    heads: int = 2
    tokens: int = 4
    row: int = 64
    dtype: torch.dtype = torch.uint8

    @property
    def plane_bytes(self) -> int:
        """Of one page."""
        return self.heads * self.tokens * self.row


@dataclass(slots=True)
class Engine:
    """``memory`` is all that was allocated, a tensor each; those of ``cache`` are views of it."""

    layout: str
    padded: bool
    content: np.ndarray
    memory: list[torch.Tensor]
    cache: PagedCache

    def blocks(self, pages: Sequence[Sequence[int]], first: int = 0, last: int | None = None) -> list[bytes]:
        """The bytes of planes ``first`` to ``last`` of the blocks that these pages are."""
        chosen = self.content[first:last]
        return [chosen[:, list(of_block)].transpose(0, 2, 1, 3, 4).tobytes() for of_block in pages]

    def put(self, pages: Sequence[Sequence[int]], blocks: Sequence[bytes], first: int, last: int) -> None:
        """What the content is once these bytes were scattered to these planes."""
        _, _, heads, tokens, row = self.content.shape
        for of_block, block in zip(pages, blocks, strict=True):
            shape = (last - first, heads, len(of_block), tokens, row)
            planes = np.frombuffer(block, np.uint8).reshape(shape).transpose(0, 2, 1, 3, 4)
            self.content[first:last, list(of_block)] = planes

    def check_memory(self) -> None:
        """Every byte is what ``content`` says, and between pages there is still poison."""
        for have, want in zip(self.memory, _laid(self.layout, self.content, self.padded), strict=True):
            assert np.array_equal(have.cpu().numpy(), want)


def engine(layout: str, shape: Shape, device: str = "cpu", seed: int = 0, padded: bool = False) -> Engine:
    """Random content, laid out as this engine's attention backend wants it.

    ``padded``: behind each page (along the first axis) stand ``GAP`` bytes that belong to nobody."""
    heads = 1 if layout == "mla" else shape.heads
    size = (shape.layers * 2, shape.pages, heads, shape.tokens, shape.row)
    content = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    memory = [torch.tensor(room, device=device) for room in _laid(layout, content, padded)]
    tensors, at = [], 0
    for layer in range(shape.layers):
        for laid in LAID[layout](content[2 * layer : 2 * layer + 2]):
            pages = memory[at][:, : laid[0].size].view(shape.dtype)
            numbers = (*laid.shape[1:-1], laid.shape[-1] // shape.dtype.itemsize)
            tensors.append(pages.unflatten(1, numbers))
            at += 1
    return Engine(layout, padded, content, memory, PagedCache(tensors, layout))


def _laid(layout: str, content: np.ndarray, padded: bool) -> list[np.ndarray]:
    """uint8 ``[first axis, bytes]`` of every tensor."""
    memory = []
    for layer in range(len(content) // 2):
        for laid in LAID[layout](content[2 * layer : 2 * layer + 2]):
            room = np.full((len(laid), laid[0].size + (GAP if padded else 0)), POISON, np.uint8)
            room[:, : laid[0].size] = laid.reshape(len(laid), -1)
            memory.append(room)
    return memory


def slab_of(length: int, device: str = "cpu") -> torch.Tensor:
    """Flat memory full of poison."""
    return torch.full((length,), POISON, dtype=torch.uint8, device=device)


def slab_bytes(length: int, offsets: Sequence[int], pieces: Sequence[bytes], at: int = 0) -> bytes:
    """A poisoned slab in which only these pieces stand, each ``at`` bytes behind its offset."""
    whole = bytearray([POISON]) * length
    for offset, piece in zip(offsets, pieces, strict=True):
        whole[offset + at : offset + at + len(piece)] = piece
    return bytes(whole)


def chunk_sums(block: bytes, chunk_bytes: int) -> list[int]:
    """By xxhash, as the int64 with the same bits."""
    digests = [
        xxhash.xxh3_64_intdigest(block[at : at + chunk_bytes]) for at in range(0, len(block), chunk_bytes)
    ]
    return [digest - (1 << 64) if digest >> 63 else digest for digest in digests]
