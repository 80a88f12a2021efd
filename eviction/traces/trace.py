"""A request trace: who asked for which prefix, and when. Read and written without numpy.

A trace is a forest of blocks and a list of requests. Block ``i`` has a parent that comes before it
(-1: none) and a number of tokens; a request is named by its last block, and walking the parents
gives its whole prompt. So two integers a block and a few a request hold everything, losslessly.

The file is "kvtrace-v1", an npz archive (a zip of .npy arrays, one dimension each):

    parent[N] ntok[N]                         a block: its parent, its tokens
    leaf[R] t_ms[R] in_len[R] out_len[R]      a request: last block (-1: no whole block), arrival, lengths
    session[R] kind[R] kinds[K]               conversation (-1 unknown), how it ended (index into kinds)
    block                                     tokens in a full block
    note                                      where it comes from

A file is input from strangers: sizes are bounded before anything is unpacked, array headers are
matched letter by letter and never evaluated, pickled objects are refused. ``numpy.load(...,
allow_pickle=False)`` reads what ``write_trace`` wrote, and the other way round.

Invariants of a ``Trace`` (checked when it is made): parents come before children; every block has
1 to ``block_tokens`` tokens, and full ones only have children; arrivals never go back.

The sum: 170,000 blocks and 19,000 requests are read and checked in about 0.1 s and held in 2 MB.
"""

from __future__ import annotations

import re
import struct
import sys
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from kvcache.errors import BadInput

