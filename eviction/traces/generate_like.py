"""Requests made up to be like those of a real trace: its parameters are fitted, then drawn from.

A request of a prefix-structured trace is told by five numbers: how long after the request before it came,
how many blocks it *found* (that some request before it had), how long these had not been used, how deep
the request was that had used them last, and how many blocks it has of its own. ``fit`` takes the joint
distribution of these, in the order of time, so that a trace that grows or dies down is followed as it does;
nothing else of the trace is kept, no block and no name. ``generate_like`` draws from it, a request at a
time, out of those near the same point in time: it looks for a request of its own that was as long ago and as
deep, follows it as far, and says something new from there. A request that went on from the very end of
another does so here.

What comes out agrees with the original in length of prompts, ideal hit, reuse times and in what a cache of
any size finds, within what docs/traces.md states, and in nothing else.

Invariant: at every moment each block's last user is the last request that has it.

The sum: 60 us a request and 1 us a block that it has of its own.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from kvcache.errors import BadInput
from kvcache.eviction.traces.shape import PROGRESS_REQUESTS, Progress, depths_of
from kvcache.eviction.traces.trace import BLOCKS_MAX, REQUESTS_MAX, Trace

NEAR_SHARE = 0.02
"""Of the original's requests: how far before and after the same point in time is drawn from."""
NEAR_MIN = 20
CANDIDATES = 160
_GOOD = 0.02


@dataclass(frozen=True, slots=True)
class Drawn:
    """One request of the original, as far as it is kept.

    ``idle_ms`` is how long the last block found had not been used, -1 when none was found; ``depth`` the
    whole blocks of the request that had used it; ``tail_tokens`` are in the last block, ``loose_tokens`` in
    none."""

    gap_ms: int
    found: int
    idle_ms: int
    depth: int
    own: int
    tail_tokens: int
    loose_tokens: int
    output_tokens: int
    kind: int
    is_same_session: bool


@dataclass(frozen=True, slots=True)
class Model:
    """What was fitted: the joint distribution, in the order of time."""

    block_tokens: int
    kinds: tuple[str, ...]
    has_sessions: bool
    drawn: tuple[Drawn, ...]
    note: str


def fit(trace: Trace) -> Model:
    """The parameters of ``trace``. REQUIRES: it has requests."""
    return Model(
        trace.block_tokens,
        trace.kinds or ("unknown",),
        any(session >= 0 for session in trace.sessions),
        tuple(_fitted(trace)),
        trace.note,
    )


def _fitted(trace: Trace) -> Iterator[Drawn]:
    parents, tokens, full = trace.parents, trace.tokens, trace.block_tokens
    depths = depths_of(parents)
    last = array("i", [-1]) * trace.block_count
    before_ms = trace.arrivals_ms[0]
    for index, leaf in enumerate(trace.leaves):
        now_ms = trace.arrivals_ms[index]
        size = depths[leaf] if leaf >= 0 else 0
        found, user = 0, -1
        block = leaf
        while block >= 0:
            if user < 0 and last[block] >= 0:
                found, user = depths[block], last[block]
            last[block] = index
            block = parents[block]
        tail = tokens[leaf] if leaf >= 0 else full
        inside = (size - 1) * full + tail if size else 0
        session = trace.sessions[index]
        yield Drawn(
            gap_ms=now_ms - before_ms,
            found=found,
            idle_ms=now_ms - trace.arrivals_ms[user] if user >= 0 else -1,
            depth=_whole_blocks(trace, depths, user) if user >= 0 else 0,
            own=size - found,
            tail_tokens=tail,
            loose_tokens=max(0, trace.input_tokens[index] - inside),
            output_tokens=trace.output_tokens[index],
            kind=min(trace.kind_indexes[index], max(len(trace.kinds) - 1, 0)),
            is_same_session=user >= 0 and session >= 0 and session == trace.sessions[user],
        )
        before_ms = now_ms


def _whole_blocks(trace: Trace, depths: array[int], index: int) -> int:
    leaf = trace.leaves[index]
    return depths[leaf] - (trace.tokens[leaf] < trace.block_tokens)


def generate_like(model: Model, count: int, seed: int = 1, progress: Progress | None = None) -> Trace:
    """``count`` requests like those that ``model`` was fitted to. RAISES BadInput (bad_config)."""
    if not 1 <= count <= REQUESTS_MAX:
        raise BadInput("bad_config", f"{count} requests", f"1 to {REQUESTS_MAX} are possible")
    maker = _Maker(model, Random(seed))
    for number, at in enumerate(_order(len(model.drawn), count, maker.random)):
        maker.add(model.drawn[at])
        if progress is not None and number % PROGRESS_REQUESTS == 0:
            progress(number)
    return maker.trace(f"kvcache.eviction.traces.generate_like, seed {seed}, fitted to: {model.note}"[:4_000])


