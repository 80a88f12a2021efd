"""Ten thousand flipped bits in everything a device has on disk: none is ever served.

A read of a block whose header or bytes have a bit flipped is refused, each one. Of what is read at opening
(segment headers, index, superblock, namespaces) damage may cost blocks, or all of them, or the directory;
what is handed out afterwards is right to the last byte. Each flip is taken back before the next.

The sum: a flip in a block costs two small writes and a read, 0.1 ms; one that needs an opening 0.2 s, so
those come many at a time where each is seen for itself, and one at a time where one is enough to end it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from kvcache.namespace import Namespace
from kvcache.tiers.nvme import Device
from kvcache.tiers.nvme_format import (
    PAGE_BYTES,
    SLOT_HEADER_BYTES,
    BadRecord,
    Entry,
    pack_value,
    parse_superblock,
)
from kvcache.tiers.nvme_index import read_index
from tests.faults.reading import opened, segment_of, why_refused
from tests.faults.work import SEGMENT_BYTES

HEADER_FLIPS = 4_000
BLOCK_FLIPS = 4_200
REBUILD_FLIPS = 300
SEGMENT_FLIPS = 120
VALUE_FLIPS = 1_000
TREE_FLIPS = 40
FILE_FLIPS = 400
OPENING_FLIPS = 12
BITS = 8

NAMESPACE = Namespace(
    model="a/model",
    weights="0123abcd",
    dtype="bfloat16",
    layout="canonical",
    block_tokens=16,
    shape="32x8x256",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]

Place = tuple[Path, int]
"""A bit of a file."""


@contextlib.contextmanager
def flipped(places: Iterable[Place]) -> Iterator[None]:
    places = list(places)
    flip(places)
    try:
        yield
    finally:
        flip(places)


def flip(places: Iterable[Place]) -> None:
    for path, bit in places:
        with path.open("r+b", buffering=0) as file:
            descriptor = file.fileno()
            byte = os.pread(descriptor, 1, bit // BITS)[0] ^ 1 << bit % BITS
            os.pwrite(descriptor, bytes([byte]), bit // BITS)


def bit_of(way: random.Random, entry: Entry, first: int, length: int) -> int:
    """A bit of a slot's bytes from ``first`` on, in its segment file."""
    return (entry.offset % SEGMENT_BYTES + first) * BITS + way.randrange(length * BITS)


def served(device: Device, entries: Sequence[Entry]) -> int:
    """How many of them. All that are, are right."""
    return sum(not why_refused(device, entry) for entry in entries)


def rounds(entries: Sequence[Entry], flips: int) -> Iterator[Sequence[Entry]]:
    """All of them, again and again, until there were ``flips``."""
    while flips > 0:
        yield entries[:flips]
        flips -= len(entries)


@pytest.mark.parametrize(
    ("first", "length", "flips", "reasons"),
    [
        (0, SLOT_HEADER_BYTES, HEADER_FLIPS, {"header"}),
        (SLOT_HEADER_BYTES, 0, BLOCK_FLIPS, {"checksum"}),
    ],
    ids=["header", "block"],
)
def test_of_a_slot(tier: Path, factor: int, first: int, length: int, flips: int, reasons: set[str]) -> None:
    way = random.Random(first)
    with opened(tier) as device:
        entries = device.take_entries()
        assert len(entries) > 100
        for some in rounds(entries, flips * factor):
            places = [
                (segment_of(tier, entry), bit_of(way, entry, first, length or entry.block_bytes))
                for entry in some
            ]
            with flipped(places):
                assert {why_refused(device, entry) for entry in some} <= reasons
        assert served(device, entries) == len(entries)


