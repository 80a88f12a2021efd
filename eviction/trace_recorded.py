"""Recordings of a node, read back into a trace. ``record`` says what a record means.

A file (.kvrec) is a head and chunks; all numbers are little-endian:

    "KVREC01\\n" | length u16 | head, JSON | crc32 of the head u32
    chunk: length u32 | crc32 of what follows u32 | records, packed with zlib

    head: life (of the recorder, 16 hexadecimal digits), sequence (of the file in it), first (number of a
    block), at_ms (from the start of the life), started_ms (of the life, on a wall clock), block_tokens and
    sample

A folder holds the files of several lives; within one, what an earlier file numbered is known again. A node
that was killed leaves a last chunk that is torn: it is dropped, and the trace's note says so. A chunk that is
wrong in the middle of a file is damage, and refused.

The sum: 5 us a record.
"""

from __future__ import annotations

import json
import struct
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcache.eviction.record import ASKED, LONGER, ODD, SAVED
from kvcache.eviction.trace import BLOCK_TOKENS_MAX, BLOCKS_MAX, REQUESTS_MAX, Trace, by_arrival
from kvcache.eviction.trace_rows import Progress, bad, parsed, whole
from kvcache.policy import HINTS

MAGIC = b"KVREC01\n"
SUFFIX = ".kvrec"
CHUNK_BYTES_MAX = 4 << 20
FILE_BYTES_MAX = 1 << 32
FILES_MAX = 1 << 16
_HEAD = struct.Struct("<H")
_CRC = struct.Struct("<I")
_CHUNK = struct.Struct("<II")
_INT_MAX = (1 << 31) - 1
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


def read_recorded(path: Path, progress: Progress | None = None) -> Trace:
    """The recording in the file ``path``, or those in the folder. RAISES BadInput (bad_trace)."""
    paths = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if len(paths) > FILES_MAX:
        raise bad(f"{path} has {len(paths)} files", f"the limit is {FILES_MAX}")
    read = [_file(each) for each in paths]
    files = [file for file in read if file.head.life]
    files.sort(key=lambda file: (file.head.started_ms, file.head.life, file.head.sequence))
    lives: dict[str, _Life] = {}
    gathered = _Gathered()
    done, torn = 0, len(read) - len(files)
    for file in files:
        life = lives.setdefault(file.head.life, _Life(gathered))
        life.read(file)
        done += file.file_bytes
        if progress is not None:
            progress(done)
        torn += file.is_torn
    notes = [f"{path.name}: {len(files)} files of {len(lives)} recordings"]
    sample = min((file.head.sample for file in files), default=1.0)
    notes += [f"sample {sample:g}"] if sample < 1 else []
    notes += [f"{torn} with a torn last record, which was dropped"] if torn else []
    return gathered.trace(", ".join(notes))


# --- one file -------------------------------------------------------------------------------------


_NO_HEAD = Head("", 0, 1, 0, 0, 1, 1.0)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    file_bytes: int
    head: Head
    chunks: Sequence[bytes]
    is_torn: bool


def _file(path: Path) -> _File:
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise bad(f"{path} has {size} bytes", f"the limit is {FILE_BYTES_MAX}")
        data = path.read_bytes()
    except OSError as error:
        raise bad(f"{path} cannot be read", str(error)) from error
    if _is_cut_head(data):
        return _File(path, size, _NO_HEAD, [], True)
    head, at = _head(path, data)
    chunks: list[bytes] = []
    while at < len(data):
        start = at + _CHUNK.size
        length, crc = _CHUNK.unpack(data[at:start]) if start <= len(data) else (1, 0)
        packed = data[start : start + length]
        if len(packed) < length or (start + length == len(data) and zlib.crc32(packed) != crc):
            return _File(path, size, head, chunks, True)
        if zlib.crc32(packed) != crc:
            raise bad(f"the chunk at byte {at} of {path} is damaged", "its checksum is another")
        chunks.append(_unpacked(path, at, packed))
        at = start + length
    return _File(path, size, head, chunks, False)


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


# --- records --------------------------------------------------------------------------------------


class _Gathered:
    """Blocks and requests of all lives."""

    def __init__(self) -> None:
        self.block_tokens = 0
        self.sessions = 0
        self.parents, self.tokens = array("i"), array("H")
        self.columns = [array(code) for code in "iqiiiB"]

    def new_block(self, parent: int, tokens: int) -> int:
        if len(self.parents) >= BLOCKS_MAX:
            raise bad("the recordings have too many blocks", f"the limit is {BLOCKS_MAX}")
        self.parents.append(parent)
        self.tokens.append(tokens)
        return len(self.parents) - 1

    def trace(self, note: str) -> Trace:
        leaves, arrivals, inputs, outputs, sessions, kinds = by_arrival(self.columns)
        start = arrivals[0] if arrivals else 0
        return Trace(
            max(self.block_tokens, 1),
            self.parents,
            self.tokens,
            leaves,
            array("q", [at - start for at in arrivals]),
            inputs,
            outputs,
            sessions,
            kinds,
            HINTS,
            note,
        )


