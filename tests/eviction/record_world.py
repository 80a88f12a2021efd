"""What the tests of recordings stand on: a trace as a node sees it, played into a recorder, as files."""

from __future__ import annotations

from array import array
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from kvcache.clock import NS_PER_MS
from kvcache.eviction.traces.edit import renumbered
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.record import Recorder
from kvcache.eviction.traces.record_format import Head, packed_chunk
from kvcache.eviction.traces.trace import Trace

BLOCK = 16
START_NS = 5_000 * NS_PER_MS


def whole_blocks(trace: Trace) -> Trace:
    """As a node sees it: partial blocks have no hash; and prompts without whole blocks are not looked up."""
    full = [
        leaf if leaf < 0 or trace.tokens[leaf] == trace.block_tokens else trace.parents[leaf]
        for leaf in trace.leaves
    ]
    keep = [at for at, leaf in enumerate(full) if leaf >= 0]
    return renumbered(
        replace(
            trace,
            leaves=array("i", [full[at] for at in keep]),
            **{
                name: array(column.typecode, [column[at] for at in keep])
                for name in ("arrivals_ms", "input_tokens", "output_tokens", "sessions", "kind_indexes")
                for column in [getattr(trace, name)]
            },
        )
    )


def hashes(trace: Trace) -> list[bytes]:
    """Of every block: chained, as a node's are."""
    found: list[bytes] = []
    for block, parent in enumerate(trace.parents):
        before = found[parent] if parent >= 0 else b""
        found.append(blake2b(before + block.to_bytes(4, "little"), digest_size=16).digest())
    return found


class Played:
    """A recorder into which a trace is played, and its files in memory."""

    def __init__(
        self, folder: Path, sample: float = 1.0, known_max: int = 1 << 17, life: str = "a" * 16
    ) -> None:
        self.folder = folder
        self.recorder = Recorder(b"s" * 16, START_NS, sample, known_max)
        self._life = life
        self._sample = sample
        self._sequence = 0
        self._head: Head | None = None
        self._chunks = bytearray()

    def play(self, trace: Trace, every: int = 0, files: int = 0) -> None:
        """A chunk every so many requests, a file every so many."""
        names = hashes(trace)
        for request in trace.requests():
            prefix = b"".join(names[block] for block in request.blocks)
            self.recorder.asked(START_NS + request.arrival_ms * NS_PER_MS, prefix, b"", BLOCK, "", False)
            if every and request.index % every == every - 1:
                self.flush()
            if files and request.index % files == files - 1:
                self.end_file()
        self.end_file()

    def flush(self) -> None:
        if self._head is None:
            self._head = Head(
                self._life, self._sequence, 1, 0, 10**12, self.recorder.group_tokens, self._sample
            )
        if records := self.recorder.take():
            self._chunks += packed_chunk(records)

    def end_file(self) -> None:
        self.flush()
        assert self._head is not None
        path = self.folder / f"{self._life}-{self._sequence}.kvrec"
        path.write_bytes(self._head.packed() + self._chunks)
        self._chunks.clear()
        self.recorder.begin_file()
        self._sequence += 1
        first, at_ms = self.recorder.next_number, self.recorder.at_ms
        self._head = replace(self._head, sequence=self._sequence, first=first, at_ms=at_ms)


def made(seed: int = 1, count: int = 80) -> Trace:
    return whole_blocks(generate(Workload(request_count=count, block_tokens=BLOCK, seed=seed)))


def content(trace: Trace) -> list[tuple[int, list[int], int]]:
    trace = renumbered(trace)
    base = trace.arrivals_ms[0]
    return [
        (request.arrival_ms - base, list(request.blocks), request.prompt_tokens)
        for request in trace.requests()
    ]


def alike(one: list[list[int]], other: list[list[int]]) -> bool:
    """The same, but for the numbers."""
    names: dict[int, int] = {}
    return all(
        len(a) == len(b) and all(names.setdefault(x, y) == y for x, y in zip(a, b, strict=True))
        for a, b in zip(one, other, strict=True)
    ) and len(set(names.values())) == len(names)