BLOCKS_MAX = 1 << 24
REQUESTS_MAX = 1 << 22
BLOCK_TOKENS_MAX = 65_535
KINDS_MAX = 256
TEXT_CHARS_MAX = 4_096
AT_MS_MAX = 1 << 53
_MEMBERS_MAX = 64
_ITEM_BYTES_MAX = 8

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([<|])([iuU])([0-9]{1,4})', 'fortran_order': (?:True|False), "
    rb"'shape': \((?:([0-9]{1,10}),)?\), \} *\n"
)
_CODES = {"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt: its blocks, first to last, and what is known about it. ``index`` counts from 0."""

    index: int
    arrival_ms: int
    blocks: Sequence[int]
    prompt_tokens: int
    input_tokens: int
    output_tokens: int
    session: int
    kind: str


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests over a forest of blocks. Its arrays are not to be changed. RAISES BadInput (bad_trace).

    ``input_tokens`` is the length the source reported; where its last partial block was not recorded
    it is more than the tokens of the blocks.
    """

    block_tokens: int
    parents: array[int]
    tokens: array[int]
    leaves: array[int]
    arrivals_ms: array[int]
    input_tokens: array[int]
    output_tokens: array[int]
    sessions: array[int]
    kind_indexes: array[int]
    kinds: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        _check_blocks(self)
        _check_requests(self)

    @property
    def block_count(self) -> int:
        return len(self.parents)

    @property
    def request_count(self) -> int:
        return len(self.leaves)

    def chain(self, block: int) -> list[int]:
        """The blocks from the first of its prompt to ``block``; none for -1."""
        chain: list[int] = []
        while block >= 0:
            chain.append(block)
            block = self.parents[block]
        chain.reverse()
        return chain

    def request(self, index: int) -> Request:
        blocks = self.chain(self.leaves[index])
        tokens = (len(blocks) - 1) * self.block_tokens + self.tokens[blocks[-1]] if blocks else 0
        kind = self.kind_indexes[index]
        return Request(
            index=index,
            arrival_ms=self.arrivals_ms[index],
            blocks=blocks,
            prompt_tokens=tokens,
            input_tokens=self.input_tokens[index],
            output_tokens=self.output_tokens[index],
            session=self.sessions[index],
            kind=self.kinds[kind] if kind < len(self.kinds) else "",
        )

    def requests(self) -> Iterator[Request]:
        """All requests in the order of their arrival."""
        return (self.request(index) for index in range(self.request_count))

    def head(self, count: int) -> Trace:
        """The first ``count`` requests, and the same blocks."""
        return replace(
            self,
            leaves=self.leaves[:count],
            arrivals_ms=self.arrivals_ms[:count],
            input_tokens=self.input_tokens[:count],
            output_tokens=self.output_tokens[:count],
            sessions=self.sessions[:count],
            kind_indexes=self.kind_indexes[:count],
        )


def _bad(what: str, why: str, todo: str = "") -> BadInput:
    return BadInput("bad_trace", what, why, todo)


def _check_blocks(trace: Trace) -> None:
    if not 1 <= trace.block_tokens <= BLOCK_TOKENS_MAX:
        raise _bad(f"blocks of {trace.block_tokens} tokens", f"1 to {BLOCK_TOKENS_MAX} are possible")
    if len(trace.tokens) != len(trace.parents):
        raise _bad(f"{len(trace.tokens)} token counts", f"there are {len(trace.parents)} blocks")
    full = trace.block_tokens
    for block, (parent, tokens) in enumerate(zip(trace.parents, trace.tokens, strict=True)):
        if not -1 <= parent < block:
            raise _bad(f"block {block} has parent {parent}", "a parent comes before its children")
        if not 1 <= tokens <= full:
            raise _bad(f"block {block} has {tokens} tokens", f"a block has 1 to {full}")
        if parent >= 0 and trace.tokens[parent] != full:
            raise _bad(f"block {block} follows block {parent}", "which is not full, so nothing can follow it")


def _check_requests(trace: Trace) -> None:
    count = len(trace.leaves)
    columns = (
        ("t_ms", trace.arrivals_ms),
        ("in_len", trace.input_tokens),
        ("out_len", trace.output_tokens),
        ("session", trace.sessions),
        ("kind", trace.kind_indexes),
    )
    for name, column in columns:
        if len(column) != count:
            raise _bad(f"{len(column)} values of {name}", f"there are {count} requests")
    if count == 0:
        return
    if not -1 <= min(trace.leaves) <= max(trace.leaves) < len(trace.parents):
        raise _bad("a request ends in a block that is not there", f"there are {len(trace.parents)} blocks")
    if min(trace.input_tokens) < 0 or min(trace.output_tokens) < 0:
        raise _bad("a request has a negative length", "lengths are counts of tokens")
    if max(map(abs, (min(trace.arrivals_ms), max(trace.arrivals_ms)))) > AT_MS_MAX:
        raise _bad("t_ms is out of range", f"times are within {AT_MS_MAX} ms of 0")
    for index, (earlier, later) in enumerate(pairwise(trace.arrivals_ms), 1):
        if later < earlier:
            raise _bad(
                f"request {index} arrives at {later} ms, the one before it at {earlier} ms",
                "t_ms never runs back",
                "if only the order is wrong, kvcache trace convert --sort mends it",
            )


# --- reading ------------------------------------------------------------------------------------


def read_trace(path: Path, *, sort: bool = False) -> Trace:
    """The kvtrace-v1 trace in ``path``. With ``sort``, requests are put in order of arrival; without, a file
    whose time runs back is refused. RAISES BadInput (bad_trace)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(path, archive).trace(sort)
    except BadInput as error:
        if str(path) in error.what:
            raise
        raise _bad(f"{error.what}, in {path}", error.why, error.todo) from error
    except FileNotFoundError as error:
        raise _bad(
            f"{path} is not there", "no file has this name", "give the path of a kvtrace-v1 .npz file"
        ) from error
    except zipfile.BadZipFile as error:
        todo = "is it a kvtrace-v1 .npz file, and whole? Such a file that was cut off has lost its directory"
        raise _bad(f"{path} cannot be read", str(error)[:200], todo) from error
    # RuntimeError and NotImplementedError: encrypted, or packed in a way zipfile does not know.
    except (OSError, EOFError, RuntimeError, zlib.error, ValueError) as error:
        raise _bad(f"{path} cannot be read", str(error)[:200], "is it a kvtrace-v1 .npz file?") from error


class _Reader:
    """Takes arrays out of one archive. Lives for one call of ``read_trace``."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        self._members = {info.filename: info for info in archive.infolist()}
        if len(archive.infolist()) > _MEMBERS_MAX:
            raise _bad(f"{path} has {len(archive.infolist())} members", f"a trace has at most {_MEMBERS_MAX}")

    def trace(self, sort: bool) -> Trace:
        block = self._integers("block", "i", 1)
        notes = self._texts("note", 1)
        if not block or not notes:
            raise _bad(f"{self._path} has no block length or no note", "the array is empty")
        columns: Sequence[array[int]] = (
            self._integers("leaf", "i", REQUESTS_MAX),
            self._integers("t_ms", "q", REQUESTS_MAX),
            self._integers("in_len", "i", REQUESTS_MAX),
            self._integers("out_len", "i", REQUESTS_MAX),
            self._integers("session", "i", REQUESTS_MAX),
            self._integers("kind", "B", REQUESTS_MAX),
        )
        leaves, arrivals_ms, input_tokens, output_tokens, sessions, kind_indexes = (
            by_arrival(columns) if sort else columns
        )
        return Trace(
            block_tokens=block[0],
            parents=self._integers("parent", "i", BLOCKS_MAX),
            tokens=self._integers("ntok", "H", BLOCKS_MAX),
            leaves=leaves,
            arrivals_ms=arrivals_ms,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            sessions=sessions,
            kind_indexes=kind_indexes,
            kinds=self._texts("kinds", KINDS_MAX),
            note=notes[0],
        )

    def _integers(self, name: str, code: str, count_max: int) -> array[int]:
        data, kind, width, count = self._array(name, count_max, _ITEM_BYTES_MAX)
        stored = _CODES.get(f"{kind}{width}")
        if stored is None:
            raise _bad(f"{self._name(name)} holds {kind}{width}", "it is to hold integers")
        values = array(stored)
        assert values.itemsize == width
        self._check_length(name, data, count * width)
        values.frombytes(data)
        if sys.byteorder == "big":
            values.byteswap()
        if stored == code:
            return values
        try:
            return array(code, values)
        except OverflowError as error:
            raise _bad(f"{self._name(name)} has a value out of range", str(error)) from error

    def _texts(self, name: str, count_max: int) -> tuple[str, ...]:
        data, kind, width, count = self._array(name, count_max, 4 * TEXT_CHARS_MAX)
        if kind != "U" or not 1 <= width <= TEXT_CHARS_MAX:
            raise _bad(f"{self._name(name)} holds {kind}{width}", "it is to hold text")
        self._check_length(name, data, count * width * 4)
        text = data.decode("utf-32-le")
        return tuple(text[at : at + width].rstrip("\0") for at in range(0, len(text), width))

    def _name(self, name: str) -> str:
        return f"the array '{name}' in {self._path}"

    def _check_length(self, name: str, data: bytes, length: int) -> None:
        if len(data) != length:
            raise _bad(f"{self._name(name)} has {len(data)} bytes", f"its header says {length}")

    def _array(self, name: str, count_max: int, item_bytes_max: int) -> tuple[bytes, str, int, int]:
        """Raw bytes, kind letter, width and count of one array; a scalar counts as one."""
        data = self._member(f"{name}.npy", count_max * item_bytes_max + 65_536)
        if not data.startswith(_MAGIC):
            raise _bad(f"{self._name(name)} has a strange header", "it is not .npy version 1.0")
        start = len(_MAGIC) + 2
        end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
        matched = _HEADER.fullmatch(data[start:end])
        if matched is None:
            raise _bad(
                f"{self._name(name)} is not a plain list",
                f"its header is {data[start:end][:80]!r}",
                "save little-endian integers or text with one dimension",
            )
        _, kind, width, count = matched.groups()
        item_count = 1 if count is None else int(count)
        if item_count > count_max:
            raise _bad(f"{self._name(name)} has {item_count} items", f"the limit is {count_max}")
        return data[end:], kind.decode(), int(width), item_count

    def _member(self, name: str, bytes_max: int) -> bytes:
        info = self._members.get(name)
        if info is None:
            raise _bad(
                f"{self._path} has no array '{name.removesuffix('.npy')}'", "every kvtrace-v1 file has it"
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _bad(f"{name} in {self._path} is packed in another way", "numpy stores or deflates")
        if info.file_size > bytes_max:
            raise _bad(f"{name} in {self._path} has {info.file_size} bytes", f"the limit is {bytes_max}")
        # The reader stops at the length in the directory, and what comes out has a checksum there.
        with self._archive.open(info) as stream:
            return stream.read(bytes_max)


def by_arrival(columns: Sequence[array[int]]) -> Sequence[array[int]]:
    """The columns (leaf, t_ms, ...) with requests in order of arrival; equal arrivals keep their order."""
    arrivals = columns[1]
    if any(len(column) != len(arrivals) for column in columns):
        return columns  # Trace refuses it, and says which.
    if all(earlier <= later for earlier, later in pairwise(arrivals)):
        return columns
    order = sorted(range(len(arrivals)), key=arrivals.__getitem__)
    return [array(column.typecode, [column[at] for at in order]) for column in columns]


# --- writing ------------------------------------------------------------------------------------


def write_trace(path: Path, trace: Trace) -> None:
    """Write ``trace`` so that ``read_trace`` and numpy read it. The same trace gives the same file."""
    kind_chars = max([1, *map(len, trace.kinds)])
    note_chars = max(1, len(trace.note))
    members = (
        ("parent", _npy_integers(trace.parents)),
        ("ntok", _npy_integers(trace.tokens)),
        ("leaf", _npy_integers(trace.leaves)),
        ("t_ms", _npy_integers(trace.arrivals_ms)),
        ("in_len", _npy_integers(trace.input_tokens)),
        ("out_len", _npy_integers(trace.output_tokens)),
        ("session", _npy_integers(trace.sessions)),
        ("kind", _npy_integers(trace.kind_indexes)),
        ("block", _npy(b"<i4", b"()", struct.pack("<i", trace.block_tokens))),
        ("kinds", _npy(b"<U%d" % kind_chars, b"(%d,)" % len(trace.kinds), _utf32(trace.kinds, kind_chars))),
        ("note", _npy(b"<U%d" % note_chars, b"()", _utf32([trace.note], note_chars))),
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy"), data, compress_type=zipfile.ZIP_DEFLATED, compresslevel=9
            )


def _utf32(texts: Sequence[str], width: int) -> bytes:
    return "".join(text.ljust(width, "\0") for text in texts).encode("utf-32-le")


def _npy_integers(values: array[int]) -> bytes:
    code = next(name for name, typecode in _CODES.items() if typecode == values.typecode)
    stored = values
    if sys.byteorder == "big":
        stored = values[:]
        stored.byteswap()
    order = b"|" if values.itemsize == 1 else b"<"
    return _npy(order + code.encode(), b"(%d,)" % len(values), stored.tobytes())


def _npy(descr: bytes, shape: bytes, data: bytes) -> bytes:
    """One array in .npy version 1.0: the header is padded so that the data starts at a multiple of 64."""
    header = b"{'descr': '%s', 'fortran_order': False, 'shape': %s, }" % (descr, shape)
    start = len(_MAGIC) + 2
    padded = header.ljust(-(start + len(header) + 1) % 64 + len(header)) + b"\n"
    return _MAGIC + struct.pack("<H", len(padded)) + padded + data
