"""What an operation checks: the caller's input before anything is sent, the node's replies before use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from kvcache.block import HASH_BYTES, BlockHash, BlockSpec
from kvcache.client.steps import BadReply
from kvcache.errors import BadInput
from kvcache.wire import TEXT_CHARS_MAX

if TYPE_CHECKING:
    from typing_extensions import Buffer

WAIT_MS_MAX: Final = 600_000

Item = TypeVar("Item")


def flat_blocks(
    blocks: Sequence[Sequence[Buffer]], spec: BlockSpec, *, writable: bool
) -> list[list[memoryview]]:
    """Each block's pieces as flat byte views. RAISES BadInput when they do not make up whole blocks."""
    block_bytes, chunk_bytes = spec.block_bytes, spec.chunk_bytes
    flat: list[list[memoryview]] = []
    for index, block in enumerate(blocks):
        try:
            views = [memoryview(piece).cast("B") for piece in block]
        except (TypeError, ValueError) as error:
            raise BadInput(
                "bad_block", f"a piece of block {index} cannot be used", str(error), "pass contiguous memory"
            ) from error
        if sum(map(len, views)) != block_bytes or any(len(view) % chunk_bytes for view in views):
            raise BadInput(
                "bad_block",
                f"block {index} has pieces of {[len(view) for view in views][:8]} bytes",
                f"a block has {block_bytes} bytes, in pieces of whole chunks of {chunk_bytes}",
                "pass whole blocks, in one piece or plane by plane",
            )
        if writable and any(view.readonly for view in views):
            raise BadInput("bad_block", f"block {index} is read-only", "it is to be loaded into")
        flat.append(views)
    return flat


def check_reply(holds: bool, why: str) -> None:
    """A reply that breaks this cannot be relied on. RAISES BadReply."""
    if not holds:
        raise BadReply(why)


def joined_hashes(prefix: Sequence[BlockHash]) -> bytes:
    joined = b"".join(prefix)
    if len(joined) != len(prefix) * HASH_BYTES:
        raise BadInput(
            "bad_prefix",
            f"{len(prefix)} block hashes of {len(joined)} bytes in all",
            f"a block hash has {HASH_BYTES} bytes",
            "pass what Handle.hashes returned",
        )
    return joined


def check_save(prefix: Sequence[BlockHash], blocks: Sequence[object], parent: bytes) -> None:
    if len(prefix) != len(blocks):
        raise BadInput(
            "bad_block", f"{len(blocks)} blocks for {len(prefix)} hashes", "each block has its hash"
        )
    if len(parent) not in (0, HASH_BYTES):
        raise BadInput("bad_prefix", f"a parent of {len(parent)} bytes", "it is one block hash, or empty")


def check_wait(wait_ms: int) -> None:
    if not 0 <= wait_ms <= WAIT_MS_MAX:
        raise BadInput("bad_lease", f"a wait of {wait_ms} ms", f"it is from 0 to {WAIT_MS_MAX}")


def check_lease(request: str, duration_ms: int, source: str = "") -> None:
    for text in (request, source):
        if len(text) > TEXT_CHARS_MAX // 4:
            raise BadInput("too_large", f"a name of {len(text)} characters", "it is a name", "shorten it")
    if duration_ms < 1:
        raise BadInput("bad_lease", f"a lease of {duration_ms} ms", "it would have ended")


def batches(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    for at in range(0, len(items), most):
        yield items[at : at + most]
