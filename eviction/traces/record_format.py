"""The files of a recording (.kvrec): a head and chunks. What records in them mean: ``record``.

All numbers are little-endian:

    "KVREC01\\n" | length u16 | head, JSON | crc32 of the head u32
    chunk: length u32 | crc32 of what follows u32 | records, packed with zlib

    head: life (of the recorder, 16 hexadecimal digits), sequence (of the file in it), first (number of a
    block), at_ms (from the start of the life), started_ms (of the life, on a wall clock), block_tokens and
    sample

A file may be a stranger's: one chunk at a time is unpacked, and never to more than ``CHUNK_BYTES_MAX``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcache.eviction.traces.rows import bad, parsed, whole
from kvcache.eviction.traces.trace import BLOCK_TOKENS_MAX

MAGIC = b"KVREC01\n"
SUFFIX = ".kvrec"
CHUNK_BYTES_MAX = 4 << 20
FILE_BYTES_MAX = 1 << 32
_PACKED_BYTES_MAX = 2 * CHUNK_BYTES_MAX
_HEAD = struct.Struct("<H")
_CRC = struct.Struct("<I")
_CHUNK = struct.Struct("<II")
_NUMBER_MAX = 1 << 62


@dataclass(frozen=True, slots=True)
class Head:
    """The first bytes of a file."""

    life: str
    sequence: int
    first: int
    at_ms: int
    started_ms: int
    block_tokens: int
    sample: float

    def packed(self) -> bytes:
        head = json.dumps({name: getattr(self, name) for name in self.__slots__}).encode()
        return MAGIC + _HEAD.pack(len(head)) + head + _CRC.pack(zlib.crc32(head))


def packed_chunk(records: bytes) -> bytes:
    """REQUIRES: at most ``CHUNK_BYTES_MAX``."""
    assert 0 < len(records) <= CHUNK_BYTES_MAX
    data = zlib.compress(records, 6)
    return _CHUNK.pack(len(data), zlib.crc32(data)) + data


# --- reading ----------------------------------------------------------------------------------------


NO_HEAD = Head("", 0, 1, 0, 0, 1, 1.0)
_HEAD_BYTES_MAX = len(MAGIC) + _HEAD.size + (1 << 16) + _CRC.size


@dataclass(frozen=True, slots=True)
class RecordedFile:
    path: Path
    file_bytes: int
    head: Head
    chunks_at: int
    """Where the first chunk begins."""


def opened_file(path: Path) -> RecordedFile:
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise bad(f"{path} has {size} bytes", f"the limit is {FILE_BYTES_MAX}")
        with path.open("rb") as stream:
            data = stream.read(_HEAD_BYTES_MAX)
    except OSError as error:
        raise bad(f"{path} cannot be read", str(error)) from error
    if _is_cut_head(data):
        return RecordedFile(path, size, NO_HEAD, size)
    return RecordedFile(path, size, *_head(path, data))


def chunks_of(file: RecordedFile) -> Iterator[tuple[int, bytes]]:
    """Where each ends, and its records, one at a time. None of the last if it is torn.

    RAISES BadInput (bad_trace)."""
    path, at = file.path, file.chunks_at
    try:
        with path.open("rb") as stream:
            stream.seek(at)
            while at < file.file_bytes:
                said = stream.read(_CHUNK.size)
                length, crc = _CHUNK.unpack(said) if len(said) == _CHUNK.size else (file.file_bytes, 0)
                end = at + _CHUNK.size + length
                if end > file.file_bytes:
                    return
                packed = stream.read(length) if length <= _PACKED_BYTES_MAX else b""
                if zlib.crc32(packed) != crc or len(packed) != length:
                    if end == file.file_bytes:
                        return
                    raise bad(f"the chunk at byte {at} of {path} is damaged", "its checksum is another")
                yield end, _unpacked(path, at, packed)
                at = end
    except OSError as error:
        raise bad(f"{path} cannot be read", str(error)) from error


def _unpacked(path: Path, at: int, packed: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(packed, CHUNK_BYTES_MAX)
    except zlib.error as error:
        raise bad(f"the chunk at byte {at} of {path} is damaged", str(error)) from error
    if not unpacker.eof:
        raise bad(f"the chunk at byte {at} of {path} is too large", f"the limit is {CHUNK_BYTES_MAX} bytes")
    return found


def _is_cut_head(data: bytes) -> bool:
    """Was the node killed when it had just begun this file?"""
    start = len(MAGIC) + _HEAD.size
    if len(data) < start:
        return MAGIC.startswith(data[: len(MAGIC)])
    return (
        data.startswith(MAGIC) and len(data) < start + _HEAD.unpack(data[len(MAGIC) : start])[0] + _CRC.size
    )


def _head(path: Path, data: bytes) -> tuple[Head, int]:
    where = f"the head of {path}"
    start = len(MAGIC) + _HEAD.size
    if not data.startswith(MAGIC) or len(data) < start:
        raise bad(f"{path} is no recording", f"it begins with {data[:8]!r}")
    end = start + _HEAD.unpack(data[len(MAGIC) : start])[0]
    if data[end : end + _CRC.size] != _CRC.pack(zlib.crc32(data[start:end])):
        raise bad(f"{where} is damaged", "its checksum is another")
    fields = parsed(where, data[start:end])
    life, sample = fields.get("life"), fields.get("sample")
    if not isinstance(life, str) or not life or not isinstance(sample, int | float) or not 0 < sample <= 1:
        raise bad(f"{where} has no life or no sample", "both are needed")
    head = Head(
        life,
        whole(where, fields, "sequence", _NUMBER_MAX),
        whole(where, fields, "first", _NUMBER_MAX, low=1),
        whole(where, fields, "at_ms", _NUMBER_MAX),
        whole(where, fields, "started_ms", _NUMBER_MAX),
        whole(where, fields, "block_tokens", BLOCK_TOKENS_MAX + 1, low=1),
        float(sample),
    )
    return head, end + _CRC.size