class _Life:
    """The blocks of one recorder, by number, over its files in order."""

    def __init__(self, gathered: _Gathered) -> None:
        self._gathered = gathered
        self._blocks: dict[int, int] = {}
        self._base = gathered.sessions
        self._depths = array("i")

    def read(self, file: _File) -> None:
        """RAISES BadInput (bad_trace) for records that make no sense."""
        head, gathered = file.head, self._gathered
        if gathered.block_tokens not in (0, head.block_tokens):
            raise bad(
                f"block_tokens in the head of {file.path} is {head.block_tokens}",
                f"in the files before it is {gathered.block_tokens}",
                "read the recordings one by one, and make their blocks equal with kvcache trace convert",
            )
        gathered.block_tokens = head.block_tokens
        self._next, self._at_ms = head.first, head.at_ms + head.started_ms
        self._requests: list[int] = []
        for number, chunk in enumerate(file.chunks):
            where = f"chunk {number} of {file.path}"
            try:
                self._chunk(where, chunk)
            except (IndexError, OverflowError) as error:
                raise bad(f"{where} makes no sense", f"a record is not whole: {error}") from error

    def _chunk(self, where: str, chunk: bytes) -> None:
        values = _Values(chunk)
        while values.left():
            kind = values.next()
            if kind in (ASKED, ODD):
                self._asked(where, values, kind)
            elif kind == LONGER:
                self._longer(where, values)
            elif kind == SAVED:
                self._saved(where, values)
            else:
                raise bad(f"{where} has a record of kind {kind}", "there is none")

    def _asked(self, where: str, values: _Values, kind: int) -> None:
        columns = self._gathered.columns
        if len(columns[0]) >= REQUESTS_MAX:
            raise bad(f"{where}: too many requests", f"the limit is {REQUESTS_MAX}")
        self._at_ms += values.next()
        tokens = values.next() if kind == ODD else 0
        leaf = self._path(where, values)
        self._requests.append(len(columns[0]))
        row = (leaf, self._at_ms, min(tokens or self._length(leaf), _INT_MAX), 0, -1, 0)
        for column, value in zip(columns, row, strict=True):
            column.append(value)

    def _longer(self, where: str, values: _Values) -> None:
        request = self._request(where, values)
        tokens = values.next()
        leaf = self._path(where, values)
        self._gathered.columns[0][request] = leaf
        self._gathered.columns[2][request] = min(tokens or self._length(leaf), _INT_MAX)

    def _saved(self, where: str, values: _Values) -> None:
        request = self._request(where, values)
        session, hint, answer = values.next(), values.next(), values.next()
        _, _, _, outputs, sessions, kinds = self._gathered.columns
        if hint >= len(HINTS):
            raise bad(f"{where} has the hint {hint}", f"there are {len(HINTS)}")
        outputs[request] = min(outputs[request] + answer, _INT_MAX)
        kinds[request] = hint
        if session:
            sessions[request] = self._base + session - 1
            self._gathered.sessions = max(self._gathered.sessions, self._base + session)

    def _request(self, where: str, values: _Values) -> int:
        back = values.next()
        if not 0 < back <= len(self._requests):
            raise bad(f"{where} speaks of a request {back} back", f"there are {len(self._requests)}")
        return self._requests[-back]

    def _length(self, leaf: int) -> int:
        if leaf < 0:
            return 0
        return (self._depths[leaf] - 1) * self._gathered.block_tokens + self._gathered.tokens[leaf]

    def _path(self, where: str, values: _Values) -> int:
        """The last block of a path: parent, runs, partial block."""
        base = self._next
        back = values.next()
        block = self._number(where, base - back) if back else -1
        for _ in range(values.next()):
            count, is_old = divmod(values.next(), 2)
            if count > BLOCKS_MAX:
                raise bad(f"{where} has a run of {count} blocks", f"the limit is {BLOCKS_MAX}")
            old = base - values.next() if is_old else 0
            for place in range(count):
                block = self._known_or_new(old + place if old else 0, block)
        if tail := values.next():
            if tail >= self._gathered.block_tokens:
                raise bad(f"{where} has a partial block of {tail} tokens", "a whole one has no more")
            block = self._add(block, tail)
            self._name(block)
        return block

    def _known_or_new(self, old: int, parent: int) -> int:
        known = self._blocks.get(old, -1) if old else -1
        # A client may have sent hashes that are none of a chain: what it stands behind here is what counts.
        is_same = known >= 0 and self._gathered.parents[known] == parent
        block = known if is_same else self._add(parent, self._gathered.block_tokens)
        self._name(block)
        return block

    def _add(self, parent: int, tokens: int) -> int:
        if parent >= 0 and self._gathered.tokens[parent] < self._gathered.block_tokens:
            parent = self._gathered.parents[parent]  # Nothing follows a partial block.
        self._depths.extend([0] * (len(self._gathered.parents) - len(self._depths)))
        self._depths.append(self._depths[parent] + 1 if parent >= 0 else 1)
        return self._gathered.new_block(parent, tokens)

    def _name(self, block: int) -> None:
        self._blocks[self._next] = block
        self._next += 1

    def _number(self, where: str, number: int) -> int:
        block = self._blocks.get(number, -1)
        if block < 0:
            raise bad(f"{where} speaks of block {number}", "no record before it has it")
        return block


class _Values:
    """Numbers of seven bits a byte, one after the other. RAISES IndexError at the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> bool:
        return self._at < len(self._data)

    def next(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise OverflowError("a number of more than 63 bits")
