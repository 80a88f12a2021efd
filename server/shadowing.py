"""Shadow caches of a node: what goes to them of each request, when they work, and what they may cost.

    look-up, save ──► which blocks are in the sample? ── none ──► counted, that is all
                             │ some: their names, into a queue
                             ▼
            the caches, TURN_NS at a time, between the turns of others ──► what they take of a processor
                                                                            │ over ``cpu``, or too many blocks
                                                                            ▼ half the sample, and anew

Off unless the operator turns it on, and then nothing is called here.

The sum: a look-up of 24 blocks takes 3 us, and half of them have a sampled block at 3 %: that one costs each
cache 5 to 25 us more. A name is 16 bytes; nothing of a prompt is kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter_ns

from kvcache.block import HASH_BYTES, BlockHash, NamespaceId, StorageKey, storage_key
from kvcache.clock import NS_PER_S
from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.eviction.choice import Choice
from kvcache.eviction.shadow_words import OFF, Situation, advice
from kvcache.eviction.shadows import BLOCKS_MAX, Cell, Shadows
from kvcache.ledger import Ledger
from kvcache.policy import RequestContext
from kvcache.wire_tuning import Shadow

log = logging.getLogger("kvcache.server")

TURN_NS = 1_000_000
WATCH_NS = 5 * NS_PER_S
QUEUE_MAX = 4_096
PENDING_MAX = 2_048
_HALF = HASH_BYTES // 2
_NAMES = 1 << 64


@dataclass(frozen=True, slots=True)
class Plan:
    """Policies and sizes (1: as the host tier), the share of blocks that is looked at, and the share of one
    processor that all this may take. RAISES BadInput (bad_config)."""

    policies: tuple[str, ...]
    sizes: tuple[float, ...]
    sample: float
    cpu: float

    @staticmethod
    def of(config: NodeConfig) -> Plan | None:
        """What the settings ask for; None: nothing."""
        if config.shadow == "none":
            return None
        policies = tuple(dict.fromkeys(part.strip() for part in config.shadow.split(",") if part.strip()))
        sizes = tuple(dict.fromkeys(_size(part) for part in config.shadow_sizes.split(",")))
        return Plan(policies, sizes, config.shadow_sample, config.shadow_cpu)

    def cells(self, own: Choice) -> list[Cell]:
        """With the store's own stand-in first. RAISES BadInput."""
        choices = [own, *(Choice(name) for name in self.policies if name != own.said)]
        cells = [Cell(own, 1.0)]
        return cells + [
            Cell(choice, size) for choice in choices for size in self.sizes if Cell(choice, size) != cells[0]
        ]


def _size(text: str) -> float:
    number, percent, rest = text.strip().partition("%")
    try:
        size = float(number) / 100
    except ValueError:
        size = 0.0
    if not percent or rest or not 0.01 <= size <= 100:
        raise BadInput(
            "bad_config",
            f"shadow_sizes has {text.strip()!r:.40}",
            "a size is in per cent of the capacity, from 1% to 10000%",
            "for instance 50%,100%,200%",
        )
    return size


@dataclass(frozen=True, slots=True)
class Store:
    """What the shadows are shadows of. ``is_alone``: all that it finds is in its memory; nothing is brought
    from other tiers or nodes."""

    ledger: Ledger
    capacity_bytes: int
    is_alone: bool
    has_evicted: Callable[[], bool]


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
EVICTED = "removed_blocks:evicted"


