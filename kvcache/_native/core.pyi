from collections.abc import Sequence

from typing_extensions import Buffer

def copy_and_sum(
    sources: Sequence[Buffer],
    targets: Sequence[Buffer],
    chunk_bytes: int,
    *,
    level: str = "",
    stores: str = "auto",
) -> bytes:
    """As ``kvcache.sums.copy_and_sum``. RAISES ValueError.

    ``level`` (one of ``levels()``) and ``stores`` ("auto", "cached", "streaming") are for tests and
    measurements: every choice writes the same bytes and returns the same sums.
    """

def sum_chunks(buffers: Sequence[Buffer], chunk_bytes: int, *, level: str = "") -> bytes:
    """As ``kvcache.sums.sum_chunks``. RAISES ValueError."""

def levels() -> tuple[str, ...]:
    """The instruction levels that this machine runs, fastest first; the last is "portable"."""
