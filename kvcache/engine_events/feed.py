"""An engine's numbered messages into batches for the index: what was lost is asked for anew, or given up.

    unknown ──message 0, or all replayed──► whole ──next message──► whole
                                              │ message lost
                                              ▼
                                          wanted: the shell asks for a replay, message by message
             ┌── it goes on from the last one taken ──► whole
             ├── it begins later, or there is none ───► empty again, and partial: too little, never too much
             └── the last one taken is another ───────► restarted: a new incarnation, empty, all replayed

A replay is asked for from the last message taken, and goes on only if that one is the same, byte by byte:
two processes behind one address cannot be mixed up, whatever their numbers. A number that goes back on one
connection is a restart as well. Without a replay nobody can tell what a new connection leads to, so it
begins empty.

Batches are numbered by the feed, from 1 in each incarnation, so the index never sees a gap of ours.
``partial`` is in each of them: the engine may hold what is not told.

Invariants (``check``): a message is held back only while a replay is wanted.

The sum: with ``decode``, ``Held`` and the index, 4 us a block of 16 tokens stored and 8 us a block removed,
as engines tell removals one by one: 100,000 to 250,000 blocks a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby

from kvcache.engine_events.decode import Cleared, Event, Removed, Skipped, Stored, Told, decode
from kvcache.engine_events.held import BLOCKS_MAX, Held
from kvcache.engine_events.naming import Namespaces
from kvcache.errors import BadInput
from kvcache.namespace import Namespace
from kvcache.wire import BlockEvent, EventBatch

PAGE_BLOCKS = 65_536
ENGINES = ("vllm", "sglang", "rfc1527")
COUNTS = (
    *(
        "messages",
        "duplicates",
        "garbage",
        "other_rank",
        "gaps",
        "replays",
        "replayed",
        "restarts",
        "emptied",
    ),
    *("stored_blocks", "removed_blocks", "unknown_removed"),
    *("unnamed_blocks", "refused_blocks", "conflicts"),
    *("skipped:group", "skipped:kind", "skipped:remote", "skipped:medium"),
    *("skipped:bigram", "skipped:uneven", "skipped:keyless", "skipped:unknown"),
)
"""What ``EngineFeed.counts`` counts. Blocks unnamed, refused or in conflict, and what was skipped as bigram,
uneven or keyless, are held and not told."""


@dataclass(slots=True)
class _Asked:
    """A replay: ``why`` is connect, gap or quiet; ``verify``: its first message must be the last taken."""

    start: int
    why: str
    verify: bool
    first: bool = True
    moved: bool = False
    broken: bool = False
    """There is a gap in the replay itself."""
    again: bool = False
    """The engine restarted: everything is asked for."""


class EngineFeed:
    """One stream of one engine. Pure; one owner. The shell calls ``connected``, then ``take`` for each
    message of that connection, and between them, while ``wanted`` is not None, asks for a replay from there:
    ``replayed`` for each message of it, and ``replay_ended``. Every batch goes to the index, in order."""

    def __init__(
        self,
        source: str,
        namespaces: Namespaces,
        incarnation: int,
        *,
        engine: str = "vllm",
        replay: bool = True,
        block_tokens: int = 0,
        blocks_max: int = BLOCKS_MAX,
    ) -> None:
        """``incarnation``: higher than any before under this name (``time.time_ns()``). ``replay``: the
        engine replays. ``block_tokens``: where events do not say."""
        assert engine in ENGINES, engine
        self.source = source
        self.incarnation = incarnation
        self.wanted: int | None = None
        """The number of the message from which on a replay is to be asked for."""
        self.rank: int | None = None
        """The data-parallel rank of the stream, once it said."""
        self.trouble = ""
        """The last thing that went wrong with what the engine told."""
        self._held = Held(namespaces, engine == "vllm", block_tokens, blocks_max)
        self._replay = replay
        self._seq = 0
        self._named = 0
        self._next: int | None = None
        self._last = b""
        self._live = -1
        self._back: tuple[int, bytes] | None = None
        self._asked: _Asked | None = None

    @property
    def counts(self) -> Counter[str]:
        """By the names in ``COUNTS``."""
        return self._held.counts

    @property
    def partial(self) -> bool:
        return self._held.partial

    @property
    def blocks(self) -> int:
        """How many are held."""
        return len(self._held)

    @property
    def namespaces(self) -> list[Namespace]:
        return list(self._held.namespaces)

    def connected(self) -> list[EventBatch]:
        """A new connection, of which nothing was taken yet."""
        self._live, self._back, self._asked, self.wanted = -1, None, None, None
        if self._replay:
            self._ask("connect")
            return []
        if self._next is not None:
            return self._restart(partial=True)
        return self._empty(partial=True)

    def take(self, seq: int, payload: bytes) -> list[EventBatch]:
        """One message. REQUIRES: no replay is wanted."""
        assert self.wanted is None
        out: list[EventBatch] = []
        if seq <= self._live:
            out += self._restart(partial=seq != 0)
        self._live = seq
        if self._next is not None and seq < self._next:
            self.counts["duplicates"] += 1
            return out
        if self._next is None and seq != 0 and not self._replay:
            return out + self._begin(seq, payload)
        if seq != (self._next or 0):
            self.counts["gaps"] += self._next is not None
            if not self._replay:
                return out + self._begin(seq, payload)
            self._back = seq, payload
            self._ask("gap")
            return out
        if self._next is None:
            return out + self._begin(seq, payload)
        return out + self._apply(seq, payload)

    def quiet(self) -> None:
        """Nothing came for a while: ask whether something was lost at the end."""
        if self._replay and self.wanted is None:
            self._ask("quiet")

    def replayed(self, seq: int, payload: bytes) -> list[EventBatch]:
        """One message of the replay. REQUIRES: one is wanted."""
        asked = self._asked
        assert asked is not None
        if asked.broken or asked.again:
            return []
        if asked.first:
            asked.first = False
            return self._replay_begins(asked, seq, payload)
        if self._next is not None and seq > self._next:
            asked.broken = True
        if seq != self._next:
            return []
        self.counts["replayed"] += 1
        asked.moved = True
        return self._apply(seq, payload)

    def replay_ended(self, answered: bool) -> list[EventBatch]:
        """It came to its end; not ``answered``: it did not, in time."""
        asked, self._asked, self.wanted = self._asked, None, None
        assert asked is not None
        self.counts["replays"] += 1
        if asked.again or ((asked.broken or not answered) and asked.moved):
            self._ask(asked.why)
            return []
        out: list[EventBatch] = []
        if asked.first and answered:
            if asked.verify:  # Not even the last one taken: that was another process.
                out = self._restart(partial=True)
                self._ask(asked.why)
                return out
            if self._next is None:
                self._next = 0
                out = self._empty(partial=False)
        elif asked.first and asked.why == "connect":
            out = self._empty(partial=True) if self._next is None else self._restart(partial=True)
        elif asked.broken and self._back is None:  # There is more, and it cannot be had.
            self._next = None
            out = self._empty(partial=True)
        return out + self._take_back()

    def snapshot(self) -> list[EventBatch]:
        """All that is held, for an index that lost it: at least one batch."""
        pages: list[list[BlockEvent]] = [[]]
        size = 0
        for event in self._held.everything():
            if size >= PAGE_BLOCKS:
                pages.append([])
                size = 0
            pages[-1].append(event)
            size += len(event.hashes) // 8
        self._named = len(self._held.namespaces)
        names = [namespace.to_map() for namespace in self._held.namespaces]
        return [
            self._batch(page, snapshot=True, left=len(pages) - at, names=names if at == 1 else [])
            for at, page in enumerate(pages, 1)
        ]

    def beat(self) -> EventBatch:
        """The engine lives, and told no more than was told here."""
        return self._batch([], beat=True)

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is held."""
        self._held.check()
        assert (self._asked is None) == (self.wanted is None)
        assert self._back is None or self._asked is not None
        assert set(self.counts) <= set(COUNTS)

    def _ask(self, why: str) -> None:
        verify = bool(self._next)
        start = (self._next or 1) - 1
        self._asked = _Asked(start, why, verify)
        self.wanted = start

    def _replay_begins(self, asked: _Asked, seq: int, payload: bytes) -> list[EventBatch]:
        if not asked.verify:
            if self._next == seq:
                return self._apply(seq, payload)
            asked.moved = True
            return self._begin(seq, payload)
        assert self._next is not None
        if seq > self._next - 1:
            asked.moved = True
            return self._begin(seq, payload)
        if _digest(payload) == self._last:
            return []
        asked.again = True
        return self._restart(partial=True)

    def _take_back(self) -> list[EventBatch]:
        """What waited for the replay: it comes next, or came with it, or else what is between is lost."""
        if self._back is None:
            return []
        (seq, payload), self._back = self._back, None
        if self._next is not None and seq < self._next:
            self.counts["duplicates"] += 1
            return []
        return self._apply(seq, payload) if seq == self._next else self._begin(seq, payload)

    def _begin(self, seq: int, payload: bytes) -> list[EventBatch]:
        """From nothing: whole only from message 0 on."""
        return self._empty(partial=seq != 0) + self._apply(seq, payload)

    def _apply(self, seq: int, payload: bytes) -> list[EventBatch]:
        self._next, self._last = seq + 1, _digest(payload)
        self.counts["messages"] += 1
        partial = self.partial
        try:
            told = decode(payload)
            events = self._events(told)
        except BadInput as error:
            self.counts["garbage"] += 1
            self.trouble = str(error)
            return self._empty(partial=True)
        if partial and not self.partial:  # It was cleared: what is left is all that there is.
            self._seq += 1
            return self.snapshot()
        if not events and self._named == len(self._held.namespaces) and self.partial == partial:
            return []
        return [self._batch(events)]

    def _events(self, told: Told) -> list[BlockEvent]:
        if told.rank is not None:
            self.rank = told.rank if self.rank is None else self.rank
            if told.rank != self.rank:
                self.counts["other_rank"] += 1
                return []
        out: list[BlockEvent] = []
        for event in _joined(told.events):
            match event:
                case Stored():
                    out += self._held.stored(event)
                case Removed():
                    out += self._held.removed(event)
                case Cleared():
                    out += self._held.cleared(event)
                case Skipped(why, lost):
                    self.counts[f"skipped:{why}"] += 1
                    self._held.partial |= lost
        return out

    def _restart(self, partial: bool) -> list[EventBatch]:
        self.counts["restarts"] += 1
        self.incarnation += 1
        self._seq, self._next, self.rank = 0, None, None
        return self._empty(partial)

    def _empty(self, partial: bool) -> list[EventBatch]:
        self.counts["emptied"] += 1
        self._named = 0
        self._seq += 1
        self._held.forget(partial)
        return [self._batch([], snapshot=True)]

    def _batch(
        self,
        events: list[BlockEvent],
        snapshot: bool = False,
        left: int = 0,
        beat: bool = False,
        names: list[dict[str, str | int]] | None = None,
    ) -> EventBatch:
        if not snapshot and not beat:
            self._seq += 1
            names = [namespace.to_map() for namespace in self._held.namespaces[self._named :]]
            self._named = len(self._held.namespaces)
        return EventBatch(
            source=self.source,
            incarnation=self.incarnation,
            seq=self._seq,
            snapshot=snapshot,
            events=events,
            left=left,
            namespaces=names or [],
            beat=beat,
            partial=self.partial,
        )


def _joined(events: Iterable[Event]) -> Iterator[Event]:
    """Engines tell removals one by one: those of one place that stand together are one event."""
    for place, run in groupby(events, lambda event: event.place if isinstance(event, Removed) else None):
        if place is None:
            yield from run
        else:
            yield Removed(
                tuple(each for event in run if isinstance(event, Removed) for each in event.hashes), place
            )


def _digest(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=16).digest()
