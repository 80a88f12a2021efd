"""A model's KV as all ranks of any tensor parallel degree would save it, in the ``canonical`` layout.

One head of one plane is a run of bytes that follows from its place; a rank's block is the heads it holds,
one after the other, plane after plane. Nothing here knows of slices, so it can be their oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import shake_128

from kvcache.block import BlockSpec
from kvcache.namespace import Namespace, shape_of


@dataclass(frozen=True, slots=True)
class ShardedModel:
    """``head_count`` is that of the model, all its ranks together."""

    plane_count: int
    head_count: int
    head_bytes: int
    block_tokens: int = 4

    def spec(self, tp_size: int) -> BlockSpec:
        """Of the blocks of one rank. REQUIRES: the degree divides the heads."""
        assert self.head_count % tp_size == 0
        return BlockSpec(self.block_tokens, self.plane_count, self.head_count // tp_size, self.head_bytes)

    def namespace(self, tp_size: int, tp_rank: int) -> Namespace:
        return Namespace(
            model="m",
            weights="w",
            dtype="bfloat16",
            layout="canonical",
            block_tokens=self.block_tokens,
            shape=shape_of(self.spec(tp_size)),
            tp_size=tp_size,
            tp_rank=tp_rank,
        )

    def head(self, block: int, plane: int, head: int) -> bytes:
        """``head`` counts through the model."""
        place = b"".join(number.to_bytes(8, "little") for number in (block, plane, head))
        return shake_128(place).digest(self.head_bytes)

    def block(self, block: int, tp_size: int, tp_rank: int) -> bytes:
        """What this rank saves as the block of this number."""
        share = self.head_count // tp_size
        heads = range(tp_rank * share, (tp_rank + 1) * share)
        planes = range(self.plane_count)
        return b"".join(self.head(block, plane, head) for plane in planes for head in heads)
