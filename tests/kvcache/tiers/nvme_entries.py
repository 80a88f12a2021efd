"""Entries for tests of the index, and a file of them."""

from __future__ import annotations

from pathlib import Path
from random import Random

from kvcache.block import StorageKey
from kvcache.tiers.nvme_format import Entry
from kvcache.tiers.nvme_index import Index

STRIDE = 8_192


def entry_of(number: int, generation: int = 1) -> Entry:
    random = Random(number << 20 | generation)
    key, parent, checksum = (random.randbytes(size) for size in (32, 16, 16))
    return Entry(number * STRIDE, StorageKey(key), parent, 4_096, 4_096, generation, checksum, 1)


def entries_of(count: int, generation: int = 1) -> list[Entry]:
    return [entry_of(number, generation) for number in range(count)]


def filled(folder: Path, entries: list[Entry]) -> bytes:
    """The data file of an index of ``entries``, made in four commits, so that it has free pages."""
    index = Index.open(folder, 100_000)
    for part in range(4):
        index.commit(entries[part::4], [entry.offset for entry in entries[3::4]], durable=False)
    index.close()
    return (folder / "data.mdb").read_bytes()
