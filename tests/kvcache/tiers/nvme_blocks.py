"""Blocks for the tests of the NVMe tier: bytes that follow from a seed, and where they go."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvcache.block import StorageKey
from kvcache.namespace import Namespace
from kvcache.sums import block_checksum, sum_chunks
from kvcache.tiers.nvme import BlockFault, Device
from kvcache.tiers.nvme_format import PARENT_ROOT, SEGMENT_HEADER_BYTES, Entry, slots_in, stride_of

PAGE = 4096
SEGMENT = 64 * PAGE
SEGMENTS = 4
CAPACITY = SEGMENTS * SEGMENT
BLOCK = 4 * PAGE
CHUNK = 64


def open_device(path: Path, **options: object) -> Device:
    return Device.open(path, CAPACITY, SEGMENT, **options)  # type: ignore[arg-type]  # as Device.open has them


def key_of(seed: int) -> StorageKey:
    return StorageKey(random.Random(f"key {seed}").randbytes(32))


def content_of(seed: int, block_bytes: int = BLOCK) -> bytes:
    return random.Random(f"block {seed}").randbytes(block_bytes)


def offset_of(number: int, slot: int, block_bytes: int = BLOCK, segment_bytes: int = SEGMENT) -> int:
    assert slot < slots_in(segment_bytes, stride_of(block_bytes))
    return number * segment_bytes + SEGMENT_HEADER_BYTES + slot * stride_of(block_bytes)


def memory_of(content: bytes, skew: int = 0) -> memoryview:
    """Memory like the host tier's; ``skew`` bytes past a page's start."""
    memory = mmap.mmap(-1, len(content) + skew)
    memory[skew:] = content
    return memoryview(memory)[skew:]


def block_of(
    seed: int, offset: int, block_bytes: int = BLOCK, chunk_bytes: int = CHUNK, skew: int = 0
) -> tuple[Entry, memoryview]:
    """As ``Device.write`` takes it."""
    key, content = key_of(seed), content_of(seed, block_bytes)
    checksum = block_checksum(key, block_bytes, chunk_bytes, sum_chunks([content], chunk_bytes))
    entry = Entry(offset, key, PARENT_ROOT, block_bytes, chunk_bytes, 0, checksum, 0)
    return entry, memory_of(content, skew)


def blocks(seeds: Iterable[int], number: int = 0) -> list[tuple[Entry, memoryview]]:
    """One a seed, in the first slots of a segment."""
    return [block_of(seed, offset_of(number, slot)) for slot, seed in enumerate(seeds)]


def fetch(device: Device, entry: Entry, skew: int = 0) -> bytes:
    """RAISES BlockFault, DeviceFault."""
    into = memory_of(b"\xee" * entry.block_bytes, skew)
    sums = device.read(entry, into)
    assert sums == sum_chunks([into], entry.chunk_bytes)
    return bytes(into)


def reason(device: Device, entry: Entry) -> str:
    """Why the block cannot be had."""
    try:
        fetch(device, entry)
    except BlockFault as fault:
        return fault.reason
    return ""


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def offsets(entries: Sequence[Entry]) -> list[int]:
    return sorted(entry.offset for entry in entries)


def reopened(device: Device) -> Device:
    device.close()
    return open_device(device.path)


def damage(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def segment_file(device: Device, number: int = 0) -> Path:
    return device.path / "segments" / f"{number:06d}.seg"


def namespace() -> Namespace:
    return Namespace(
        model="Llama", weights="w1", dtype="bfloat16", layout="canonical", block_tokens=16, shape="8x2x64"
    )


def failing(number: int) -> Callable[..., None]:
    """A call that the system refuses."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
