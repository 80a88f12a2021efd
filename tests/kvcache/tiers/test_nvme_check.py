"""An offline check of a directory: each kind of damage is named and, if asked, repaired; nothing else is."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvcache.block import HASH_BYTES, StorageKey
from kvcache.errors import BadInput
from kvcache.namespace import Namespace
from kvcache.sums import block_checksum, sum_chunks
from kvcache.tiers.nvme import Device, DeviceFault
from kvcache.tiers.nvme_check import READERS, UNREADABLE_MAX, WORDS, Report, check
from kvcache.tiers.nvme_format import (
    PAGE_BYTES,
    PARENT_ROOT,
    SLOT_HEADER_BYTES,
    Entry,
    pack_segment_header,
    pack_value,
    parse_segment_header,
)
from tests.kvcache.tiers.nvme_blocks import (
    BLOCK,
    CHUNK,
    SEGMENT,
    content_of,
    fetch,
    flip,
    key_of,
    memory_of,
    offset_of,
    open_device,
)

LENGTH = 10
CHAINS = 2
SPACE = key_of(0)[:HASH_BYTES]
NAMESPACE = Namespace(
    model="m", weights="w", dtype="bfloat16", layout="canonical", block_tokens=16, shape="2x1x64"
)


def silent(what: str, done: int, total: int) -> None:
    pass


def key(chain: int, depth: int) -> StorageKey:
    return StorageKey(SPACE + key_of(chain * 1_000 + depth)[HASH_BYTES:])


def block(chain: int, depth: int, offset: int) -> tuple[Entry, memoryview]:
    """The block of that depth (from 1) of a prompt; the first has no parent."""
    name, content = key(chain, depth), content_of(chain * 1_000 + depth)
    checksum = block_checksum(name, BLOCK, CHUNK, sum_chunks([content], CHUNK))
    parent = key(chain, depth - 1)[HASH_BYTES:] if depth > 1 else PARENT_ROOT
    return Entry(offset, name, parent, BLOCK, CHUNK, 0, checksum, 0), memory_of(content)


CONTENTS = {
    key(chain, depth): content_of(chain * 1_000 + depth)
    for chain in range(CHAINS)
    for depth in range(1, LENGTH + 1)
}


def place(chain: int, depth: int) -> int:
    """A chain a segment, in order."""
    return offset_of(chain, depth - 1)


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    """Two prompts of ten blocks."""
    path = tmp_path / "tier"
    device = open_device(path)
    device.save_namespace(NAMESPACE.to_map())
    device.write(
        [
            block(chain, depth, place(chain, depth))
            for chain in range(CHAINS)
            for depth in range(1, LENGTH + 1)
        ],
        (),
        durable=True,
    )
    device.close()
    return path


def segment(tier: Path, chain: int) -> Path:
    return tier / "segments" / f"{chain:06d}.seg"


def within(chain: int, depth: int) -> int:
    return place(chain, depth) - chain * SEGMENT


def snapshot(tier: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tier)): path.read_bytes() for path in sorted(tier.rglob("*")) if path.is_file()
    }


def entries(tier: Path) -> list[Entry]:
    device = open_device(tier)
    try:
        return sorted(device.take_entries())
    finally:
        device.close()


def test_all_is_well(tier: Path) -> None:
    before = snapshot(tier)
    told: list[tuple[str, int, int]] = []
    report = check(tier, repair=False, progress=lambda *step: told.append(step))
    assert report.ok
    assert (report.blocks, report.fine_blocks, report.fine_bytes) == (20, 20, 20 * BLOCK)
    assert report.read_bytes == 20 * BLOCK
    assert (report.bad, report.findings, report.stopped) == ({}, [], "")
    assert told[-1] == ("reading blocks", 20 * BLOCK, 20 * BLOCK)
    assert snapshot(tier) == before


def test_repair_of_what_is_well_changes_nothing(tier: Path) -> None:
    before = snapshot(tier)
    report = check(tier, repair=True, progress=silent)
    assert report.ok
    assert not report.repaired
    assert snapshot(tier) == before


# --- planted damage -----------------------------------------------------------------------------


def payload(tier: Path) -> None:
    flip(segment(tier, 0), (within(0, 10) + SLOT_HEADER_BYTES + BLOCK - 1) * 8 + 3)


def header(tier: Path) -> None:
    flip(segment(tier, 0), (within(0, 10) + 40) * 8)


def swapped(tier: Path) -> None:
    """The whole slot of another block."""
    with segment(tier, 0).open("r+b") as file:
        file.seek(within(0, 9))
        slot = file.read(SLOT_HEADER_BYTES + BLOCK)
        file.seek(within(0, 10))
        file.write(slot)


def in_the_middle(tier: Path) -> None:
    flip(segment(tier, 0), (within(0, 4) + SLOT_HEADER_BYTES) * 8)


def truncated(tier: Path) -> None:
    with segment(tier, 1).open("r+b") as file:
        file.truncate(SEGMENT // 2)


def removed(tier: Path) -> None:
    segment(tier, 1).unlink()


def segment_header(tier: Path) -> None:
    flip(segment(tier, 1), 100 * 8)


def formatted(tier: Path) -> None:
    """As if the index had lost what it was told since."""
    with segment(tier, 1).open("r+b") as file:
        old = parse_segment_header(file.read(PAGE_BYTES))
        file.seek(0)
        file.write(pack_segment_header(replace(old, epoch=old.epoch + 1)))


def duplicate(tier: Path) -> None:
    device = open_device(tier)
    device.write([block(0, 3, place(0, 11))], (), durable=True)
    device.close()


def orphan(tier: Path) -> None:
    device = open_device(tier)
    device.write((), [place(1, 8)], durable=True)
    device.close()


def index_value(tier: Path) -> None:
    value = pack_value(next(entry for entry in entries(tier) if entry.offset == place(0, 10)))
    file = tier / "index" / "data.mdb"
    found = file.read_bytes().find(value)
    assert found > 0
    flip(file, (found + 20) * 8)


def index_missing(tier: Path) -> None:
    (tier / "index" / "data.mdb").unlink()


def index_garbage(tier: Path) -> None:
    (tier / "index" / "data.mdb").write_bytes(b"\x77" * 65_536)


def superblock(tier: Path) -> None:
    (tier / "tier.json").unlink()


def superblock_damaged(tier: Path) -> None:
    flip(tier / "tier.json", 30 * 8)


def namespace(tier: Path) -> None:
    next((tier / "namespaces").glob("*.json")).write_text(json.dumps({"model": "other"}))


DAMAGE: list[tuple[Callable[[Path], None], dict[str, int], int, str]] = [
    # what, bad by reason, how many blocks are fine, what a finding says
    (payload, {"checksum": 1}, 19, ""),
    (header, {"header": 1}, 19, ""),
    (swapped, {"generation": 1}, 19, ""),
    (in_the_middle, {"checksum": 1}, 13, ""),
    (truncated, {"segment": 10}, 10, "000001.seg"),
    (removed, {"segment": 10}, 10, ""),
    (segment_header, {"segment": 10}, 10, "000001.seg"),
    (formatted, {"stale": 10}, 10, ""),
    (duplicate, {"duplicate": 1}, 20, ""),
    (index_value, {}, 19, "1 entries of the index are damaged"),
    (index_missing, {}, 20, "there is no index"),
    (index_garbage, {}, 20, "the index cannot be read"),
    (superblock, {}, 20, "tier.json"),
    (superblock_damaged, {}, 20, "tier.json"),
    (namespace, {}, 20, "it does not say what its name does"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "bad", "fine", "finding"), DAMAGE, ids=[row[0].__name__ for row in DAMAGE]
)
def test_damage_is_named_and_repaired(
    tier: Path, damage: Callable[[Path], None], bad: dict[str, int], fine: int, finding: str
) -> None:
    damage(tier)
    before = snapshot(tier)
    report = check(tier, repair=False, progress=silent)
    assert dict(report.bad) == bad
    assert report.fine_blocks == fine
    assert any(finding in each for each in report.findings) if finding else not report.findings
    assert not report.ok
    assert set(report.bad) <= set(WORDS)
    assert snapshot(tier) == before, "a look changes nothing"

    repaired = check(tier, repair=True, progress=silent)
    assert repaired.repaired
    assert (repaired.bad, repaired.findings) == (report.bad, report.findings)

    again = check(tier, repair=False, progress=silent)
    assert again.ok, (again.bad, again.findings)
    assert (again.blocks, again.fine_blocks) == (fine + report.apart_blocks, fine)
    device = open_device(tier)
    assert len(device.entries()) == again.blocks
    for entry in device.take_entries():
        assert fetch(device, entry) == CONTENTS[entry.key]
    device.close()


def test_what_continues_another_device_is_well_and_survives_a_repair(tier: Path) -> None:
    """A prompt goes over all devices of a node: the block before may be in another directory."""
    orphan(tier)
    report = check(tier, repair=False, progress=silent)
    assert (report.ok, report.blocks, report.fine_blocks, report.apart_blocks) == (True, 19, 17, 2)
    payload(tier)
    assert check(tier, repair=True, progress=silent).repaired
    again = check(tier, repair=False, progress=silent)
    assert (again.ok, again.blocks, again.apart_blocks) == (True, 18, 2)


def test_what_lies_in_free_slots_is_nobody_s_concern(tier: Path) -> None:
    device = open_device(tier)
    device.write((), [place(0, 10), place(1, 10)], durable=True)
    device.close()
    header(tier)
    payload(tier)
    report = check(tier, repair=False, progress=silent)
    assert report.ok
    assert report.blocks == 18


# --- when it cannot be done ---------------------------------------------------------------------


def test_a_node_runs_on_it(tier: Path) -> None:
    device = open_device(tier)
    with pytest.raises(BadInput) as refused:
        check(tier, repair=True, progress=silent)
    assert refused.value.code == "address_in_use"
    device.close()
    assert check(tier, repair=False, progress=silent).ok


def test_the_lock_is_given_back(tier: Path) -> None:
    for repair in (False, True):
        payload(tier)
        check(tier, repair=repair, progress=silent)
        open_device(tier).close()


def test_no_tier_is_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="bad_tier"):
        check(tmp_path, repair=False, progress=silent)
    assert list(tmp_path.iterdir()) == []


def test_one_block_that_cannot_be_read_is_dropped(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = with_unreadable(tier, monkeypatch, lambda entry: entry.offset == place(1, 10))
    assert report.bad == {"unreadable": 1}
    assert (report.repaired, report.fine_blocks, report.stopped) == (True, 19, "")


def test_a_device_that_fails_is_left_alone(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one bad cable would empty the tier."""
    before = snapshot(tier)
    report = with_unreadable(tier, monkeypatch, lambda entry: True)
    assert "could not read" in report.stopped
    assert report.bad["unreadable"] >= UNREADABLE_MAX
    assert not report.repaired
    assert not report.ok
    assert snapshot(tier) == before


