"""A random life of some sources, told to the index and to its oracle, which are then asked the same.

truth of a source ──Teller──► batches ──lost, late, twice, cut short──► index | model ──► compared
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import msgspec

from kvcache.block import HINT_BYTES, NamespaceId, split_hints
from kvcache.events import Digest
from kvcache.index import Index
from kvcache.locality import BEAT_NS, TIERS, Applied, Found, LocalityIndex, Located
from kvcache.testing.locality_model import Held, LocalityModel
from kvcache.wire import BlockEvent, EventBatch

SPACES = (NamespaceId(b"a" * 16), NamespaceId(b"b" * 16), NamespaceId(b"\xff" * 16))
BYTES_MAX = 64 << 20


class Teller:
    """What a source holds, and how it tells. Blocks are those of ``prompts``, each one chain of hints."""

    def __init__(
        self, name: str, incarnation: int, prompts: Sequence[bytes], generator: random.Random
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.seq = 0
        self.held: Held = {}
        self._prompts = prompts
        self._random = generator

    def batch(self) -> EventBatch:
        """Something happened, and is told."""
        events = [event for _ in range(self._random.randint(1, 4)) for event in self._change()]
        self.seq += 1
        digests = self._digests() if self._random.random() < 0.4 else {}
        return EventBatch(self.name, self.incarnation, self.seq, False, events, digests=digests)

    def beat(self) -> EventBatch:
        return EventBatch(
            self.name, self.incarnation, self.seq, False, [], digests=self._digests(), beat=True
        )

    def pages(self) -> list[EventBatch]:
        """All that it holds, in as many pages as it likes; in places what was not told is in no order."""
        events = [
            self._stored(space, tier, part)
            for (space, tier), blocks in self.held.items()
            for prompt in self._prompts
            if (part := [block for block in split_hints(prompt) if block in blocks])
        ]
        cut = self._random.randint(0, len(events))
        parts = [part for part in (events[:cut], events[cut : cut + 2], events[cut + 2 :]) if part] or [[]]
        return [
            EventBatch(
                self.name, self.incarnation, self.seq, True, part, len(parts) - at, digests=self._digests()
            )
            for at, part in enumerate(parts, 1)
        ]

    def _change(self) -> Iterator[BlockEvent]:
        space, tier = self._random.choice(SPACES), self._random.choice(TIERS)
        held = self.held.setdefault((space, tier), set())
        prompt = split_hints(self._random.choice(self._prompts))
        start = self._random.choice((0, self._random.randrange(len(prompt))))
        part = prompt[start : start + self._random.randint(1, len(prompt))]
        kind = self._random.choices(("stored", "removed", "hole", "cleared"), (6, 3, 3, 0.3))[0]
        if kind == "stored":
            fresh = [block for block in part if block not in held]
            held.update(fresh)
            if fresh:
                before = prompt[start - 1] if start and fresh[0] == part[0] else b""
                yield self._stored(space, tier, fresh, before)
        elif kind == "cleared":
            held.clear()
            yield BlockEvent("cleared", space, tier)
        else:
            gone = [block for block in part if block in held]
            gone = gone[:1] if kind == "hole" else gone[::-1]
            held.difference_update(gone)
            if gone:
                yield BlockEvent("removed", space, tier, b"", b"".join(gone))

    def _stored(
        self, space: NamespaceId, tier: str, blocks: Sequence[bytes], before: bytes = b""
    ) -> BlockEvent:
        """As one run, or as several."""
        runs = b""
        if len(blocks) > 1 and self._random.random() < 0.5:
            cut = self._random.randrange(1, len(blocks))
            runs = b"".join(length.to_bytes(2, "little") for length in (cut, len(blocks) - cut))
        elif self._random.random() < 0.2:
            runs = b"\x01\x00"
        return BlockEvent("stored", space, tier, before, b"".join(blocks), runs)

    def _digests(self) -> dict[str, bytes]:
        digests = {tier: Digest() for tier in TIERS}
        for (space, tier), blocks in self.held.items():
            digests[tier].add(space, blocks)
        return {tier: digest.pack() for tier, digest in digests.items() if digest.count}


class World:
    """Index and oracle, and what may happen to them."""

    def __init__(self, seed: int, make: Callable[[int], Index]) -> None:
        self.random = random.Random(seed)
        self.prompts = _prompts(self.random)
        self.index = LocalityIndex(BYTES_MAX, make)
        self.model = LocalityModel()
        self.tellers = [self._teller(name, 1) for name in ("left", "middle", "right")]
        self.now_ns = 0
        self.compared = 0
        self.seen: set[object] = set()
        """What came to pass: results, and states of sources."""
        self._late: list[EventBatch] = []
        for teller in self.tellers:
            self._tell(*teller.pages())

    def step(self) -> None:
        """One thing happens; index and oracle say the same of it."""
        self.now_ns += self.random.choice((0, BEAT_NS // 50, BEAT_NS // 3))
        acts = (self._in_order, self._lossy, self._snapshot, self._beat, self._break, self._restart)
        more = (self._tick, self._place, self._forget, self._corrupt, self._catch_up)
        weights = (12, 4, 2, 3, 1, 0.5, 2, 2, 0.2, 0.7, 2)
        self.random.choices((*acts, *more), weights)[0](self.random.choice(self.tellers))
        self._compare_states()

    def ask(self, times: int) -> None:
        """So many times two questions: of all that there is, and the same in one of the narrower ways."""
        for _ in range(times):
            prompt = self.random.choice(self.prompts)
            start = HINT_BYTES * self.random.choice((0, 0, 0, self.random.randrange(8)))
            hints = prompt[start : HINT_BYTES * self.random.choice((5, 12, 64, 64))]
            expected = self.model.locate(hints)
            found = self.index.match(hints)
            assert sorted(found.located(), key=_key) == [each for each in expected if _is_there(each)]
            self._check_suspects(found)
            self._narrower(hints, expected)
            self.compared += 2

    def _narrower(self, hints: bytes, expected: list[Located]) -> None:
        kind = self.random.randrange(5)
        spaces = set(self.random.sample(SPACES, self.random.randint(0, 3)))
        names = self.random.sample(["left", "middle", "right", "nobody"], 2)
        there = [each for each in expected if _is_there(each)]
        if kind == 0:
            assert self.index.locate(hints) == expected
        elif kind == 1:
            assert self.index.locate(hints, spaces) == [each for each in expected if each.namespace in spaces]
        elif kind == 2:
            found = self.index.match(hints, spaces, sources=names).located()
            wanted = [each for each in there if each.namespace in spaces and each.source in names]
            assert sorted(found, key=_key) == wanted
        elif kind == 3:
            counts = sorted(each.blocks + each.placed for each in self.index.match(hints, limit=2).located())
            assert counts == sorted(each.blocks + each.placed for each in there)[-2:]
        else:
            mask = self.random.randrange(1, 1 << len(TIERS))
            tiers = [tier for at, tier in enumerate(TIERS) if mask >> at & 1]
            wanted = [each for each in self.model.locate(hints, tiers=tiers) if _is_there(each)]
            assert sorted(self.index.match(hints, tiers=mask).located(), key=_key) == wanted

    def _check_suspects(self, found: Found) -> None:
        synced = {state.source for state in self.model.sources() if state.synced}
        assert [bool(flag) for flag in found.suspect] == [
            found.source(at) not in synced for at in range(len(found))
        ]

    # --- what happens ---------------------------------------------------------------------------

    def _in_order(self, teller: Teller) -> None:
        self._tell(teller.batch())

    def _lossy(self, teller: Teller) -> None:
        """Some are lost; some come late, behind others or twice."""
        for _ in range(self.random.randint(1, 3)):
            batch = teller.batch()
            fate = self.random.random()
            if fate < 0.4:
                self._late.append(batch)
            if fate > 0.2:
                self._tell(batch)
        self._tell(*self._late[:2])
        if self.random.random() < 0.3:
            self._late.clear()

    def _snapshot(self, teller: Teller) -> None:
        """To its end, or not; in between, others go on."""
        pages = teller.pages()
        for page in pages[: self.random.choice((1, 2, 9, 9))]:
            self._tell(page)
            self.ask(1)
            if self.random.random() < 0.2:
                self._tell(page)

    def _catch_up(self, teller: Teller) -> None:
        """As a follower does: behind what is there, or everything anew."""
        cursor = self.index.cursor(teller.name)
        if cursor != (teller.incarnation, teller.seq):
            self._tell(*teller.pages())
        self._tell(teller.beat())

    def _beat(self, teller: Teller) -> None:
        self._tell(teller.beat())

    def _break(self, teller: Teller) -> None:
        self.index.suspect(teller.name)
        self.model.suspect(teller.name)

    def _restart(self, teller: Teller) -> None:
        at = self.tellers.index(teller)
        self._late.append(teller.beat())
        self.tellers[at] = self._teller(teller.name, teller.incarnation + 1)
        if self.random.random() < 0.5:
            self._tell(*self.tellers[at].pages())

    def _corrupt(self, teller: Teller) -> None:
        """A batch that lost its last event on the way."""
        batch = teller.batch()
        self._tell(msgspec.structs.replace(batch, events=batch.events[:-1]))

    def _tick(self, teller: Teller) -> None:
        self.now_ns += self.random.choice((0, BEAT_NS, 2 * BEAT_NS, 4 * BEAT_NS))
        for each in self.tellers:
            if self.random.random() < 0.5:
                self.index.heard(each.name, self.now_ns)
                self.model.heard(each.name, self.now_ns)
        dropped = self.index.tick(self.now_ns)
        assert dropped == self.model.tick(self.now_ns)
        self.seen.add(("dropped", bool(dropped)))

    def _place(self, teller: Teller) -> None:
        prompt, space = self.random.choice(self.prompts), self.random.choice(SPACES)
        self.index.place(teller.name, space, prompt, self.now_ns)
        self.model.place(teller.name, space, prompt, self.now_ns)

    def _forget(self, teller: Teller) -> None:
        self.index.forget(teller.name)
        self.model.forget(teller.name)

    # --- comparing ------------------------------------------------------------------------------

    def _tell(self, *batches: EventBatch) -> Applied | None:
        """Returns what became of the last."""
        applied = None
        for batch in batches:
            applied = self.index.apply(batch, self.now_ns)
            assert applied is self.model.apply(batch, self.now_ns)
            self.seen.add(applied)
        return applied

    def _compare_states(self) -> None:
        states = self.model.sources()
        assert self.index.sources() == states
        for state in states:
            assert self.index.cursor(state.source) == self.model.cursor(state.source)
            self.seen.add(("suspect", state.known and not state.synced))
            teller = next(each for each in self.tellers if each.name == state.source)
            is_current = (state.incarnation, state.seq) == (teller.incarnation, teller.seq)
            if state.synced and is_current and self.random.random() < 0.3:
                self._check_truth(teller)

    def _check_truth(self, teller: Teller) -> None:
        """What the oracle holds as current is what the source holds, once its digest was compared."""
        if self._tell(teller.beat()) is Applied.TAKEN:
            truth = {key: blocks for key, blocks in teller.held.items() if blocks}
            assert self.model.held(teller.name) == truth

    def _teller(self, name: str, incarnation: int) -> Teller:
        return Teller(name, incarnation, self.prompts, self.random)


def live(seed: int, make: Callable[[int], Index], steps: int, questions: int) -> World:
    """A world after so many steps, so many questions asked behind each."""
    world = World(seed, make)
    for _ in range(steps):
        world.step()
        world.ask(questions)
    world.index.check()
    return world


def _prompts(generator: random.Random) -> list[bytes]:
    """Some that begin alike, and one that does not."""
    prompts = [_hints(generator, generator.randint(8, 40))]
    for _ in range(4):
        other = generator.choice(prompts)
        cut = HINT_BYTES * generator.randrange(len(other) // HINT_BYTES)
        prompts.append(other[:cut] + _hints(generator, generator.randint(1, 24)))
    return [*prompts, _hints(generator, 6)]


def _hints(generator: random.Random, count: int) -> bytes:
    return generator.randbytes(HINT_BYTES * count)


def _is_there(found: Located) -> bool:
    return bool(found.blocks or found.placed)


def _key(found: Located) -> tuple[str, bytes]:
    return found.source, found.namespace
