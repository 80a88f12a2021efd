"""XXH3-64 (seed 0) of many equal chunks at once, in torch: the fallback and the oracle of the device kernels.

All lengths, on any device. u64 are kept in int64: torch adds and multiplies them modulo 2**64, and a shift to
the right is masked. The sum: some 20 passes over the bytes; 0.3 GB/s a CPU core, where memory and torch's
calls (30 a KiB of the chunk, whatever their number) are the limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvcache.block import BlockSpec

PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
PRIME64 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
PRIME_MX1 = 0x165667919E3779F9
PRIME_MX2 = 0x9FB21C651E98DF25
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
START = (
    PRIME32[2],
    PRIME64[0],
    PRIME64[1],
    PRIME64[2],
    PRIME64[3],
    PRIME32[1],
    PRIME64[4],
    PRIME32[0],
)
"""What the eight accumulators begin with."""

STRIPE_BYTES = 64
ROUND_STRIPES = 16
ROUND_BYTES = STRIPE_BYTES * ROUND_STRIPES
"""After so many bytes the accumulators are scrambled."""
SHORT_BYTES_MAX = 240
LAST_KEY = len(SECRET) - STRIPE_BYTES - 7
SCRAMBLE_KEY = len(SECRET) - STRIPE_BYTES
MERGE_KEY = 11

_LOW = 0xFFFFFFFF


def sum_chunks(blocks: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
    """int64 ``[block, chunk]``: the bits of the XXH3-64 of each chunk of ``blocks``, uint8 ``[block, byte]``.

    REQUIRES: a block is whole chunks."""
    assert blocks.shape[1] % chunk_bytes == 0, (tuple(blocks.shape), chunk_bytes)
    chunks = blocks.reshape(-1, chunk_bytes)
    return _sums(chunks, chunk_bytes).view(len(blocks), -1)


def sum_in_slab(
    slab: torch.Tensor, offsets: torch.Tensor, spec: BlockSpec, first: int, last: int
) -> torch.Tensor:
    """As ``kvcache.device.sums.sum_chunks``, which has checked the arguments."""
    sums = []
    for plane in range(first, last):
        within = torch.arange(plane * spec.plane_bytes, (plane + 1) * spec.plane_bytes, device=slab.device)
        sums.append(sum_chunks(slab[offsets[:, None] + within], spec.chunk_bytes))
    return torch.cat(sums, 1)


def key_words(start: int, count: int = 8) -> list[int]:
    """So many u64 of the secret, from byte ``start`` on."""
    return [int.from_bytes(SECRET[at : at + 8], "little") for at in range(start, start + 8 * count, 8)]


def signed(value: int) -> int:
    """The int64 with the bits of this u64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _sums(chunks: torch.Tensor, length: int) -> torch.Tensor:
    if length > SHORT_BYTES_MAX:
        return _sum_long(chunks, length)
    if length > 128:
        return _sum_to_240(chunks, length)
    if length > 16:
        return _sum_to_128(chunks, length)
    if length > 8:
        low = _u64(chunks, 0) ^ signed(_key(24) ^ _key(32))
        high = _u64(chunks, length - 8) ^ signed(_key(40) ^ _key(48))
        return _avalanche(_byteswap(low) + high + _fold(low, high) + length)
    if length > 3:
        mixed = _u32(chunks, length - 4) + (_u32(chunks, 0) << 32) ^ signed(_key(8) ^ _key(16))
        mixed = mixed ^ _rotate(mixed, 49) ^ _rotate(mixed, 24)
        mixed = mixed * signed(PRIME_MX2)
        mixed = (mixed ^ _right(mixed, 35) + length) * signed(PRIME_MX2)
        return mixed ^ _right(mixed, 28)
    wide = chunks.long()
    mixed = wide[:, 0] << 16 | wide[:, length >> 1] << 24 | wide[:, length - 1] | length << 8
    mixed = mixed ^ (int.from_bytes(SECRET[:4], "little") ^ int.from_bytes(SECRET[4:8], "little"))
    mixed = (mixed ^ _right(mixed, 33)) * signed(PRIME64[1])
    mixed = (mixed ^ _right(mixed, 29)) * signed(PRIME64[2])
    return mixed ^ _right(mixed, 32)


