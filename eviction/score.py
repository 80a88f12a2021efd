"""A policy in ten lines: a class with one method, ``score``. What scores lowest goes first.

    class MostUsed:
        def score(self, block: int, meta: BlockMeta, now: float) -> float:
            return meta.touches / (1 + now - meta.last_s)

Offer it by name as an entry point of the group ``kvcache.eviction``; ``kvcache policy check`` tries it.

Everything else is done here: of the leaves, the longest unused and ``samples`` drawn evenly are scored,
and after a leaf goes the branch that it ends, as far as that was used at once. ``now`` and the times in
``meta`` are in seconds, of one clock.

The sum: 3 us a leaf that is scored, and what the score takes; 250 bytes a held block.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Protocol, TypeGuard, runtime_checkable

from kvcache.eviction.class_leaves import ClassLeaves
from kvcache.eviction.reuse_times import ReuseClass, Use
from kvcache.policy import EvictionPolicy, Param, RequestContext, TreeView

SAMPLES = 32
_NS_PER_S = 1_000_000_000
_KIND = ReuseClass((), None)


@dataclass(frozen=True, slots=True)
class BlockMeta:
    """What is known of a block. The last six are those of the request that used it last."""

    depth: int
    block_bytes: int
    touches: int
    first_s: float
    last_s: float
    tenant: str
    session: int
    prompt_tokens: int
    hint: str
    priority: int
    expected_gap_s: float | None


@runtime_checkable
class Score(Protocol):
    def score(self, block: int, meta: BlockMeta, now: float) -> float:
        """How much the block is worth keeping. Any order will do."""


class _Seen(Use):
    __slots__ = ("context", "first_ns")

    def __init__(self, context: RequestContext, at: int, touches: int, first_ns: int) -> None:
        super().__init__(_KIND, 0, at, touches, 0.0)
        self.context = context
        self.first_ns = first_ns


class Scored:
    """An ``EvictionPolicy`` and a ``DevicePolicy`` that asks a ``Score``. Subclasses say which."""

    MAKE: ClassVar[type[Score]]

    def __init__(self, tree: TreeView, capacity_bytes: int, samples: float = SAMPLES) -> None:
        self._tree = tree
        self._samples = int(samples)
        self._score = self.MAKE()
        self._random = Random(1)
        self._seen: dict[int, Use] = {}
        self._leaves = ClassLeaves(tree, self._seen)
        self._uses = 0

    @classmethod
    def params(cls) -> Mapping[str, Param]:
        return {
            "samples": Param(
                SAMPLES, 1, 1_024, "leaves drawn evenly and scored, beside the oldest", whole=True
            )
        }

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self._use(context, [block for block in path[:] if block in self._seen])

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        return count

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self._use(context, blocks)

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return self._choose(context, count, None)

    def victims_on(self, context: RequestContext, count: int, device: int) -> Sequence[int]:
        return self._choose(context, count, device)

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        for block in blocks:
            self._seen.pop(block, None)
            parent = self._tree.parent[block]
            if parent >= 0:
                self._leaves.add(parent)

    def state(self) -> bytes:
        return b""

    def load_state(self, data: bytes) -> None:
        if data:
            raise ValueError(f"{len(data)} bytes of state, but this policy learns nothing")

    def meta(self, block: int) -> BlockMeta:
        seen = self._seen[block]
        assert isinstance(seen, _Seen)
        context = seen.context
        gap_ms = context.expected_gap_ms
        return BlockMeta(
            depth=self._tree.depth[block],
            block_bytes=self._tree.block_bytes[block],
            touches=seen.touches,
            first_s=seen.first_ns / _NS_PER_S,
            last_s=context.now_ns / _NS_PER_S,
            tenant=context.tenant,
            session=context.session,
            prompt_tokens=context.prompt_tokens,
            hint=context.hint,
            priority=context.priority,
            expected_gap_s=None if gap_ms is None else gap_ms / 1_000,
        )

    def _choose(self, context: RequestContext, count: int, device: int | None) -> list[int]:
        now = context.now_ns / _NS_PER_S
        drawn = self._tree.sample_leaves(self._samples, self._random)
        return self._leaves.choose(
            count, device, lambda block: float(self._score.score(block, self.meta(block), now)), drawn
        )

    def _use(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self._uses += 1
        made: dict[Use | None, _Seen] = {}
        for block in blocks:
            last = self._seen.get(block)
            seen = made.get(last)
            if seen is None:
                first_ns = last.first_ns if isinstance(last, _Seen) else context.now_ns
                touches = last.touches + 1 if last is not None else 1
                seen = made[last] = _Seen(context, self._uses, touches, first_ns)
            self._seen[block] = seen
        if blocks:
            self._leaves.add(blocks[-1])


def scored(score: type[Score]) -> type[EvictionPolicy]:
    """The policy class that asks ``score``, which is made without arguments."""
    return type(f"Scored{score.__name__}", (Scored,), {"MAKE": score})


def is_score(found: object) -> TypeGuard[type[Score]]:
    """Is it a class of the short form?"""
    return inspect.isclass(found) and issubclass(found, Score) and not hasattr(found, "victims")
