"""Block bytes that follow from the block's key: quick to make, quick to compare, hard to mistake.

One run of noise is made from the seed. The block of a key is a stretch of it that begins where the key
says, with the key itself written over its first 32 bytes. So two blocks never agree in full, a block
that is shifted, cut, mixed or stale differs nearly everywhere, and every process that knows the seed
knows what each block must be, without storing any.

The sum: filling is one ``memcpy`` and comparing is one ``memcmp`` (``bytearray == buffer``; a memoryview
on the left would be compared item by item, a hundred times slower): 10 GB/s and more each.
"""

from __future__ import annotations

from hashlib import shake_128

from kvcache.block import KEY_BYTES, StorageKey

SPAN_BYTES = 1 << 20
"""As many places a block can begin at. That a foreign block has the same is caught by its key."""


class Pattern:
    """What the blocks of one shape are to hold. The same seed and size give the same everywhere."""

    def __init__(self, seed: int, block_bytes: int) -> None:
        assert block_bytes >= KEY_BYTES
        self.block_bytes = block_bytes
        noise = shake_128(b"kvcache.pattern" + seed.to_bytes(8, "little")).digest(block_bytes + SPAN_BYTES)
        self._noise = memoryview(noise)

    def fill(self, block: bytearray, key: StorageKey) -> None:
        """REQUIRES: ``block`` has ``block_bytes`` bytes."""
        assert len(block) == self.block_bytes
        block[:] = self._expected(key)
        block[:KEY_BYTES] = key

    def wrong_bytes(self, block: bytearray, key: StorageKey) -> int:
        """How many bytes of ``block`` differ from those of ``key``. Its first 32 bytes are spent by this."""
        assert len(block) == self.block_bytes
        wrong = _differing(bytes(block[:KEY_BYTES]), key)
        expected = self._expected(key)
        block[:KEY_BYTES] = expected[:KEY_BYTES]
        if block == expected:
            return wrong
        return wrong + _differing(bytes(block), bytes(expected))

    def _expected(self, key: StorageKey) -> memoryview:
        start = int.from_bytes(key[-8:], "little") % SPAN_BYTES
        return self._noise[start : start + self.block_bytes]


def _differing(left: bytes, right: bytes) -> int:
    """How many positions differ. REQUIRES: equal lengths."""
    difference = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return len(left) - difference.to_bytes(len(left), "little").count(0)
