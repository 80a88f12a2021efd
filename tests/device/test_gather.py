"""Pages to blocks and back: every layout, kind of number, head count and block size against the oracle.

Slabs and pads are full of poison, and the whole of what was allocated is compared: what was not named is
not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.device import gather as public
from kvcache.errors import BadInput
from tests.device.engine_cache import LAID, Engine, Shape, chunk_sums, engine, slab_bytes, slab_of
from tests.device.places import PLACES, Place, by_all, on_all

pytestmark = pytest.mark.slow

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8)
PAGES = {1: [[4], [0], [6]], 2: [[5, 1], [3, 4], [6, 0]], 3: [[6, 2, 0], [1, 5, 4]]}


def check_moves(place: Place, rig: Engine, pages: list[list[int]], gap: int = 80, first: int = 0) -> None:
    """Gather, scatter elsewhere, and both with sums: the planes from ``first`` on, of blocks with gaps
    between."""
    made, device = place.made, place.device
    spec, last = rig.cache.spec(len(pages[0])), len(rig.cache.planes)
    offsets = [gap + (spec.block_bytes + gap) * at for at in reversed(range(len(pages)))]
    length = len(pages) * (spec.block_bytes + gap) + gap
    moves = rig.cache.moves(offsets, pages)
    pieces = rig.blocks(pages, first, last)
    expected = slab_bytes(length, offsets, pieces, first * spec.plane_bytes)
    sums = [chunk_sums(piece, spec.chunk_bytes) for piece in pieces]
    slab, summed = slab_of(length, device), slab_of(length, device)
    made.gather(moves, slab, first, last)
    assert slab.cpu().numpy().tobytes() == expected
    assert made.gather_and_sum(moves, summed, first, last).tolist() == sums
    assert summed.cpu().numpy().tobytes() == expected

    turned = [[(page + 1) % rig.cache.page_count for page in of_block] for of_block in pages]
    other = rig.cache.moves(offsets, turned)
    rig.put(turned, pieces, first, last)
    made.scatter(other, slab, first, last)
    rig.check_memory()
    rig.put(pages, pieces, first, last)
    assert made.scatter_and_sum(moves, slab, first, last).tolist() == sums
    rig.check_memory()
    assert slab.cpu().numpy().tobytes() == expected, "who scatters only reads the slab"


@by_all
def test_memory_that_was_made_in_inference_mode(place: Place) -> None:
    """As engines make theirs. Rows of whole words and others."""
    for row in (64, 12):
        with torch.inference_mode():
            rig = engine("flashinfer_nhd", Shape(row=row), place.device)
        check_moves(place, rig, PAGES[2])


@by_all
@pytest.mark.parametrize("row", [64, 40])
@pytest.mark.parametrize("way", ["gather_and_sum", "scatter_and_sum"])
def test_who_writes_to_the_slab_meanwhile_is_not_summed(
    place: Place, way: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of his bytes would publish them, or pass for those in the pages."""
    rig = engine("flashinfer_nhd", Shape(row=row), place.device)
    size = rig.cache.spec(2).block_bytes
    moves = rig.cache.moves([0, size], PAGES[2][:2])
    blocks, chunk_bytes = rig.blocks(PAGES[2][:2], 1, 3), moves.spec.chunk_bytes
    slab = slab_of(2 * size, place.device)
    place.made.gather(moves, slab, 0, len(rig.cache.planes))
    for name in ("_launch_copy", "_launch_copy_and_sum", "_fill", "_scatter"):
        if done := getattr(place.made, name, None):
            monkeypatch.setattr(place.made, name, scribbling(done, slab))
    found = getattr(place.made, way)(moves, slab, 1, 3)
    assert found.tolist() == [chunk_sums(block, chunk_bytes) for block in blocks]
    assert slab[0] == 0xEE, "else nobody has written to it"
    rig.check_memory()


def scribbling(done: Callable[..., object], slab: torch.Tensor) -> Callable[..., object]:
    """The same, and then somebody writes to the slab."""

    def do(*given: object) -> object:
        result = done(*given)
        slab.fill_(0xEE)
        return result

    return do


@by_all
@pytest.mark.parametrize("per_block", PAGES)
@pytest.mark.parametrize("layout", LAID)
def test_every_layout(place: Place, layout: str, per_block: int) -> None:
    rig = engine(layout, Shape(row=64, dtype=torch.bfloat16), place.device, padded=per_block == 2)
    check_moves(place, rig, PAGES[per_block])


