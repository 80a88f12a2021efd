"""What the faulted processes store, where, and the words in which they tell what they did.

A block is known by a small number: its key, its size and every byte of it follow from the number, so what
a device hands out can be compared whole, by any process, without anything being kept. A *record* is a
file of lines, one write each, so a process that is killed has told all that it did before:

    e N ...   about to give these up      s N ...   stored          d N ...   stored, durably
    c N ...   looked at all: these are there and right
    w N       wrong bytes were handed out     r N WHY   an entry whose block is refused
    f ERRNO WHAT   the device reported trouble    o WHY   the device could not be opened
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from kvcache.block import KEY_BYTES, StorageKey
from kvcache.sums import block_checksum, sum_chunks
from kvcache.testing.pattern import Pattern
from kvcache.tiers.nvme_format import PARENT_ROOT, Entry

SIZES = ((16_384, 4_096), (20_000, 4_000), (65_536, 16_384))
"""Bytes a block and a chunk. The second is no whole number of pages."""
NUMBERS = 3_000
SEGMENT_BYTES = 1 << 20
CAPACITY_BYTES = 12 * SEGMENT_BYTES
PATTERN_SEED = 4_711
DOUBLE = "a newer copy is there"


def key_of(number: int) -> StorageKey:
    return StorageKey(blake2b(number.to_bytes(8, "little"), digest_size=KEY_BYTES).digest())


NUMBER_OF = {key_of(number): number for number in range(NUMBERS)}
PATTERNS = tuple(Pattern(PATTERN_SEED + at, block_bytes) for at, (block_bytes, _) in enumerate(SIZES))


def size_of(number: int) -> int:
    """Which of ``SIZES`` a block has."""
    return number % len(SIZES)


def content(number: int) -> bytearray:
    at = size_of(number)
    block = bytearray(SIZES[at][0])
    PATTERNS[at].fill(block, key_of(number))
    return block


def is_right(number: int, block: bytearray) -> bool:
    """REQUIRES: the block's length is that of the number. What ``block`` holds is spent by this."""
    return not PATTERNS[size_of(number)].wrong_bytes(block, key_of(number))


def put_of(number: int, offset: int, *, aligned: bool) -> tuple[Entry, memoryview]:
    """As ``Device.write`` takes it. ``aligned``: in memory that direct I/O takes as it is."""
    block = memoryview(content(number))
    if aligned:
        memory = mmap.mmap(-1, len(block))
        memory[:] = block
        block = memoryview(memory)
    key = key_of(number)
    block_bytes, chunk_bytes = SIZES[size_of(number)]
    checksum = block_checksum(key, block_bytes, chunk_bytes, sum_chunks([block], chunk_bytes))
    return Entry(offset, key, PARENT_ROOT, block_bytes, chunk_bytes, 0, checksum, 0), block


@dataclass(frozen=True, slots=True)
class Job:
    """What a process of the nursery is to do."""

    directory: str
    record: str
    seed: int
    steps: int = 0
    """0: until it is killed. Negative: look at all, then leave."""
    direct: str = "auto"
    waits: bool = False
    """For SIGUSR1, before the device is opened: time to attach a tracer."""
    lazy: bool = False
    """Drop nothing from the page cache: dropping starts the writing, and what a power cut loses is then
    what was not synced."""
    unsynced: bool = False
    """The sabotage: no fdatasync of segments."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Teller:
    """Appends to a record."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def tell(self, word: str, *values: object) -> None:
        os.write(self._descriptor, " ".join((word, *map(str, values))).encode() + b"\n")


class Record:
    """Reads what was told, and holds it against what must be. ``problems`` is empty when all is well."""

    def __init__(self, path: Path, *, durable_only: bool, lies: bool = False) -> None:
        """``durable_only``: after a power cut, what was stored otherwise may be gone, and what was given
        up may be refused. ``lies``: the disk said that it did what it did not, so anything but wrong bytes
        may be."""
        self.path = path
        self.problems: list[str] = []
        self.looks = self.checked = self.refused = self.stored = self.wrong = self.faults = 0
        self.required: set[int] = set()
        self._durable_only = durable_only
        self._lies = lies
        self._doubtful: set[int] = set()
        self._refused: set[int] = set()
        self._read_bytes = 0
        path.touch(mode=0o600)

    def read(self) -> None:
        """Take in what was told since the last time. REQUIRES: nobody is writing."""
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # A line that was cut short was not told.
        self._read_bytes += len(text)
        for line in whole.decode().splitlines():
            word, _, rest = line.partition(" ")
            self._take(word, rest)

    def _take(self, word: str, rest: str) -> None:
        if word == "e":
            numbers = set(map(int, rest.split()))
            self.required -= numbers
            self._doubtful |= numbers
        elif word in "sd":
            numbers = set(map(int, rest.split()))
            self.stored += len(numbers)
            if word == "d" or not self._durable_only:
                self.required |= numbers
        elif word == "c":
            self._compare(set(map(int, rest.split())))
        elif word == "r":
            self._refuse(int(rest.split()[0]), rest)
        elif word == "w":
            self.wrong += 1
            self.problems.append(f"wrong bytes were handed out: {rest}")
        else:
            self.faults += 1

    def _compare(self, found: set[int]) -> None:
        self.looks += 1
        self.checked += len(found)
        if not self._lies and (missing := self.required - found):
            self.problems.append(f"look {self.looks}: {len(missing)} blocks are gone: {sorted(missing)[:8]}")
        self.required = found
        self._doubtful, self._refused = self._refused, set()

    def _refuse(self, number: int, rest: str) -> None:
        if rest.endswith(DOUBLE):
            return  # Giving up the older copy failed; the newer is looked at as any other.
        self.refused += 1
        self._refused.add(number)
        if not self._lies and not (self._durable_only and number in self._doubtful):
            self.problems.append(f"look {self.looks}: an entry whose block is refused: {rest}")
