"""What the NVMe tier writes to disk, byte by byte. No I/O here. docs/format-segment.md says it in prose.

A *segment* file is a segment header and then slots of one size: a slot header and the block's bytes,
each padded to ``PAGE_BYTES``. A header fills one page and ends with a guard over all that is before it,
its padding too, so a bit flipped anywhere in the page is found. An index value holds the same fields as
the slot header, with a guard over its key and itself, so that a value under another's key is found too.

    segment header page | slot header page | block, padded | slot header page | block, padded | ...

* Integers are big-endian, as the index needs its keys to be: one order for all.
* What ``pack_...`` gives, ``parse_...`` takes. Everything else is a BadRecord; no parser guesses.
* A guard finds corruption. It does not stop a forger: who can write the directory is trusted.

The sum: a header is 4,096 bytes a block (0.2 % of 2 MiB) and takes 2 us either way; an index entry is
104 bytes, and 300,000 of them are parsed in one call in 0.2 s.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, NamedTuple

from kvcache.block import BLOCK_BYTES_MAX, CHUNK_BYTES_MAX, HASH_BYTES, KEY_BYTES, StorageKey
from kvcache.sums import guard_sum
from kvcache.tiers.space import CAPACITY_BYTES_MAX

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMAT_VERSION = 1
PAGE_BYTES = 4_096
SLOT_HEADER_BYTES = PAGE_BYTES
SEGMENT_HEADER_BYTES = PAGE_BYTES
PARENT_ROOT = bytes(HASH_BYTES)
DIRECTORY_ID_BYTES = 16
CHECKSUM_BYTES = 16
SUPERBLOCK_BYTES_MAX = PAGE_BYTES

_SLOT_MAGIC = b"kvc.slot"
_SEGMENT_MAGIC = b"kvc.segm"
_SUPERBLOCK_KIND = "kvcache nvme tier"

_GUARD_BYTES = 8
_GUARD_AT = PAGE_BYTES - _GUARD_BYTES
_BLANK_PAGE = bytes(PAGE_BYTES)

_KEY = struct.Struct(">Q")
_ENTRY = struct.Struct(f">Q{KEY_BYTES}s{HASH_BYTES}sIIQ{CHECKSUM_BYTES}sQ")
_SEGMENT = struct.Struct(f">{DIRECTORY_ID_BYTES}sI4xQQQ")
_HEAD = struct.Struct(">8sI4x")
_RECORD = struct.Struct(f">{_ENTRY.size}s{_GUARD_BYTES}s")

INDEX_KEY_BYTES = _KEY.size
INDEX_RECORD_BYTES = _RECORD.size
"""An index key and its value, joined."""
INDEX_VALUE_BYTES = INDEX_RECORD_BYTES - INDEX_KEY_BYTES


class BadRecord(Exception):
    """These bytes are not a record of ours. Internal: it never leaves ``kvcache/tiers``.

    ``reason`` is one of ``length``, ``empty`` (a page of zeros: never written), ``magic``, ``version``,
    ``checksum``, ``shape`` (the guard is right and the fields cannot be). ``what`` says it in words.
    """

    def __init__(self, reason: str, what: str) -> None:
        self.reason = reason
        self.what = what
        super().__init__(reason, what)


class Entry(NamedTuple):
    """What a slot header and the index both say of one slot, in the order of the bytes on disk.

    A named tuple, for half a million of them are made at a start: a frozen dataclass takes twice as long.
    """

    offset: int
    """Of the slot's header, in the device's address space: segment number times segment bytes, and on."""
    key: StorageKey
    parent: bytes
    """Prefix hash of the block before it, ``PARENT_ROOT`` for a first block."""
    block_bytes: int
    chunk_bytes: int
    generation: int
    """Grows with every write of the device, so of two slots that claim a key the newer is known."""
    checksum: bytes
    """Of the block's bytes: ``kvcache.sums.block_checksum``."""
    epoch: int
    """Of the segment: raised whenever the segment is formatted for a size class."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """The first page of a segment file."""

    directory_id: bytes
    number: int
    segment_bytes: int
    stride: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Superblock:
    """The file ``tier.json`` of a directory."""

    version: int
    directory_id: bytes
    segment_bytes: int


def stride_of(block_bytes: int) -> int:
    """Bytes from one slot header to the next. REQUIRES: ``block_bytes`` is positive."""
    assert block_bytes > 0, block_bytes
    return SLOT_HEADER_BYTES + -(-block_bytes // PAGE_BYTES) * PAGE_BYTES


def slots_in(segment_bytes: int, stride: int) -> int:
    return max(segment_bytes - SEGMENT_HEADER_BYTES, 0) // stride


def pack_slot_header(entry: Entry) -> bytes:
    """REQUIRES: ``entry`` has a shape that can be."""
    return _pack_page(_SLOT_MAGIC, _pack_entry(entry))


def parse_slot_header(page: Buffer) -> Entry:
    """RAISES BadRecord. Whether the header belongs where it was read is for the caller to compare."""
    entry = Entry._make(_ENTRY.unpack_from(_parse_page(_SLOT_MAGIC, "slot header", page), _HEAD.size))
    _refuse(_entry_fault(entry))
    return entry


def pack_segment_header(header: SegmentHeader) -> bytes:
    """REQUIRES: ``header`` has a shape that can be."""
    fault = _segment_fault(header)
    assert not fault, fault
    fields = (header.directory_id, header.number, header.segment_bytes, header.stride, header.epoch)
    return _pack_page(_SEGMENT_MAGIC, _SEGMENT.pack(*fields))


def parse_segment_header(page: Buffer) -> SegmentHeader:
    """RAISES BadRecord. Whether directory, number and sizes are the expected ones is for the caller."""
    whole = _parse_page(_SEGMENT_MAGIC, "segment header", page)
    header = SegmentHeader(*_SEGMENT.unpack_from(whole, _HEAD.size))
    _refuse(_segment_fault(header))
    return header


def pack_key(offset: int) -> bytes:
    """The index's key of a slot. Keys sort as offsets do."""
    return _KEY.pack(offset)


