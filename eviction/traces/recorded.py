"""Recordings of a node, read back into a trace. ``record`` says what a record means.

A folder holds the files of several lives; within one, what an earlier file numbered is known again. A node
that was killed leaves a last chunk that is torn: it is dropped, and the trace's note says so. A chunk that is
wrong in the middle of a file is damage, and refused.

The sum: 5 us a record.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from pathlib import Path

from kvcache.eviction.traces.record import ASKED, LONGER, ODD, SAVED
from kvcache.eviction.traces.record_format import SUFFIX, RecordedFile, chunks_of, opened_file
from kvcache.eviction.traces.rows import Progress, bad
from kvcache.eviction.traces.trace import BLOCKS_MAX, REQUESTS_MAX, Trace, by_arrival
from kvcache.policy import HINTS

FILES_MAX = 1 << 16
NUMBERS_MAX = 2 * BLOCKS_MAX
_INT_MAX = (1 << 31) - 1


def read_recorded(path: Path, progress: Progress | None = None) -> Trace:
    """The recording in the file ``path``, or those in the folder. RAISES BadInput (bad_trace)."""
    paths = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if len(paths) > FILES_MAX:
        raise bad(f"{path} has {len(paths)} files", f"the limit is {FILES_MAX}")
    read = [opened_file(each) for each in paths]
    files = [file for file in read if file.head.life]
    files.sort(key=lambda file: (file.head.started_ms, file.head.life, file.head.sequence))
    lives: dict[str, _Life] = {}
    gathered = _Gathered()
    done, torn = 0, len(read) - len(files)
    for file in files:
        life = lives.setdefault(file.head.life, _Life(gathered))
        torn += life.read(file, done, progress)
        done += file.file_bytes
    notes = [f"{path.name}: {len(files)} files of {len(lives)} recordings"]
    sample = min((file.head.sample for file in files), default=1.0)
    notes += [f"sample {sample:g}"] if sample < 1 else []
    notes += [f"{torn} with a torn last record, which was dropped"] if torn else []
    return gathered.trace(", ".join(notes))


# --- records --------------------------------------------------------------------------------------


class _Gathered:
    """Blocks and requests of all lives."""

    def __init__(self) -> None:
        self.block_tokens = 0
        self.sessions = self.numbers = 0
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


class _Numbers:
    """The blocks of one recorder by its numbers, which rise from file to file: 4 bytes each."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._parts: list[array[int]] = []

    @property
    def next(self) -> int:
        return self._firsts[-1] + len(self._parts[-1]) if self._firsts else 1

    def begin_file(self, first: int) -> None:
        """REQUIRES: not below ``next``."""
        self._firsts.append(first)
        self._parts.append(array("i"))

    def add(self, block: int) -> None:
        self._parts[-1].append(block)

    def block(self, number: int) -> int:
        """-1 of one that nothing has."""
        at = bisect_right(self._firsts, number) - 1
        place = number - self._firsts[at] if at >= 0 else -1
        return self._parts[at][place] if 0 <= place < len(self._parts[at]) else -1


class _Life:
    """The blocks of one recorder, by number, over its files in order."""

    def __init__(self, gathered: _Gathered) -> None:
        self._gathered = gathered
        self._numbers = _Numbers()
        self._base = gathered.sessions
        self._depths = array("i")

    def read(self, file: RecordedFile, done: int, progress: Progress | None) -> bool:
        """Is its last record torn? ``done`` bytes of other files were read before.

        RAISES BadInput (bad_trace) for records that make no sense."""
        head, gathered = file.head, self._gathered
        if gathered.block_tokens not in (0, head.block_tokens):
            raise bad(
                f"block_tokens in the head of {file.path} is {head.block_tokens}",
                f"in the files before it is {gathered.block_tokens}",
                "read the recordings one by one, and make their blocks equal with kvcache trace convert",
            )
        if head.first < self._numbers.next:
            raise bad(
                f"first in the head of {file.path} is {head.first}",
                f"the files before it have blocks up to {self._numbers.next - 1}",
                "is one of them a copy? Then take it away",
            )
        gathered.block_tokens = head.block_tokens
        self._numbers.begin_file(head.first)
        self._at_ms = head.at_ms + head.started_ms
        self._requests: list[int] = []
        end = file.chunks_at
        for number, (end, chunk) in enumerate(chunks_of(file)):
            where = f"chunk {number} of {file.path}"
            try:
                self._chunk(where, chunk)
            except (IndexError, OverflowError) as error:
                raise bad(f"{where} makes no sense", f"a record is not whole: {error}") from error
            if progress is not None:
                progress(done + end)
        return end < file.file_bytes

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
        base = self._numbers.next
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
        known = self._numbers.block(old) if old else -1
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
        self._gathered.numbers += 1
        if self._gathered.numbers > NUMBERS_MAX:
            raise bad("the recordings number too many blocks", f"the limit is {NUMBERS_MAX}")
        self._numbers.add(block)

    def _number(self, where: str, number: int) -> int:
        block = self._numbers.block(number)
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
