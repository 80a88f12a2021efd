"""The choice of a worker for one request, and why it was this one.

    costs ──► the session's worker: a bonus, if it is not overloaded ──► the pool (all, or some by chance)
          ──► temperature 0: the cheapest; equal ones by load, then by session, then in turn
          ──► temperature above 0: by chance, the cheaper the likelier

A ``Chooser`` remembers three things, all bounded: its generator of chance, whose turn it is, and where the
last ``sessions_max`` sessions went. With the same seed and the same calls it makes the same choices.

*Blind* is a choice without an index: then nothing is known to be cached, and the session's worker is believed
to have a share of the prompt; a session not seen before goes where a hash of its name says, so that several
routers that share nothing send it to the same worker.

The sum: 1 us a candidate for its cost, 64 of them well below 100 us; what explains a choice is only made
when it is asked for.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from kvcache.routing.cost import TERMS, Candidate, Row, Term, busy, row, terms, usable
from kvcache.routing.weights import Weights

SESSIONS_MAX = 65_536


@dataclass(frozen=True, slots=True)
class Explained:
    """What one candidate would have cost, and the terms that add up to it."""

    worker: str
    cost: float
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A worker, and all that spoke for and against it and the others.

    ``how``: ``only`` (there was no other), ``cheapest``, ``tie`` (others cost the same), or ``drawn``.
    ``session``: ``none`` was given, it was ``new``, it was ``kept`` where it was, it ``moved`` as others were
    cheaper, its worker was ``overloaded`` or ``gone``."""

    worker: str
    cost: float
    how: str
    session: str
    blind: bool
    prompt_tokens: int
    weights: Weights
    candidates: tuple[Candidate, ...]
    rows: tuple[Row, ...]
    costs: tuple[float, ...]
    bonus: tuple[int, float]
    """Which candidate had the session's bonus, and how much; ``(-1, 0.0)``: none had."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """Of the chosen worker. They add up to ``cost``."""
        return self.explain(self._at(self.worker)).terms

    @property
    def candidate(self) -> Candidate:
        """The chosen one."""
        return self.candidates[self._at(self.worker)]

    def explanation(self) -> tuple[Explained, ...]:
        """Every candidate, the cheapest first."""
        order = sorted(range(len(self.costs)), key=self.costs.__getitem__)
        return tuple(self.explain(number) for number in order)

    def explain(self, number: int) -> Explained:
        """The candidate of this number."""
        bonus = self.bonus[1] if self.bonus[0] == number else 0.0
        candidate = self.candidates[number]
        told = terms(self.weights, self.prompt_tokens, candidate, self.rows[number], bonus)
        return Explained(candidate.worker, self.costs[number], told)

    @property
    def why(self) -> str:
        """One plain sentence."""
        parts = [f"{self.worker} {self._how()} at {self.cost:.0f} tokens", self._has()]
        if len(self.costs) > 1:
            parts.append(self._beside())
        if self.session in _SESSION_WORDS:
            parts.append(_SESSION_WORDS[self.session])
        return "; ".join(parts)

    def _how(self) -> str:
        count = len(self.costs)
        return {
            "only": "is the only candidate",
            "cheapest": f"is the cheapest of {count}",
            "tie": f"is as cheap as others of {count}, and it is its turn",
            "drawn": f"was drawn from {count}",
        }[self.how]

    def _has(self) -> str:
        if self.blind:
            return f"nothing is known of what holds its {self.prompt_tokens}"
        hbm, host, nvme, placed = usable(self.prompt_tokens, self.candidate)
        told = ((hbm, "hbm"), (host, "host"), (nvme, "nvme"), (placed, "only routed there"))
        inner = ", ".join(f"{count} {name}" for count, name in told if count)
        inner = f" ({inner})" if inner else ""
        return f"it has {hbm + host + nvme + placed} of {self.prompt_tokens}{inner}"

    def _beside(self) -> str:
        """How the best of the others differs: the term that makes most of it."""
        mine = self._at(self.worker)
        other = min((n for n in range(len(self.costs)) if n != mine), key=self.costs.__getitem__)
        pairs = zip(self.rows[other], self.rows[mine], strict=True)
        names = dict(zip(TERMS, (theirs - ours for theirs, ours in pairs), strict=True))
        by = max(names, key=lambda name: abs(names[name]))
        text = f"the best other is {self.candidates[other].worker} at {self.costs[other]:.0f}"
        return f"{text}, most of it by {by} ({names[by]:+.0f})" if names[by] else text

    def _at(self, worker: str) -> int:
        return next(n for n, each in enumerate(self.candidates) if each.worker == worker)


_SESSION_WORDS = {
    "kept": "its session is there",
    "moved": "its session was elsewhere, where it is dearer now",
    "overloaded": "its session's worker is overloaded",
    "gone": "its session's worker is gone",
}


class Chooser:
    """One owner; every call returns at once."""

    def __init__(self, weights: Weights, seed: int = 0, sessions_max: int = SESSIONS_MAX) -> None:
        assert sessions_max > 0
        self.weights = weights
        self._random = random.Random(seed)
        self._turn = 0
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._sessions_max = sessions_max

    def choose(
        self, prompt_tokens: int, candidates: Sequence[Candidate], session: str = "", *, blind: bool = False
    ) -> Choice:
        """The worker for this request. REQUIRES: candidates, of different names. ``blind``: what they have
        cached is not known."""
        assert candidates and prompt_tokens >= 0
        w = self.weights
        mean = sum(each.backlog_tokens for each in candidates) / len(candidates)
        rows = [row(w, prompt_tokens, each, mean) for each in candidates]
        costs = [sum(each) for each in rows]
        loads = [busy(w, each, mean) for each in candidates]
        home, state, bonus = self._home(w, prompt_tokens, candidates, loads, session, blind)
        if bonus:
            costs[home] -= bonus
        at, how = self._pick(w, candidates, costs, loads, home, session)
        worker = candidates[at].worker
        if session:
            self._remember(session, worker)
        if state == "kept" and at != home:
            state = "moved"
        return Choice(
            worker=worker,
            cost=costs[at],
            how=how,
            session=state,
            blind=blind,
            prompt_tokens=prompt_tokens,
            weights=w,
            candidates=tuple(candidates),
            rows=tuple(rows),
            costs=tuple(costs),
            bonus=(home, bonus) if bonus else (-1, 0.0),
        )

    def home(self, session: str) -> str:
        """The worker that this session went to last, as far as that is remembered; else the empty string."""
        return self._sessions.get(session, "")

    def _home(
        self,
        w: Weights,
        prompt_tokens: int,
        candidates: Sequence[Candidate],
        loads: Sequence[float],
        session: str,
        blind: bool,
    ) -> tuple[int, str, float]:
        """The number of the session's worker or -1, how that is called, and its bonus."""
        if not session:
            return -1, "none", 0.0
        last = self._sessions.get(session, "")
        home = next((n for n, each in enumerate(candidates) if each.worker == last), -1)
        state = "kept" if home >= 0 else "gone" if last else "new"
        if home < 0 and blind:
            home = rendezvous(session, candidates)
        if home < 0:
            return -1, state, 0.0
        if loads[home] - min(loads) > w.session_slack:
            return home, "overloaded" if state == "kept" else state, 0.0
        bonus = w.session_tokens
        if blind:
            bonus = max(bonus, w.prefill * w.blind_credit * prompt_tokens)
        return home, state, bonus

    def _remember(self, session: str, worker: str) -> None:
        self._sessions[session] = worker
        self._sessions.move_to_end(session)
        if len(self._sessions) > self._sessions_max:
            self._sessions.popitem(last=False)

    def _pick(
        self,
        w: Weights,
        candidates: Sequence[Candidate],
        costs: list[float],
        loads: Sequence[float],
        home: int,
        session: str,
    ) -> tuple[int, str]:
        """A candidate's number, and how it was picked."""
        if len(candidates) == 1:
            return 0, "only"
        pool = self._pool(candidates, home)
        if w.temperature:
            return self._draw(pool, costs), "drawn"
        limit = min(costs[n] for n in pool) + w.tie_tokens
        best = [n for n in pool if costs[n] <= limit]
        return (
            (best[0], "cheapest") if len(best) == 1 else (self._tie(candidates, best, loads, session), "tie")
        )

    def _pool(self, candidates: Sequence[Candidate], home: int) -> Sequence[int]:
        """All, or some by chance, with the one that holds most and the session's, so that neither is lost."""
        count = self.weights.choices
        everybody = range(len(candidates))
        if not count or count >= len(candidates):
            return everybody
        holds = [sum(each.cached) + each.placed for each in candidates]
        most = max(holds)
        chosen = {*self._random.sample(everybody, count)} | ({holds.index(most)} if most else set())
        return sorted(chosen | {home} if home >= 0 else chosen)

    def _draw(self, pool: Sequence[int], costs: list[float]) -> int:
        """Softmax of the costs, which are first brought to 0 (cheapest) to 1 (dearest)."""
        low = min(costs[n] for n in pool)
        span = max(costs[n] for n in pool) - low
        if span <= self.weights.tie_tokens:
            return pool[self._random.randrange(len(pool))]
        scale = span * self.weights.temperature
        likely = [math.exp(-min((costs[n] - low) / scale, 700.0)) for n in pool]
        return self._random.choices(pool, likely)[0]

    def _tie(
        self, candidates: Sequence[Candidate], best: Sequence[int], all_loads: Sequence[float], session: str
    ) -> int:
        """The least loaded; equally loaded ones by the session's hash, or in turn."""
        loads = [all_loads[n] for n in best]
        least = min(loads)
        idle = [n for n, load in zip(best, loads, strict=True) if load == least]
        if session:
            return idle[rendezvous(session, [candidates[n] for n in idle])]
        self._turn += 1
        return idle[self._turn % len(idle)]


def rendezvous(session: str, candidates: Sequence[Candidate]) -> int:
    """The candidate on which everybody agrees for this session who knows the same ones. When one goes, only
    its sessions move. REQUIRES: candidates."""
    key = blake2b(session.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return max(
        range(len(candidates)),
        key=lambda n: blake2b(candidates[n].worker.encode(), key=key, digest_size=8).digest(),
    )