def pack_value(entry: Entry) -> bytes:
    """The index's value under ``pack_key(entry.offset)``. REQUIRES: as ``pack_slot_header``."""
    fields = _pack_entry(entry)
    return fields[INDEX_KEY_BYTES:] + guard_sum(fields)


def parse_value(offset_key: bytes, value: bytes) -> Entry:
    """RAISES BadRecord."""
    if len(offset_key) != INDEX_KEY_BYTES or len(value) != INDEX_VALUE_BYTES:
        raise BadRecord("length", f"an index entry of {len(offset_key)} and {len(value)} bytes")
    fields, guard = _RECORD.unpack(offset_key + value)
    if guard_sum(fields) != guard:
        raise BadRecord("checksum", "an index entry's guard does not fit it")
    entry = Entry._make(_ENTRY.unpack(fields))
    _refuse(_entry_fault(entry))
    return entry


def parse_values(records: bytes) -> tuple[list[Entry], int]:
    """``parse_value`` of joined keys and values, and how many were bad and left out.

    RAISES BadRecord when ``records`` is not a whole number of records.
    """
    if len(records) % INDEX_RECORD_BYTES:
        raise BadRecord("length", f"{len(records)} bytes of index entries of {INDEX_RECORD_BYTES} bytes")
    make, unpack = tuple.__new__, _ENTRY.unpack
    entries = [
        make(Entry, unpack(fields))
        for fields, guard in _RECORD.iter_unpack(records)
        if guard_sum(fields) == guard
    ]
    if not _fit_at_once(entries):
        entries = [entry for entry in entries if not _entry_fault(entry)]
    return entries, len(records) // INDEX_RECORD_BYTES - len(entries)


def pack_superblock(superblock: Superblock) -> bytes:
    """REQUIRES: it is of this version and has a shape that can be."""
    assert superblock.version == FORMAT_VERSION, superblock
    fault = _superblock_fault(superblock)
    assert not fault, fault
    fields: dict[str, object] = {
        "kind": _SUPERBLOCK_KIND,
        "version": superblock.version,
        "directory_id": superblock.directory_id.hex(),
        "segment_bytes": superblock.segment_bytes,
    }
    return _json({**fields, "checksum": _json_guard(fields)})


def parse_superblock(text: bytes) -> Superblock:
    """RAISES BadRecord; for a superblock of another version, ``what`` says which and what to do.

    In every version the text is a JSON object with ``version`` and a ``checksum`` as here, so that a
    newer format is known from a damaged one.
    """
    fields = _parse_json(text)
    checksum = fields.pop("checksum", None)
    if checksum != _json_guard(fields):
        raise BadRecord("checksum", "the superblock's checksum does not fit it: the file is damaged")
    if fields.get("kind") != _SUPERBLOCK_KIND:
        raise BadRecord("magic", "it is not the superblock of a kvcache NVMe tier")
    if fields.get("version") != FORMAT_VERSION:
        raise BadRecord("version", _other_version("the directory", fields.get("version")))
    identity, segment_bytes = fields.get("directory_id"), fields.get("segment_bytes")
    if not isinstance(identity, str) or type(segment_bytes) is not int:
        raise BadRecord("shape", "the superblock lacks a field")
    try:
        superblock = Superblock(FORMAT_VERSION, bytes.fromhex(identity), segment_bytes)
    except ValueError as error:
        raise BadRecord("shape", f"the superblock's directory_id is not hexadecimal: {error}") from error
    _refuse(_superblock_fault(superblock))
    if pack_superblock(superblock) != text:
        raise BadRecord("checksum", "the superblock is not as it was written: the file is damaged")
    return superblock


def _pack_entry(entry: Entry) -> bytes:
    fault = _entry_fault(entry)
    assert not fault, fault
    return _ENTRY.pack(*entry)


