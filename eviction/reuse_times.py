"""How long until blocks are used again, learned by class, and what keeping them is worth.

A ``Use`` is one request's use of some blocks at once. Blocks used alike are of one class (how often
they were used, how long before, how the request ended). For each class and age the table counts
blocks that grew that old unused, and blocks that were used again at that age; their quotient is the
hazard. Blocks that have left count on for as long as somebody remembers them, so what a small cache
evicts too early is learned from as well. A class that has seen little leans on the wider one.

The *worth* of a block at some age is its Gittins index: the most reuses a second of holding that any
stopping time gives,

    max over T of  P(reused before T) / E[time held until reuse or T]

which for a fixed amount of room is the rate that decides what to keep (Gittins 1979; for caches,
Scully and Harchol-Balter, "The Gittins policy in the M/G/1 queue", 2021). It is the steepest slope from
a point of the curve (time held, reused) to a later one, so one walk over the curve's upper hull gives it
for all ages.

Ages are in half octaves from 128 ms to six days; older is as six days.

Invariants (``check``): a use waits in one queue as long as it has blocks, and in none beyond the last
age; the queues have at most twice as many uses as have blocks, and some. Classes are a few hundred at
most: the caller names them by small numbers.

The sum: a use costs 3 us over its life, and one request 4 us for looking at the queues; a rebuild takes
60 us a class, and comes every 200 requests, so 25 us a request with 80 classes. A use is 250 bytes.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence

AGES = 46
_FINE_MS = 128  # Below this, reuse is as good as at once.
_HAZARD_MAX = 0.999
_SPARE_USES = 1_024
_STATE_BYTES_MAX = 1 << 20

ClassName = tuple[int, ...]


def age_index(age_ms: int) -> int:
    """Which half octave. REQUIRES: not negative."""
    if age_ms < _FINE_MS:
        return 0
    bits = age_ms.bit_length()
    at = 2 * bits - 15 + ((age_ms >> (bits - 2)) & 1)
    return at if at < AGES else AGES - 1


def _start_ms(at: int) -> int:
    """The youngest of an age: 0, 128, 192, 256, 384, ..."""
    if at == 0:
        return 0
    octave, upper = divmod(at - 1, 2)
    return (_FINE_MS << octave) * (3 if upper else 2) // 2


STARTS_MS = tuple(map(_start_ms, range(AGES)))
_WIDTHS_MS = (*map(int.__sub__, STARTS_MS[1:], STARTS_MS), STARTS_MS[-1])


class ReuseClass:
    """Blocks that are taken to be alike. ``worth`` is by age; what is counted here, is not in ``wider``."""

    __slots__ = ("exposed", "hazard", "name", "reused", "wider", "worth")

    def __init__(self, name: ClassName, wider: ReuseClass | None) -> None:
        self.name = name
        self.wider = wider
        self.exposed = [0.0] * AGES
        self.reused = [0.0] * AGES
        self.hazard: list[float] = [0.0] * AGES if wider is None else wider.hazard
        self.worth: list[float] = [0.0] * AGES if wider is None else wider.worth

    def worth_at(self, age_ms: int) -> float:
        """Between the starts of two ages, as far between their worths: that two classes differ by a chance
        of a few per cent must not count for more than half an octave of age. REQUIRES: not negative."""
        at = age_index(age_ms)
        if at == AGES - 1:
            return self.worth[at]
        worth, start = self.worth[at], STARTS_MS[at]
        return worth + (self.worth[at + 1] - worth) * (age_ms - start) / _WIDTHS_MS[at]


class Use:
    """Some blocks, used at once. ``count`` of them have not been used again, as far as is known."""

    __slots__ = ("at_ms", "count", "kind", "order", "touches", "turn", "weight")

    def __init__(
        self, kind: ReuseClass, count: int, at_ms: int, touches: int, weight: float, order: int = -1
    ) -> None:
        """``weight`` is what one block counts for in the table; with 0 the use teaches nothing. ``order``
        tells which of two uses was first; -1: that of their times does."""
        self.kind = kind
        self.count = count
        self.at_ms = at_ms
        self.order = order if order >= 0 else at_ms
        self.touches = touches
        self.turn = 0
        self.weight = weight


class ReuseTimes:
    def __init__(self, prior: float) -> None:
        """``prior``: with how many mean uses the wider class weighs in."""
        self._prior = prior
        self._classes: dict[ClassName, ReuseClass] = {}
        self._root = self.kind(())
        self._queues: list[deque[Use]] = [deque() for _ in range(AGES - 1)]
        self._alive = 0
        self._uses = 0.0
        self._weight = 0.0

    def kind(self, name: ClassName) -> ReuseClass:
        """The class of this name; the wider one is that of the name without its last part."""
        found = self._classes.get(name)
        if found is None:
            found = ReuseClass(name, self.kind(name[:-1]) if name else None)
            self._classes[name] = found
        return found

    def begin(self, use: Use) -> None:
        """These blocks were just used. REQUIRES: no use that began before is younger."""
        if not use.weight:
            return
        weight = use.count * use.weight
        self._uses += 1
        self._weight += weight
        self._alive += 1
        self._queues[0].append(use)
        use.kind.exposed[0] += weight

    def reuse(self, use: Use, count: int, now_ms: int) -> None:
        """So many of its blocks were used again."""
        self.forget(use, count)
        if use.weight:
            use.kind.reused[age_index(max(0, now_ms - use.at_ms))] += count * use.weight

    def forget(self, use: Use, count: int) -> None:
        """Of so many of its blocks nothing more will be known."""
        use.count -= count
        assert use.count >= 0
        if not use.count and use.weight:
            self._alive -= 1

    def advance(self, now_ms: int) -> None:
        """Let the uses grow older."""
        queues = self._queues
        for at in range(1, AGES):
            queue = queues[at - 1]
            limit = now_ms - STARTS_MS[at]
            while queue and queue[0].at_ms <= limit:
                use = queue.popleft()
                if use.count:
                    use.kind.exposed[at] += use.count * use.weight
                    if at < AGES - 1:
                        queues[at].append(use)
        if len(queues[0]) > _SPARE_USES and self._queued() > 2 * self._alive + _SPARE_USES:
            self._queues = [deque(use for use in queue if use.count) for queue in queues]

    def _queued(self) -> int:
        return sum(map(len, self._queues))

    def rebuild(self, decay: float) -> None:
        """Learn from what was counted, then let it count ``decay`` times as much as what comes."""
        lean = self._prior * self._weight / self._uses if self._uses else 1.0
        kinds = list(self._classes.values())  # In order of creation: wider ones first.
        exposed = {kind.name: kind.exposed for kind in kinds}
        reused = {kind.name: kind.reused for kind in kinds}
        for kind in reversed(kinds):
            if kind.wider is not None:
                wider = kind.wider.name
                exposed[wider] = list(map(float.__add__, exposed[wider], exposed[kind.name]))
                reused[wider] = list(map(float.__add__, reused[wider], reused[kind.name]))
        for kind in kinds:
            kind.hazard = _hazard(kind.wider, exposed[kind.name], reused[kind.name], lean)
            kind.worth = worth(kind.hazard)
            kind.exposed = [value * decay for value in kind.exposed]
            kind.reused = [value * decay for value in kind.reused]
        self._uses *= decay
        self._weight *= decay

    def state(self) -> bytes:
        """What was counted; not the uses."""
        counted = [
            [
                kind.name,
                [round(value, 3) for value in kind.exposed],
                [round(value, 3) for value in kind.reused],
            ]
            for kind in self._classes.values()
        ]
        return json.dumps([self._uses, self._weight, counted], separators=(",", ":")).encode()

    def load_state(self, data: bytes) -> None:
        """RAISES ValueError for what ``state`` did not make; nothing has changed then."""
        if len(data) > _STATE_BYTES_MAX:
            raise ValueError(f"{len(data)} bytes of learned reuse times are too many")
        try:
            uses, weight, counted = _fields(json.loads(data), 3)
        except RecursionError as error:
            raise ValueError("learned reuse times are nested too deeply") from error
        read = [_read_class(entry) for entry in _fields(counted, None)]
        if len({name for name, _, _ in read}) != len(read):
            raise ValueError("learned reuse times name a class twice")
        self._uses, self._weight = _number(uses), _number(weight)
        for name, exposed, reused in read:
            kind = self.kind(name)
            kind.exposed, kind.reused = exposed, reused
        self.rebuild(1.0)

    def check(self) -> None:
        """Assert every invariant."""
        waiting = [use for queue in self._queues for use in queue]
        assert len(set(map(id, waiting))) == len(waiting)
        assert sum(1 for use in waiting if use.count) <= self._alive
        for kind in self._classes.values():
            assert kind.name == () or kind.wider is self._classes[kind.name[:-1]]
            assert all(rate >= 0 for rate in kind.worth)


def _hazard(
    wider: ReuseClass | None, exposed: Sequence[float], reused: Sequence[float], lean: float
) -> list[float]:
    """Which share of what reaches an age is used again at that age."""
    if wider is None:
        leaning = [min(_HAZARD_MAX, sum(reused) / max(1.0, sum(exposed)))] * AGES
    else:
        leaning = wider.hazard
    return [
        min(_HAZARD_MAX, (again + lean * rate) / (max(grown, again) + lean))
        for grown, again, rate in zip(exposed, reused, leaning, strict=True)
    ]


def worth(hazard: Sequence[float]) -> list[float]:
    """Reuses a millisecond of holding, for a block at the start of each age."""
    held, used, left = [0.0], [0.0], 1.0
    for rate, width in zip(hazard, _WIDTHS_MS, strict=True):
        held.append(held[-1] + width * left * (1 - rate / 2))
        used.append(used[-1] + left * rate)
        left *= 1 - rate
    index = [0.0] * AGES
    hull = [AGES]  # Of the points to the right of this one; the nearest last.
    for at in range(AGES - 1, -1, -1):
        x, y = held[at], used[at]
        while len(hull) > 1 and (used[hull[-2]] - y) * (held[hull[-1]] - x) >= (used[hull[-1]] - y) * (
            held[hull[-2]] - x
        ):
            hull.pop()
        if held[hull[-1]] > x:
            index[at] = (used[hull[-1]] - y) / (held[hull[-1]] - x)
        hull.append(at)
    return index


def _fields(value: object, count: int | None) -> list[object]:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise ValueError(f"learned reuse times have {str(value)[:40]!r} where a list is expected")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"learned reuse times have {str(value)[:40]!r} where a count is expected")
    return float(value)


def _read_class(value: object) -> tuple[ClassName, list[float], list[float]]:
    name, exposed, reused = _fields(value, 3)
    parts: list[int] = []
    for part in _fields(name, None):
        if not isinstance(part, int) or not -8 <= part <= 8 or len(parts) == 4:
            raise ValueError(f"learned reuse times have a class called {str(name)[:40]!r}")
        parts.append(part)
    return (
        tuple(parts),
        [_number(each) for each in _fields(exposed, AGES)],
        [_number(each) for each in _fields(reused, AGES)],
    )
