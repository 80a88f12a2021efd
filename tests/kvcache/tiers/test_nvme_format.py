"""The records on disk: what was packed comes back, and nothing else is taken for a record."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.block import BLOCK_BYTES_MAX, CHUNK_BYTES_MAX, StorageKey
from kvcache.sums import block_checksum, guard_sum, sum_chunks
from kvcache.tiers.nvme_format import (
    FORMAT_VERSION,
    INDEX_RECORD_BYTES,
    INDEX_VALUE_BYTES,
    PAGE_BYTES,
    PARENT_ROOT,
    BadRecord,
    Entry,
    SegmentHeader,
    Superblock,
    pack_key,
    pack_segment_header,
    pack_slot_header,
    pack_superblock,
    pack_value,
    parse_segment_header,
    parse_slot_header,
    parse_superblock,
    parse_value,
    parse_values,
    slots_in,
    stride_of,
)
from kvcache.tiers.space import CAPACITY_BYTES_MAX

ROOT = Path(__file__).parents[3]
_DISK_U64 = st.integers(0, (1 << 64) - 1)


@st.composite
def _entries(draw: st.DrawFn) -> Entry:
    chunk_bytes = draw(st.integers(1, CHUNK_BYTES_MAX))
    block_bytes = chunk_bytes * draw(st.integers(1, BLOCK_BYTES_MAX // chunk_bytes))
    last = (CAPACITY_BYTES_MAX - stride_of(block_bytes)) // PAGE_BYTES
    return Entry(
        draw(st.integers(0, last)) * PAGE_BYTES,
        StorageKey(draw(st.binary(min_size=32, max_size=32))),
        draw(st.binary(min_size=16, max_size=16)),
        block_bytes,
        chunk_bytes,
        draw(_DISK_U64),
        draw(st.binary(min_size=16, max_size=16)),
        draw(_DISK_U64),
    )


@st.composite
def _segment_headers(draw: st.DrawFn) -> SegmentHeader:
    pages = draw(st.integers(3, 1 << 24))
    segment_bytes = pages * PAGE_BYTES
    return SegmentHeader(
        draw(st.binary(min_size=16, max_size=16)),
        draw(st.integers(0, min(CAPACITY_BYTES_MAX // segment_bytes - 1, (1 << 32) - 1))),
        segment_bytes,
        draw(st.integers(2, pages - 1)) * PAGE_BYTES,
        draw(_DISK_U64),
    )


def entry_of(seed: int, offset: int = PAGE_BYTES) -> Entry:
    random = Random(seed)
    key, parent, checksum = (random.randbytes(size) for size in (32, 16, 16))
    return Entry(offset, StorageKey(key), parent, 2 << 20, 64 << 10, seed + 1, checksum, 7)


ENTRY = entry_of(1)
SEGMENT = SegmentHeader(bytes(range(16)), 3, 64 << 20, stride_of(2 << 20), 7)
SUPERBLOCK = Superblock(FORMAT_VERSION, bytes(range(16)), 64 << 20)


def flips(record: bytes) -> Iterator[bytearray]:
    """The record with each of its bits flipped. One array, changed and mended: it is not to be kept."""
    flipped = bytearray(record)
    for at in range(len(record)):
        for bit in range(8):
            flipped[at] ^= 1 << bit
            yield flipped
            flipped[at] ^= 1 << bit


def refused(parse: Callable[[], object]) -> str:
    with pytest.raises(BadRecord) as caught:
        parse()
    assert caught.value.what
    return caught.value.reason


def resealed(page: bytes, at: int, content: bytes) -> bytes:
    """A page with other content and a guard that fits it: what no flip gives, but a bug might."""
    covered = page[:at] + content + page[at + len(content) : -8]
    return covered + guard_sum(covered)


def test_a_slot_is_a_page_and_whole_pages_of_block() -> None:
    assert [stride_of(size) for size in (1, 4_096, 4_097, 2 << 20)] == [
        8_192,
        8_192,
        12_288,
        (2 << 20) + 4_096,
    ]
    assert [slots_in(size, 8_192) for size in (0, 4_096, 12_287, 12_288, 20_480)] == [0, 0, 0, 1, 2]


@given(_entries())
def test_a_slot_header_comes_back(entry: Entry) -> None:
    page = pack_slot_header(entry)
    assert len(page) == PAGE_BYTES
    assert parse_slot_header(page) == parse_slot_header(memoryview(bytearray(page))) == entry


@given(_entries())
def test_an_index_entry_comes_back(entry: Entry) -> None:
    key, value = pack_key(entry.offset), pack_value(entry)
    assert (len(key), len(value)) == (8, INDEX_VALUE_BYTES)
    assert parse_value(key, value) == entry
    assert parse_values((key + value) * 2) == ([entry, entry], 0)


@given(_segment_headers())
def test_a_segment_header_comes_back(header: SegmentHeader) -> None:
    assert parse_segment_header(pack_segment_header(header)) == header


@given(st.binary(min_size=16, max_size=16), st.integers(1, CAPACITY_BYTES_MAX // PAGE_BYTES))
def test_a_superblock_comes_back(identity: bytes, pages: int) -> None:
    superblock = Superblock(FORMAT_VERSION, identity, pages * PAGE_BYTES)
    text = pack_superblock(superblock)
    assert len(text) < PAGE_BYTES
    assert parse_superblock(text) == superblock


def test_the_bytes_are_those_of_format_1() -> None:
    """Whoever changes these has made another format, and counts the version up."""
    page = pack_slot_header(ENTRY)
    assert page[:16] == b"kvc.slot" + bytes.fromhex("00000001 00000000")
    assert page[16:24] == (4_096).to_bytes(8, "big")
    assert page[24:72] == ENTRY.key + ENTRY.parent
    assert page[72:80] == (2 << 20).to_bytes(4, "big") + (64 << 10).to_bytes(4, "big")
    assert page[80:112] == (2).to_bytes(8, "big") + ENTRY.checksum + (7).to_bytes(8, "big")
    assert not any(page[112:-8])
    assert page[-8:] == guard_sum(page[:-8])
    assert pack_value(ENTRY) == page[24:112] + guard_sum(page[16:112])
    segment = pack_segment_header(SEGMENT)
    assert segment[:16] == b"kvc.segm" + bytes.fromhex("00000001 00000000")
    assert segment[16:40] == SEGMENT.directory_id + bytes.fromhex("00000003 00000000")
    assert segment[40:64] == b"".join(size.to_bytes(8, "big") for size in (64 << 20, stride_of(2 << 20), 7))
    assert not any(segment[64:-8])
    assert json.loads(pack_superblock(SUPERBLOCK)) == {
        "kind": "kvcache nvme tier",
        "version": 1,
        "directory_id": "000102030405060708090a0b0c0d0e0f",
        "segment_bytes": 67_108_864,
        "checksum": "70b5e85f3fb906e6",
    }


@pytest.mark.parametrize(
    ("page", "parse"),
    [(pack_slot_header(ENTRY), parse_slot_header), (pack_segment_header(SEGMENT), parse_segment_header)],
)
def test_a_bit_flipped_anywhere_in_a_header_is_found(
    page: bytes, parse: Callable[[bytearray], object]
) -> None:
    count = 0
    for flipped in flips(page):
        try:
            parse(flipped)
        except BadRecord:
            count += 1
    assert count == PAGE_BYTES * 8


def test_a_bit_flipped_anywhere_in_an_index_entry_is_found() -> None:
    record = pack_key(ENTRY.offset) + pack_value(ENTRY)
    for flipped in flips(record):
        changed = bytes(flipped)
        assert refused(lambda: parse_value(changed[:8], changed[8:])) == "checksum"  # noqa: B023
        assert parse_values(record + changed + record) == ([ENTRY, ENTRY], 1)


def test_a_bit_flipped_anywhere_in_a_superblock_is_found() -> None:
    for flipped in flips(pack_superblock(SUPERBLOCK)):
        refused(lambda: parse_superblock(bytes(flipped)))  # noqa: B023


def test_a_value_under_anothers_key_is_found() -> None:
    here, there = entry_of(1, 4_096), entry_of(2, 8_192)
    assert refused(lambda: parse_value(pack_key(8_192), pack_value(here))) == "checksum"
    swapped = pack_key(8_192) + pack_value(here) + pack_key(4_096) + pack_value(there)
    assert parse_values(swapped) == ([], 2)


def test_what_was_never_written_is_known() -> None:
    assert refused(lambda: parse_slot_header(bytes(PAGE_BYTES))) == "empty"
    assert refused(lambda: parse_segment_header(bytes(PAGE_BYTES))) == "empty"
    assert parse_values(bytes(INDEX_RECORD_BYTES)) == ([], 1)
    assert parse_values(b"") == ([], 0)


def test_a_header_of_one_kind_is_not_one_of_the_other() -> None:
    assert refused(lambda: parse_segment_header(pack_slot_header(ENTRY))) == "magic"
    assert refused(lambda: parse_slot_header(pack_segment_header(SEGMENT))) == "magic"


def test_wrong_lengths_are_refused() -> None:
    page, value = pack_slot_header(ENTRY), pack_value(ENTRY)
    for wrong in (b"", page[:-1], page + b"\0"):
        assert refused(lambda: parse_slot_header(wrong)) == "length"  # noqa: B023
    assert refused(lambda: parse_value(pack_key(ENTRY.offset), value + b"\0")) == "length"
    assert refused(lambda: parse_value(pack_key(ENTRY.offset)[1:], value)) == "length"
    assert refused(lambda: parse_values(value)) == "length"
    assert refused(lambda: parse_superblock(b" " * (PAGE_BYTES + 1))) == "length"


@pytest.mark.parametrize(("version", "advice"), [(0, "older kvcache"), (2, "newer kvcache")])
def test_another_version_is_named(version: int, advice: str) -> None:
    page = resealed(pack_slot_header(ENTRY), 8, version.to_bytes(4, "big"))
    with pytest.raises(BadRecord, match=rf"format {version}, .* reads format 1: use the {advice}") as caught:
        parse_slot_header(page)
    assert caught.value.reason == "version"
    fields = {"kind": "kvcache nvme tier", "version": version, "segments": "something else"}
    text = json.dumps({**fields, "checksum": sealed_json(fields)}).encode()
    with pytest.raises(BadRecord, match=advice) as caught:
        parse_superblock(text)
    assert caught.value.reason == "version"


def sealed_json(fields: dict[str, object]) -> str:
    return guard_sum(json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n").hex()


@pytest.mark.parametrize(
    "field",
    [
        (16, (4_097).to_bytes(8, "big")),
        (16, (CAPACITY_BYTES_MAX - 4_096).to_bytes(8, "big")),
        (16, (CAPACITY_BYTES_MAX).to_bytes(8, "big")),
        (72, (0).to_bytes(4, "big")),
        (72, ((2 << 20) + 1).to_bytes(4, "big")),
        (72, (BLOCK_BYTES_MAX + (64 << 10)).to_bytes(4, "big")),
        (76, (0).to_bytes(4, "big")),
        (76, (CHUNK_BYTES_MAX * 2).to_bytes(4, "big")),
    ],
)
def test_fields_that_cannot_be_are_refused_under_a_right_guard(field: tuple[int, bytes]) -> None:
    page = resealed(pack_slot_header(ENTRY), *field)
    assert refused(lambda: parse_slot_header(page)) == "shape"
    fields = page[16:112]
    value = fields[8:] + guard_sum(fields)
    assert refused(lambda: parse_value(fields[:8], value)) == "shape"
    other = entry_of(2, 1 << 30)
    good = [pack_key(entry.offset) + pack_value(entry) for entry in (ENTRY, other)]
    assert parse_values(good[0] + fields[:8] + value + good[1]) == ([ENTRY, other], 1)


@pytest.mark.parametrize(
    "header",
    [
        SegmentHeader(bytes(15), 0, 1 << 20, 8_192, 1),
        SegmentHeader(bytes(16), 0, (1 << 20) + 1, 8_192, 1),
        SegmentHeader(bytes(16), 0, 0, 8_192, 1),
        SegmentHeader(bytes(16), 0, 1 << 20, 4_096, 1),
        SegmentHeader(bytes(16), 0, 1 << 20, 8_193, 1),
        SegmentHeader(bytes(16), 0, 1 << 20, 1 << 20, 1),
        SegmentHeader(bytes(16), CAPACITY_BYTES_MAX >> 20, 1 << 20, 8_192, 1),
    ],
)
def test_a_segment_that_cannot_be_is_not_written(header: SegmentHeader) -> None:
    with pytest.raises(AssertionError):
        pack_segment_header(header)


def test_a_segment_that_cannot_be_is_refused_under_a_right_guard() -> None:
    page = pack_segment_header(SEGMENT)
    for at, size in ((40, (64 << 20) + 1), (48, 4_096), (48, 64 << 20), (40, CAPACITY_BYTES_MAX)):
        assert refused(lambda: parse_segment_header(resealed(page, at, size.to_bytes(8, "big")))) == "shape"  # noqa: B023


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "another thing"}, "magic"),
        ({"version": True}, "checksum"),
        ({"directory_id": "zz"}, "shape"),
        ({"directory_id": "00"}, "shape"),
        ({"directory_id": "000102030405060708090A0B0C0D0E0F"}, "checksum"),
        ({"segment_bytes": "1"}, "shape"),
        ({"segment_bytes": 4_097}, "shape"),
        ({"segment_bytes": None}, "shape"),
        ({"more": 1}, "checksum"),
    ],
)
def test_a_superblock_that_cannot_be_is_refused_under_a_right_checksum(
    change: dict[str, object], reason: str
) -> None:
    fields = json.loads(pack_superblock(SUPERBLOCK))
    del fields["checksum"]
    fields |= change
    text = json.dumps({**fields, "checksum": sealed_json(fields)}, indent=2, sort_keys=True).encode() + b"\n"
    assert refused(lambda: parse_superblock(text)) == reason


@given(st.binary(max_size=200))
def test_no_text_makes_the_superblock_parser_fall_over(text: bytes) -> None:
    refused(lambda: parse_superblock(text))


def test_deep_json_is_refused() -> None:
    refused(lambda: parse_superblock(b"[" * PAGE_BYTES))
    refused(lambda: parse_superblock(b'{"a":' * 800 + b"1" + b"}" * 80))


def tables(page: str) -> list[dict[str, slice]]:
    """Of each table of bytes in a page of docs/: where its fields lie."""
    row = re.compile(r"\| ([\d,]+) \| ([\d,]+) \| (\w+) \|")
    found: list[dict[str, slice]] = []
    for line in (ROOT / "docs" / page).read_text().splitlines():
        if line.startswith("| offset | bytes |"):
            found.append({})
        elif match := row.match(line):
            start, size = (int(number.replace(",", "")) for number in match.groups()[:2])
            expected = max((field.stop for field in found[-1].values()), default=0)
            assert start == expected, f"{page}: a gap before {line}"
            found[-1][f"zero at {start}" if match[3] == "zero" else match[3]] = slice(start, start + size)
    return found


def said(where: dict[str, slice], record: bytes) -> dict[str, object]:
    """The fields of a record, read as the page says."""
    texts = ("directory_id", "key", "parent", "checksum", "magic", "guard")
    assert max(field.stop for field in where.values()) == len(record)
    fields = {name: record[field] for name, field in where.items()}
    assert not any(any(fields.pop(name)) for name in list(fields) if name.startswith("zero"))
    return {name: value if name in texts else int.from_bytes(value, "big") for name, value in fields.items()}


def test_the_pages_on_the_formats_say_where_the_fields_lie() -> None:
    segment, slot = tables("format-segment.md")
    key, value = tables("format-index.md")
    page = pack_segment_header(SEGMENT)
    head = {"magic": b"kvc.segm", "version": 1, "guard": guard_sum(page[:-8])}
    assert said(segment, page) == asdict(SEGMENT) | head
    page = pack_slot_header(ENTRY)
    head = {"magic": b"kvc.slot", "version": 1, "guard": guard_sum(page[:-8])}
    assert said(slot, page) == ENTRY._asdict() | head
    joined = pack_key(ENTRY.offset) + pack_value(ENTRY)
    guard = {"guard": guard_sum(joined[:-8])}
    assert said(key, joined[:8]) | said(value, joined[8:]) == ENTRY._asdict() | guard


def test_the_superblock_in_the_page_is_one() -> None:
    text = (ROOT / "docs" / "format-segment.md").read_text()
    example = text.split("```json\n")[1].split("```")[0].encode()
    assert parse_superblock(example) == SUPERBLOCK


def test_the_reader_in_the_page_reads_a_segment(tmp_path: Path) -> None:
    block, chunk_bytes, stride = Random(1).randbytes(6_000), 2_000, stride_of(6_000)
    key = StorageKey(bytes(range(32)))
    checksum = block_checksum(key, len(block), chunk_bytes, sum_chunks([block], chunk_bytes))
    segment = SegmentHeader(bytes(16), 2, 64 << 10, stride, 5)
    pages = [pack_segment_header(segment)]
    for slot, (epoch, content) in enumerate([(5, block), (4, block), (5, b"x" + block[1:])]):
        offset = 2 * segment.segment_bytes + PAGE_BYTES + slot * stride
        entry = Entry(offset, key, PARENT_ROOT, len(block), chunk_bytes, 9 + slot, checksum, epoch)
        pages += [pack_slot_header(entry), content.ljust(stride - PAGE_BYTES, b"\0")]
    (tmp_path / "000002.seg").write_bytes(b"".join(pages).ljust(segment.segment_bytes, b"\0"))
    reader = (ROOT / "docs" / "format-segment.md").read_text().split("```python\n")[1].split("```")[0]
    command = [sys.executable, "-c", reader, str(tmp_path / "000002.seg")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == [
        f"135168 {key.hex()} 6000 9 whole",
        f"{135_168 + 2 * stride} {key.hex()} 6000 11 damaged",
    ]


def test_a_first_block_has_a_parent_that_no_block_has() -> None:
    assert bytes(16) == PARENT_ROOT