def _sum_to_128(chunks: torch.Tensor, length: int) -> torch.Tensor:
    total = _mix16(chunks, 0, 0) + _mix16(chunks, length - 16, 16)
    for step in range(1, (length - 1) // 32 + 1):
        total = total + _mix16(chunks, 16 * step, 32 * step)
        total = total + _mix16(chunks, length - 16 * (step + 1), 32 * step + 16)
    return _avalanche(total + signed(length * PRIME64[0]))


def _sum_to_240(chunks: torch.Tensor, length: int) -> torch.Tensor:
    total = _mix16(chunks, 0, 0) + signed(length * PRIME64[0])
    for at in range(16, 128, 16):
        total = total + _mix16(chunks, at, at)
    total = _avalanche(total) + _mix16(chunks, length - 16, 136 - 17)
    for at in range(128, length // 16 * 16, 16):
        total = total + _mix16(chunks, at, at - 128 + 3)
    return _avalanche(total)


def _sum_long(chunks: torch.Tensor, length: int) -> torch.Tensor:
    lanes = _constants(chunks, START).expand(len(chunks), 8)
    scramble = _constants(chunks, key_words(SCRAMBLE_KEY))
    stripes = (length - 1) // STRIPE_BYTES
    for stripe in range(0, stripes, ROUND_STRIPES):
        count = min(ROUND_STRIPES, stripes - stripe)
        lanes = _accumulated(lanes, chunks, stripe * STRIPE_BYTES, [8 * at for at in range(count)])
        if (stripe + ROUND_STRIPES) * STRIPE_BYTES < length:
            lanes = (lanes ^ _right(lanes, 47) ^ scramble) * PRIME32[0]
    lanes = _accumulated(lanes, chunks, length - STRIPE_BYTES, [LAST_KEY])
    mixed = lanes ^ _constants(chunks, key_words(MERGE_KEY))
    total = _fold(mixed[:, 0::2], mixed[:, 1::2]).sum(1)
    return _avalanche(total + signed(length * PRIME64[0]))


def _accumulated(lanes: torch.Tensor, chunks: torch.Tensor, start: int, keys: list[int]) -> torch.Tensor:
    """The lanes ``[chunk, 8]`` and a stripe from byte ``start`` on for each of ``keys``."""
    data = _words(chunks, start, STRIPE_BYTES * len(keys), torch.int64)
    data = data.view(len(chunks), len(keys), 8)
    mixed = data ^ _constants(chunks, [word for key in keys for word in key_words(key)]).view(len(keys), 8)
    swapped = data.sum(1)[:, [1, 0, 3, 2, 5, 4, 7, 6]]
    return lanes + swapped + ((mixed & _LOW) * _right(mixed, 32)).sum(1)


def _constants(like: torch.Tensor, values: list[int] | tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([signed(value) for value in values], dtype=torch.int64, device=like.device)


def _key(start: int) -> int:
    return key_words(start, 1)[0]


def _u64(chunks: torch.Tensor, start: int) -> torch.Tensor:
    return _words(chunks, start, 8, torch.int64)[:, 0]


def _u32(chunks: torch.Tensor, start: int) -> torch.Tensor:
    return _words(chunks, start, 4, torch.int32)[:, 0].long() & _LOW


def _words(chunks: torch.Tensor, start: int, length: int, kind: torch.dtype) -> torch.Tensor:
    """So many bytes of each chunk, as words. A copy: they may begin anywhere."""
    return chunks[:, start : start + length].clone(memory_format=torch.contiguous_format).view(kind)


def _right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """The u64 shifted to the right: no sign comes in."""
    return value >> bits & (1 << 64 - bits) - 1


def _rotate(value: torch.Tensor, bits: int) -> torch.Tensor:
    return value << bits | _right(value, 64 - bits)


def _byteswap(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(torch.uint8).view(-1, 8).flip(1).view(torch.int64)[:, 0]


def _avalanche(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _right(value, 37)) * PRIME_MX1
    return value ^ _right(value, 32)


def _mix16(chunks: torch.Tensor, start: int, key: int) -> torch.Tensor:
    low = _u64(chunks, start) ^ signed(_key(key))
    return _fold(low, _u64(chunks, start + 8) ^ signed(_key(key + 8)))


def _fold(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Both halves of the product of u128, xored."""
    left_low, left_high = left & _LOW, _right(left, 32)
    right_low, right_high = right & _LOW, _right(right, 32)
    cross = left_high * right_low + _right(left_low * right_low, 32)
    other = left_low * right_high + (cross & _LOW)
    return left * right ^ left_high * right_high + _right(cross, 32) + _right(other, 32)
