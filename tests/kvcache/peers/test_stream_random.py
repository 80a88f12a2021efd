"""Engines that write, give up and vanish at random at one node, and requests at random at the other: what is
given is whole and right, and when all is over nothing is held."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from random import Random

import pytest

from kvcache.peers import receive
from kvcache.transport.base import Endpoint, PeerLost, Priority, Ticket
from tests.kvcache.peers.stream_world import PLANES, World, worlds
from tests.server.peer_world import Meddler

FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))
STEPS = 150 * FACTOR
DAYS_MAX = 20
"""How much is given of what waits some milliseconds is the machine's: it may take several."""
PROMPT_BLOCKS = 10
BAD = 0.1


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield from worlds(tmp_path)


class Weather(Meddler):
    """Some bytes change on the way, some transfers are lost."""

    def __init__(self, inner: Endpoint, random: Random) -> None:
        super().__init__(inner)
        self._random = random

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        if self._random.random() < BAD:
            raise PeerLost("the weather is bad")
        await self.inner.read(ticket, into, deadline_ns, priority)
        if self._random.random() < BAD:
            self._random.choice(into)[0] ^= 1

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        if self._random.random() < BAD:
            raise PeerLost("the weather is bad")
        sent = [memoryview(bytearray(piece)) for piece in pieces]
        if self._random.random() < BAD:
            self._random.choice(sent)[0] ^= 1
        await self.inner.write(ticket, sent, deadline_ns, priority)


class Life:
    """One engine at ``a``: it writes one prompt after another, or part of one."""

    def __init__(self, world: World, random: Random, push: str) -> None:
        self._world = world
        self._random = random
        self._push = push
        self._engine = world.engine()
        self._planes = PLANES
        self.prompts = [prompt_of(random) for _ in range(4)]
        self.prompt = self.prompts[0]
        self.is_writing = False

    def step(self) -> None:
        roll = self._random.random()
        if not self.is_writing:
            self._reserve()
        elif roll < 0.6 and self._planes < PLANES:
            more = self._random.randint(1, PLANES - self._planes)
            self._engine.advance(more)
            self._planes += more
        elif roll < 0.8:
            self.finish()
        elif roll < 0.95:
            self._engine.abort()
            self.is_writing = False
        else:
            self._engine.vanish()
            self._engine = self._world.engine()
            self.is_writing = False

    def _reserve(self) -> None:
        if self._random.random() < 0.5:
            self.prompts[self._random.randrange(len(self.prompts))] = prompt_of(self._random)
        self.prompt = self._random.choice(self.prompts)
        end = self._random.randint(1, len(self.prompt))
        self.is_writing = self._engine.reserve(self.prompt[:end], push=self._push) > 0
        self._planes = 0

    def finish(self) -> None:
        self._engine.commit()
        self.is_writing = False


def prompt_of(random: Random) -> list[bytes]:
    return [random.randbytes(16) for _ in range(PROMPT_BLOCKS)]


@pytest.mark.slow
@pytest.mark.parametrize("push", ["", "b"])
@pytest.mark.parametrize("seed", range(3))
def test_long_days(world: World, push: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "REST_NS", 0)
    print(f"seed {seed}")
    random = Random(seed)
    world.start(pushes=bool(push), capacity="1MiB")
    if not push:
        world.patience(begin_ns=50, stall_ns=50, fetch_ns=500)
    (world.a if push else world.b).on_the_way(lambda endpoint: Weather(endpoint, random))
    # All engines of this process are one client of the node: they vanish together.
    life = Life(world, random, push)
    given = 0
    for day in range(DAYS_MAX):
        given += lived(world, life, random, pushed=bool(push))
        world.until_quiet()
        moved = world.a.stat("pushed_blocks") if push else world.b.stat("streamed_blocks")
        print(f"day {day}: {given} blocks given, {moved:.0f} moved")
        if given and moved:
            return
    raise AssertionError("nothing was ever given, or moved")


def lived(world: World, life: Life, random: Random, *, pushed: bool) -> int:
    """A long day: how many blocks were given."""
    wanted: list[Future[int]] = []
    for _ in range(STEPS):
        if random.random() < 0.3 and sum(not each.done() for each in wanted) < 8:
            prompt = random.choice((life.prompt, random.choice(life.prompts)))
            count = random.randint(1, len(prompt))
            wanted.append(world.want(prompt[:count], random.choice((0, 5, 50)), pushed=pushed))
        for here in random.choices((world.a, world.b), k=random.randint(0, 8)):
            here.stats()  # Time goes by.
        life.step()
    if life.is_writing:
        life.finish()
    return sum(each.result() for each in wanted)
