"""Engines' tensors as planes: each layout by hand, what is refused and what the refusal says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvcache.block import BlockSpec
from kvcache.device.pages import LAYOUTS, PagedCache, planes_of
from kvcache.errors import BadInput
from tests.device.engine_cache import LAID, Shape, engine

NHD = "flash_attention_nhd"


def test_every_layout_is_tested() -> None:
    assert set(LAID) == set(LAYOUTS)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planes_are_the_engines_memory_in_canonical_order(layout: str, padded: bool) -> None:
    made = engine(layout, Shape(dtype=torch.float16), padded=padded)
    assert len(made.cache.planes) == len(made.content)
    for plane, content in zip(made.cache.planes, made.content, strict=True):
        assert np.array_equal(plane.numpy(), content)
    made.cache.planes[1][2, 0, 3] = 77
    made.content[1, 2, 0, 3] = 77
    made.check_memory()


def test_heads_first_in_memory_under_a_shape_of_tokens_first() -> None:
    """vLLM keeps the shape and permutes the strides: the shape says the layout."""
    memory = torch.arange(2 * 3 * 2 * 4 * 8, dtype=torch.float32).view(2, 3, 2, 4, 8)
    planes = planes_of(memory.permute(0, 1, 3, 2, 4), NHD)
    for part in (0, 1):
        assert torch.equal(planes[part].view(torch.float32), memory[part])
    cache = PagedCache([memory.permute(0, 1, 3, 2, 4)], NHD)
    assert cache.run_bytes == 4 * 32, "tokens of a head are next to one another"
    assert PagedCache([memory.transpose(2, 3).contiguous()], NHD).run_bytes == 32


def test_layers_that_are_slices_of_one_allocation() -> None:
    whole = torch.arange(5 * 3 * 2 * 4 * 2 * 8, dtype=torch.int32).view(5, 3, 2, 4, 2, 8)  # Pages first.
    cache = PagedCache([whole[:, layer] for layer in range(3)], "flashinfer_nhd")
    assert cache.page_count == 5 and len(cache.planes) == 6
    assert torch.equal(cache.planes[5].view(torch.int32), whole[:, 2, 1].transpose(1, 2))
    assert cache.addresses.tolist() == [plane.data_ptr() for plane in cache.planes]


@pytest.mark.parametrize("per_block", [1, 2, 4])
def test_the_shape_of_a_block(per_block: int) -> None:
    cache = engine("flashinfer_hnd", Shape(layers=3, heads=2, tokens=4, row=64)).cache
    assert cache.spec(per_block) == BlockSpec(4 * per_block, 6, 2, 4 * per_block * 64)


@pytest.mark.parametrize(
    ("tensors", "layout", "why"),
    [
        (lambda: [], NHD, "no tensor"),
        (lambda: [torch.zeros(2, 3, 4, 2, 8)], "paged_attention_v1", "the layout 'paged_attention_v1'"),
        (lambda: [torch.zeros(3, 2, 4, 2, 8)], NHD, r"tensor 0 has shape \(3, 2, 4, 2, 8\)"),
        (lambda: [torch.zeros(3, 4, 2, 8)], NHD, "tensor 0 has shape"),
        (lambda: [torch.zeros(3, 4, 2, 7)], "content_nhd", "tensor 0 has shape"),
        (lambda: [torch.zeros(2, 0, 4, 2, 8)], NHD, "tensor 0 has shape"),
        (lambda: [torch.zeros(2, 3, 4, 8, 2).transpose(3, 4)], NHD, "stand 2 apart"),
        (lambda: [torch.zeros(2, 1, 4, 2, 8).expand(2, 3, 4, 2, 8)], NHD, "rows share memory"),
        (lambda: [torch.zeros(64).as_strided((3, 4, 8), (16, 4, 1))], "mla", "rows share memory"),
        (lambda: [torch.zeros(3, 4, 8, dtype=torch.complex64)], "mla", "tensor 0 is torch.complex64"),
        (lambda: [torch.zeros(3, 4, 8).to_sparse()], "mla", "tensor 0 is torch.sparse_coo"),
        (lambda: [torch.zeros(3, 4, 8), torch.zeros(3, 4, 16)], "mla", "plane 1 has shape"),
        (lambda: [torch.zeros(3, 4, 8), torch.zeros(3, 4, 9)[..., :8]], "mla", "plane 1 has strides"),
        (lambda: [torch.zeros(3, 4, 8), torch.zeros(3, 4, 8, device="meta")], "mla", "plane 1 has device"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    tensors: Callable[[], list[torch.Tensor]], layout: str, why: str
) -> None:
    with pytest.raises(BadInput, match=why) as refused:
        PagedCache(tensors(), layout)
    assert refused.value.code == "unsupported_engine" and refused.value.why and refused.value.todo


@pytest.mark.parametrize(
    ("offsets", "pages", "why"),
    [
        ([], [], "0 offsets"),
        ([0], [[1], [2]], "1 offsets and the pages of 2 blocks"),
        ([0], [[]], "1 offsets"),
        ([0, 9999], [[1], [2, 3]], "different numbers of pages"),
        ([0], [[7]], "page 7"),
        ([0], [[-1]], "page -1"),
        ([-16], [[1]], "begin before it"),
        ([100, 99], [[1], [2]], "overlap"),
    ],
)
def test_moves_that_cannot_be(offsets: list[int], pages: list[list[int]], why: str) -> None:
    cache = engine("single_hnd", Shape()).cache
    with pytest.raises(BadInput, match=why) as refused:
        cache.moves(offsets, pages)
    assert refused.value.code == "bad_block"


def test_what_moves_say() -> None:
    cache = engine("single_hnd", Shape()).cache
    moves = cache.moves([8, 24 + 2 * cache.spec(2).block_bytes], [[1, 2], [3, 4]])
    assert moves.block_count == 2 and moves.pages.tolist() == [[1, 2], [3, 4]]
    assert (moves.alignment, moves.pages_differ) == (8, True)
    assert moves.end == 24 + 3 * cache.spec(2).block_bytes
    assert not cache.moves([0], [[1, 1]]).pages_differ
