"""MessagePack with hard limits: what a peer sends can cost a bounded time and memory, whatever it is.

The only file that imports msgpack. The limits are those of the messages in ``kvcache.wire``.
"""

from __future__ import annotations

from typing import TypeVar

import msgpack

BODY_BYTES_MAX = 4 << 20
PREFIX_BLOCKS_MAX = 65_536
TEXT_CHARS_MAX = 4_096
# No message holds more: [call, message] and four lists; a message and one map a list entry.
LISTS_MAX = 5
MAPS_MAX = PREFIX_BLOCKS_MAX + 2

_Container = TypeVar("_Container")


class _Limit:
    """Counts containers while a body is decoded, so that a body of nothing but brackets ends early."""

    __slots__ = ("_left", "_what")

    def __init__(self, what: str, most: int) -> None:
        self._what = what
        self._left = most

    def __call__(self, container: _Container) -> _Container:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it holds too many {self._what}")
        return container


def pack(value: object) -> bytes:
    """RAISES ValueError or OverflowError for what MessagePack cannot say."""
    packed = msgpack.packb(value, use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def unpack(
    body: bytes | memoryview, lists_max: int = LISTS_MAX, items_max: int = PREFIX_BLOCKS_MAX
) -> object:
    """RAISES ValueError for anything that is not one value within the limits: at most ``lists_max`` lists,
    of at most ``items_max`` items each."""
    try:
        plain: object = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            list_hook=_Limit("lists", lists_max),
            object_hook=_Limit("maps", MAPS_MAX),
            max_str_len=TEXT_CHARS_MAX,
            max_bin_len=BODY_BYTES_MAX,
            max_array_len=min(len(body), items_max),
            max_map_len=min(len(body), TEXT_CHARS_MAX),
            max_ext_len=0,
        )
    except msgpack.exceptions.UnpackException as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return plain
