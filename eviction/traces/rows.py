"""What readers of others' traces share: bounded lines, checked numbers, blocks numbered as they appear.

A source names the blocks of a prompt by numbers of its own; ``Rows`` gives each block its place in a forest,
so that what comes out is a ``Trace`` however the source counts. Two kinds of names are told apart:

* *prefix names* (Mooncake): a name stands for a block and all before it, so it has one parent wherever it
  appears, and a file in which it has two is damaged;
* *content names* (Qwen-Bailian): a name may stand for the same text in several places, so a block is a name
  behind a parent.

A file is input from strangers: lines, numbers, blocks and requests are bounded, and every refusal names the
line and the field.

The sum: 0.2 us a block of a prompt, 10 us a request.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from kvcache.errors import BadInput
from kvcache.eviction.traces.trace import (
    BLOCK_TOKENS_MAX,
    BLOCKS_MAX,
    KINDS_MAX,
    REQUESTS_MAX,
    Trace,
    by_arrival,
)

LINE_BYTES_MAX = 4 << 20
NAME_MAX = 1 << 64
LENGTH_MAX = 1 << 31
SECONDS_MAX = 1e10
SESSIONS_MAX = REQUESTS_MAX
KIND_CHARS_MAX = 64
_SHOWN_CHARS = 40
_NAME_BITS = 96  # With what readers put before a name to tell one file's from another's.

Progress = Callable[[int], None]
"""How many bytes have been read."""


def bad(what: str, why: str, todo: str = "") -> BadInput:
    return BadInput("bad_trace", what, why, todo)


class Fit:
    """Are blocks as long as was taken for granted? Else every figure in tokens would be wrong by so much. A
    request may be odd; a file of which most are has blocks of another length."""

    def __init__(self, block_tokens: int, *, is_assumed: bool) -> None:
        """``is_assumed``: nobody said how long they are, so that longer ones are refused, too."""
        self._full = block_tokens
        self._is_assumed = is_assumed
        self._low, self._high = 1, BLOCK_TOKENS_MAX
        self._some = self._several = self._over = self._under = 0
        self._first_over = self._first_under = ""

    def see(self, where: str, count: int, tokens: int) -> None:
        """A prompt of so many tokens has ``count`` blocks."""
        if not count:
            return
        said = f"{where}: {count:,} blocks of {self._full} tokens for a prompt of {tokens:,}"
        self._some += 1
        self._low = max(self._low, -(-tokens // count))
        if tokens >= (count + 1) * self._full:
            self._under += 1
            self._first_under = self._first_under or said
        if count > 1:
            self._several += 1
            self._high = min(self._high, (tokens - 1) // (count - 1))
            if tokens <= (count - 1) * self._full:
                self._over += 1
                self._first_over = self._first_over or said

    def check(self) -> None:
        """RAISES BadInput (bad_trace)."""
        if 2 * self._over > self._several:
            raise self._bad(self._first_over, "shorter", f"{self._over:,} of {self._several:,}")
        if self._is_assumed and 2 * self._under > self._some:
            raise self._bad(self._first_under, "longer", f"{self._under:,} of {self._some:,}")

    def _bad(self, what: str, how: str, share: str) -> BadInput:
        likely = 1 << (self._low - 1).bit_length()
        fits = self._low <= likely <= self._high
        todo = "say how long they are with --block-tokens"
        return bad(
            what,
            f"so it is in {share} requests: the blocks of this file are {how}",
            f"{todo} {likely}" if fits else todo,
        )


class Rows:
    """Gathers requests into a trace, in the order in which they are added."""

    def __init__(self, block_tokens: int, *, prefix_names: bool, sort: bool, fit: Fit | None = None) -> None:
        """Without ``sort``, a request that arrives before the one added before it is refused."""
        self._full = block_tokens
        self._fit = fit
        self._prefix_names = prefix_names
        self._sort = sort
        self._parents = array("i")
        self._tokens = array("H")
        self._numbers: dict[int, int] = {}
        self._behind: dict[int, int] = {}
        self._columns = [array(code) for code in "iqiiiB"]
        self._kinds: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(
        self,
        where: str,
        at_ms: int,
        names: Sequence[int],
        input_tokens: int,
        output_tokens: int,
        session: int = -1,
        kind: str = "unknown",
    ) -> None:
        """One request, of the blocks ``names``. ``where`` is what a refusal calls it.

        RAISES BadInput when time runs back, a block has two parents, or there is too much."""
        arrivals = self._columns[1]
        if len(arrivals) >= REQUESTS_MAX:
            raise bad(f"{where}: too many requests", f"the limit is {REQUESTS_MAX}")
        if arrivals and at_ms < arrivals[-1] and not self._sort:
            raise bad(
                f"{where} is at {at_ms} ms, the request before it at {arrivals[-1]} ms",
                "time never runs back in a trace",
                "if only the order is wrong, kvcache trace convert --sort mends it",
            )
        leaf = self._leaf(where, names, input_tokens)
        if self._fit is not None:
            self._fit.see(where, len(names), input_tokens)
        for column, value in zip(
            self._columns,
            (leaf, at_ms, input_tokens, output_tokens, session, self._kind(where, kind)),
            strict=True,
        ):
            column.append(value)

    def trace(self, note: str) -> Trace:
        """All that was added. RAISES BadInput (bad_trace)."""
        if self._fit is not None:
            self._fit.check()
        columns = by_arrival(self._columns) if self._sort else self._columns
        leaves, arrivals, inputs, outputs, sessions, kinds = columns
        return Trace(
            self._full,
            self._parents,
            self._tokens,
            leaves,
            arrivals,
            inputs,
            outputs,
            sessions,
            kinds,
            tuple(self._kinds),
            note,
        )

    def _kind(self, where: str, kind: str) -> int:
        if kind not in self._kinds and len(self._kinds) >= KINDS_MAX:
            raise bad(f"{where}: too many kinds of requests", f"the limit is {KINDS_MAX}")
        return self._kinds.setdefault(kind, len(self._kinds))

    def _leaf(self, where: str, names: Sequence[int], input_tokens: int) -> int:
        """The number of the last block; -1 of a prompt without any. A last block that is new, and longer
        than what is left of the prompt, is partial until something follows it."""
        known = len(self._parents)
        leaf = self._by_prefix(where, names) if self._prefix_names else self._by_content(names)
        if len(self._parents) > BLOCKS_MAX:
            raise bad(f"{where}: too many blocks", f"the limit is {BLOCKS_MAX}")
        rest = input_tokens - (len(names) - 1) * self._full
        if leaf >= known and 1 <= rest < self._full:
            self._tokens[leaf] = rest
        return leaf

    def _by_prefix(self, where: str, names: Sequence[int]) -> int:
        parent = -1
        parents, tokens, numbers, full = self._parents, self._tokens, self._numbers, self._full
        for name in names:
            number = numbers.get(name, -1)
            if number < 0:
                number = numbers[name] = len(parents)
                parents.append(parent)
                tokens.append(full)
            elif parents[number] != parent:
                raise bad(
                    f"hash_ids in {where}: block {name} has two parents",
                    "a number stands for a block and all before it, so it follows one block, everywhere",
                )
            if parent >= 0:
                tokens[parent] = full
            parent = number
        return parent

    def _by_content(self, names: Sequence[int]) -> int:
        parent = -1
        parents, tokens, behind, full = self._parents, self._tokens, self._behind, self._full
        for name in names:
            key = parent + 1 << _NAME_BITS | name  # Half as large as a pair of the two.
            number = behind.get(key, -1)
            if number < 0:
                number = behind[key] = len(parents)
                parents.append(parent)
                tokens.append(full)
            if parent >= 0:
                tokens[parent] = full
            parent = number
        return parent


# --- lines and fields ---------------------------------------------------------------------------


def objects(path: Path, progress: Progress | None = None) -> Iterator[tuple[str, dict[str, object]]]:
    """Every line of ``path`` as an object, with the words for it; empty lines are passed over.

    RAISES BadInput (bad_trace) for a line that is none, and for a file that cannot be read."""
    try:
        done = 0
        with path.open("rb") as stream:
            for number, line in _lines(path, stream):
                done += len(line)
                if progress is not None:
                    progress(done)
                if line.strip():
                    where = f"line {number} of {path}"
                    yield where, parsed(where, line)
    except OSError as error:
        raise bad(f"{path} cannot be read", str(error)) from error


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > LINE_BYTES_MAX:
            raise bad(f"line {number} of {path} is too long", f"the limit is {LINE_BYTES_MAX} bytes")
        yield number, line


def parsed(where: str, text: bytes) -> dict[str, object]:
    """The JSON object in ``text``. RAISES BadInput (bad_trace)."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad(
            f"{where} is no JSON", str(error)[:200], "is the file whole, and in this format?"
        ) from error
    if not isinstance(read, dict):
        raise bad(f"{where} is no object", "each describes a request, between { and }")
    return read


