"""Requests made up from a seed, shaped like those of real services: they share prefixes.

Four things make prefixes shared, and a ``Workload`` says how much of each:

* a few *system prompts*, some far more popular than others, begin most requests;
* a *session* comes back turn after turn, each prompt being the one before, its answer, and more;
* a *fan-out* asks many questions about one long document within seconds (agents, batch grading);
* a *one-shot* is never seen again, and only gets in the way.

The same workload gives the same trace on every machine. Real traces, for comparison, are published
by Mooncake (FAST 25), LMCache and kv-cache-tester; ``eviction.trace`` reads them in one format.

The sum: about 60,000 requests a second are made; a trace of 10,000 is there in 0.2 s.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from kvcache.errors import BadInput
from kvcache.eviction.traces.trace import BLOCK_TOKENS_MAX, BLOCKS_MAX, REQUESTS_MAX, Trace

KINDS = ("turn", "fan_out", "one_shot")
_TURN, _FAN_OUT, _ONE_SHOT = range(3)


@dataclass(frozen=True, slots=True)
class Workload:
    """What to make. RAISES BadInput (bad_config) when it describes nothing.

    Lengths are means, in tokens. ``session_share`` and ``fan_out_share`` are shares of what
    arrives (a whole session or fan-out is one arrival); the rest are one-shots.
    """

    request_count: int = 1_000
    block_tokens: int = 16
    seed: int = 1
    arrivals_a_second: float = 2.0
    system_prompt_count: int = 6
    system_prompt_tokens: int = 320
    session_share: float = 0.5
    fan_out_share: float = 0.1
    turns: int = 5
    turn_gap_s: float = 12.0
    question_tokens: int = 120
    answer_tokens: int = 180
    document_tokens: int = 1_200
    fan_out_width: int = 8
    one_shot_tokens: int = 600

    def __post_init__(self) -> None:
        self._check_range("request_count", 1, REQUESTS_MAX)
        self._check_range("block_tokens", 1, BLOCK_TOKENS_MAX)
        self._check_range("system_prompt_count", 1, 10_000)
        for name in ("system_prompt_tokens", "question_tokens", "answer_tokens", "document_tokens"):
            self._check_range(name, 1, 1_000_000)
        for name in ("one_shot_tokens", "turns", "fan_out_width"):
            self._check_range(name, 1, 1_000_000)
        for name in ("arrivals_a_second", "turn_gap_s"):
            self._check_range(name, 1e-6, 1e6)
        self._check_range("session_share", 0, 1)
        self._check_range("fan_out_share", 0, 1 - self.session_share)

    def _check_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            raise BadInput("bad_config", f"{name} is {value}", f"{low} to {high} is possible")


def generate(workload: Workload, progress: Callable[[int], None] | None = None) -> Trace:
    """The trace of ``workload``; ``progress`` hears how many requests it has by now.

    RAISES BadInput (bad_config) when it would have too many blocks."""
    return _Generator(workload).trace(progress)


@dataclass(slots=True)
class _Prompt:
    """What has been said so far: its full blocks end in ``last``; ``loose`` tokens are in none yet."""

    last: int = -1
    loose: int = 0
    length: int = 0


@dataclass(order=True, slots=True)
class _Event:
    """Something to happen. ``order`` breaks ties, so that equal times have one order everywhere."""

    at_ms: int
    order: int
    kind: int = field(compare=False)
    session: int = field(default=-1, compare=False)
    prompt: _Prompt | None = field(default=None, compare=False)
    left: int = field(default=0, compare=False)


class _Generator:
    """Plays the workload in order of time, so that blocks are numbered as they first appear."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._random = Random(workload.seed)
        self._parents, self._tokens = array("i"), array("H")
        self._leaves, self._arrivals_ms = array("i"), array("q")
        self._input_tokens, self._output_tokens = array("i"), array("i")
        self._sessions, self._kinds = array("i"), array("B")
        self._events: list[_Event] = []
        self._event_count = 0
        self._session_count = 0
        self._systems = [self._new_system() for _ in range(workload.system_prompt_count)]

    def trace(self, progress: Callable[[int], None] | None) -> Trace:
        self._schedule(0, _ONE_SHOT)
        while len(self._leaves) < self._workload.request_count:
            if progress is not None:
                progress(len(self._leaves))
            event = heapq.heappop(self._events)
            if event.prompt is None:
                self._arrive(event.at_ms)
            elif event.kind == _TURN:
                self._take_turn(event, event.prompt)
            else:
                self._ask(event, event.prompt)
        return Trace(
            self._workload.block_tokens,
            self._parents,
            self._tokens,
            self._leaves,
            self._arrivals_ms,
            self._input_tokens,
            self._output_tokens,
            self._sessions,
            self._kinds,
            KINDS,
            f"kvcache.eviction.traces.generate, seed {self._workload.seed}",
        )

    def _schedule(self, at_ms: int, kind: int, prompt: _Prompt | None = None, left: int = 0) -> None:
        """``prompt`` None stands for the next arrival from outside."""
        self._event_count += 1
        session = self._session_count if prompt is not None else -1
        heapq.heappush(self._events, _Event(at_ms, self._event_count, kind, session, prompt, left))

    def _arrive(self, now_ms: int) -> None:
        """Something new comes; the next arrival is set."""
        workload = self._workload
        self._schedule(now_ms + self._gap_ms(1 / workload.arrivals_a_second), _ONE_SHOT)
        self._session_count += 1
        draw = self._random.random()
        if draw < workload.session_share:
            self._schedule(now_ms, _TURN, self._begin(), self._length(workload.turns))
        elif draw < workload.session_share + workload.fan_out_share:
            document = self._begin()
            self._say(document, self._length(workload.document_tokens))
            at_ms = now_ms
            for _ in range(self._length(workload.fan_out_width)):
                self._schedule(at_ms, _FAN_OUT, _copy(document))
                at_ms += self._gap_ms(0.2)
        else:
            prompt = self._begin() if self._random.random() < 0.5 else _Prompt()
            self._say(prompt, self._length(workload.one_shot_tokens))
            self._schedule(now_ms, _ONE_SHOT, prompt)

    def _take_turn(self, event: _Event, prompt: _Prompt) -> None:
        self._say(prompt, self._length(self._workload.question_tokens))
        answer = self._record(event, prompt)
        if event.left > 1:
            self._say(prompt, answer)
            event.at_ms += self._gap_ms(self._workload.turn_gap_s)
            event.left -= 1
            heapq.heappush(self._events, event)

    def _ask(self, event: _Event, prompt: _Prompt) -> None:
        if event.kind == _FAN_OUT:
            self._say(prompt, self._length(self._workload.question_tokens))
        self._record(event, prompt)

    def _begin(self) -> _Prompt:
        """A prompt that starts with one of the system prompts; the first are the popular ones."""
        rank = min(int(self._random.expovariate(0.7)), len(self._systems) - 1)
        return _copy(self._systems[rank])

    def _new_system(self) -> _Prompt:
        prompt = _Prompt()
        self._say(prompt, self._length(self._workload.system_prompt_tokens))
        return prompt

    def _say(self, prompt: _Prompt, tokens: int) -> None:
        """Append ``tokens`` that nobody has said before; every block they fill gets a number."""
        prompt.length += tokens
        prompt.loose += tokens
        block_tokens = self._workload.block_tokens
        while prompt.loose >= block_tokens:
            prompt.last = self._new_block(prompt.last, block_tokens)
            prompt.loose -= block_tokens

    def _new_block(self, parent: int, tokens: int) -> int:
        if len(self._parents) >= BLOCKS_MAX:
            raise BadInput("bad_config", "the workload has too many blocks", f"the limit is {BLOCKS_MAX}")
        self._parents.append(parent)
        self._tokens.append(tokens)
        return len(self._parents) - 1

    def _record(self, event: _Event, prompt: _Prompt) -> int:
        """The request is made now. Its length in answer tokens."""
        answer = self._length(self._workload.answer_tokens)
        leaf = self._new_block(prompt.last, prompt.loose) if prompt.loose else prompt.last
        self._leaves.append(leaf)
        self._arrivals_ms.append(event.at_ms)
        self._input_tokens.append(prompt.length)
        self._output_tokens.append(answer)
        self._sessions.append(event.session)
        self._kinds.append(event.kind)
        return answer

    def _length(self, mean: int) -> int:
        """A length with that mean, at least 1 and at most four times it."""
        return max(1, min(int(self._random.expovariate(1 / mean)) + 1, 4 * mean))

    def _gap_ms(self, mean_s: float) -> int:
        return 1 + int(self._random.expovariate(1 / mean_s) * 1_000)


def _copy(prompt: _Prompt) -> _Prompt:
    return _Prompt(prompt.last, prompt.loose, prompt.length)