def with_unreadable(
    tier: Path, monkeypatch: pytest.MonkeyPatch, unreadable: Callable[[Entry], bool]
) -> Report:
    read = Device.read

    def fail(device: Device, expected: Entry, into: memoryview) -> bytes:
        if unreadable(expected):
            raise DeviceFault(errno.EIO, "reading: Input/output error")
        return read(device, expected, into)

    with monkeypatch.context() as patch:
        patch.setattr(Device, "read", fail)
        return check(tier, repair=True, progress=silent)


@pytest.mark.slow
def test_more_blocks_than_one_round_of_reads(tmp_path: Path) -> None:
    path = tmp_path / "tier"
    count = READERS * 2 * 64 + 70
    device = Device.open(path, 16 << 20, 8 << 20)
    puts = []
    for number in range(count):
        content = content_of(number, 4_096)
        name = StorageKey(SPACE + key_of(number)[HASH_BYTES:])
        checksum = block_checksum(name, 4_096, CHUNK, sum_chunks([content], CHUNK))
        puts.append(
            (
                Entry(offset_of(0, number, 4_096, 8 << 20), name, PARENT_ROOT, 4_096, CHUNK, 0, checksum, 0),
                memory_of(content),
            )
        )
    device.write(puts, (), durable=True)
    device.close()
    done: list[int] = []
    report = check(path, repair=False, progress=lambda what, here, total: done.append(here))
    assert (report.ok, report.blocks, report.fine_blocks) == (True, count, count)
    assert done == sorted(done)
    assert done[-1] == count * 4_096
