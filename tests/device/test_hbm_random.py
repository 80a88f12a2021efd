"""A random caller over HBM, host memory and NVMe together: whatever it does, no byte is wrong, nothing leaks.

After each step every invariant of the node is checked. A failure names its seed, which repeats the calls;
what the node does behind their back (copying to NVMe, reading from there) comes when it comes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.block import BlockHash, storage_key
from kvcache.client.store import Lease
from kvcache.testing.stores import SPEC
from tests.device.hbm_rig import HBM_BLOCKS, Engine, World, hold, lose
from tests.server.talk import connected, deadline

pytestmark = pytest.mark.slow
STEPS = 150
PATHS = 12
BLOCKS_MAX = 24
TURNS = 60


class Caller:
    """``tips`` are prompts that begin alike by twos: paths of one tree."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        nvme = {"nvme": f"{folder / 'nvme'}:16MiB", "nvme_segment": "1MiB", "nvme_scrub_share": 0.0}
        self.world = World(folder, capacity="512KiB", **nvme)
        self.engine = self.world.engine
        self.let_go = hold(self.world)
        self.paths = [self._path(number) for number in range(PATHS)]
        self.leases: list[Lease] = []
        self.flipped: set[BlockHash] = set()
        self.gone = 0
        self.is_lost = False

    def _path(self, number: int) -> list[BlockHash]:
        """The first eight blocks are those of its sister."""
        common = range(number // 2 * 1_000, number // 2 * 1_000 + 8 * SPEC.block_tokens)
        own = range(number * 100_000 + 7, number * 100_000 + 7 + (BLOCKS_MAX - 8) * SPEC.block_tokens)
        return self.engine.handle.hashes([*common, *own])

    def some(self) -> list[BlockHash]:
        path = self.random.choice(self.paths)
        return path[: self.random.randint(1, len(path))]

    # --- steps ----------------------------------------------------------------------------------

    def save(self) -> None:
        path = self.some()
        count = self.engine.save(path)
        assert 0 <= count <= len(path)
        assert self.world.in_hbm(path) >= count or self.is_lost

    def save_continued(self) -> None:
        path = self.some()
        at = self.random.randrange(len(path))
        self.engine.save(path[at:], parent=path[at - 1] if at else b"")

    def save_below(self) -> None:
        self.engine.save_below(self.some())

    def load(self) -> None:
        """Everything that is in HBM, and behind it what host memory has, is had; but for what was flipped."""
        path = self.some()
        hot = self.world.in_hbm(path)
        least = hot + self.world.in_host(path[hot:])
        count, failed = self.engine.load(path)
        assert count >= least
        assert {path[at] for at in failed} <= self.flipped

    def hold_lease(self) -> None:
        path = self.some()
        lease = self.engine.store.lease_device(self.engine.handle, path)
        for grant in lease.grants:
            assert not grant.start or lease.grants[0].start == 0
        if lease.count:
            self.leases.append(lease)

    def release_lease(self) -> None:
        if self.leases:
            self.engine.store.release(self.leases.pop(self.random.randrange(len(self.leases))))

    def flip(self) -> None:
        """Of what no lower tier has, too."""
        path = self.some()
        hot = self.world.in_hbm(path)
        if hot:
            block = path[self.random.randrange(hot)]
            self.world.flip(block)
            self.flipped.add(block)

    def demote(self) -> None:
        self.let_go()
        self.world.eventually(lambda: not self.world.demoter().is_busy)
        self.let_go = hold(self.world)

    def vanish(self) -> None:
        """A writer's connection ends in the middle, and later its process says that it has stopped."""
        if self.is_lost:
            return  # Then nobody is given a slab.
        path, name = self.some(), f"writer-{self.gone}"
        self.gone += 1
        namespace = self.engine.handle.namespace_id
        with connected(self.world.node.node.address, map=True, hbm=True, client=name) as channel:
            opened = wire.Open(
                self.engine.handle.namespace.to_map(), SPEC.plane_count, SPEC.head_count, SPEC.head_bytes
            )
            channel.call(opened, deadline())
            request = wire.Reserve(namespace, b"", b"".join(path), tier=wire.HBM)
            reserved = channel.call(request, deadline())
            assert isinstance(reserved, wire.Reserved)
        if reserved.count:
            self.world.eventually(lambda: self.world.stats()["hbm_limbo_blocks"] == reserved.count)
        ended = {"map": True, "hbm": True, "client": name, "writes_ended": True}
        with connected(self.world.node.node.address, **ended):
            self.world.eventually(lambda: self.world.stats()["hbm_limbo_blocks"] == 0)

    def persist(self) -> None:
        path = self.some()
        assert self.engine.store.persist(self.engine.handle, path, 100) <= len(path)

    def lose(self) -> None:
        """Once, late."""
        if self.random.random() < 0.1:
            lose(self.world)
            self.is_lost = True

    # --- the whole ------------------------------------------------------------------------------

    def run(self) -> None:
        steps: list[Callable[[], None]] = [
            *[self.save] * 6,
            *[self.save_continued] * 2,
            *[self.save_below] * 5,
            *[self.load] * 8,
            *[self.hold_lease] * 3,
            *[self.release_lease] * 3,
            *[self.flip] * 2,
            *[self.demote] * 2,
            self.vanish,
            self.persist,
            self.lose,
        ]
        for _ in range(STEPS):
            self.random.choice(steps)()
            self.check()
        while self.leases:
            self.release_lease()
        self.world.eventually(self.nothing_is_held)
        self.check()

    def check(self) -> None:
        self.world.check()
        stats = self.world.stats()
        assert stats["used_bytes:hbm"] <= stats["capacity_bytes:hbm"]
        assert stats["blocks:hbm"] <= HBM_BLOCKS
        told = self.world.told("hbm")
        held = self.world.node.call(lambda: self.findable())
        assert told == held, "followers know what HBM holds"

    def findable(self) -> int:
        hbm = self.world.node.node.core.hbm
        assert hbm is not None
        every = {storage_key(self.engine.handle.namespace_id, block) for path in self.paths for block in path}
        return sum(hbm[0].ledger.has(key) for key in every)

    def nothing_is_held(self) -> bool:
        stats = self.world.stats()
        names = (
            "leases",
            "reservations",
            "limbo_blocks",
            "hbm_leases",
            "hbm_reservations",
            "hbm_limbo_blocks",
        )
        return not any(stats[name] for name in names)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_caller(tmp_path: Path, seed: int) -> None:
    caller = Caller(tmp_path, seed)
    try:
        caller.run()
    finally:
        caller.world.close()


def test_engines_side_by_side(tmp_path: Path) -> None:
    """They save, load and throw one another's blocks out, while the node copies to host memory: whatever is
    had is what it should be (``Engine.load``), and in the end nothing is held."""
    world = World(tmp_path)
    engines = [world.engine, *(Engine(world.node.node.address, str(number)) for number in range(2))]

    def work(number: int) -> int:
        choices, loaded = random.Random(number), 0
        for _ in range(TURNS):
            path = engines[number].path(choices.randint(1, HBM_BLOCKS // 2), choices.randrange(4))
            if choices.random() < 0.4:
                engines[number].save(path)
            else:
                count, failed = engines[number].load(path)
                loaded += count - len(failed)
        return loaded

    with ThreadPoolExecutor(len(engines)) as pool:
        assert all(pool.map(work, range(len(engines))))
    world.eventually(lambda: not world.demoter().is_busy)
    held = ("hbm_leases", "hbm_reservations", "leases", "reservations")
    world.eventually(lambda: not any(world.stats()[name] for name in held))
    stats = world.stats()
    assert stats.get("hbm_rejected_blocks:reader", 0) == 0
    assert stats.get("hbm_rejected_blocks:checksum", 0) == 0
    world.check()
    for engine in engines[1:]:
        engine.close()
    world.close()
