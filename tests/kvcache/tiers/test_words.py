"""What operators are told of a drive: enough, once, and no flood."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from kvcache.testing.clock import FakeClock
from kvcache.tiers import stack as stack_module
from kvcache.tiers.drive import Drive
from kvcache.tiers.nvme import BlockFault, Device, DeviceFault
from kvcache.tiers.words import Teller, words
from tests.kvcache.tiers.nvme_entries import entry_of
from tests.kvcache.tiers.stack_rig import PROBE_S, Faults, Rig, path_of

SEGMENT = 1 << 20


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "kvcache.nvme")
    return caplog


def test_a_thousand_bad_blocks_are_a_line_a_minute(log: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    teller = Teller(Path("/mnt/a"), SEGMENT, clock)
    for _ in range(1_000):
        teller.bad_block(entry_of(1)._replace(offset=3 * SEGMENT + 8_192), BlockFault("checksum"))
        clock.advance_ms(100)
    assert len(log.messages) == 2
    assert all(each in log.messages[0] for each in ("/mnt/a", "checksum, segment 3, byte 8192", "; 1 since"))
    assert "; 601 since the start" in log.messages[1]


def test_progress_is_told_only_of_what_takes_long(log: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    teller = Teller(Path("/mnt/a"), SEGMENT, clock)
    for _ in range(2):
        teller.opening()
        for done in range(48):
            teller.progress("reading slot headers", done, 48)
            clock.advance_ms(100)
    assert log.messages == []
    for done in range(48):
        teller.progress("reading slot headers", done, 48)
        clock.advance_ms(100)
    assert log.messages == ["/mnt/a: reading slot headers: 2 of 48"]


def test_what_helps_is_said_where_it_is_known() -> None:
    assert words(DeviceFault(errno.ENOENT, "opening")).startswith("opening; see that the device is mounted")
    assert words(DeviceFault(errno.EUCLEAN, "opening")) == "opening"


class Pauses:
    """Those that the stack makes between two tries of a drive. While there is a ``drive`` each lasts until it
    is fenced again, so that a slow machine makes the same ones."""

    def __init__(self) -> None:
        self.made: list[float] = []
        self.drive: Drive | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(asyncio, name)

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
        if PROBE_S <= duration_s < 1:  # The scrubber's are longer.
            self.made.append(duration_s)
            while self.drive is not None and self.drive.state == "ok":
                await asyncio.sleep(PROBE_S)


@pytest.mark.slow
def test_a_drive_that_works_only_when_it_is_tried_is_tried_ever_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise DeviceFault(errno.EIO, "writing")

    Faults(monkeypatch)
    pauses = Pauses()
    monkeypatch.setattr(stack_module, "asyncio", pauses)

    async def play() -> None:
        rig = Rig(tmp_path, drives=1)
        await rig.start()
        (drive,) = rig.stack.drives
        pauses.drive = drive
        with monkeypatch.context() as broken:
            broken.setattr(Device, "write", fails)
            for turn in range(7):
                await rig.until(lambda: drive.state == "ok")
                rig.save(path_of(100 + turn))
                await rig.until(lambda turn=turn: drive.fences == turn + 1)  # type: ignore[misc]
        pauses.drive = None
        await rig.healed()
        assert await rig.persist(path_of(106)) == 1
        await rig.close()

    asyncio.run(play())
    assert pauses.made[:7] == [PROBE_S * times for times in (1, 1, 2, 4, 8, 8, 8)]


@pytest.mark.slow
def test_a_new_reason_is_told_and_the_old_one_is_not_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    faults = Faults(monkeypatch)

    async def play() -> None:
        rig = Rig(tmp_path, drives=1)
        await rig.start()
        (drive,) = rig.stack.drives
        faults.broken[drive.place.path] = errno.EIO
        drive.fence("it smells")
        await rig.until(lambda: "probe failed" in drive.trouble)
        for _ in range(10):
            drive.still(DeviceFault(errno.EIO, "probe failed"))
        drive.still(DeviceFault(errno.ENODEV, "another directory"))
        assert "restart the node to use this one" in drive.trouble
        faults.broken.clear()
        await rig.healed()
        await rig.close()

    asyncio.run(play())
    told = [each for each in log.messages if "still not used" in each]
    assert [each.rpartition(": ")[2] for each in told] == [
        "probe failed; look at the system's log",
        "another directory; mount the one that it was, or restart the node to use this one",
    ]


@pytest.mark.slow
def test_a_drive_tells_of_bad_blocks_by_itself(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        rig = Rig(tmp_path, drives=1)
        await rig.start()
        keys = path_of(1, 2, 3)
        rig.save(keys)
        assert await rig.persist(keys) == 3
        rig.forget_in_memory()
        for file in (rig.paths[0] / "segments").iterdir():
            data = bytearray(file.read_bytes())
            data[data.index(bytes(keys[1][16:]) * 8)] ^= 1
            file.write_bytes(data)
        assert await rig.load(keys) == 1
        await rig.close()

    asyncio.run(play())
    assert [each for each in log.messages if "not as it was written (checksum, segment 0" in each]
