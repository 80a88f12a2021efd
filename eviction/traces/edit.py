"""Traces made of traces: some of the requests, larger blocks, nobody's names.

Every one of these gives a sound trace in which only blocks remain that a request has, parents first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import le
from random import Random

from kvcache.errors import BadInput
from kvcache.eviction.amounts import plain
from kvcache.eviction.traces.shape import depths_of
from kvcache.eviction.traces.trace import BLOCK_TOKENS_MAX, Trace

_ROUND_MS_MAX = 86_400_000
_LENGTH_MAX = (1 << 31) - 1


def subset(trace: Trace, indexes: Sequence[int], note: str) -> Trace:
    """The requests at ``indexes``, and their blocks. REQUIRES: in order."""

    def taken(column: array[int]) -> array[int]:
        return array(column.typecode, [column[at] for at in indexes])

    part = replace(
        trace,
        leaves=taken(trace.leaves),
        arrivals_ms=taken(trace.arrivals_ms),
        input_tokens=taken(trace.input_tokens),
        output_tokens=taken(trace.output_tokens),
        sessions=taken(trace.sessions),
        kind_indexes=taken(trace.kind_indexes),
        note=note,
    )
    return renumbered(part)


def renumbered(trace: Trace) -> Trace:
    """Without blocks that no request has; the others are numbered as they are first used."""
    numbers = array("i", [-1]) * trace.block_count
    order = array("i")
    parents = trace.parents
    for leaf in trace.leaves:
        fresh = []
        while leaf >= 0 and numbers[leaf] < 0:
            fresh.append(leaf)
            leaf = parents[leaf]
        for block in reversed(fresh):
            numbers[block] = len(order)
            order.append(block)
    return replace(
        trace,
        parents=array("i", [numbers[parents[block]] if parents[block] >= 0 else -1 for block in order]),
        tokens=array("H", [trace.tokens[block] for block in order]),
        leaves=array("i", [numbers[leaf] if leaf >= 0 else -1 for leaf in trace.leaves]),
    )


def with_used_blocks(trace: Trace) -> Trace:
    """Only blocks that a request has: per cent are of these."""
    used, parents = bytearray(trace.block_count), trace.parents
    for leaf in trace.leaves:
        while leaf >= 0 and not used[leaf]:
            used[leaf] = 1
            leaf = parents[leaf]
    return trace if all(used) else renumbered(trace)


def with_whole_lengths(trace: Trace) -> Trace:
    """No prompt is shorter than its blocks: a source that says so would have more found than was asked for.
    RAISES BadInput (bad_trace) for one of more tokens than a length can be."""
    depths, full = depths_of(trace.parents), trace.block_tokens
    least = [(depths[leaf] - 1) * full + trace.tokens[leaf] if leaf >= 0 else 0 for leaf in trace.leaves]
    if all(map(le, least, trace.input_tokens)):
        return trace
    if max(least) > _LENGTH_MAX:
        raise BadInput("bad_trace", f"a prompt of {max(least):,} tokens", f"the limit is {_LENGTH_MAX:,}")
    return replace(trace, input_tokens=array("i", map(max, least, trace.input_tokens)))


def with_plain_words(trace: Trace) -> Trace:
    """Kinds and note as they may be shown: a terminal obeys some signs, and a file cannot hold others."""
    kinds = tuple(map(plain, trace.kinds))
    if kinds == trace.kinds and trace.note.isprintable():
        return trace
    return replace(trace, kinds=kinds, note=plain(trace.note))


def with_sessions(trace: Trace) -> Trace:
    """Every request has a session: its own, if it says so; else that of the request from whose end its prompt
    goes on, as the next turn of a conversation does; else a new one."""
    parents, full = trace.parents, trace.block_tokens
    last = array("i", [-1]) * trace.block_count
    sessions = array("i", trace.sessions)
    fresh = max(sessions, default=-1) + 1
    ends = [parents[leaf] if leaf >= 0 and trace.tokens[leaf] < full else leaf for leaf in trace.leaves]
    for index, leaf in enumerate(trace.leaves):
        block, before = leaf, -1
        while block >= 0:
            if before < 0 and last[block] >= 0:
                user = last[block]
                before = user if block in (ends[user], trace.leaves[user]) else index
            last[block] = index
            block = parents[block]
        if sessions[index] < 0:
            goes_on = 0 <= before < index
            sessions[index] = sessions[before] if goes_on else fresh
            fresh += not goes_on
    return replace(trace, sessions=sessions)


# --- splitting ----------------------------------------------------------------------------------


def split_by_time(trace: Trace, share: float) -> tuple[Trace, Trace]:
    """The requests of the first ``share`` of the time, and the others: to choose on the one, and see on the
    other whether it was right. RAISES BadInput (bad_config)."""
    _check_share(share)
    start, end = trace.arrivals_ms[0], trace.arrivals_ms[-1]
    edge = start + (end - start) * share
    first = [at for at, arrival in enumerate(trace.arrivals_ms) if arrival < edge]
    rest = range(len(first), trace.request_count)
    return _parts(trace, first, rest, f"the first {share:.0%} of the time of", "the time after that of")


def split_by_session(trace: Trace, share: float, seed: int = 1) -> tuple[Trace, Trace]:
    """``share`` of the sessions, drawn by chance, and the others; a request of no session is one of its own.
    RAISES BadInput (bad_config)."""
    _check_share(share)
    random = Random(seed)
    draws: dict[int, bool] = {}
    first: list[int] = []
    rest: list[int] = []
    for at, session in enumerate(trace.sessions):
        if session < 0 or session not in draws:
            draws[session] = random.random() < share
        (first if draws[session] else rest).append(at)
    return _parts(trace, first, rest, f"{share:.0%} of the sessions of", "the other sessions of")


def parse_share(text: str) -> float:
    """``50%`` or ``0.5``. RAISES BadInput (bad_config)."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise BadInput("bad_config", f"a share of {text!r}", "write for instance 50% or 0.5") from error


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise BadInput("bad_config", f"a share of {share}", "it is over 0 and below 1, for instance 50%")