class Shadowing:
    """Called from one thread, the event loop's. ``work_ns`` is a clock for what it costs."""

    def __init__(self, work_ns: Callable[[], int] = perf_counter_ns) -> None:
        self.is_on = False
        self.trouble = ""
        """Why they ended by themselves; empty if they did not."""
        self._work_ns = work_ns
        self._shadows: Shadows | None = None
        self._plan: Plan | None = None
        self._store: Store | None = None
        self._own: int | None = None
        self._policy = ""
        self._queue: deque[_Event] = deque()
        self._is_drained = True
        self._pending: OrderedDict[bytes, tuple[StorageKey | None, tuple[StorageKey, ...]]] = OrderedDict()
        self._limit = 0
        self._dropped = 0
        self._lost = False
        self._cost_ns = 0
        self._watched_ns = 0
        self._watched_cost_ns = 0

    def begin(self, plan: Plan, store: Store, own: Choice, now_ns: int) -> None:
        """``own`` decides in the store. RAISES BadInput."""
        cells = plan.cells(own)
        self._shadows = Shadows(cells, store.capacity_bytes, plan.sample, declines=store.is_alone)
        self._plan, self._store = plan, store
        self._limit = int(plan.sample * _NAMES)
        self._queue.clear()
        self._pending.clear()
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
        began_ns = self._work_ns()
        asked = len(prefix) // HASH_BYTES
        self._shadows.counted(asked * block_tokens, held * block_tokens)
        if found := self._sampled(prefix):
            path = self._names(namespace, prefix, found)
            before = self._before(namespace, parent) if parent else None
            there = sum(at < held for at in found)
            if there < len(path):
                first = prefix[held * HASH_BYTES : (held + 1) * HASH_BYTES]
                while len(self._pending) >= PENDING_MAX:
                    self._pending.popitem(last=False)
                self._pending[first] = (path[there - 1] if there else before, path[there:])
            self._put(_Event(context, before, path, there, block_bytes, block_tokens))
        self._cost_ns += self._work_ns() - began_ns

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
        began_ns = self._work_ns()
        if (pending := self._pending.pop(prefix[:HASH_BYTES], None)) is not None:
            self._put(_Event(context, *pending, _SAVE, block_bytes, block_tokens))
        if found := self._sampled(prefix):
            before = self._before(namespace, parent) if parent else None
            path = self._names(namespace, prefix, found)
            self._put(_Event(context, before, path, _SAVE, block_bytes, block_tokens))
        self._cost_ns += self._work_ns() - began_ns

    def _sampled(self, prefix: bytes) -> list[int]:
        limit = self._limit
        return [at for at, half in enumerate(memoryview(prefix).cast("Q")[::2].tolist()) if half < limit]

    def _names(self, namespace: NamespaceId, prefix: bytes, places: list[int]) -> tuple[StorageKey, ...]:
        return tuple(
            StorageKey(namespace[:_HALF] + prefix[at * HASH_BYTES : at * HASH_BYTES + _HALF]) for at in places
        )

    def _before(self, namespace: NamespaceId, parent: bytes) -> StorageKey | None:
        """The last of those up to ``parent`` that is in the sample."""
        assert self._store is not None
        for key in self._store.ledger.ancestors(storage_key(namespace, BlockHash(parent))):
            if self._sampled(key[HASH_BYTES:]):
                return StorageKey(namespace[:_HALF] + key[HASH_BYTES : HASH_BYTES + _HALF])
        return None

    def _put(self, event: _Event) -> None:
        if len(self._queue) >= QUEUE_MAX:
            self._dropped += 1
            self._lost = True
            return
        self._queue.append(event)
        if self._is_drained:
            self._is_drained = False
            asyncio.get_running_loop().call_soon(self._drain)

    def _drain(self) -> None:
        """Work for ``TURN_NS``, then let others."""
        began_ns = self._work_ns()
        while self._queue and self._work_ns() - began_ns < TURN_NS:
            self._apply(self._queue.popleft())
        self._cost_ns += self._work_ns() - began_ns
        self._is_drained = not self._queue
        if self._queue:
            asyncio.get_running_loop().call_soon(self._drain)

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
        if now_ns - self._watched_ns < WATCH_NS:
            return
        spent_ns, passed_ns = self._cost_ns - self._watched_cost_ns, now_ns - self._watched_ns
        is_first = not self._watched_ns
        self._watched_ns, self._watched_cost_ns = now_ns, self._cost_ns
        too_dear = not is_first and spent_ns > self._plan.cpu * passed_ns
        if too_dear or self._lost or self._shadows.block_count > BLOCKS_MAX:
            self._lost = False
            self._thin(f"{spent_ns / passed_ns:.1%} of a processor" if too_dear else "too many blocks")

    def _thin(self, why: str) -> None:
        assert self._shadows is not None
        if not self._shadows.thin():
            self._end(f"they took {why}, with as small a sample as says anything")
            return
        self._limit = int(self._shadows.sample * _NAMES)
        self._queue.clear()
        self._pending.clear()
        log.info("shadow caches took %s: they look at %.2f%% now", why, self._shadows.sample * 100)

    def _end(self, why: str) -> None:
        self.trouble = f"the shadow caches ended: {why}"
        log.warning("%s", self.trouble)
        self.is_on, self._shadows = False, None
        self._queue.clear()
        self._pending.clear()

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
