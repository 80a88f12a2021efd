"""What each term of a choice weighs: one frozen set of numbers, with the defaults, checked when it is made.

The unit of every cost is one token of prefill: what a weight says is how many tokens of prefill a thing is
worth. So with ``running`` 32, one more running request on a worker is as bad as 32 tokens to compute.
``kvcache.routing.cost`` has the sum that they go into, docs/routing.md explains it for operators.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from kvcache.errors import BadInput

Form = Literal["linear", "multiplicative"]
FORMS: tuple[Form, ...] = ("linear", "multiplicative")
TOKENS_MAX = float(1 << 24)
MS_MAX = 86_400_000.0
CHOICES_MAX = 1_024


@dataclass(frozen=True, slots=True)
class Weights:
    """All coefficients. RAISES BadInput (bad_config) for one that is out of its range (``RANGES``)."""

    form: Form = "linear"
    """linear: all terms add up. multiplicative: the prefill, times how loaded the worker is."""
    prefill: float = 1.0
    """A token of this prompt that has to be computed."""
    request_tokens: float = 16.0
    """What any prompt costs besides its tokens, so that with the multiplicative form load always counts."""
    load_hbm: float = 0.0
    """A cached token that has to be loaded from this tier, as a share of computing it."""
    load_host: float = 0.1
    load_nvme: float = 0.4
    placed_credit: float = 0.95
    """How far blocks count that were only routed to a worker, and not told by it yet."""
    suspect_credit: float = 0.7
    """How far the blocks of a source count whose stream of events is broken."""
    age_ms_free: float = 3_000.0
    """Up to this age what a source told counts fully, ..."""
    age_ms_max: float = 60_000.0
    """... from this age on not at all, and in between in proportion."""
    waiting_prefill: float = 0.02
    """A token of other prompts that this worker has to compute first. It delays one request, where a token
    computed twice takes time and room from all that come after."""
    overdue: float = 0.2
    """A token of this worker's backlog by which it is more than ``patience_tokens`` above the mean."""
    patience_tokens: float = 131_072.0
    """How much longer than the mean a worker's backlog may be without more ado, in tokens without context."""
    running: float = 32.0
    """A request that the worker is decoding."""
    decode: float = 0.004
    """A token of context of those requests."""
    waiting: float = 32.0
    """A request in the worker's queue."""
    memory: float = 4_096.0
    """A worker without any free memory; in proportion to what is missing to ``memory_floor``."""
    memory_floor: float = 0.1
    """The share of its memory that a worker should have free."""
    scale_tokens: float = 8_192.0
    """Multiplicative: a worker with this much load costs twice as much as an idle one."""
    session_tokens: float = 256.0
    """What it is worth to go where the session went before."""
    session_slack: float = 8_192.0
    """By how many tokens the session's worker may be more loaded than the least loaded; beyond, the session
    counts for nothing."""
    blind_credit: float = 0.8
    """Without an index: the share of the prompt that the session's worker is believed to have."""
    tie_tokens: float = 1.0
    """Costs that differ by no more are equal."""
    temperature: float = 0.0
    """0: the cheapest. More: by chance, the cheaper the likelier; at 1 the dearest of all is still 0.37 times
    as likely as the cheapest."""
    choices: int = 0
    """Look at so many workers, drawn by chance, besides those that hold most. 0: at all of them."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise _bad("form", self.form, f"it is one of {', '.join(FORMS)}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise _bad(name, value, f"it is a number from {low:g} to {high:g}")
            if name in _INTEGERS and not isinstance(value, int):
                raise _bad(name, value, "it is a whole number")
        if self.age_ms_max <= self.age_ms_free:
            raise _bad("age_ms_max", self.age_ms_max, f"it is more than age_ms_free, {self.age_ms_free:g}")

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> Weights:
        """From a table of a TOML file; what is not named keeps its default. RAISES BadInput (bad_config)."""
        known = [each.name for each in fields(cls)]
        for name in table:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise _bad(name, table[name], "no such weight", f"did you mean {near[0]!r}?" if near else "")
        return cls(**table)  # type: ignore[arg-type]  # Checked when it is made.


_SHARE = (0.0, 1.0)
_TOKENS = (0.0, TOKENS_MAX)
_INTEGERS = frozenset({"choices"})

RANGES: dict[str, tuple[float, float]] = {
    "prefill": (1e-6, 1e6),
    "request_tokens": _TOKENS,
    "load_hbm": _SHARE,
    "load_host": _SHARE,
    "load_nvme": _SHARE,
    "placed_credit": _SHARE,
    "suspect_credit": _SHARE,
    "age_ms_free": (0.0, MS_MAX),
    "age_ms_max": (0.0, MS_MAX),
    "waiting_prefill": (0.0, 1e6),
    "overdue": (0.0, 1e6),
    "patience_tokens": _TOKENS,
    "running": _TOKENS,
    "decode": (0.0, 1e6),
    "waiting": _TOKENS,
    "memory": _TOKENS,
    "memory_floor": _SHARE,
    "scale_tokens": (1.0, TOKENS_MAX),
    "session_tokens": _TOKENS,
    "session_slack": _TOKENS,
    "blind_credit": _SHARE,
    "tie_tokens": _TOKENS,
    "temperature": (0.0, 100.0),
    "choices": (0, CHOICES_MAX),
}
"""From and to, both included. Nothing here is without end, so no cost is."""

assert all(math.isfinite(high) for _, high in RANGES.values())


def _bad(name: str, value: object, why: str, todo: str = "see docs/routing.md") -> BadInput:
    return BadInput("bad_config", f"the weight {name} is {str(value)[:40]!r}", why, todo)
