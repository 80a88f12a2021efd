"""Leaf-first eviction by learned reuse: what is least worth its room goes, as ``reuse_times`` has learned.

Blocks are told apart by how often they were used, how long before their last use the one before was,
and how the request ended that used them (the hint, where engines give one). What each class's reuse
looks like is learned as requests come, hints or none. The policy knows three things beside:

* *names it remembers*: blocks that have left, or were never taken, are remembered by name (``key``), so
  that one that comes back is known by what it was;
* *what it declines*: a new branch that is worth less than what would have to go for it is not taken
  (``admit_keys``), from its first block on that is not worth it. Where many sessions share too little
  room, this keeps some whole instead of none. Prompts that are computed for others to read
  (``prefill_only``) and requests of raised priority are always taken;
* *which blocks teach*: those before a fork are covered by what continues them, and their frequent reuse
  says nothing about leaves, so only what comes behind the last fork of a path is counted.

Of all leaves, the longest unused of each class and a few drawn evenly are compared; then the branch goes
from its leaf up as long as its blocks were used alike. With nothing learned it is leaf-first LRU.

Where the past says nothing about what comes, or something false, all this would find less than leaf-first
LRU. So it is counted what that would have found (``lru_beside``), and the further the policy falls behind,
the more often the longest unused goes instead, and nothing is declined. That costs 0.2 % of what is asked
for at most, on all traces that it was tried on; without, it was 25 % on the worst.

Memory: 100 bytes a held block, and 200 with its name for a remembered one: ``memory`` times as many as are
held, 65,536 at least (15 MB). What was remembered first is forgotten first.

The sum: a request of 24 blocks takes 60 to 80 us, half of it to choose what goes; long prompts take 0.8 us a
block. Classes are at most 101, so the table is small beside the names.

Related: LHD (NSDI 18) estimates hit density from ages in the same way, for objects that stand alone; the
worth at an age is a Gittins index; declining what is worth less is the bypass of Belady's MIN.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from random import Random

from kvcache.eviction.class_leaves import ClassLeaves
from kvcache.eviction.lru_beside import LruBeside
from kvcache.eviction.reuse_times import ReuseTimes, Use
from kvcache.policy import HINTS, Param, RequestContext, TreeView

_NS_PER_MS = 1_000_000
_NAMES_MIN = 65_536
_TOUCHES_MAX = 4
_GAPS_MS = (15_000, 120_000)
_PRIOR_USES = 16.0
_REBUILD_FIRST = 10
_REBUILD_REQUESTS = 200
_MADE_ROOM = ("evicted", "reclaimed")
_ORDINARY_PRIORITY = 50
_HINT_AT = {hint: at for at, hint in enumerate(HINTS)}


class LeafHazard:
    """An ``EvictionPolicy``, a ``KeyedPolicy`` and a ``DevicePolicy``."""

    def __init__(
        self,
        tree: TreeView,
        capacity_bytes: int,
        samples: float = 8,
        decay: float = 0.98,
        memory: float = 4.0,
        decline: float = 1.0,
    ) -> None:
        self._tree = tree
        self._samples = int(samples)
        self._decay = decay
        self._memory = memory
        self._decline = decline
        self._random = Random(1)
        self._times = ReuseTimes(_PRIOR_USES)
        self._uses: dict[int, Use] = {}  # of held blocks
        self._names: OrderedDict[Hashable, Use] = OrderedDict()  # of others, the first remembered first
        self._leaves = ClassLeaves(tree, self._uses)
        self._lru = LruBeside()
        self._use_count = 0
        self._by_recency = False  # It is the turn of leaf-first LRU.
        self._now_ms = 0
        self._first_ms = -1
        self._requests = 0
        self._rebuilt_at = 0
        self._rebuild_at = _REBUILD_FIRST
        self._expected: list[int] = []  # what may go next, chosen since anything was told
        self._full = 0  # so many blocks were held at most, since the table was built; 0: nothing went yet

    @classmethod
    def params(cls) -> Mapping[str, Param]:
        return {
            "samples": Param(
                8, 0, 256, "leaves drawn evenly and compared, beside the oldest of each class", whole=True
            ),
            "decay": Param(
                0.98, 0.5, 1.0, "what 200 requests leave of the weight of what was learned before"
            ),
            "memory": Param(
                4.0, 0.0, 64.0, "blocks remembered after they left, for each held; 65,536 at least"
            ),
            "decline": Param(
                1.0, 0.0, 4.0, "how much a new branch must be worth, for each that goes; 0: none"
            ),
        }

    # --- what happens -----------------------------------------------------------------------------

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self._tick(context)
        self._expected = []
        self._requests += 1
        self._lru.end_request(self._full)
        if self._requests >= self._rebuild_at:
            self._rebuild()
        path = path[:]
        if not path:
            return
        uses = self._uses
        cover = self._covered(path)
        hint = _HINT_AT[context.hint]
        at = in_lru = 0
        for use, run in groupby(path, uses.get):
            blocks = list(run)
            at += len(blocks)
            if use is None:  # Being written, or lost.
                in_lru += len(blocks)
                continue
            in_lru += self._lru.held(use, len(blocks), self._full)
            self._reused(use, len(blocks))
            fresh = self._use(use, len(blocks), hint, teaches=at > cover and self._has_clock())
            uses.update(dict.fromkeys(blocks, fresh))
            self._lru.used(fresh)
        self._leaves.add(path[-1])
        self._lru.found(at, in_lru, at)

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        return count

    def admit_keys(self, context: RequestContext, parent: int, keys: Sequence[Hashable]) -> int:
        self._tick(context)
        self._lru.found(0, self._in_lru(keys), len(keys))
        self._by_recency = self._lru.is_due(self._full)
        free = self._full - len(self._uses) if self._full else len(keys)
        if free >= len(keys) or not self._decline or self._by_recency or _is_wanted(context):
            return len(keys)
        hint = _HINT_AT[context.hint]
        bar = self._bar(context, len(keys) - free)
        taken, keeping = max(0, free), False
        at = 0
        for use, run in groupby(keys, self._names.get):
            names = list(run)
            at += len(names)
            fresh = self._use(use, 0, hint, teaches=False)
            offered = fresh.kind.worth[0] / self._decline
            while not keeping and taken < at:
                if bar and bar[-1] <= offered:
                    bar.pop()
                    taken += 1
                else:
                    keeping = True
            if taken < at:
                self._remember(use, names[taken - at :], hint)
        self._forget()
        return taken

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self._tick(context)
        self._expected = []
        uses, names, key = self._uses, self._names, self._tree.key
        hint = _HINT_AT[context.hint]

        def known(block: int) -> Use | None:
            return names.pop(key[block], None)

        for use, run in groupby(blocks, known):
            same = list(run)
            if use is not None:
                self._reused(use, len(same))
            fresh = self._use(use, len(same), hint, teaches=self._has_clock())
            uses.update(dict.fromkeys(same, fresh))
            self._lru.used(fresh)
        self._leaves.add(blocks[-1])
        self._lru.end_request(self._full)
        if self._full:
            self._full = max(self._full, len(uses))

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        self._expected = []
        uses, names, tree = self._uses, self._names, self._tree
        parents, children, key = tree.parent, tree.children, tree.key
        made_room = reason in _MADE_ROOM
        if not self._full and made_room:
            self._full = len(uses)
        for block in blocks:
            use = uses.pop(block, None)
            if use is not None:
                stale = names.pop(key[block], None)
                if stale is not None:
                    self._forgotten(stale)
                if made_room:
                    names[key[block]] = use
                else:
                    self._forgotten(use)  # Nobody's choice: leaf-first LRU would have lost it too.
            parent = parents[block]
            if parent >= 0 and not children[parent]:
                self._leaves.add(parent)
        self._forget()

    # --- what goes --------------------------------------------------------------------------------

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        """What was chosen to see whether a branch is worth its room goes for it, if it still can."""
        expected = self._expected[:count]
        if len(expected) == count and self._can_go(expected):
            return expected
        return self._choose(context, count, None)

    def victims_on(self, context: RequestContext, count: int, device: int) -> Sequence[int]:
        return self._choose(context, count, device)

    def _choose(self, context: RequestContext, count: int, device: int | None) -> list[int]:
        now_ms, uses = self._time_ms(context), self._uses

        def rank(block: int) -> float:
            use = uses[block]
            return use.kind.worth_at(now_ms - use.at_ms)

        if self._by_recency:
            return self._leaves.choose(count, device, lambda block: uses[block].order)
        drawn = self._tree.sample_leaves(self._samples, self._random)
        return self._leaves.choose(count, device, rank, drawn)

    def _can_go(self, blocks: Sequence[int]) -> bool:
        """Is each an evictable leaf, once those before it have gone?"""
        parents, children, holds = self._tree.parent, self._tree.children, self._tree.holds
        gone: dict[int, int] = {}
        for block in blocks:
            if holds[block] or children[block] != gone.get(block, 0):
                return False
            parent = parents[block]
            gone[parent] = gone.get(parent, 0) + 1
        return True

    def _bar(self, context: RequestContext, count: int) -> list[float]:
        """What each of ``count`` victims is worth, the first of them last."""
        self._expected = self._choose(context, count, None)
        now_ms = self._now_ms
        bar: list[float] = []
        for use, run in groupby(reversed(self._expected), self._uses.__getitem__):
            bar += [use.kind.worth_at(max(0, now_ms - use.at_ms))] * len(list(run))
        return bar

    # --- what is known ----------------------------------------------------------------------------

    def _use(self, last: Use | None, count: int, hint: int, *, teaches: bool) -> Use:
        """Of blocks that are used now, and were last used so. A run's blocks share one fate, so a long
        one counts for more than a short one, but by its root only."""
        touches = last.touches + 1 if last is not None else 1
        gap = _gap(self._now_ms - last.at_ms) if last is not None else -1
        kind = self._times.kind((min(touches, _TOUCHES_MAX), gap, hint))
        self._use_count += 1
        weight = count**-0.5 if teaches and count else 0.0
        use = Use(kind, count, self._now_ms, touches, weight, self._use_count)
        self._times.begin(use)
        return use

    def _reused(self, use: Use, count: int) -> None:
        """So many blocks that were last used so are used now."""
        self._lru.lost(use, count)
        self._times.reuse(use, count, self._now_ms)

    def _forgotten(self, use: Use) -> None:
        """One block that was last used so."""
        self._lru.lost(use, 1)
        self._times.forget(use, 1)

    def _in_lru(self, keys: Sequence[Hashable]) -> int:
        """How many leading blocks of these, which are missing, leaf-first LRU would have."""
        first = self._names.get(keys[0])
        if first is None or not self._lru.held(first, 1, self._full):
            return 0
        found = 0
        for use, run in groupby(keys, self._names.get):
            count = len(list(run))
            held = self._lru.held(use, count, self._full) if use is not None else 0
            found += held
            if held < count:
                break
        return found

    def _remember(self, use: Use | None, names: Sequence[Hashable], hint: int) -> None:
        """These were asked for, and not taken."""
        if use is not None:
            self._reused(use, len(names))
        fresh = self._use(use, len(names), hint, teaches=self._has_clock())
        self._lru.declined(fresh)
        for name in names:
            self._names.pop(name, None)
            self._names[name] = fresh

    def _forget(self) -> None:
        limit = max(_NAMES_MIN, int(self._memory * len(self._uses)))
        while len(self._names) > limit:
            self._forgotten(self._names.popitem(last=False)[1])

    def _covered(self, path: Sequence[int]) -> int:
        """How many leading blocks of the path come before its last fork."""
        children = self._tree.children
        for at in range(len(path) - 1, -1, -1):
            if children[path[at]] > 1:
                return at + 1
        return 0

    def _rebuild(self) -> None:
        passed = self._requests - self._rebuilt_at
        fading = self._decay ** (passed / _REBUILD_REQUESTS)
        self._times.rebuild(fading)
        self._lru.fade(fading)
        self._rebuilt_at = self._requests
        self._rebuild_at += min(_REBUILD_REQUESTS, max(_REBUILD_FIRST, self._requests // 4))
        if self._full:
            self._full = len(self._uses)

    def _has_clock(self) -> bool:
        """Does time pass? Ages teach nothing where all requests come at one instant."""
        return self._now_ms > self._first_ms

    def _time_ms(self, context: RequestContext) -> int:
        return max(self._now_ms, context.now_ns // _NS_PER_MS)

    def _tick(self, context: RequestContext) -> None:
        now_ms = self._time_ms(context)
        if self._first_ms < 0:
            self._first_ms = now_ms
        if now_ms != self._now_ms:
            self._now_ms = now_ms
            self._times.advance(now_ms)

    def state(self) -> bytes:
        return self._times.state()

    def load_state(self, data: bytes) -> None:
        self._times.load_state(data)


def _gap(gap_ms: int) -> int:
    return sum(gap_ms >= limit for limit in _GAPS_MS)


def _is_wanted(context: RequestContext) -> bool:
    return context.hint == "prefill_only" or context.priority > _ORDINARY_PRIORITY
