"""A stack with two real devices under anything at all, in any order: no wrong byte, nothing stuck."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from pathlib import Path

import pytest

from kvcache.block import StorageKey
from kvcache.tiers.demote import Rules
from tests.kvcache.tiers.stack_rig import ME, Faults, Rig, path_of

FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))
STEPS = 150
CHAINS = 6
CHAIN_BLOCKS = 60
ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.ENODEV)


class Caller:
    """One run. What goes on beside a step goes on over the next ones."""

    def __init__(self, rig: Rig, faults: Faults, seed: int) -> None:
        self.rig = rig
        self.faults = faults
        self.random = random.Random(seed)
        self.beside: set[asyncio.Task[int]] = set()
        self.served = 0
        self.restarts = 0

    def some_path(self) -> list[StorageKey]:
        chain = self.random.randrange(CHAINS)
        fork = self.random.choice((10, 25, CHAIN_BLOCKS))
        branch = self.random.randrange(2)
        numbers = [chain, *(at + 100 * branch * (at > fork) for at in range(1, CHAIN_BLOCKS))]
        return path_of(*numbers[: self.random.randint(1, CHAIN_BLOCKS)])

    async def step(self) -> None:
        steps = (
            (self.save, 8),
            (self.load, 8),
            (self.load_beside, 4),
            (self.persist, 3),
            (self.persist_beside, 3),
            (self.ask, 3),
            (self.forget, 4),
            (self.tick, 3),
            (self.breaks, 2),
            (self.mends, 3),
            (self.flip, 2),
            (self.scrub, 1),
            (self.let_go_on, 4),
            (self.restart, 1),
        )
        (step,) = self.random.choices([each for each, _ in steps], [weight for _, weight in steps])
        await step()
        self.rig.check()

    async def save(self) -> None:
        self.rig.save(self.some_path())

    async def load(self) -> None:
        self.served += await self.rig.load(self.some_path())

    async def load_beside(self) -> None:
        self.beside.add(asyncio.create_task(self.rig.load(self.some_path())))

    async def persist(self) -> None:
        path = self.some_path()
        assert await self.rig.persist(path) <= len(path)

    async def persist_beside(self) -> None:
        self.beside.add(asyncio.create_task(self.rig.persist(self.some_path())))

    async def ask(self) -> None:
        self.rig.ask(self.some_path())

    async def forget(self) -> None:
        self.rig.forget_in_memory()

    async def tick(self) -> None:
        self.rig.stack.tick()

    async def breaks(self) -> None:
        self.faults.broken[self.random.choice(self.rig.paths)] = self.random.choice(ERRORS)

    async def mends(self) -> None:
        self.faults.broken.clear()
        if self.random.random() < 0.5:
            await self.rig.healed()

    async def flip(self) -> None:
        files = sorted(self.random.choice(self.rig.paths).glob("segments/*.seg"))
        if not files:
            return
        with self.random.choice(files).open("r+b") as file:
            for _ in range(3):
                file.seek(self.random.randrange(os.fstat(file.fileno()).st_size))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1 << self.random.randrange(8)]))

    async def scrub(self) -> None:
        self.rig.stack.scrub()

    async def let_go_on(self) -> None:
        for _ in range(self.random.randrange(20)):
            await asyncio.sleep(0.0005)

    async def restart(self) -> None:
        await self.end_beside(cancel=self.random.random() < 0.5)
        await self.rig.close()
        self.faults.broken.clear()
        await self.rig.start()
        self.restarts += 1

    async def end_beside(self, *, cancel: bool) -> None:
        for task in self.beside:
            if cancel:
                task.cancel()
        for result in await asyncio.gather(*self.beside, return_exceptions=True):
            assert isinstance(result, int | asyncio.CancelledError), result
        self.beside.clear()

    async def finish(self) -> None:
        """Nothing is stuck: once all is well, what is saved can be made durable, and outlives the node."""
        await self.end_beside(cancel=False)
        self.faults.broken.clear()
        await self.rig.healed()
        last = path_of(*range(200, 220))
        assert self.rig.save(last) == 20
        assert await self.rig.persist(last) == 20
        await self.rig.until(lambda: not self.rig.stack.stats()["nvme_wanted_blocks"])
        self.rig.check()
        await self.rig.close()
        await self.rig.start()
        assert await self.rig.load(last) == 20
        self.rig.check()
        held = self.rig.host.stats()
        assert held["reservations"] == held["leases"] == 0, ME
        await self.rig.close()


POLICIES = (
    Rules("through", "all", 0),
    Rules("back", "second-touch", 2_000_000),
    Rules("evict", "all", 0),
    Rules("through", "branch-reused", 0),
    Rules("back", "hazard", 2_000_000),
    Rules("evict", "hazard", 0, bytes_s=4 << 20),
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6 * FACTOR))
def test_anything_in_any_order(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        rig = Rig(tmp_path)
        rig.rules = POLICIES[seed % len(POLICIES)]
        rig.nvme_bytes = (2 << 20) << seed % 3
        caller = Caller(rig, Faults(monkeypatch), seed)
        await rig.start()
        for _ in range(STEPS):
            await caller.step()
        await caller.finish()
        assert caller.served

    asyncio.run(run())
