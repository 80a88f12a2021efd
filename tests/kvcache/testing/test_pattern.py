"""The demo and the benchmarks believe this pattern, so it must see every wrong byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcache.block import StorageKey
from kvcache.testing.pattern import SPAN_BYTES, Pattern

BLOCK_BYTES = 4096
PATTERN = Pattern(1, BLOCK_BYTES)
keys = st.binary(min_size=32, max_size=32).map(StorageKey)


def filled(key: StorageKey) -> bytearray:
    block = bytearray(BLOCK_BYTES)
    PATTERN.fill(block, key)
    return block


@given(key=keys)
def test_what_was_filled_is_right(key: StorageKey) -> None:
    assert PATTERN.wrong_bytes(filled(key), key) == 0
    assert Pattern(1, BLOCK_BYTES).wrong_bytes(filled(key), key) == 0


@given(key=keys, at=st.sets(st.integers(0, BLOCK_BYTES - 1), min_size=1), flip=st.integers(1, 255))
def test_every_wrong_byte_is_counted(key: StorageKey, at: set[int], flip: int) -> None:
    block = filled(key)
    for position in at:
        block[position] ^= flip
    assert PATTERN.wrong_bytes(block, key) == len(at)


@given(key=keys, other=keys)
def test_another_block_is_wrong(key: StorageKey, other: StorageKey) -> None:
    same = sum(left == right for left, right in zip(key, other, strict=True))
    assert PATTERN.wrong_bytes(filled(other), key) >= 32 - same


def test_blocks_that_begin_at_the_same_place_differ_by_their_keys() -> None:
    key = StorageKey(bytes(32))
    other = StorageKey(bytes(24) + SPAN_BYTES.to_bytes(8, "little"))
    assert PATTERN.wrong_bytes(filled(other), key) == 1


def test_a_shifted_block_is_wrong_nearly_everywhere() -> None:
    key = StorageKey(bytes(range(32)))
    block = filled(key)
    block.append(block.pop(0))
    assert PATTERN.wrong_bytes(block, key) > 0.99 * BLOCK_BYTES


def test_another_seed_is_another_pattern() -> None:
    key = StorageKey(bytes(range(32)))
    assert Pattern(2, BLOCK_BYTES).wrong_bytes(filled(key), key) > 0.9 * BLOCK_BYTES
