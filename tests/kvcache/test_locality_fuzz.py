"""The index against its oracle, question by question; and against the truth, whatever a network does.

``KVCACHE_FAULT_FACTOR`` multiplies the runs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable

import pytest

from kvcache import index, index_twin
from kvcache.block import hints
from kvcache.index import Index
from kvcache.locality import BEAT_NS, LOST, TIERS, Applied, LocalityIndex
from kvcache.wire import EventBatch
from tests.kvcache.locality_source import BYTES_MAX, SPACES, Source, Truth, expected, path
from tests.kvcache.locality_world import live

FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))
WORLDS = 40 * FACTOR
TWIN_WORLDS = 6 * FACTOR
RUNS = 500 * FACTOR
STEPS = 60
QUESTIONS = 20


@pytest.mark.parametrize("make", [index.make_index, index_twin.PrefixIndex])
def test_some_worlds_are_as_their_oracles_say(make: Callable[[int], Index]) -> None:
    for seed in range(1_000, 1_004):
        assert live(seed, make, steps=20, questions=3).compared >= 120


@pytest.mark.slow
def test_a_hundred_thousand_questions_are_answered_as_the_oracle_answers_them() -> None:
    worlds = [live(seed, index.make_index, STEPS, QUESTIONS) for seed in range(WORLDS)]
    worlds += [
        live(seed, index_twin.PrefixIndex, STEPS, QUESTIONS) for seed in range(WORLDS, WORLDS + TWIN_WORLDS)
    ]
    assert sum(world.compared for world in worlds) >= 100_000
    seen = set().union(*(world.seen for world in worlds))
    assert seen >= {*Applied, ("dropped", True), ("suspect", True)}, "all of it happened"


class Network:
    """Batches on their way: one in ten is lost, one in ten comes twice, some overtake others."""

    def __init__(self, generator: random.Random) -> None:
        self._random = generator
        self._under_way: list[EventBatch] = []
        self.is_cut = False

    def send(self, batches: Iterable[EventBatch]) -> None:
        for batch in batches:
            if not self.is_cut and self._random.random() >= 0.1:
                self._under_way.append(batch)
                if self._random.random() < 0.1:
                    self._under_way.insert(self._random.randrange(len(self._under_way)), batch)

    def arrived(self) -> list[EventBatch]:
        """All but a few, nearly in order."""
        stays = self._random.choice((0, 0, 1, 3))
        here, self._under_way = self._under_way[stays:], self._under_way[:stays]
        if len(here) > 1 and self._random.random() < 0.3:
            at = self._random.randrange(len(here) - 1)
            here[at], here[at + 1] = here[at + 1], here[at]
        return here


class Stream:
    """One source, a network, and a follower that does what ``Applied`` and ``cursor`` say."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.prompt = path(self.random.randint(4, 40), seed)
        self.source = Source("n", 1, self.prompt)
        self.network = Network(self.random)
        self.index = LocalityIndex(BYTES_MAX)
        self.now_ns = 0
        self.has_begun = self.was_suspect = False
        self._truths: dict[tuple[int, int], Truth] = {}
        self._highest = (0, 0)
        self._remember()
        self.network.send(self.source.answer(None))

    def life(self) -> None:
        """Changes; for a while nobody hears of them, and longer than the ring; then perhaps a restart."""
        self.quiesce()
        self.has_begun = True
        cut = self.random.randrange(2, 10)
        restart = self.random.choice((0, 0, self.random.randrange(cut + 11, 25)))
        for turn in range(1, 26):
            self.network.is_cut = cut <= turn < cut + 10
            if turn == restart:
                self.source = Source("n", self.source.incarnation + 1, self.prompt)
                self._remember()
            self.change()
            self.deliver()

    def change(self) -> None:
        for _ in range(self.random.randint(1, 2)):
            start = self.random.randrange(len(self.prompt))
            places = range(start, min(len(self.prompt), start + self.random.randint(1, 20)))
            act = self.source.store if self.random.random() < 0.6 else self.source.remove
            for batch in act(self.random.choice(SPACES), self.random.choice(TIERS), places):
                self._remember()
                self.network.send([batch])
        if self.random.random() < 0.3:
            self.network.send([self.source.publisher.beat()])

    def deliver(self) -> None:
        """What arrives is applied; after a loss the source is asked to go on from where the index is."""
        self.now_ns += BEAT_NS // 100
        for batch in self.network.arrived():
            told = (batch.incarnation, batch.seq)
            self._highest = max(self._highest, told)
            if self.index.apply(batch, self.now_ns) in LOST and self.random.random() < 0.5:
                self.network.send(self.source.answer(self.index.cursor("n")))
            self.check()

    def quiesce(self) -> None:
        """Nothing changes any more; beats go on until the index says that it is current."""
        self.network.is_cut = False
        for _ in range(400):
            self.network.send([self.source.publisher.beat()])
            self.deliver()
            if self.is_current():
                return
        raise AssertionError("it never came to rest")

    def is_current(self) -> bool:
        state = self.index.as_of("n")
        now = (self.source.incarnation, self.source.seq)
        return state is not None and state.synced and (state.incarnation, state.seq) == now

    def check(self) -> None:
        """What is said to be current has no batch behind it that arrived, and was the truth then."""
        state = self.index.as_of("n")
        assert state is not None
        self.was_suspect = self.was_suspect or (self.has_begun and not state.synced)
        if state.synced:
            assert (state.incarnation, state.seq) == self._highest
            self.compare(self._truths[state.incarnation, state.seq])

    def compare(self, truth: Truth) -> None:
        located = {each.namespace: each for each in self.index.locate(hints(self.prompt))}
        for space in SPACES:
            wanted = expected("n", truth, space, self.prompt)
            assert located.get(space, wanted) == wanted and (space in located or not wanted.blocks)

    def _remember(self) -> None:
        held = {key: set(blocks) for key, blocks in self.source.held.items()}
        self._truths[self.source.incarnation, self.source.seq] = held


def run(seed: int) -> Stream:
    """One stream's whole life: afterwards the index is the truth, and said meanwhile that it was not."""
    stream = Stream(seed)
    stream.life()
    stream.quiesce()
    held = stream.source.held
    stream.compare(held)
    assert stream.index.entries == sum(map(len, held.values()))
    for place in range(len(stream.prompt)):
        prompt = stream.prompt[place:]
        for each in stream.index.locate(hints(prompt)):
            assert each == expected("n", held, each.namespace, prompt)
    stream.index.check()
    assert stream.was_suspect
    return stream


@pytest.mark.parametrize("seed", range(RUNS, RUNS + 8))
def test_a_stream_through_a_bad_network_ends_as_the_truth(seed: int) -> None:
    run(seed)


@pytest.mark.slow
def test_five_hundred_streams_through_bad_networks_end_as_the_truth() -> None:
    for seed in range(RUNS):
        try:
            run(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
