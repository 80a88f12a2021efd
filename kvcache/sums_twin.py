"""``kvcache/_native/core`` in Python: the fallback where nothing was compiled, and the oracle for what was.

Each chunk is copied with ``memmove`` (which lets other threads run) and then summed where it was
written, while it is still in a cache: so here too a source byte is read once, and the sum is of the
bytes that were written. A chunk costs about 2 us of interpreter beside its bytes.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SIMPLE = 0
_WRITABLE = 1


class _View(ctypes.Structure):
    """CPython's ``Py_buffer``: the only way to the address of a buffer that is read-only."""

    buf: int | None
    len: int
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def copy_and_sum(sources: Sequence[Buffer], targets: Sequence[Buffer], chunk_bytes: int) -> bytes:
    """As ``kvcache.sums.copy_and_sum``. RAISES ValueError."""
    with _views(sources, "source") as readable, _views(targets, "target") as writable:
        _check_chunks(readable, chunk_bytes)
        _check_pairs(readable, writable)
        _check_apart(readable, writable)
        sums = []
        for source, target, buffer in zip(readable, writable, targets, strict=True):
            written = _bytes_of(buffer, target)
            for start in range(0, source.len, chunk_bytes):
                ctypes.memmove(_address(target) + start, _address(source) + start, chunk_bytes)
                sums.append(_sum(written[start : start + chunk_bytes]))
        return b"".join(sums)


def sum_chunks(buffers: Sequence[Buffer], chunk_bytes: int) -> bytes:
    """As ``kvcache.sums.sum_chunks``. RAISES ValueError."""
    with _views(buffers, "source") as views:
        _check_chunks(views, chunk_bytes)
        sums = []
        for view, buffer in zip(views, buffers, strict=True):
            content = _bytes_of(buffer, view)
            sums += [_sum(content[at : at + chunk_bytes]) for at in range(0, view.len, chunk_bytes)]
        return b"".join(sums)


def _sum(chunk: memoryview) -> bytes:
    return xxhash.xxh3_64_intdigest(chunk).to_bytes(8, "little")


def _address(view: _View) -> int:
    return view.buf or 0


def _bytes_of(buffer: Buffer, view: _View) -> memoryview:
    """The buffer as plain bytes. An empty one of some shapes cannot be cast, and need not be."""
    return memoryview(buffer).cast("B") if view.len else memoryview(b"")


@contextmanager
def _views(buffers: Sequence[Buffer], role: str) -> Iterator[list[_View]]:
    """The buffers' addresses and lengths; their owners keep them in place until the end."""
    views: list[_View] = []
    try:
        for index, buffer in enumerate(buffers):
            views.append(_view(buffer, role, index))
        yield views
    finally:
        for view in views:
            ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def _view(buffer: Buffer, role: str, index: int) -> _View:
    view = _View()
    flags = _WRITABLE if role == "target" else _SIMPLE
    try:
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(view), flags)
    except (BufferError, ValueError):
        why = "is read-only or not contiguous" if role == "target" else "is not contiguous"
        raise ValueError(f"{role} {index} {why}") from None
    return view


def _check_chunks(views: Sequence[_View], chunk_bytes: int) -> None:
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}")
    for index, view in enumerate(views):
        if view.len % chunk_bytes:
            raise ValueError(f"source {index} has {view.len} bytes, not a multiple of {chunk_bytes}")


def _check_pairs(sources: Sequence[_View], targets: Sequence[_View]) -> None:
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources, {len(targets)} targets")
    for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if source.len != target.len:
            raise ValueError(f"source {index} has {source.len} bytes, target {index} has {target.len} bytes")


def _check_apart(sources: Sequence[_View], targets: Sequence[_View]) -> None:
    """Targets may touch neither each other nor any source. Sources may overlap: they are only read."""
    ranges = sorted((_address(view), _address(view) + view.len) for view in targets if view.len)
    if any(after < end for (_, end), (after, _) in pairwise(ranges)):
        raise ValueError("two targets overlap")
    for source in sources:
        after = bisect_left(ranges, (_address(source) + source.len, 0))
        if source.len and after and ranges[after - 1][1] > _address(source):
            raise ValueError("a source and a target overlap")
