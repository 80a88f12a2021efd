"""XXH3-64 on the device against xxhash: every length of chunk that a BlockSpec can give, every plane
alone."""

from __future__ import annotations

import random

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvcache import sums as host_sums
from kvcache.block import CHUNK_BYTES_MAX, BlockSpec
from kvcache.device import checks, kernels, sums, sums_twin
from kvcache.device.pages import PagedCache
from kvcache.errors import BadInput
from tests.device.engine_cache import chunk_sums
from tests.device.places import CUDA, of_kernels, on_all

KERNEL_DEVICE = "cuda" if CUDA else "cpu"
# Chunks of whole stripes and rounds, and such as end within one; 248 is the shortest that the kernel sums.
LENGTHS = (248, 256, 312, 320, 512, 1024, 1032, 1088, 1984, 2048, 2056, 4096, 4608, 18432, 65472, 65536)
SHORT = (1, 3, 4, 8, 9, 16, 17, 33, 65, 97, 128, 129, 144, 239, 240, 241, 247, 1023, 1025)
ALL_BELOW = 1101


def noise(length: int, seed: int, device: str = "cpu") -> torch.Tensor:
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(length)), dtype=torch.uint8).to(device)


def expected(blocks: torch.Tensor, chunk_bytes: int) -> list[list[int]]:
    return [chunk_sums(block.cpu().numpy().tobytes(), chunk_bytes) for block in blocks]


@on_all
def test_every_length_to_a_kibibyte(device: str) -> None:
    for length in range(1, ALL_BELOW):
        blocks = noise(4 * length, length, device).view(2, -1)
        assert sums_twin.sum_chunks(blocks, length).tolist() == expected(blocks, length), length


@given(st.integers(1, CHUNK_BYTES_MAX), st.integers(1, 3), st.randoms(use_true_random=False))
def test_any_length(length: int, count: int, draw: random.Random) -> None:
    blocks = noise(count * length, draw.randrange(1 << 20)).view(1, -1)
    assert sums_twin.sum_chunks(blocks, length).tolist() == expected(blocks, length)


@pytest.mark.parametrize("pattern", [0, 0xFF], ids=["zeros", "ones"])
@pytest.mark.parametrize("length", [8, 240, 248, 65536])
def test_carries_of_every_multiplication(length: int, pattern: int) -> None:
    """All ones is where halves of a product carry most."""
    blocks = torch.full((1, length), pattern, dtype=torch.uint8)
    assert sums_twin.sum_chunks(blocks, length).tolist() == expected(blocks, length)


def in_kernel(
    slab: torch.Tensor, offsets: list[int], spec: BlockSpec, first: int, last: int
) -> list[list[int]]:
    table = checks.uploaded(offsets, slab.device)
    aligned = checks.alignment(*offsets)
    found: list[list[int]] = kernels.sum_chunks(slab, table, aligned, spec, first, last).tolist()
    return found


@of_kernels
@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS + SHORT)
def test_the_kernel_sums_every_chunk_of_some_planes(length: int) -> None:
    """Blocks at offsets in no order, with other bytes between; planes of two chunks where a plane can have
    two."""
    spec = BlockSpec(1, 3, 2, length)
    gap = 16 if length % 8 == 0 else 13
    offsets = [gap + spec.block_bytes, 0]
    slab = noise(2 * spec.block_bytes + gap, length, KERNEL_DEVICE)
    first = spec.plane_bytes
    for one, two in ((0, 3), (1, 2)):
        blocks = torch.stack([slab[at + one * first : at + two * first] for at in offsets])
        assert in_kernel(slab, offsets, spec, one, two) == expected(blocks, spec.chunk_bytes)


@of_kernels
@pytest.mark.slow
def test_the_kernel_itself_sums_what_it_can() -> None:
    """So the test above is one of the kernel: for these lengths the twin is not asked."""
    slab = noise(65536, 0, KERNEL_DEVICE)
    for length in LENGTHS:
        spec = BlockSpec(1, 1, 1, length)
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(sums_twin, "sum_in_slab")
            in_kernel(slab, [0], spec, 0, 1)
            with pytest.raises(AttributeError):
                in_kernel(slab, [1], spec, 0, 1)


@of_kernels
@pytest.mark.slow
@given(st.integers(30, 600), st.integers(1, 9), st.randoms(use_true_random=False))
def test_any_length_in_the_kernel(words: int, count: int, draw: random.Random) -> None:
    spec = BlockSpec(1, count, 1, 8 * words)
    slab = noise(spec.block_bytes, draw.randrange(1 << 20), KERNEL_DEVICE)
    assert in_kernel(slab, [0], spec, 0, count) == expected(slab[None], 8 * words)


@on_all
@pytest.mark.parametrize(
    "heads, head_bytes", [(8, 4096), (2, 65536), (1, 131072), (3, 1152), (5, 40), (1, 7)]
)
def test_as_the_host_sums_them(heads: int, head_bytes: int, device: str) -> None:
    """Byte for byte what ``kvcache.sums`` says, which is what leases carry."""
    spec = BlockSpec(4, 3, heads, head_bytes)
    offsets = [spec.block_bytes + 32, 8]
    slab = noise(2 * spec.block_bytes + 64, heads, device)
    blocks = [slab[at : at + spec.block_bytes].cpu().numpy() for at in offsets]
    found = sums.joined(sums.sum_chunks(slab, offsets, spec))
    assert found == [host_sums.sum_chunks([block], spec.chunk_bytes) for block in blocks]
    per_plane = len(found[0]) // 3
    part = sums.joined(sums.sum_chunks(slab, offsets, spec, 1, 2))
    assert part == [whole[per_plane : 2 * per_plane] for whole in found]


def test_one_bit_is_seen() -> None:
    spec = BlockSpec(1, 2, 1, 4096)
    slab = noise(spec.block_bytes, 5)
    before = sums.sum_chunks(slab, [0], spec)
    slab[5000] ^= 1
    assert (sums.sum_chunks(slab, [0], spec) == before).tolist() == [[True, False]]


def test_what_cannot_be_summed_is_refused() -> None:
    spec = BlockSpec(1, 2, 1, 64)
    slab = noise(256, 0)
    for call, why in (
        (lambda: sums.sum_chunks(slab, [], spec), "no block"),
        (lambda: sums.sum_chunks(slab, [0, 129], spec), "a block at byte 129"),
        (lambda: sums.sum_chunks(slab, [-1], spec), "a block at byte -1"),
        (lambda: sums.sum_chunks(slab, [0], spec, 2, 2), "planes 2 to 2"),
        (lambda: sums.sum_chunks(slab, [0], spec, 0, 3), "planes 0 to 3"),
        (lambda: sums.sum_chunks(slab.view(torch.float16), [0], spec), "flat uint8"),
    ):
        with pytest.raises(BadInput, match=why):
            call()


def test_the_secret_is_xxhashs_own() -> None:
    """A chunk of 9 to 16 zero bytes is the fold of two of its words, so a wrong one would show at once."""
    for length in (9, 16, 64, 200):
        zeros = torch.zeros((1, length), dtype=torch.uint8)
        digest = xxhash.xxh3_64_intdigest(bytes(length))
        assert sums_twin.sum_chunks(zeros, length).tolist() == [[sums_twin.signed(digest)]]


def test_blocks_of_a_cache_have_the_specs_chunks() -> None:
    cache = PagedCache([torch.zeros((2, 3, 16, 8, 128), dtype=torch.bfloat16)], "flash_attention_nhd")
    assert cache.spec(2) == BlockSpec(32, 2, 8, 32 * 256)