def _parts(
    trace: Trace, first: Sequence[int], rest: Sequence[int], first_words: str, rest_words: str
) -> tuple[Trace, Trace]:
    if not first or not rest:
        raise BadInput("bad_config", "one part has no request", f"the trace has {trace.request_count}")
    return (
        subset(trace, first, f"{first_words} {trace.note}"),
        subset(trace, rest, f"{rest_words} {trace.note}"),
    )


# --- other blocks, other names ------------------------------------------------------------------


def coarsened(trace: Trace, block_tokens: int) -> Trace:
    """With blocks of ``block_tokens``: so many of the old ones are one. RAISES BadInput (bad_config)."""
    factor, rest = divmod(block_tokens, trace.block_tokens)
    if rest or factor < 1 or block_tokens > BLOCK_TOKENS_MAX:
        raise BadInput(
            "bad_config",
            f"blocks of {block_tokens} tokens of those of {trace.block_tokens}",
            f"it is a multiple of {trace.block_tokens}, {BLOCK_TOKENS_MAX} at most",
        )
    if factor == 1:
        return trace
    parents, tokens = array("i"), array("H")
    whole = array("i", [-1]) * trace.block_count  # Of each old block, the last new one that ends by it.
    partial: dict[int, int] = {}
    depths, ends = depths_of(trace.parents), set(trace.leaves)
    for block, (parent, size) in enumerate(zip(trace.parents, trace.tokens, strict=True)):
        before = whole[parent] if parent >= 0 else -1
        in_group = (depths[block] - 1) % factor
        is_last = in_group == factor - 1
        whole[block] = len(parents) if is_last else before
        if is_last or block in ends:
            partial[block] = len(parents)
            parents.append(before)
            tokens.append(in_group * trace.block_tokens + size)
    return renumbered(
        replace(
            trace,
            block_tokens=block_tokens,
            parents=parents,
            tokens=tokens,
            leaves=array("i", [partial[leaf] if leaf >= 0 else -1 for leaf in trace.leaves]),
        )
    )


def anonymized(trace: Trace, *, round_ms: int = 1, kinds: bool = True, sessions: bool = True) -> Trace:
    """What tuning needs and no more: time from 0, in steps of ``round_ms``; blocks, sessions and kinds as
    numbers in the order of their first use; where it comes from left out. What remains says how long prompts
    and answers were, when they came and what they shared. RAISES BadInput (bad_config)."""
    if not 1 <= round_ms <= _ROUND_MS_MAX:
        raise BadInput("bad_config", f"times in steps of {round_ms} ms", f"1 to {_ROUND_MS_MAX} is possible")
    start = trace.arrivals_ms[0] if trace.request_count else 0
    count = trace.request_count
    names = _in_order(trace.kind_indexes)
    return renumbered(
        replace(
            trace,
            arrivals_ms=array("q", [(at - start) // round_ms * round_ms for at in trace.arrivals_ms]),
            sessions=_in_order(trace.sessions) if sessions else array("i", [-1]) * count,
            kind_indexes=array("B", names) if kinds else array("B", bytes(count)),
            kinds=_known_kinds(trace) if kinds else ("unknown",),
            note="anonymized",
        )
    )


def _known_kinds(trace: Trace) -> tuple[str, ...]:
    """Their names in the new order: what a tuner acts on keeps its name, others are numbered."""
    seen = dict.fromkeys(trace.kind_indexes)
    names = [trace.kinds[at] if at < len(trace.kinds) else "" for at in seen]
    return tuple(name if name in PLAIN_KINDS else f"kind-{at}" for at, name in enumerate(names))


PLAIN_KINDS = frozenset(
    {"unknown", "other", "tool_use", "tool_call", "end_turn", "turn_end", "final", "prefill_only", "subagent"}
)
"""What any engine says; other names may be an operator's own."""


def _in_order(values: Iterable[int]) -> array[int]:
    """Numbered from 0 in the order of their first use; what is below 0 is -1."""
    numbers: dict[int, int] = {}
    return array("i", [numbers.setdefault(each, len(numbers)) if each >= 0 else -1 for each in values])