def test_of_slot_headers_that_an_index_is_made_from(tier: Path, factor: int) -> None:
    """Half of the slots at a time: what is found are the others, and they are right."""
    way = random.Random(2)
    with opened(tier) as device:
        entries = device.take_entries()
    for some in rounds(entries, 2 * REBUILD_FLIPS * factor):
        chosen = way.sample(some, len(some) // 2)
        shutil.rmtree(tier / "index")
        places = [(segment_of(tier, entry), bit_of(way, entry, 0, PAGE_BYTES)) for entry in chosen]
        with flipped(places), opened(tier) as device:
            found = device.take_entries()
            assert not {entry.offset for entry in chosen} & {entry.offset for entry in found}
            assert served(device, found) == len(found) >= len(entries) - len(chosen)


def test_of_segment_headers(tier: Path, factor: int) -> None:
    way = random.Random(3)
    with opened(tier) as device:
        before = {entry.key for entry in device.take_entries()}
    paths = sorted((tier / "segments").iterdir())
    pristine = shutil.copytree(tier, tier.with_name("pristine"))
    for _ in range(max(1, SEGMENT_FLIPS * factor * 2 // len(paths))):
        chosen = way.sample(paths, len(paths) // 2)
        with flipped((path, way.randrange(PAGE_BYTES * BITS)) for path in chosen), opened(tier) as device:
            found = device.take_entries()
            assert not {segment_of(tier, entry) for entry in found} & set(chosen)
            assert served(device, found) == len(found) > 0
            assert {entry.key for entry in found} < before
            assert device.findings
        restore(pristine, tier)


def test_of_the_index_values(tier: Path, factor: int) -> None:
    """Found by their bytes in the file. Each is refused by its guard, and the others are not."""
    way = random.Random(4)
    with opened(tier) as device:
        entries = {entry.offset: entry for entry in device.take_entries()}
    data = tier / "index" / "data.mdb"
    content = data.read_bytes()
    values = {offset: pack_value(entry) for offset, entry in entries.items()}
    copies = {offset: all_places(content, value) for offset, value in values.items()}
    for some in rounds(list(entries.values()), 2 * VALUE_FLIPS * factor):
        chosen = {entry.offset for entry in way.sample(some, len(some) // 2)}
        bits = {offset: way.randrange(len(values[offset]) * BITS) for offset in chosen}
        with flipped((data, at * BITS + bits[offset]) for offset in chosen for at in copies[offset]):
            found = read_index(tier / "index")
        assert found is not None
        assert all(entries[entry.offset] == entry for entry in found)
        assert {entry.offset for entry in found} == entries.keys() - chosen


def test_of_the_index_anywhere(tier: Path, factor: int) -> None:
    """One bit of the tree can end the process that reads it. What is served then is right, as always."""
    way = random.Random(5)
    pristine = shutil.copytree(tier, tier.with_name("pristine"))
    data = tier / "index" / "data.mdb"
    used = [
        at for at in range(0, data.stat().st_size, PAGE_BYTES) if any(data.read_bytes()[at : at + PAGE_BYTES])
    ]
    for _ in range(TREE_FLIPS * factor):
        flip([(data, way.choice(used) * BITS + way.randrange(way.choice((16, PAGE_BYTES)) * BITS))])
        with opened(tier) as device:
            found = device.take_entries()
            assert served(device, found) == len(found)
            device.write((), [entry.offset for entry in found[:4]], durable=True)
        restore(pristine, tier)


def test_of_the_superblock(tier: Path, factor: int) -> None:
    way = random.Random(6)
    file = tier / "tier.json"
    content = file.read_bytes()
    for _ in range(FILE_FLIPS * factor):
        with flipped([(file, way.randrange(len(content) * BITS))]), pytest.raises(BadRecord):
            parse_superblock(file.read_bytes())
    for _ in range(OPENING_FLIPS * factor):
        flip([(file, way.randrange(len(content) * BITS))])
        with opened(tier) as device:
            found = device.take_entries()
            assert served(device, found) == len(found) > 0
            assert device.findings
        assert file.read_bytes() == content


def test_of_a_namespace(tier: Path, factor: int) -> None:
    way = random.Random(7)
    with opened(tier) as device:
        device.save_namespace(NAMESPACE.to_map())
        (file,) = (tier / "namespaces").iterdir()
        length = file.stat().st_size
        for _ in range(FILE_FLIPS * factor):
            with flipped([(file, way.randrange(length * BITS))]):
                assert device.namespaces() in ([], [NAMESPACE.to_map()])
        assert device.namespaces() == [NAMESPACE.to_map()]


def all_places(content: bytes, value: bytes) -> list[int]:
    """Pages that are free again keep what was in them."""
    places = [match.start() for match in re.finditer(re.escape(value), content)]
    assert places
    return places


def restore(pristine: Path, tier: Path) -> None:
    """Opening mends some of it, and must find it damaged the next time."""
    shutil.rmtree(tier)
    shutil.copytree(pristine, tier)
