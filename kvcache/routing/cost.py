"""What a worker would cost a request, term by term, in tokens of prefill.

    prefill = uncached        w.prefill * (prompt - cached - placed + w.request_tokens)
            + load            w.prefill * what the tiers of its cached tokens ask for loading them
            + freshness       w.prefill * the credit that an old or broken stream does not earn
            + placed          w.prefill * the credit that a mere placement does not earn
            + waiting_prefill w.waiting_prefill * tokens of others that it must compute first
            + overdue         w.overdue * what its backlog is longer than the mean, beyond w.patience_tokens
    load    = running + decode + waiting + memory          (each with its weight)

    linear:          cost = prefill + load - session
    multiplicative:  cost = prefill * (1 + load / scale_tokens) - session

Invariants: every term but ``session`` is at least 0, none is infinite; the terms of a candidate add up to its
cost, in either form (a product is told as the shares that each factor adds). With all else equal, a worker
that has more cached, or a faster tier of it where loads are dearer below, never costs more; one that is more
loaded, or of whose cache less is certain, never costs less.

The sum: about a microsecond a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.routing.weights import Weights

TERMS = (
    "uncached",
    "load",
    "freshness",
    "placed",
    "waiting_prefill",
    "overdue",
    "running",
    "decode",
    "waiting",
    "memory",
)
"""The terms of a row, in order; ``session`` comes behind them."""
PREFILL_TERMS = 6
SESSION = "session"

Row = tuple[float, float, float, float, float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as a choice sees it. All counts are at least 0; they need not be consistent.

    ``cached``: tokens of this prompt's leading run by the tier from which the worker would load them (hbm,
    host, nvme), each counted once. ``placed``: tokens behind them that were routed there lately, and that it
    has not told of yet. ``suspect``: a stream of its events is broken; ``age_ms``: how old its view is.
    ``decode_tokens``: the context of what it is decoding. ``free_share``: of its KV memory, 0 to 1.
    ``backlog_tokens``: what it must compute first, tokens behind long contexts weighing more, without what
    must be done by now (``kvcache.routing.backlog``)."""

    worker: str
    cached: tuple[int, int, int] = (0, 0, 0)
    placed: int = 0
    suspect: bool = False
    age_ms: float = 0.0
    waiting_prefill_tokens: int = 0
    running: int = 0
    waiting: int = 0
    decode_tokens: int = 0
    free_share: float = 1.0
    backlog_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Term:
    """One reason: what was measured, and what that costs in tokens of prefill."""

    name: str
    raw: float
    weighted: float


def row(w: Weights, prompt_tokens: int, c: Candidate, mean_backlog: float = 0.0) -> Row:
    """The weighted terms of one candidate, in the order of ``TERMS``. Their sum is its cost.
    ``mean_backlog``: of all candidates."""
    hbm, host, nvme, placed = usable(prompt_tokens, c)
    uncached = prompt_tokens - hbm - host - nvme - placed + w.request_tokens
    loading = hbm * w.load_hbm + host * w.load_host + nvme * w.load_nvme
    doubt = doubted(w, c)
    p = w.prefill
    p_uncached = p * uncached
    p_load = p * loading
    p_fresh = p * doubt * (hbm + host + nvme - loading) if doubt else 0.0
    p_placed = p * (1.0 - w.placed_credit) * placed
    p_waiting = w.waiting_prefill * c.waiting_prefill_tokens
    p_overdue = _overdue(w, c, mean_backlog)
    short = w.memory_floor - c.free_share
    factor = 1.0
    if w.form == "multiplicative":
        factor = (p_uncached + p_load + p_fresh + p_placed + p_waiting + p_overdue) / w.scale_tokens
    return (
        p_uncached,
        p_load,
        p_fresh,
        p_placed,
        p_waiting,
        p_overdue,
        factor * w.running * c.running,
        factor * w.decode * c.decode_tokens,
        factor * w.waiting * c.waiting,
        factor * w.memory * short / w.memory_floor if short > 0.0 else 0.0,
    )


def busy(w: Weights, c: Candidate, mean_backlog: float = 0.0) -> float:
    """How loaded the worker is with others' requests, in tokens of prefill, whatever this request is."""
    short = w.memory_floor - c.free_share
    return (
        w.waiting_prefill * c.waiting_prefill_tokens
        + _overdue(w, c, mean_backlog)
        + w.running * c.running
        + w.decode * c.decode_tokens
        + w.waiting * c.waiting
        + (w.memory * short / w.memory_floor if short > 0.0 else 0.0)
    )


def _overdue(w: Weights, c: Candidate, mean_backlog: float) -> float:
    return w.overdue * max(0.0, c.backlog_tokens - mean_backlog - w.patience_tokens)


def usable(prompt_tokens: int, c: Candidate) -> tuple[int, int, int, int]:
    """The cached tokens by tier, then the placed ones, cut to what can be used of the prompt: all but its
    last token, which an engine always computes. The faster tiers count first."""
    hbm, host, nvme = c.cached
    placed = c.placed
    if hbm + host + nvme + placed < prompt_tokens:
        return hbm, host, nvme, placed
    room = max(0, prompt_tokens - 1)
    hbm = min(hbm, room)
    host = min(host, room - hbm)
    nvme = min(nvme, room - hbm - host)
    return hbm, host, nvme, min(placed, room - hbm - host - nvme)


def doubted(w: Weights, c: Candidate) -> float:
    """The share of the credit that is not given, 0 to 1: for a broken stream, and for age."""
    doubt = 1.0 - w.suspect_credit if c.suspect else 0.0
    if c.age_ms > w.age_ms_free:
        late = (c.age_ms - w.age_ms_free) / (w.age_ms_max - w.age_ms_free)
        return 1.0 - (1.0 - doubt) * (1.0 - min(1.0, late))
    return doubt


def terms(w: Weights, prompt_tokens: int, c: Candidate, weighted: Row, session: float) -> tuple[Term, ...]:
    """The row, told: what was measured beside what it costs. ``session`` is the bonus, at least 0."""
    hbm, host, nvme, placed = usable(prompt_tokens, c)
    raw = (
        prompt_tokens - hbm - host - nvme - placed,
        host + nvme,
        doubted(w, c),
        placed,
        c.waiting_prefill_tokens,
        c.backlog_tokens,
        c.running,
        c.decode_tokens,
        c.waiting,
        c.free_share,
    )
    told = [Term(name, float(value), cost) for name, value, cost in zip(TERMS, raw, weighted, strict=True)]
    return (*told, Term(SESSION, 1.0 if session else 0.0, -session))
