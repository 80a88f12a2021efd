"""What is called durable has been synced: not what came while the drives were, nor what was only found."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvcache.tiers.nvme import Device
from kvcache.tiers.nvme_format import Entry
from tests.kvcache.tiers.stack_rig import PATIENCE_S, Rig, path_of

KEYS = path_of(1, 2, 3)

pytestmark = pytest.mark.slow


def test_what_is_written_while_drives_are_synced_is_not_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)

    async def saved_meanwhile() -> None:
        rig.save(KEYS)
        async with asyncio.timeout(PATIENCE_S):
            while rig.stack.ledger.match(KEYS) < len(KEYS):
                await asyncio.sleep(0)

    async def play() -> None:
        await rig.start()
        monkeypatch.setattr(rig.stack.drives[-1], "sync", saved_meanwhile)
        assert await rig.persist(KEYS) == 0
        monkeypatch.undo()
        assert await rig.persist(KEYS) == len(KEYS)
        await rig.close()

    asyncio.run(play())


def test_what_was_found_at_the_start_is_synced_before_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that was killed may have committed it and never synced."""
    rig = Rig(tmp_path, drives=1)
    synced: list[Path] = []
    write = Device.write

    def noted(
        device: Device, puts: Sequence[tuple[Entry, memoryview]], deletes: Sequence[int], *, durable: bool
    ) -> list[Entry]:
        if durable:
            synced.append(device.path)
        return write(device, puts, deletes, durable=durable)

    async def play() -> None:
        await rig.start()
        rig.save(KEYS)
        assert await rig.persist(KEYS) == len(KEYS)
        await rig.close()
        await rig.start()
        monkeypatch.setattr(Device, "write", noted)
        assert await rig.persist(KEYS) == len(KEYS)
        assert await rig.persist(KEYS) == len(KEYS)
        assert synced == rig.paths, "once is enough"
        await rig.close()

    asyncio.run(play())
