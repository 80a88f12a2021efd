"""What an engine told that it holds: its own hash of each block, the block's public name, and where it is.

    hash ──► name, name of the block before, namespace, places        a place is a tier, or a part of one

An engine removes by its own hashes, so their names are kept, and the names of what follows are made from
that of the block before. Several places may be in one tier, and with ``copies`` the engine's own pool may
have a block twice (vLLM does not merge equal blocks, and tells of each): a tier has lost a block when the
last of these went. What cannot be named, or is over ``blocks_max`` or ``PLACES_MAX``, is not told: too
little, never too much.

Invariants (``check``): every block has a place, and at most ``PLACES_MAX``; none is over ``blocks_max``.

The sum: 1 to 2 us a block told, 230 bytes a block held.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvcache.block import HINT_BYTES, NamespaceId
from kvcache.engine_events.decode import Cleared, EngineHash, Removed, Stored
from kvcache.engine_events.naming import Namespaces, Space
from kvcache.errors import BadInput
from kvcache.namespace import Namespace
from kvcache.sequence import sequence_hashes
from kvcache.wire import BlockEvent

BLOCKS_MAX = 1 << 20
SPACES_MAX = 1_024
PLACES_MAX = 256
"""Of one block, copies counted. When these went it is told as gone, though the engine may have more."""
OWN = "hbm"
"""The place of which an engine may tell copies."""


@dataclass(slots=True)
class _Block:
    name: int
    before: int | None
    space: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Run:
    """Blocks that follow one another, named."""

    space: int
    before: int | None
    names: Sequence[int]


class Held:
    """One engine's blocks. One owner; every call returns at once."""

    def __init__(
        self,
        namespaces: Namespaces,
        copies: bool = True,
        block_tokens: int = 0,
        blocks_max: int = BLOCKS_MAX,
    ) -> None:
        """``block_tokens``: of events that do not say."""
        self.partial = False
        """Whether the engine holds, or may hold, what is not told."""
        self.counts: Counter[str] = Counter()
        self.namespaces: list[Namespace] = []
        """Those of all events so far, in the order in which they came."""
        self._namespaces = namespaces
        self._copies = copies
        self._block_tokens = block_tokens
        self._blocks_max = blocks_max
        self._blocks: dict[EngineHash, _Block] = {}
        self._spaces: dict[Space, int] = {}
        self._ids: list[NamespaceId] = []
        self._lower = False

    def __len__(self) -> int:
        return len(self._blocks)

    def forget(self, partial: bool) -> None:
        """Nothing is known to be held any more; ``partial``: something may be."""
        self._blocks.clear()
        self._lower = False
        self.partial = partial

    def stored(self, event: Stored) -> list[BlockEvent]:
        """What to tell the index. RAISES BadInput, having taken nothing, for what makes no sense."""
        self._lower = self._lower or _tier(event.place) != OWN
        if not event.tokens and not event.public:
            return self._stored_again(event)
        if len(set(event.hashes)) < len(
            event.hashes
        ):  # Which of two blocks it is that goes cannot be said later.
            self._lost("conflicts", len(event.hashes))
            return []
        run = self._named(event)
        if run is None:
            self._lost("unnamed_blocks", len(event.hashes))
            return []
        blocks, only = self._blocks, (event.place,)
        known = any(map(blocks.__contains__, event.hashes))
        told = self._conflicts(event.hashes, run) if known else []
        fresh = taken = 0
        before = run.before
        for each, name in zip(event.hashes, run.names, strict=True):
            block = blocks.get(each) if known else None
            if block is not None:
                fresh += self._place(block, event.place)
            elif len(blocks) >= self._blocks_max:
                break
            else:
                blocks[each] = _Block(name, before, run.space, only)
                fresh += 1
            taken += 1
            before = name
        if taken < len(event.hashes):
            self._lost("refused_blocks", len(event.hashes) - taken)
        if fresh:
            self.counts["stored_blocks"] += fresh
            told.append(self._event("stored", run.space, event.place, run.names[:taken], run.before))
        return told

    def removed(self, event: Removed) -> list[BlockEvent]:
        told: list[BlockEvent] = []
        names: list[int] = []
        space = -1
        for each in event.hashes:
            block = self._blocks.get(each)
            if block is None or event.place not in block.places:  # Never told, or told as gone.
                self.counts["unknown_removed"] += 1
                continue
            if not self._leave(each, block, event.place):
                continue
            if names and block.space != space:
                told.append(self._event("removed", space, event.place, names))
                names = []
            space = block.space
            names.append(block.name)
            self.counts["removed_blocks"] += 1
        if names:
            told.append(self._event("removed", space, event.place, names))
        return told

    def cleared(self, event: Cleared) -> list[BlockEvent]:
        """Without a tier, nothing is left anywhere; then nothing is unknown either, unless the engine has
        tiers that it may not have meant. A ``narrow`` one is taken to be of all namespaces."""
        tiers = (event.tier,) if event.tier else ("hbm", "host", "nvme")
        told = [
            BlockEvent("cleared", namespace, tier)
            for namespace in self._ids
            for tier in tiers
            if self._blocks
        ]
        narrow = event.narrow and len(self._ids) > 1
        if not event.tier:
            lower = self._lower
            self.forget(partial=lower or narrow)
            self._lower = lower
            return told
        self.partial = self.partial or narrow
        for each, block in list(self._blocks.items()):
            block.places = tuple(place for place in block.places if _tier(place) != event.tier)
            if not block.places:
                del self._blocks[each]
        return told

    def everything(self) -> Iterator[BlockEvent]:
        """All that is held, as runs, parents mostly before children."""
        for tier in ("hbm", "host", "nvme"):
            run: list[int] = []
            space, before = -1, None
            for block in self._blocks.values():
                if not _has(block, tier):
                    continue
                if run and (block.space != space or block.before != run[-1]):
                    yield self._event("stored", space, tier, run, before)
                    run = []
                if not run:
                    space, before = block.space, block.before
                run.append(block.name)
            if run:
                yield self._event("stored", space, tier, run, before)

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is held."""
        assert len(self._blocks) <= self._blocks_max
        for block in self._blocks.values():
            assert 0 < len(block.places) <= PLACES_MAX
            assert 0 <= block.space < len(self._ids)

    def _named(self, event: Stored) -> _Run | None:
        """None: the block before is not known, so neither are the names of these."""
        space = self._space(event)
        if space is None:
            return None
        if event.public:
            if not all(isinstance(each, int) for each in event.hashes):
                return None
            before = event.parent if isinstance(event.parent, int) else None
            return _Run(space, before, [each for each in event.hashes if isinstance(each, int)])
        before = None
        if event.parent is not None:
            parent = self._blocks.get(event.parent)
            if parent is None or parent.space != space:
                return None
            before = parent.name
        names = sequence_hashes(event.tokens, event.block_tokens, event.extra[: len(event.hashes)], before)
        return _Run(space, before, names.tolist())

    def _space(self, event: Stored) -> int | None:
        """The number of its namespace. None: there are too many, or it cannot be said."""
        block_tokens = event.block_tokens or self._block_tokens
        key = Space(block_tokens, event.adapter, event.model, event.salt, event.tenant)
        number = self._spaces.get(key)
        if number is None and len(self._spaces) < SPACES_MAX:
            try:
                namespace = self._namespaces(key)
            except BadInput:
                return None
            number = self._spaces[key] = len(self._ids)
            self._ids.append(namespace.namespace_id())
            self.namespaces.append(namespace)
        return number

    def _stored_again(self, event: Stored) -> list[BlockEvent]:
        """Told without tokens: offloaded blocks, whose names are known from when they were computed."""
        told: list[BlockEvent] = []
        for each in event.hashes:
            block = self._blocks.get(each)
            if block is None:
                self._lost("unnamed_blocks", 1)
            elif self._place(block, event.place):
                self.counts["stored_blocks"] += 1
                told.append(self._event("stored", block.space, event.place, [block.name], block.before))
        return told

    def _conflicts(self, hashes: Sequence[EngineHash], run: _Run) -> list[BlockEvent]:
        """A hash that now means another block: which of them is removed later cannot be known, so the
        one before goes now."""
        told: list[BlockEvent] = []
        for each, name in zip(hashes, run.names, strict=True):
            block = self._blocks.get(each)
            if block is not None and (block.name, block.space) != (name, run.space):
                self._lost("conflicts", 1)
                del self._blocks[each]
                told += [
                    self._event("removed", block.space, tier, [block.name])
                    for tier in sorted({_tier(place) for place in block.places})
                ]
        return told

    def _place(self, block: _Block, place: str) -> bool:
        """It is there too. Returns whether its tier has it only now."""
        if place in block.places and not (self._copies and place == OWN):
            return False
        if len(block.places) == PLACES_MAX:
            self._lost("refused_blocks", 1)
            return False
        fresh = not _has(block, _tier(place))
        block.places = (*block.places, place)
        return fresh

    def _leave(self, each: EngineHash, block: _Block, place: str) -> bool:
        """Returns whether its tier has it no more. REQUIRES: ``place`` is one of its places."""
        if len(block.places) == 1:
            del self._blocks[each]
            return True
        at = block.places.index(place)
        block.places = block.places[:at] + block.places[at + 1 :]
        return not _has(block, _tier(place))

    def _lost(self, count: str, number: int) -> None:
        self.counts[count] += number
        self.partial = True

    def _event(
        self, kind: str, space: int, place: str, names: Sequence[int], before: int | None = None
    ) -> BlockEvent:
        parent = b"" if before is None else before.to_bytes(HINT_BYTES, "little")
        hashes = array("Q", names).tobytes()
        return BlockEvent(kind, self._ids[space], _tier(place), parent, hashes)


def _tier(place: str) -> str:
    return place.partition(":")[0]


def _has(block: _Block, tier: str) -> bool:
    return any(_tier(place) == tier for place in block.places)
