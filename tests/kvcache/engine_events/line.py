"""A line between an engine and its feed: what the feed asks for, the engine's buffer answers."""

from __future__ import annotations

import random

from kvcache.engine_events.feed import EngineFeed
from kvcache.engine_events.naming import public_namespaces
from kvcache.wire import EventBatch
from tests.kvcache.engine_events.model_engine import MODEL, ModelEngine, Shelf


def make(replay: bool = True, engine: str = "vllm", blocks_max: int = 1 << 20) -> EngineFeed:
    return EngineFeed(
        "engine:w", public_namespaces(MODEL), 7, engine=engine, replay=replay, blocks_max=blocks_max
    )


class Line:
    """A connection between the two: what the feed asks for, the engine's buffer answers."""

    def __init__(self, engine: ModelEngine, feed: EngineFeed, buffered: int = 1 << 20) -> None:
        self.engine, self.feed, self.shelf = engine, feed, Shelf()
        self.buffered = buffered
        self.answers = True
        self.drops_after = 1 << 20
        """How much of a replay arrives before the rest is lost."""
        self.drops_one = 0
        """Which message of a replay is lost in its middle; 0: none."""

    def connect(self) -> None:
        self.apply(self.feed.connected())
        self.settle()

    def send(self, message: tuple[int, bytes] | None) -> None:
        if message is not None:
            self.apply(self.feed.take(*message))
            self.settle()

    def settle(self) -> None:
        for _ in range(1_000):
            start = self.feed.wanted
            if start is None:
                return
            buffer = self.engine.log[-self.buffered :] if self.answers else []
            sent = [message for message in buffer if message[0] >= start]
            for number, message in enumerate(sent[: self.drops_after]):
                if not number or number != self.drops_one:
                    self.apply(self.feed.replayed(*message))
            self.apply(self.feed.replay_ended(self.answers and len(sent) <= self.drops_after))
        raise AssertionError("it asks for ever")

    def quiet(self) -> None:
        self.feed.quiet()
        self.settle()

    def apply(self, batches: list[EventBatch]) -> None:
        for batch in batches:
            self.shelf.apply(batch, 0)
            self.assert_runs(batch)
        self.feed.check()

    def assert_runs(self, batch: EventBatch) -> None:
        """What is told as stored together follows one another."""
        for event in batch.events:
            if event.kind == "stored":
                names = memoryview(event.hashes).cast("Q").tolist()
                before = [int.from_bytes(event.parent, "little") if event.parent else None, *names]
                known = [self.engine.before.get(name, 0) for name in names]
                assert all(first in (0, second) for first, second in zip(known, before, strict=False))

    def assert_exact(self) -> None:
        assert self.shelf.members == self.engine.truth()
        assert not self.shelf.partial

    def assert_too_little(self) -> None:
        assert self.shelf.members <= self.engine.truth()


def line(seed: int = 0, steps: int = 0, replay: bool = True, buffered: int = 1 << 20) -> Line:
    engine = ModelEngine(random.Random(seed), offloads=seed % 2 == 1)
    made = Line(engine, make(replay), buffered)
    made.connect()
    for _ in range(steps):
        engine.step()
        made.send(engine.publish())
    return made
