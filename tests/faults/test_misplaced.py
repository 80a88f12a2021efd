"""Good bytes in the wrong place: what misdirected, lost and late writes leave, and indexes that are behind.

Every checksum on such a disk fits what it is about. That they are about another block is what has to be
found: a header says which slot, key and generation it is for, and a block's checksum has its key in it.

The sum: a case is two small writes and two reads, 0.3 ms.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest

from kvcache.tiers.nvme import Device
from kvcache.tiers.nvme_format import SLOT_HEADER_BYTES, Entry, stride_of
from tests.faults.reading import opened, segment_of, why_refused
from tests.faults.work import NUMBER_OF, NUMBERS, SEGMENT_BYTES, SIZES, put_of

MISDIRECTED = 900
LATE = 100

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]

PARTS = {
    "all": (0, None, "generation"),
    "the header": (0, SLOT_HEADER_BYTES, "generation"),
    "the block": (SLOT_HEADER_BYTES, None, "checksum"),
}
"""Where in the slot it begins and ends, and why it is refused."""


def slot_bytes(tier: Path, entry: Entry) -> bytes:
    with segment_of(tier, entry).open("rb") as file:
        file.seek(entry.offset % SEGMENT_BYTES)
        return file.read(stride_of(entry.block_bytes))


def overwrite(tier: Path, entry: Entry, first: int, content: bytes) -> None:
    with segment_of(tier, entry).open("r+b") as file:
        file.seek(entry.offset % SEGMENT_BYTES + first)
        file.write(content)


def replaced(device: Device, way: random.Random, entry: Entry) -> Entry:
    """The entry of what was written over its slot: half of the time the same block again."""
    number = NUMBER_OF[entry.key]
    if way.random() < 0.5:
        number = (number + len(SIZES) * way.randint(1, 100)) % NUMBERS
    return device.write([put_of(number, entry.offset, aligned=True)], (), durable=False)[0]


@pytest.mark.parametrize("part", PARTS)
def test_what_belongs_into_another_slot(tier: Path, factor: int, part: str) -> None:
    way = random.Random(part)
    first, end, reason = PARTS[part]
    with opened(tier) as device:
        alike: defaultdict[int, list[Entry]] = defaultdict(list)
        for entry in device.take_entries():
            alike[entry.block_bytes].append(entry)
        for _ in range(MISDIRECTED * factor // len(PARTS)):
            source, target = way.sample(way.choice(list(alike.values())), 2)
            before = slot_bytes(tier, target)
            overwrite(tier, target, first, slot_bytes(tier, source)[first:end])
            assert why_refused(device, target) == reason
            overwrite(tier, target, 0, before)
            assert not why_refused(device, target)


def test_what_was_in_the_slot_before(tier: Path, factor: int) -> None:
    """The slot's last write never reached the disk; or it did, and it is the entry that is behind."""
    way = random.Random(21)
    with opened(tier) as device:
        entries = device.take_entries()
        for at in way.choices(range(len(entries)), k=LATE * factor):
            stale = entries[at]
            before = slot_bytes(tier, stale)
            entries[at] = replaced(device, way, stale)
            assert why_refused(device, stale) == "generation"
            after = slot_bytes(tier, stale)
            overwrite(tier, stale, 0, before)
            assert why_refused(device, entries[at]) == "generation"
            overwrite(tier, stale, 0, after)
            assert not why_refused(device, entries[at])


def test_bytes_under_a_key_that_is_not_theirs(tier: Path) -> None:
    """Header and index agree, and the checksum fits the bytes: of the block whose they are."""
    with opened(tier) as device:
        entry = device.take_entries()[0]
        number = NUMBER_OF[entry.key]
        theirs, block = put_of(number + len(SIZES), entry.offset, aligned=True)
        written = device.write([(theirs._replace(key=entry.key), block)], (), durable=False)[0]
        assert why_refused(device, written) == "checksum"
