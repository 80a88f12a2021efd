"""Looks into a directory, in this process: what it serves is right, and what it refuses has a reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kvcache.tiers.nvme import BlockFault, Device
from kvcache.tiers.nvme_format import Entry
from tests.faults.work import CAPACITY_BYTES, NUMBER_OF, SEGMENT_BYTES, is_right


@contextlib.contextmanager
def opened(tier: Path) -> Iterator[Device]:
    device = Device.open(tier, CAPACITY_BYTES, SEGMENT_BYTES)
    try:
        yield device
    finally:
        device.close()


def segment_of(tier: Path, entry: Entry) -> Path:
    return tier / "segments" / f"{entry.offset // SEGMENT_BYTES:06d}.seg"


def why_refused(device: Device, entry: Entry) -> str:
    """The reason; the empty string when it is served, and right."""
    block = bytearray(entry.block_bytes)
    try:
        device.read(entry, memoryview(block))
    except BlockFault as fault:
        return fault.reason
    assert is_right(NUMBER_OF[entry.key], block), f"wrong bytes served for {entry}"
    return ""