def whole(where: str, fields: Mapping[str, object], name: str, limit: int = LENGTH_MAX, low: int = 0) -> int:
    """A whole number from ``low``, below ``limit``. RAISES BadInput (bad_trace)."""
    return checked(where, name, fields.get(name), limit, low)


def checked(where: str, name: str, value: object, limit: int, low: int = 0) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < limit:
        raise bad(f"{name} in {where} is {shown(value)}", f"it is a whole number from {low}, below {limit}")
    return value


def seconds(where: str, fields: Mapping[str, object], name: str) -> int:
    """A time in seconds, as milliseconds. RAISES BadInput (bad_trace)."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= SECONDS_MAX:
        raise bad(f"{name} in {where} is {shown(value)}", f"it is seconds, from 0 to {SECONDS_MAX:.0f}")
    return math.floor(value * 1_000 + 0.5)


def names(where: str, fields: Mapping[str, object]) -> list[int]:
    """``hash_ids``. RAISES BadInput (bad_trace)."""
    found = fields.get("hash_ids")
    if not isinstance(found, list):
        raise bad(f"{where} has no hash_ids", "they say which blocks the prompt has")
    if all(type(each) is int and 0 <= each < NAME_MAX for each in found):
        return found
    return [checked(where, "hash_ids", each, NAME_MAX) for each in found]


def text(where: str, fields: Mapping[str, object], name: str, default: str) -> str:
    """A short text; ``default`` where there is none. RAISES BadInput (bad_trace)."""
    value = fields.get(name, default)
    if not isinstance(value, str) or len(value) > KIND_CHARS_MAX or "\0" in value:
        raise bad(f"{name} in {where} is {shown(value)}", f"it is text, {KIND_CHARS_MAX} characters at most")
    return value or default


def shown(value: object) -> str:
    """What a message says of something that a stranger wrote: short, and one line."""
    return "missing" if value is None else repr(str(value)[:_SHOWN_CHARS])