def _pack_page(magic: bytes, fields: bytes) -> bytes:
    covered = (_HEAD.pack(magic, FORMAT_VERSION) + fields).ljust(_GUARD_AT, b"\0")
    return covered + guard_sum(covered)


def _parse_page(magic: bytes, name: str, page: Buffer) -> bytes:
    """The page, once its guard vouches for it. Version before guard: in another it may lie elsewhere."""
    whole = bytes(memoryview(page))
    if len(whole) != PAGE_BYTES:
        raise BadRecord("length", f"a {name} of {len(whole)} bytes")
    if whole == _BLANK_PAGE:
        raise BadRecord("empty", f"no {name} was written here")
    found, version = _HEAD.unpack_from(whole)
    if found != magic:
        raise BadRecord("magic", f"it is not a {name}")
    if version != FORMAT_VERSION:
        raise BadRecord("version", _other_version(f"the {name}", version))
    if guard_sum(memoryview(whole)[:_GUARD_AT]) != whole[_GUARD_AT:]:
        raise BadRecord("checksum", f"the {name}'s guard does not fit it")
    return whole


def _other_version(name: str, version: object) -> str:
    if isinstance(version, int) and version > FORMAT_VERSION:
        advice = "use the newer kvcache that wrote it"
    else:
        advice = "use the older kvcache that wrote it"
    return (
        f"{name} is in format {version}, and this kvcache reads format {FORMAT_VERSION}: {advice}, "
        "or give it an empty directory"
    )


def _refuse(fault: str) -> None:
    if fault:
        raise BadRecord("shape", fault)


def _entry_fault(entry: Entry) -> str:
    """What cannot be about these fields, in words; the empty string when all is well."""
    if len(entry.key) != KEY_BYTES or len(entry.parent) != HASH_BYTES:
        return f"a key of {len(entry.key)} bytes and a parent of {len(entry.parent)}"
    if len(entry.checksum) != CHECKSUM_BYTES:
        return f"a checksum of {len(entry.checksum)} bytes"
    return _shape_fault(entry.block_bytes, entry.chunk_bytes) or _offset_fault(
        entry.offset, stride_of(entry.block_bytes)
    )


def _fit_at_once(entries: list[Entry]) -> bool:
    """True: no entry has a fault. What bears a right guard was written by us, so it will be."""
    if any(_shape_fault(*shape) for shape in {(entry.block_bytes, entry.chunk_bytes) for entry in entries}):
        return False
    stride = stride_of(max((entry.block_bytes for entry in entries), default=1))
    bits = reduce(or_, (entry.offset for entry in entries), 0)
    last = max((entry.offset for entry in entries), default=0)
    return bits % PAGE_BYTES == 0 and not _offset_fault(last, stride)


def _shape_fault(block_bytes: int, chunk_bytes: int) -> str:
    if not 0 < block_bytes <= BLOCK_BYTES_MAX:
        return f"a block of {block_bytes} bytes"
    if not 0 < chunk_bytes <= CHUNK_BYTES_MAX or block_bytes % chunk_bytes:
        return f"chunks of {chunk_bytes} bytes in a block of {block_bytes}"
    return ""


def _offset_fault(offset: int, stride: int) -> str:
    if offset % PAGE_BYTES or not 0 <= offset <= CAPACITY_BYTES_MAX - stride:
        return f"a slot at offset {offset}"
    return ""


def _segment_fault(header: SegmentHeader) -> str:
    if len(header.directory_id) != DIRECTORY_ID_BYTES:
        return f"a directory id of {len(header.directory_id)} bytes"
    if header.stride % PAGE_BYTES or header.stride < stride_of(1):
        return f"slots of {header.stride} bytes"
    if fault := _segment_bytes_fault(header.segment_bytes):
        return fault
    if not slots_in(header.segment_bytes, header.stride):
        return f"slots of {header.stride} bytes in a segment of {header.segment_bytes}"
    if (header.number + 1) * header.segment_bytes > CAPACITY_BYTES_MAX:
        return f"segment {header.number} of {header.segment_bytes} bytes"
    return ""


def _segment_bytes_fault(segment_bytes: int) -> str:
    if segment_bytes % PAGE_BYTES or not 0 < segment_bytes <= CAPACITY_BYTES_MAX:
        return f"segments of {segment_bytes} bytes"
    return ""


def _superblock_fault(superblock: Superblock) -> str:
    if len(superblock.directory_id) != DIRECTORY_ID_BYTES:
        return f"a directory id of {len(superblock.directory_id)} bytes"
    return _segment_bytes_fault(superblock.segment_bytes)


def _json(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"


def _json_guard(fields: dict[str, object]) -> str:
    return guard_sum(_json(fields)).hex()


def _parse_json(text: bytes) -> dict[str, object]:
    if len(text) > SUPERBLOCK_BYTES_MAX:
        raise BadRecord("length", f"a superblock of {len(text)} bytes")
    try:
        fields: object = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise BadRecord("checksum", f"the superblock is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRecord("checksum", "the superblock is no JSON object")
    return fields