@by_all
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, dim", [(1, 128), (2, 80), (8, 16), (3, 12), (1, 5)])
def test_every_kind_of_number(place: Place, dtype: torch.dtype, heads: int, dim: int) -> None:
    """GQA leaves a rank few heads or many; rows of 5 to 512 bytes are moved in words of 1 to 16."""
    shape = Shape(layers=1, heads=heads, row=dim * dtype.itemsize, dtype=dtype)
    rig = engine("flash_attention_nhd", shape, place.device)
    check_moves(place, rig, PAGES[2], gap=81 if dim == 5 else 80)


@by_all
@pytest.mark.parametrize("first", [1, 3])
def test_some_layers_alone(place: Place, first: int) -> None:
    rig = engine("flashinfer_hnd", Shape(layers=2, row=128, dtype=torch.float16), place.device, padded=True)
    check_moves(place, rig, PAGES[2], first=first)


@by_all
@pytest.mark.parametrize("tokens, row", [(16, 1152), (64, 256), (3, 88), (16, 72)])
def test_planes_larger_than_a_tile_or_of_an_odd_size(place: Place, tokens: int, row: int) -> None:
    """MLA's 576 numbers; 64 KiB a plane; chunks that end within a stripe or a round."""
    shape = Shape(layers=1, pages=4, heads=2, tokens=tokens, row=row, dtype=torch.bfloat16)
    check_moves(place, engine("triton_nhd", shape, place.device), [[3, 1]])


@by_all
def test_a_slab_that_begins_anywhere(place: Place) -> None:
    """A view that is not aligned is moved in the words that fit it."""
    rig = engine("single_nhd", Shape(layers=1, dtype=torch.float16), place.device)
    (expected,) = rig.blocks([[2]])
    for shift in (1, 2, 4, 8, 16):
        whole = slab_of(len(expected) + 64, place.device)
        moves = rig.cache.moves([0], [[2]])
        sums = place.made.gather_and_sum(moves, whole[shift:], 0, 2)
        assert whole.cpu().numpy().tobytes() == slab_bytes(len(whole), [shift], [expected])
        assert sums.tolist() == [chunk_sums(expected, rig.cache.spec().chunk_bytes)]


@given(
    st.sampled_from(sorted(LAID)),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 3),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_shape(
    layout: str, heads: int, tokens: int, row: int, per_block: int, padded: bool, random: Random
) -> None:
    """The twin, against the oracle: the kernels are held to the same in fewer shapes, for they are slow
    here."""
    rig = engine(layout, Shape(1, 6, heads, tokens, row), seed=random.randrange(1000), padded=padded)
    order = random.sample(range(6), 6)
    pages = [order[at : at + per_block] for at in range(0, 7 - 2 * per_block, per_block)]
    check_moves(PLACES[0], rig, pages, gap=1)


@on_all
def test_the_public_functions_do_the_same(device: str) -> None:
    rig = engine("flash_attention_hnd", Shape(), device)
    spec = rig.cache.spec()
    moves = rig.cache.moves([0], [[3]])
    slab = slab_of(spec.block_bytes, device)
    public.gather(moves, slab)
    (block,) = rig.blocks([[3]])
    assert slab.cpu().numpy().tobytes() == block
    sums = [chunk_sums(block, spec.chunk_bytes)]
    assert public.gather_and_sum(moves, slab).tolist() == sums
    assert public.scatter_and_sum(moves, slab).tolist() == sums
    half = len(sums[0]) // 2
    assert public.scatter_and_sum(moves, slab, 2, 4).tolist() == [sums[0][half:]]
    public.scatter(moves, slab, 1, 2)
    rig.check_memory()


def test_what_does_not_fit_is_refused_before_a_byte_moves() -> None:
    rig = engine("single_hnd", Shape())
    spec = rig.cache.spec()
    moves = rig.cache.moves([0, spec.block_bytes], [[1], [1]])
    slab = slab_of(2 * spec.block_bytes)
    for call, why in (
        (lambda: public.gather(moves, slab, 3, 2), "planes 3 to 2"),
        (lambda: public.gather(moves, slab, 0, 5), "planes 0 to 5"),
        (lambda: public.gather(moves, slab[1:]), "a block at byte"),
        (lambda: public.gather(moves, slab.view(2, -1)), "flat uint8"),
        (lambda: public.gather(moves, slab[::2]), "flat uint8"),
        (lambda: public.gather(moves, slab.view(torch.int8)), "flat uint8"),
        (lambda: public.scatter(moves, slab), "named twice"),
        (lambda: public.scatter_and_sum(moves, slab), "named twice"),
        (lambda: public.gather(moves, slab.to("meta")), "one device"),
    ):
        with pytest.raises(BadInput, match=why):
            call()
    assert slab.numpy().tobytes() == slab_bytes(len(slab), [], [])
    rig.check_memory()
