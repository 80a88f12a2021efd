"""What is hot goes to who lacks it, once, within the budget, one copy at a time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_MS
from kvcache.peers.heat import Heat
from kvcache.peers.replicate import LOOKS_MAX, REST_NS, Budget, Lack, Replicator
from kvcache.testing.clock import FakeClock

BLOCK = 1_000


def played(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Run it on a loop of its own."""

    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


def path(name: str, length: int) -> list[StorageKey]:
    return [StorageKey(f"{name}/{at}".encode().ljust(32, b".")) for at in range(length)]


class World:
    """Peers that hold what they were given, and a replicator over them."""

    def __init__(self, rate: int, peers: Sequence[str] = ("b",)) -> None:
        self.clock = FakeClock()
        self.counters: Counter[str] = Counter()
        self.held: dict[str, set[StorageKey]] = {name: set() for name in peers}
        self.here = 1_000
        self.paths: dict[StorageKey, list[StorageKey]] = {}
        self.copies: list[tuple[str, int, int]] = []
        self.gate: asyncio.Event | None = None
        self.takes = 1_000
        self.replicator = Replicator(
            Heat(2),
            Budget(rate),
            self.lacking,
            self.path_to,
            self.size_of,
            self.copy,
            self.clock,
            self.counters,
        )

    def lacking(self, keys: Sequence[StorageKey]) -> list[Lack]:
        found = []
        for name, held in self.held.items():
            count = next((at for at, key in enumerate(keys) if key not in held), len(keys))
            found += [Lack(name, count)] if count < len(keys) else []
        return found

    def path_to(self, key: StorageKey) -> list[StorageKey]:
        return self.paths[key]

    def size_of(self, keys: Sequence[StorageKey]) -> tuple[int, int]:
        return min(self.here, len(keys)), BLOCK

    async def copy(self, name: str, keys: Sequence[StorageKey], start: int) -> int:
        if self.gate is not None:
            await self.gate.wait()
        taken = min(self.takes, len(keys) - start)
        self.copies.append((name, start, taken))
        self.held[name].update(keys[: start + taken])
        return taken

    async def tick(self, seconds: float = 0) -> None:
        self.clock.advance_ms(int(seconds * 1_000))
        self.replicator.tick()
        for _ in range(3):
            await asyncio.sleep(0)

    def heat(self, keys: list[StorageKey]) -> None:
        self.use(keys)
        self.use(keys)

    def use(self, keys: list[StorageKey], start: int = 0) -> None:
        self.paths |= {key: keys[: at + 1] for at, key in enumerate(keys)}
        self.replicator.used(keys[start:])


@played
async def test_what_is_hot_is_copied_to_who_lacks_it() -> None:
    world = World(100 * BLOCK, ("b", "c"))
    world.use(path("p", 5))
    await world.tick()
    assert world.copies == []
    world.use(path("p", 5))
    for _ in range(4):
        await world.tick()
    assert world.copies == [("b", 0, 5), ("c", 0, 5)]
    assert world.counters["replicated_blocks"] == 10
    assert world.counters["replicated_bytes"] == 10 * BLOCK


@played
async def test_the_budget_of_a_second_is_not_exceeded() -> None:
    world = World(10 * BLOCK)
    world.heat(path("p", 100))
    await world.tick()
    await world.tick()
    assert sum(count for _, _, count in world.copies) == 10
    await world.tick(0.5)
    assert sum(count for _, _, count in world.copies) == 15
    for _ in range(40):
        await world.tick(0.25)
    assert sum(count for _, _, count in world.copies) == 100
    starts = [start for _, start, _ in world.copies]
    assert starts == sorted(starts), "from the root on"


@played
async def test_a_block_larger_than_the_budget_goes_when_all_of_it_is_there() -> None:
    world = World(BLOCK // 4)
    world.heat(path("p", 2))
    await world.tick()
    assert world.copies == [("b", 0, 1)]
    await world.tick(3)
    assert len(world.copies) == 1, "four seconds' budget was spent"
    await world.tick(2)
    assert world.copies[1:] == [("b", 1, 1)]


@played
async def test_one_copy_at_a_time() -> None:
    world = World(100 * BLOCK, ("b", "c"))
    world.gate = asyncio.Event()
    world.heat(path("p", 3))
    world.heat(path("q", 3))
    for _ in range(5):
        await world.tick()
    assert world.copies == []
    world.gate.set()
    for _ in range(8):
        await world.tick()
    assert len(world.copies) == 4


@played
async def test_few_paths_are_looked_up_at_once() -> None:
    """Many became hot that nobody lacks."""
    world = World(100 * BLOCK)
    for number in range(2 * LOOKS_MAX):
        known = path(f"p{number}", 3)
        world.held["b"].update(known)
        world.heat(known)
    for left in (LOOKS_MAX, 0):
        await world.tick()
        assert len(world.replicator._wanted) == left
    assert world.copies == []


@played
async def test_a_peer_that_takes_nothing_rests() -> None:
    world = World(100 * BLOCK, ("b", "c"))
    world.takes = 0
    world.heat(path("p", 3))
    for _ in range(6):
        await world.tick()
    assert [name for name, _, _ in world.copies] == ["b", "c"]
    assert world.counters["replication_failures"] == 2
    world.takes = 3
    world.heat(path("q", 3))
    await world.tick()
    assert len(world.copies) == 2, "both rest"
    world.clock.advance_ms(REST_NS // NS_PER_MS)
    world.heat(path("r", 3))
    await world.tick()
    assert len(world.copies) == 3


@played
async def test_what_is_not_here_any_more_is_forgotten() -> None:
    world = World(100 * BLOCK)
    world.heat(path("p", 3))
    world.here = 0
    await world.tick()
    world.here = 3
    await world.tick()
    assert world.copies == []


@played
async def test_what_a_peer_was_given_is_not_sent_again_before_it_tells() -> None:
    world = World(100 * BLOCK)
    world.replicator._lacking = lambda keys: [Lack("b", 0)]  # Its events have not come.
    world.heat(path("p", 3))
    for _ in range(5):
        await world.tick()
    assert world.copies == [("b", 0, 3)]


@played
async def test_a_later_part_of_a_prompt_goes_with_what_comes_before_it() -> None:
    world = World(100 * BLOCK)
    world.use(path("p", 9), start=6)
    world.use(path("p", 9), start=6)
    await world.tick()
    assert world.copies == [("b", 0, 9)]


@played
async def test_close_ends_a_copy() -> None:
    world = World(100 * BLOCK)
    world.gate = asyncio.Event()
    world.heat(path("p", 3))
    await world.tick()
    await world.replicator.close()
    assert world.copies == []
