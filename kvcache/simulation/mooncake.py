"""Reads request traces as Mooncake publishes them, and others after it: a JSON object a line.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, ...]}

Milliseconds, tokens, and a number a block of 512 tokens, the last of which may be partial. A number stands
for a block and all before it, so a block has one parent wherever it appears; a file in which one has two is
refused.

A file is input from strangers: lines, blocks and requests are bounded, and nothing but numbers is taken.

The sum: 30 us a request.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvcache.errors import BadInput
from kvcache.eviction.trace import BLOCKS_MAX, REQUESTS_MAX, Trace

BLOCK_TOKENS = 512
LINE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class _Line:
    at_ms: int
    prompt_tokens: int
    answer_tokens: int
    hashes: tuple[int, ...]


def read_mooncake(path: Path, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """The trace in ``path``, requests in order of arrival. RAISES BadInput (bad_trace)."""
    try:
        with path.open("rb") as stream:
            lines = sorted(_lines(path, stream), key=lambda line: line.at_ms)
    except OSError as error:
        raise _bad(f"{path} cannot be read", str(error)) from error
    blocks = _Blocks(path, block_tokens)
    leaves = array("i", [blocks.leaf(line) for line in lines])
    count = len(lines)
    return Trace(
        block_tokens,
        blocks.parents,
        blocks.tokens,
        leaves,
        array("q", [line.at_ms for line in lines]),
        array("i", [line.prompt_tokens for line in lines]),
        array("i", [line.answer_tokens for line in lines]),
        array("i", [-1]) * count,
        array("B", bytes(count)),
        ("unknown",),
        path.name,
    )


class _Blocks:
    """Numbers the blocks as they first appear."""

    def __init__(self, path: Path, block_tokens: int) -> None:
        self.parents = array("i")
        self.tokens = array("H")
        self._path = path
        self._full = block_tokens
        self._numbers: dict[int, int] = {}

    def leaf(self, line: _Line) -> int:
        """The number of its last block; -1 of a prompt without any."""
        parent, known = -1, len(self.parents)
        for name in line.hashes:
            number = self._numbers.get(name)
            if number is None:
                number = self._new(name)
                self.parents.append(parent)
                self.tokens.append(self._full)
            if self.parents[number] != parent:
                raise _bad(f"block {name} in {self._path} has two parents", "a number stands for a prefix")
            if parent >= 0:
                self.tokens[parent] = self._full
            parent = number
        rest = line.prompt_tokens - (len(line.hashes) - 1) * self._full
        if parent >= known and 1 <= rest < self._full:
            self.tokens[parent] = rest
        return parent

    def _new(self, name: int) -> int:
        if len(self._numbers) >= BLOCKS_MAX:
            raise _bad(f"{self._path} has too many blocks", f"the limit is {BLOCKS_MAX}")
        self._numbers[name] = len(self._numbers)
        return self._numbers[name]


def _lines(path: Path, stream: BinaryIO) -> Iterator[_Line]:
    count = 0
    while line := stream.readline(LINE_BYTES_MAX + 1):
        count += 1
        if len(line) > LINE_BYTES_MAX:
            raise _bad(f"line {count} of {path} is too long", f"the limit is {LINE_BYTES_MAX} bytes")
        if count > REQUESTS_MAX:
            raise _bad(f"{path} has too many requests", f"the limit is {REQUESTS_MAX}")
        if line.strip():
            yield _parsed(f"line {count} of {path}", line)


def _parsed(where: str, line: bytes) -> _Line:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad(
            f"{where} is no JSON", str(error)[:200], "give a file as Mooncake publishes them"
        ) from error
    if not isinstance(read, dict):
        raise _bad(f"{where} is no object", "each line describes a request")
    hashes = read.get("hash_ids")
    if not isinstance(hashes, list):
        raise _bad(f"{where} has no hash_ids", "they say which blocks the prompt has")
    names = tuple(_number(where, "hash_ids", each, 1 << 64) for each in hashes)
    fields = ("timestamp", "input_length", "output_length")
    at_ms, prompt, answer = (_number(where, name, read.get(name), 1 << 31) for name in fields)
    return _Line(at_ms, prompt, answer, names)


def _number(where: str, name: str, value: object, limit: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise _bad(f"{name} in {where} is {str(value)[:40]!r}", f"it is a whole number from 0, below {limit}")
    return value


def _bad(what: str, why: str, todo: str = "") -> BadInput:
    return BadInput("bad_trace", what, why, todo)
