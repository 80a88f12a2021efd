"""Shadow caches of a node: what goes to them of each request, when they work, and what they may cost.

    look-up, save ──► which blocks are in the sample? ── none ──► counted, that is all
                             │ some: their names, into a queue
                             ▼
            the caches, at each tick, TURN_NS between the turns of others, as long as there is credit
                             │ more comes than there is credit for, or too many blocks are held
                             ▼
            half the sample, and anew

Credit is a share (``cpu``) of the processor time that the node takes, or ``FLOOR`` of a processor if that is
more; it is earned at each tick. What is done here for a look-up without sampled blocks is taken off it as
``LOOK_NS``. So what all this costs is bounded, however the node is asked.

What begins more than ``HOT_SHARE`` of all look-ups, a system prompt say, is *hot*: it is left out, as it is
always found, and would make every look-up one with a sampled block. Off unless the operator turns it on, and
then nothing is called here.

The sum: 1.2 us a look-up and a save; those with a sampled block, half of all at 24 blocks and 3 %, take 5 us
more and each cache 5 to 25 us. A name is 16 bytes; nothing of a prompt is kept.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import process_time_ns, thread_time_ns

from kvcache.block import HASH_BYTES, BlockHash, NamespaceId, StorageKey, storage_key
from kvcache.clock import NS_PER_S
from kvcache.errors import BadInput
from kvcache.eviction.choice import Choice
from kvcache.eviction.shadow_words import OFF, Situation, advice
from kvcache.eviction.shadows import BLOCKS_MAX, Shadows
from kvcache.patience import Patience
from kvcache.policy import RequestContext
from kvcache.server.shadow_plan import Plan, Store
from kvcache.wire_tuning import Shadow

log = logging.getLogger("kvcache.server")

TURN_NS = 1_000_000
WATCH_NS = 5 * NS_PER_S
FLOOR = 0.001
LOOK_NS = 1_200
QUEUE_MAX = 4_096
PENDING_MAX = 2_048
HOT_SHARE = 0.02
HOT_MAX = 256
LOOKS_ENOUGH = 500
_HALF = HASH_BYTES // 2
_NAMES = 1 << 64
_TOP = _HALF - 1 if sys.byteorder == "little" else 0  # The byte of a hash that says most of whether it is in.
_TOP_SHIFT = 8 * (_HALF - 1)


@dataclass(frozen=True, slots=True)
class _Event:
    """A look-up (``held`` of the ``path`` were there), or a save (``held`` -1)."""

    context: RequestContext
    before: StorageKey | None
    path: tuple[StorageKey, ...]
    held: int
    block_bytes: int
    block_tokens: int


_SAVE = -1


class Shadowing:
    """Called from one thread, the event loop's. ``work_ns`` is the processor time of this thread, ``node_ns``
    that of the node."""

    def __init__(
        self,
        work_ns: Callable[[], int] = thread_time_ns,
        node_ns: Callable[[], int] = process_time_ns,
        patience: Patience | None = None,
    ) -> None:
        self.is_on = False
        self.trouble = ""
        """Why they ended by themselves; empty if they did not."""
        self._patience = patience
        self._work_ns = work_ns
        self._node_ns = node_ns
        self._shadows: Shadows | None = None
        self._plan: Plan | None = None
        self._store: Store | None = None
        self._own: int | None = None
        self._policy = ""
        self._queue: deque[_Event] = deque()
        self._is_drained = True
        self._pending: OrderedDict[bytes, tuple[StorageKey | None, tuple[StorageKey, ...]]] = OrderedDict()
        self._limit = 0
        self._others = b""  # Top bytes of names that are not in the sample.
        self._hot: set[StorageKey] = set()
        self._firsts: Counter[StorageKey] = Counter()
        self._looks = 0
        self._dropped = 0
        self._cost_ns = 0
        self._credit_ns = 0
        self._ticked_ns = 0
        self._node_spent_ns = 0
        self._watched_ns = 0

    def begin(self, plan: Plan, store: Store, own: Choice, now_ns: int) -> None:
        """``own`` decides in the store. RAISES BadInput."""
        cells = plan.cells(own)
        self._shadows = Shadows(
            cells, store.capacity_bytes, plan.sample, declines=store.is_alone, patience=self._patience
        )
        self._plan, self._store = plan, store
        self._ticked_ns, self._node_spent_ns = now_ns, self._node_ns()
        self._forget()
        self.is_on, self.trouble = True, ""
        self.decides(own, now_ns)
        self._shadows.tick(now_ns, self._anchor, store.has_evicted())

    def decides(self, own: Choice, now_ns: int) -> None:
        """Another policy decides in the store. If it has no stand-in it is given one, and all begins anew."""
        if self._shadows is None or self._plan is None or self._store is None:
            return
        self._policy = own.said
        self._own = self._shadows.index_of(own)
        if self._own is None:
            try:
                self.begin(self._plan, self._store, own, now_ns)
            except BadInput as error:
                self._end(f"{own.said} cannot be shadowed: {error}")

    # --- what happens -----------------------------------------------------------------------------

    def asked(
        self,
        context: RequestContext,
        namespace: NamespaceId,
        prefix: bytes,
        parent: bytes,
        held: int,
        block_bytes: int,
        block_tokens: int,
    ) -> None:
        """A look-up that has been answered: the leading ``held`` of its blocks were there.

        REQUIRES: ``is_on``."""
        assert self._shadows is not None
        asked = len(prefix) // HASH_BYTES
        self._shadows.counted(asked * block_tokens, held * block_tokens)
        self._looks += 1
        self._spent(LOOK_NS)
        if not prefix[_TOP::HASH_BYTES].translate(None, self._others):
            return
        began_ns = self._work_ns()
        found = self._sampled(namespace, prefix)
        if found:
            path = tuple(name for _, name in found)
            self._firsts[path[0]] += not parent
            before = self._before(namespace, parent) if parent else None
            there = sum(at < held for at, _ in found)
            if there < len(path):
                first = prefix[held * HASH_BYTES : (held + 1) * HASH_BYTES]
                while len(self._pending) >= PENDING_MAX:
                    self._pending.popitem(last=False)
                self._pending[first] = (path[there - 1] if there else before, path[there:])
            self._put(_Event(context, before, path, there, block_bytes, block_tokens))
        self._spent(self._work_ns() - began_ns)

    def saved(
        self,
        context: RequestContext,
        namespace: NamespaceId,
        prefix: bytes,
        parent: bytes,
        block_bytes: int,
        block_tokens: int,
    ) -> None:
        """A reservation that has been answered. Who saves the first block that was missing of a prompt saves
        all of it, though the store may decline some. REQUIRES: ``is_on``."""
        self._spent(LOOK_NS)
        pending = self._pending.pop(prefix[:HASH_BYTES], None)
        if pending is None and not prefix[_TOP::HASH_BYTES].translate(None, self._others):
            return
        began_ns = self._work_ns()
        if pending is not None:
            self._put(_Event(context, *pending, _SAVE, block_bytes, block_tokens))
        path = tuple(name for _, name in self._sampled(namespace, prefix))
        if path and (pending is None or path[-1] not in pending[1]):
            before = self._before(namespace, parent) if parent else None
            self._put(_Event(context, before, path, _SAVE, block_bytes, block_tokens))
        self._spent(self._work_ns() - began_ns)

    def _sampled(self, namespace: NamespaceId, prefix: bytes) -> list[tuple[int, StorageKey]]:
        """Which blocks are in the sample, and not hot: where in the prefix, and their names."""
        limit, start = self._limit, namespace[:_HALF]
        halves = (
            memoryview(prefix).cast("Q")[::2].tolist()
        )  # As the byte order has it: a sample all the same.
        found = [
            (at, StorageKey(start + prefix[at * HASH_BYTES : at * HASH_BYTES + _HALF]))
            for at, half in enumerate(halves)
            if half < limit
        ]
        return [each for each in found if each[1] not in self._hot] if self._hot else found

    def _before(self, namespace: NamespaceId, parent: bytes) -> StorageKey | None:
        """The last of those up to ``parent`` that is in the sample."""
        assert self._store is not None
        if len(parent) != HASH_BYTES:  # Nobody has looked at it before, in a look-up.
            return None
        for key in self._store.ledger.ancestors(storage_key(namespace, BlockHash(parent))):
            if found := self._sampled(namespace, key[HASH_BYTES:]):
                return found[0][1]
        return None

    def _put(self, event: _Event) -> None:
        if len(self._queue) >= QUEUE_MAX:
            self._dropped += 1
            self._thin("more than they may")
            return
        self._queue.append(event)

    def _drain(self) -> None:
        """Work for ``TURN_NS``, then let others; or until the next tick, when there is no credit."""
        began_ns = now_ns = self._work_ns()
        while self._queue and now_ns - began_ns < min(TURN_NS, self._credit_ns):
            self._apply(self._queue.popleft())
            now_ns = self._work_ns()
        self._spent(now_ns - began_ns)
        self._is_drained = not self._queue or self._credit_ns <= 0
        if not self._is_drained:
            asyncio.get_running_loop().call_soon(self._drain)

    def _earn(self, now_ns: int) -> None:
        """At most what a second brings is saved up."""
        assert self._plan is not None
        node_ns, cpu = self._node_ns(), self._plan.cpu
        passed_ns, spent_ns = now_ns - self._ticked_ns, node_ns - self._node_spent_ns
        self._ticked_ns, self._node_spent_ns = now_ns, node_ns
        earned_ns = int(max(cpu * spent_ns, FLOOR * passed_ns))
        self._credit_ns = min(int(cpu * NS_PER_S), self._credit_ns + earned_ns)

    def _spent(self, cost_ns: int) -> None:
        self._cost_ns += cost_ns
        self._credit_ns -= cost_ns

    def drain_all(self) -> None:
        """For who wants to know now."""
        while self._queue:
            self._apply(self._queue.popleft())

    def _apply(self, event: _Event) -> None:
        shadows = self._shadows
        if shadows is None:
            return
        if event.held == _SAVE:
            shadows.stored(event.context, event.before, event.path, event.block_bytes)
        else:
            shadows.asked(
                event.context, event.before, event.path, event.held, event.block_bytes, event.block_tokens
            )

    # --- time, and what it costs ------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        if self._shadows is None or self._plan is None or self._store is None:
            return
        self._shadows.tick(now_ns, self._anchor, self._store.has_evicted())
        self._earn(now_ns)
        if self._queue and self._is_drained and self._credit_ns > 0:
            self._is_drained = False
            asyncio.get_running_loop().call_soon(self._drain)
        if now_ns - self._watched_ns < WATCH_NS:
            return
        self._watched_ns = now_ns
        if self._shadows.block_count > BLOCKS_MAX:
            self._thin("too many blocks")
        elif len(self._queue) > QUEUE_MAX // 2:
            self._thin("more than they may")
        self._find_hot()

    def _find_hot(self) -> None:
        """What is hot stays so: what stands behind it is known without it from now on."""
        if self._looks < LOOKS_ENOUGH:
            return
        hot = [name for name, count in self._firsts.items() if count > HOT_SHARE * self._looks]
        self._hot.update(hot[: max(0, HOT_MAX - len(self._hot))])
        self._firsts.clear()
        self._looks = 0

    def _thin(self, why: str) -> None:
        assert self._shadows is not None
        if not self._shadows.thin():
            self._end(f"they took {why}, with as small a sample as says anything")
            return
        self._forget()
        log.info("shadow caches took %s: they look at %.2f%% now", why, self._shadows.sample * 100)

    def _forget(self) -> None:
        """All begins anew."""
        assert self._shadows is not None
        self._limit = int(self._shadows.sample * _NAMES)
        tops = min(256, -(-self._limit >> _TOP_SHIFT))
        self._others = bytes(range(tops, 256))
        for each in (self._queue, self._pending, self._hot, self._firsts):
            each.clear()
        self._looks = 0

    def _end(self, why: str) -> None:
        self.trouble = f"the shadow caches ended: {why}"
        log.warning("%s", self.trouble)
        self.is_on, self._shadows = False, None
        self._queue.clear()
        self._pending.clear()
        self._hot.clear()

    # --- what it says -----------------------------------------------------------------------------

    def situation(self, now_ns: int) -> Situation | None:
        """None while there are none."""
        if self._shadows is None:
            return None
        return Situation(
            self._policy,
            self._shadows.found_ratio,
            self._shadows.seconds(now_ns),
            self._shadows.sample,
            self._shadows.estimates(self._anchor),
            self._own,
            self._shadows.is_counting,
        )

    @property
    def _anchor(self) -> int | None:
        """The cache that stands for the store, if what the store found is what its memory has."""
        return self._own if self._store is not None and self._store.is_alone else None

    def said(self, now_ns: int) -> list[str]:
        at = self.situation(now_ns)
        return advice(at) if at is not None else [self.trouble or OFF]

    def curves(self, now_ns: int) -> list[Shadow]:
        at = self.situation(now_ns)
        return [
            Shadow(
                policy=each.cell.choice.said,
                size=each.cell.size,
                hit_ratio=each.hit_ratio,
                sampled_hit_ratio=each.sampled_ratio,
                doubt=each.doubt,
                blocks=each.blocks,
                is_full=each.is_full,
            )
            for each in (at.estimates if at is not None else ())
        ]

    def stats(self, now_ns: int) -> dict[str, float]:
        shadows = self._shadows
        return {
            "shadow_sample": shadows.sample if shadows is not None else 0.0,
            "shadow_blocks": float(shadows.block_count) if shadows is not None else 0.0,
            "shadow_seconds": self._cost_ns / NS_PER_S,
            "shadow_dropped": float(self._dropped),
            **dict(self._ratios(now_ns)),
        }

    def _ratios(self, now_ns: int) -> Iterator[tuple[str, float]]:
        for each in self.curves(now_ns):
            yield f"shadow_hit_ratio:{each.policy}@{each.size:.0%}", each.hit_ratio

    def check(self) -> None:
        """Assert every invariant."""
        assert len(self._queue) <= QUEUE_MAX
        assert len(self._pending) <= PENDING_MAX
        if self._shadows is not None:
            self.drain_all()
            self._shadows.check()