def _order(known: int, count: int, random: Random) -> list[int]:
    """Which of the original's requests are drawn, one after the other: each equally often, shuffled among
    those near the same point in time."""
    width = max(NEAR_MIN, known * NEAR_SHARE) * count / known
    places = [(number + random.uniform(-width, width), number * known // count) for number in range(count)]
    return [at for _, at in sorted(places)]


class _Maker:
    """Holds what was made so far. Request ``r`` has the first ``found[r]`` blocks of request ``behind[r]``,
    then ``own[r]`` blocks from ``first[r]`` on."""

    def __init__(self, model: Model, random: Random) -> None:
        self.random = random
        self._model = model
        self._parents, self._tokens = array("i"), array("H")
        self._last = array("i")
        self._behind, self._found, self._first, self._own = (array("i") for _ in range(4))
        self._whole = array("i")
        self._columns = [array(code) for code in "iqiiiB"]
        self._sessions = 0
        self._owed = 0  # Blocks that requests should have found so far, and did not.

    def add(self, drawn: Drawn) -> None:
        arrivals = self._columns[1]
        now_ms = (arrivals[-1] if arrivals else 0) + drawn.gap_ms
        behind, found = self._choose(drawn, now_ms) if drawn.idle_ms >= 0 else (-1, 0)
        index, first = len(arrivals), len(self._parents)
        parent = self._block(behind, found)
        if drawn.own:
            self._append(parent, drawn)
        leaf = len(self._parents) - 1 if drawn.own else parent
        self._behind.append(behind)
        self._found.append(found)
        self._first.append(first)
        self._own.append(drawn.own)
        size = found + drawn.own
        is_partial = leaf >= 0 and self._tokens[leaf] < self._model.block_tokens
        self._whole.append(size - is_partial)
        self._touch(index)
        tokens = (size - 1) * self._model.block_tokens + self._tokens[leaf] if size else 0
        row = (
            leaf,
            now_ms,
            tokens + drawn.loose_tokens,
            drawn.output_tokens,
            self._session(drawn, behind),
            drawn.kind,
        )
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)

    def trace(self, note: str) -> Trace:
        leaves, arrivals, inputs, outputs, sessions, kinds = self._columns
        columns = (leaves, arrivals, inputs, outputs, sessions, kinds, self._model.kinds, note)
        return Trace(self._model.block_tokens, self._parents, self._tokens, *columns)

    def _append(self, parent: int, drawn: Drawn) -> None:
        if len(self._parents) + drawn.own > BLOCKS_MAX:
            raise BadInput("bad_config", "the trace has too many blocks", f"the limit is {BLOCKS_MAX}")
        first = len(self._parents)
        self._parents.append(parent)
        self._parents.extend(range(first, first + drawn.own - 1))
        self._tokens.extend([self._model.block_tokens] * (drawn.own - 1) + [drawn.tail_tokens])
        self._last.extend([-1] * drawn.own)

    def _session(self, drawn: Drawn, behind: int) -> int:
        if not self._model.has_sessions:
            return -1
        if drawn.is_same_session and behind >= 0:
            return self._columns[4][behind]
        self._sessions += 1
        return self._sessions - 1

    # --- whom it follows ------------------------------------------------------------------------

    def _choose(self, drawn: Drawn, now_ms: int) -> tuple[int, int]:
        """A request that was the last to use what it has, as long ago and as deep; and how far to follow it.

        (-1, 0) when there is none yet."""
        arrivals = self._columns[1]
        goes_on = drawn.found >= drawn.depth
        best, best_found, best_score = -1, 0, math.inf
        depth = drawn.depth + max(-drawn.depth // 2, min(drawn.depth // 2, self._owed))
        for user in self._around(bisect_left(arrivals, now_ms - drawn.idle_ms)):
            whole = self._whole[user]
            found = whole if goes_on else min(drawn.found, whole)
            if not found or self._last[self._block(user, found)] != user:
                continue
            idle_ms = now_ms - arrivals[user]
            score = abs(math.log((whole + 1) / (depth + 1))) + 0.5 * abs(
                math.log((idle_ms + 200) / (drawn.idle_ms + 200))
            )
            if score < best_score:
                best, best_found, best_score = user, found, score
                if score < _GOOD:
                    break
        self._owed += drawn.found - best_found
        return best, best_found

    def _around(self, center: int) -> Iterator[int]:
        """Requests from ``center`` on outwards, ``CANDIDATES`` at most."""
        count = len(self._whole)
        for step in range(CANDIDATES):
            user = center + (step + 1) // 2 * (1 if step % 2 else -1)
            if 0 <= user < count:
                yield user

    def _block(self, index: int, depth: int) -> int:
        """The block of request ``index`` at ``depth`` (1: the first); -1 for 0."""
        if depth <= 0:
            return -1
        while depth <= self._found[index]:
            index = self._behind[index]
        return self._first[index] + depth - self._found[index] - 1

    def _touch(self, index: int) -> None:
        """It is the last user of all its blocks."""
        user, size = index, self._found[index] + self._own[index]
        while size > 0:
            start = self._found[user]
            if size > start:
                first = self._first[user]
                self._last[first : first + size - start] = array("i", [index]) * (size - start)
                size = start
            user = self._behind[user]
