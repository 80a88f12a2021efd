"""A trace made ready to be replayed many times: each request's blocks, their names, and what is ideal.

Blocks are the trace's own, whole ones only, as engines cache no others. A block's name is 64 bits drawn from
its number: in a trace one number is one prefix, so equal names mean equal prefixes, as the index wants it.

The sum: 10 us a request of 24 blocks, once; 16 bytes a block of a prompt are held.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.errors import BadInput
from kvcache.eviction.traces.trace import Trace

_WORD = (1 << 64) - 1


@dataclass(slots=True, eq=False)
class Job:
    """One request, and what becomes of it in one run. The fields behind ``session`` belong to the run."""

    number: int
    arrival_s: float
    path: Sequence[int]
    names: array[int]
    prompt_tokens: int
    answer_tokens: int
    answer_blocks: int
    session: int
    worker: int = -1
    credited: int = -1
    """Blocks of it that the router took to be cached there; -1: it does not look."""
    truth: int = 0
    expected_tokens: int = 0
    """What the router took it to have to compute."""
    expected_s: float = 0.0
    """As ``expected_tokens``, of a router that knows times."""
    hit: int = 0
    """Blocks that it found at the worker when it was computed, ``loaded`` of them in host memory."""
    loaded: int = 0
    used: int = 0
    """``hit``, of the time when it was computed first."""
    first_s: float = -1.0
    finish_s: float = -1.0
    resent: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order in which they arrive, ``speed`` times as fast as they were recorded."""

    name: str
    block_tokens: int
    parents: array[int]
    block_names: array[int]
    arrivals_s: Sequence[float]
    paths: Sequence[Sequence[int]]
    names: Sequence[array[int]]
    prompt_tokens: Sequence[int]
    answer_tokens: Sequence[int]
    sessions: Sequence[int]
    ideals: Sequence[int]
    """Of each request, the leading blocks that some request before it had."""
    largest_blocks: int

    @property
    def span_s(self) -> float:
        return self.arrivals_s[-1] if self.arrivals_s else 0.0

    def jobs(self) -> list[Job]:
        """Fresh ones, for one run."""
        block = self.block_tokens
        columns = (self.arrivals_s, self.paths, self.names, self.prompt_tokens, self.answer_tokens)
        return [
            Job(number, arrival, path, names, prompt, answer, -(-answer // block), session)
            for number, (arrival, path, names, prompt, answer, session) in enumerate(
                zip(*columns, self.sessions, strict=True)
            )
        ]


def prepare(name: str, trace: Trace, speed: float, count: int = 0) -> Workload:
    """The first ``count`` requests (0: all) of ``trace``. RAISES BadInput (bad_config)."""
    if not 1e-6 <= speed <= 1e6:
        raise BadInput("bad_config", f"speed {speed}", "1e-6 to 1e6 times as recorded is possible")
    if trace.request_count == 0:
        raise BadInput("bad_config", f"{name} has no requests", "there is nothing to replay")
    trace = trace.head(count) if count else trace
    full = trace.block_tokens
    parents = list(trace.parents)
    block_names = array("Q", map(name_of, range(trace.block_count)))
    paths, names, prompts, ideals = [], [], [], []
    seen = bytearray(trace.block_count)
    for leaf, reported in zip(trace.leaves, trace.input_tokens, strict=True):
        loose = 0
        if leaf >= 0 and trace.tokens[leaf] < full:
            loose, leaf = trace.tokens[leaf], parents[leaf]
        path = _path(parents, leaf)
        tokens = max(len(path) * full + loose, reported, 1)
        ideals.append(_known(seen, path))
        paths.append(path)
        names.append(array("Q", [block_names[block] for block in path]))
        prompts.append(tokens)
    start = trace.arrivals_ms[0]
    return Workload(
        name=name,
        block_tokens=full,
        parents=trace.parents,
        block_names=block_names,
        arrivals_s=[(arrival - start) / 1_000 / speed for arrival in trace.arrivals_ms],
        paths=paths,
        names=names,
        prompt_tokens=prompts,
        answer_tokens=list(trace.output_tokens),
        sessions=list(trace.sessions),
        ideals=ideals,
        largest_blocks=max(
            len(path) - (-answer // full) for path, answer in zip(paths, trace.output_tokens, strict=True)
        ),
    )


def name_of(block: int) -> int:
    """64 bits that no other block of a trace has: a bijection of the number (the finaliser of splitmix64)."""
    word = (block + 1) * 0x9E3779B97F4A7C15 & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def _path(parents: Sequence[int], block: int) -> tuple[int, ...]:
    path = []
    while block >= 0:
        path.append(block)
        block = parents[block]
    path.reverse()
    return tuple(path)


def _known(seen: bytearray, path: Sequence[int]) -> int:
    """How many leading blocks an endless cache would have had; from now on it has them all."""
    hit = len(path)
    while hit and not seen[path[hit - 1]]:
        hit -= 1
        seen[path[hit]] = 1
    return hit
