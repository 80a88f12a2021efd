"""The locality index in sets, one a source, namespace and tier: the oracle of ``kvcache.locality``.

It does what its contract says by the shortest way, one block at a time, and has no bound of memory:

    what a source is known to hold ──► {(namespace, tier): {hint, ...}}       replaced whole by a snapshot
    a question ──► block after block, until no tier of the shard has it

Nothing of it is shared with the index but the values that go in and come out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from kvcache.block import NamespaceId, split_hints
from kvcache.events import EMPTY_DIGEST, Digest
from kvcache.locality import BEAT_NS, PLACE_NS, TIERS, Applied, AsOf, Located
from kvcache.wire import BlockEvent, EventBatch

Held = dict[tuple[NamespaceId, str], set[bytes]]

_DIGEST_BYTES = len(EMPTY_DIGEST)
_NOTHING: frozenset[bytes] = frozenset()


@dataclass(slots=True)
class _Snapshot:
    """On its way: the next page has ``left`` behind it."""

    seq: int
    left: int
    held: Held = field(default_factory=dict)


@dataclass(slots=True)
class _Told:
    """What one source told. ``content``: unknown, whole, or wrong (its digest was another)."""

    incarnation: int
    seq: int = 0
    highest: int = 0
    content: str = "unknown"
    broken: bool = False
    partial: bool = False
    alive_ns: int = 0
    late: bool = False
    heard_ns: int = 0
    held: Held = field(default_factory=dict)
    loading: _Snapshot | None = None
    left: _Snapshot | None = None
    """One that was given up before it was whole."""

    @property
    def synced(self) -> bool:
        return self.content == "whole" and not self.broken and not self.late and self.seq == self.highest

    def forget(self) -> None:
        self.content, self.broken, self.partial = "unknown", False, False
        self.held = {}
        self.leave()

    def leave(self) -> None:
        self.left, self.loading = self.loading or self.left, None

    def hear(self, now_ns: int) -> None:
        if self.synced:
            self.heard_ns = max(self.heard_ns, now_ns)


class LocalityModel:
    """As ``kvcache.locality.LocalityIndex``, with whatever it leaves open as that has it."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}
        self._placed: dict[tuple[str, NamespaceId], list[set[bytes]]] = {}  # The blocks of two turns.
        self._turn = 0
        self._ticked_ns: int | None = None
        self._spared_until_ns = 0

    # --- what is told ---------------------------------------------------------------------------

    def apply(self, batch: EventBatch, now_ns: int) -> Applied:
        told = self._told.setdefault(batch.source, _Told(batch.incarnation))
        if batch.incarnation < told.incarnation:
            return Applied.STALE
        told.alive_ns, told.late = max(told.alive_ns, now_ns), False
        restarted = batch.incarnation > told.incarnation
        if restarted:
            self._unplace(batch.source)
            self._told[batch.source] = told = _Told(
                batch.incarnation, alive_ns=told.alive_ns, heard_ns=told.heard_ns
            )
        if batch.snapshot:
            return self._page(told, batch, now_ns)
        told.highest = max(told.highest, batch.seq)
        if restarted:
            return Applied.RESTARTED
        if told.content != "whole":
            return Applied.GAP
        if batch.seq < told.seq or (batch.seq == told.seq and not batch.beat):
            return Applied.STALE
        if batch.seq > told.seq + (0 if batch.beat else 1):
            return Applied.GAP
        return self._next(told, batch, now_ns)

    def _next(self, told: _Told, batch: EventBatch, now_ns: int) -> Applied:
        self._change(told.held, batch.events)
        told.seq, told.broken = batch.seq, False
        told.partial = told.partial or batch.partial
        if batch.digests and not _agrees(told.held, batch.digests):
            told.content = "wrong"
            return Applied.DRIFT
        for event in batch.events:
            self._end_placed(batch.source, event)
        told.hear(now_ns)
        return Applied.TAKEN

    def _page(self, told: _Told, batch: EventBatch, now_ns: int) -> Applied:
        if told.content == "whole" and (
            batch.seq < told.seq or (batch.seq == told.seq and told.synced)
        ):  # What is there is as good.
            if told.loading is not None and told.loading.seq == batch.seq:
                told.leave()
            return Applied.STALE
        told.highest = max(told.highest, batch.seq)
        if told.loading is None:
            left, told.left = told.left, None
            if left is not None and batch.seq == left.seq and batch.left <= left.left:
                return Applied.GAP
        loading = told.loading = told.loading or _Snapshot(batch.seq, batch.left)
        if (batch.seq, batch.left) == (loading.seq, loading.left + 1):
            return Applied.STALE
        if (batch.seq, batch.left) != (loading.seq, loading.left):
            told.leave()
            told.broken = True
            return Applied.GAP
        self._change(loading.held, batch.events)
        loading.left -= 1
        told.broken = True
        if batch.left:
            return Applied.TAKEN
        told.loading = None
        if batch.digests and not _agrees(loading.held, batch.digests):
            return Applied.DRIFT
        told.held, told.seq, told.content = loading.held, batch.seq, "whole"
        told.broken, told.partial = False, batch.partial
        told.hear(now_ns)
        return Applied.TAKEN

    @staticmethod
    def _change(held: Held, events: Sequence[BlockEvent]) -> None:
        for event in events:
            key = (NamespaceId(event.namespace), event.tier)
            if event.kind == "stored":
                held.setdefault(key, set()).update(split_hints(event.hashes))
            elif event.kind == "removed":
                held.get(key, set()).difference_update(split_hints(event.hashes))
            elif key in held:
                held[key] = set()

    def suspect(self, source: str) -> None:
        if source in self._told:
            self._told[source].broken = True
            self._told[source].leave()

    def heard(self, source: str, now_ns: int) -> None:
        if source in self._told:
            told = self._told[source]
            told.alive_ns, told.late = max(told.alive_ns, now_ns), False
            told.hear(now_ns)

    def forget(self, source: str) -> None:
        if self._told.pop(source, None) is not None:
            self._unplace(source)

    def tick(self, now_ns: int) -> list[str]:
        if self._ticked_ns is not None and now_ns > self._ticked_ns + BEAT_NS:
            self._spared_until_ns = now_ns + BEAT_NS
        self._ticked_ns, are_spared = now_ns, now_ns < self._spared_until_ns
        dropped = []
        for name, told in self._told.items():
            silent_ns = now_ns - told.alive_ns
            told.late = silent_ns > 1.5 * BEAT_NS
            if silent_ns > 3 * BEAT_NS and not are_spared and (told.content != "unknown" or told.loading):
                told.forget()
                self._unplace(name)
                dropped.append(name)
        self._turn_to(now_ns)
        return dropped

    def cursor(self, source: str) -> tuple[int, int] | None:
        told = self._told.get(source)
        return (told.incarnation, told.seq) if told is not None and told.content == "whole" else None

    # --- what is predicted ----------------------------------------------------------------------

    def place(self, source: str, namespace: NamespaceId, hints: bytes, now_ns: int) -> None:
        self._turn_to(now_ns)
        if source in self._told:
            turns = self._placed.setdefault((source, namespace), [set(), set()])
            turns[self._turn % 2].update(split_hints(hints))

    def _turn_to(self, now_ns: int) -> None:
        turn = now_ns // PLACE_NS
        for _ in range(min(2, turn - self._turn)):
            self._turn += 1
            for turns in self._placed.values():
                turns[self._turn % 2] = set()
        self._turn = max(self._turn, turn)

    def _end_placed(self, source: str, event: BlockEvent) -> None:
        turns = self._placed.get((source, NamespaceId(event.namespace)), [])
        for blocks in turns:
            if event.kind == "removed":
                blocks.difference_update(split_hints(event.hashes))
            elif event.kind == "cleared":
                blocks.clear()

    def _unplace(self, source: str) -> None:
        self._placed = {key: turns for key, turns in self._placed.items() if key[0] != source}

    # --- what is asked --------------------------------------------------------------------------

    def locate(
        self, hints: bytes, namespaces: Collection[bytes] | None = None, tiers: Sequence[str] = TIERS
    ) -> list[Located]:
        """By source and namespace; shards with nothing included."""
        prefix = split_hints(hints)
        shards = {(name, space) for name, told in self._told.items() for space, _ in told.held}
        shards |= {key for key in self._placed if self._predicted(*key, prefix)}
        return [
            self._located(name, space, prefix, tiers)
            for name, space in sorted(shards)
            if namespaces is None or space in namespaces
        ]

    def _located(
        self, name: str, space: NamespaceId, prefix: Sequence[bytes], tiers: Sequence[str]
    ) -> Located:
        held = self._told[name].held
        asked = [held.get((space, tier), _NOTHING) if tier in tiers else _NOTHING for tier in TIERS]
        having: list[list[bool]] = []
        for block in prefix:
            having.append([block in blocks for blocks in asked])
            if True not in having[-1]:
                del having[-1]
                break
        counts = tuple(map(sum, zip(*having, strict=True))) if having else (0,) * len(TIERS)
        beyond = max(0, self._predicted(name, space, prefix) - len(having))
        return Located(name, space, len(having), counts, beyond)

    def _predicted(self, name: str, space: NamespaceId, prefix: Sequence[bytes]) -> int:
        turns = self._placed.get((name, space))
        if turns is None:
            return 0
        blocks = 0
        while blocks < len(prefix) and any(prefix[blocks] in turn for turn in turns):
            blocks += 1
        return blocks

    def sources(self) -> list[AsOf]:
        return [
            AsOf(
                source=name,
                incarnation=told.incarnation,
                seq=told.seq,
                heard_ns=told.heard_ns,
                synced=told.synced,
                known=told.content != "unknown",
                partial=told.partial,
            )
            for name, told in self._told.items()
        ]

    def held(self, source: str) -> Held:
        """What it is known to hold; nothing of what is empty."""
        return {key: set(blocks) for key, blocks in self._told[source].held.items() if blocks}


def _agrees(held: Held, told: Mapping[str, bytes]) -> bool:
    for tier in TIERS:
        digest = Digest()
        for (namespace, of), blocks in held.items():
            if of == tier:
                digest.add(namespace, blocks)
        if digest.pack() != told.get(tier, bytes(_DIGEST_BYTES)):
            return False
    return True
