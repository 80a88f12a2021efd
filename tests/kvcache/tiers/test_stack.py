"""Two drives, their faults and what they hold, one situation a test."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvcache import leases
from kvcache.tiers import demote
from kvcache.tiers.admission import WriteRate
from kvcache.tiers.demote import Rules
from kvcache.tiers.drive import RATE_NS_MAX, READERS
from kvcache.tiers.nvme import Device, DeviceFault
from kvcache.tiers.nvme_format import stride_of
from kvcache.tiers.promote import IN_FLIGHT_PARTS
from tests.kvcache.tiers.stack_rig import PATIENCE_S, READ, SIZE, Faults, Rig, path_of

TURNS = path_of(*range(1, 31))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def played(rig: Rig, play: Callable[[], Awaitable[None]]) -> None:
    """Between a start and a close."""

    async def run() -> None:
        await rig.start()
        await play()
        rig.check()
        await rig.close()

    asyncio.run(run())


async def save_over_both(rig: Rig) -> None:
    """Ten blocks on each drive in turn: a path that changes drives twice."""
    for turn in range(3):
        here, other = rig.stack.drives[turn % 2], rig.stack.drives[1 - turn % 2]
        here.state, other.state = "ok", "read_only"
        assert rig.save(TURNS[: 10 * turn + 10]) == 10 * turn + 10
        assert await rig.persist(TURNS) == 10 * turn + 10
    assert all(drive.entries for drive in rig.stack.drives)


class Slow:
    """Makes a call of devices wait until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, path: Path) -> None:
        self.go_on = threading.Event()
        self.began = 0
        real = getattr(Device, name)

        def call(device: object, *args: object, **named: object) -> object:
            if path in (getattr(device, "path", None), device):
                self.began += 1
                assert self.go_on.wait(PATIENCE_S)
            return real(device, *args, **named)

        if name == "open":
            call_it = call
            monkeypatch.setattr(Device, "open", staticmethod(lambda *args, **named: call_it(*args, **named)))
        else:
            monkeypatch.setattr(Device, name, call)


@pytest.mark.slow
class TestPathsOverTwoDrives:
    @pytest.mark.parametrize("late", [0, 1])
    def test_whichever_is_read_last(self, rig: Rig, late: int, monkeypatch: pytest.MonkeyPatch) -> None:
        played(rig, lambda: save_over_both(rig))

        async def run() -> None:
            with monkeypatch.context() as patch:
                slow = Slow(patch, "open", rig.paths[late])
                starting = asyncio.create_task(rig.start())
                await asyncio.sleep(0)
                early = rig.stack.drives[1 - late]
                async with asyncio.timeout(PATIENCE_S):
                    while not early.readable:
                        await asyncio.sleep(0.001)
                slow.go_on.set()
                await starting
            assert await rig.load(TURNS) == 30
            rig.check()
            await rig.close()

        asyncio.run(run())

    @pytest.mark.parametrize("lost", [0, 1])
    def test_one_is_fenced_and_comes_back(self, rig: Rig, lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
        faults = Faults(monkeypatch)

        async def play() -> None:
            await save_over_both(rig)
            rig.forget_in_memory()
            faults.broken[rig.paths[lost]] = errno.EIO
            await rig.load(TURNS)
            assert rig.stack.drives[lost].state == "fenced"
            rig.check()
            faults.broken.clear()
            await rig.healed()
            assert await rig.load(TURNS) == 30

        played(rig, play)

    def test_a_drive_goes_on_behind_what_the_other_writes_still(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(demote, "BATCH_BLOCKS_MAX", 5)

        async def play() -> None:
            slow = Slow(monkeypatch, "write", rig.paths[0])
            rig.save(TURNS)
            waiting = asyncio.create_task(rig.persist(TURNS))
            await rig.until(lambda: slow.began > 0 and len(rig.stack.drives[1].entries) >= 10)
            slow.go_on.set()
            assert await waiting == 30

        played(rig, play)

    def test_what_continues_nothing_is_forgotten_once_all_are_read(self, rig: Rig) -> None:
        played(rig, lambda: save_over_both(rig))
        rig.paths = rig.paths[1:]

        async def play() -> None:
            assert rig.stack.drives[0].entries == {}
            assert await rig.load(TURNS) == 0

        played(rig, play)


@pytest.mark.slow
class TestADriveThatIsSlowOrSick:
    def test_a_wish_that_two_drives_took_up_is_ended_once(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def play() -> None:
            rig.stack.drives[1].state = "read_only"
            slow = Slow(monkeypatch, "write", rig.paths[0])
            rig.save(TURNS)
            waiting = asyncio.create_task(rig.persist(TURNS))
            await rig.until(lambda: slow.began > 0)
            rig.stack._demoter.give_up()
            slow.go_on.set()
            assert await waiting == 30

        played(rig, play)

    def test_a_drive_that_is_fenced_while_it_is_probed_stays_so(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def play() -> None:
            drive = rig.stack.drives[0]
            slow = Slow(monkeypatch, "probe", rig.paths[0])
            drive.failed(DeviceFault(errno.ENOSPC, "full"))
            healing = asyncio.create_task(drive.heal())
            await rig.until(lambda: slow.began > 0)
            drive.fence("an I/O error")
            slow.go_on.set()
            assert await healing is None
            assert drive.state == "fenced"
            await rig.healed()

        played(rig, play)

    def test_what_queues_at_a_fenced_drive_holds_no_memory(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvcache.tiers.promote.GROUP_BYTES", SIZE)
        rig.paths = rig.paths[:1]

        async def play() -> None:
            rig.save(TURNS)
            assert await rig.persist(TURNS) == 30
            rig.forget_in_memory()
            slow = Slow(monkeypatch, READ, rig.paths[0])
            rig.ask(TURNS)
            await rig.until(lambda: slow.began == READERS)
            rig.stack.drives[0].fence("it hangs")
            await rig.until(lambda: rig.host.stats()["reservations"] == READERS)
            slow.go_on.set()
            await rig.healed()
            assert await rig.load(TURNS) == 30

        played(rig, play)

    def test_a_rate_that_was_measured_long_ago_is_forgotten(self, rig: Rig) -> None:
        async def play() -> None:
            drive = rig.stack.drives[0]
            for _ in range(20):
                drive.rate.add(1, 10**9)
            drive.tick()
            assert drive.rate.value() is not None
            now_ns = rig.clock.now_ns() + RATE_NS_MAX + 10**9
            rig.clock.now_ns = lambda: now_ns  # type: ignore[method-assign]
            drive.tick()
            assert drive.rate.value() is None

        played(rig, play)

    def test_a_bad_block_takes_no_other_entry_with_it(self, rig: Rig) -> None:
        async def play() -> None:
            rig.stack.drives[1].state = "read_only"
            rig.save(TURNS)
            assert await rig.persist(TURNS) == 30
            drive = rig.stack.drives[0]
            entry = next(iter(drive.entries.values()))
            drive.forget(entry._replace(generation=entry.generation - 1))
            assert drive.entries[entry.offset] is entry
            drive.forget(entry)
            assert entry.offset not in drive.entries
            drive.entries[entry.offset] = entry

        played(rig, play)


@pytest.mark.slow
class TestLimits:
    def test_what_was_spent_counts_once_after_a_fence_and_after_a_restart(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faults = Faults(monkeypatch)
        rig.paths = rig.paths[:1]
        rig.bytes_a_day = 100 * SIZE
        spent = 30 * stride_of(SIZE)

        async def fenced() -> None:
            for end in (10, 20, 30):
                rig.save(TURNS[:end])
                assert await rig.persist(TURNS[:end]) == end
            assert rig.stack.stats()["nvme_budget_spent_bytes"] == spent
            faults.broken[rig.paths[0]] = errno.EIO
            rig.forget_in_memory()
            await rig.load(TURNS)
            faults.broken.clear()
            await rig.healed()
            assert rig.stack.stats()["nvme_budget_spent_bytes"] == spent

        played(rig, fenced)

        async def again() -> None:
            assert rig.stack.stats()["nvme_budget_spent_bytes"] == spent

        played(rig, again)

    def test_a_budget_too_short_for_a_block_is_told(self, rig: Rig) -> None:
        rig.paths = rig.paths[:1]
        rig.bytes_a_day = SIZE

        async def play() -> None:
            rig.save(TURNS)
            assert await rig.persist(TURNS) == 0
            (trouble,) = rig.stack.troubles()
            assert "daily write budget" in trouble

        played(rig, play)

    def test_a_conversation_that_came_back_is_written_whole(self, rig: Rig) -> None:
        rig.rules = Rules("through", "branch-reused", 0)

        async def play() -> None:
            rig.save(TURNS[:8])
            assert rig.counters["nvme_skipped_blocks:admission"] == 8
            assert await rig.load(TURNS[:8]) == 8
            rig.save(TURNS[:12])
            await rig.until(lambda: rig.counters["nvme_written_blocks"] == 12)

        played(rig, play)

    def test_what_the_rate_has_no_room_for_waits_and_is_written(self, rig: Rig) -> None:
        """A minute's worth is saved up, and is less than a block: one may be written, and no other."""
        rig.paths = rig.paths[:1]
        rig.rules = Rules("through", "all", 0, bytes_s=1)

        async def play() -> None:
            rig.save(TURNS)
            await rig.until(lambda: rig.counters["nvme_written_blocks"] == 1)
            rig.stack.tick()
            await asyncio.sleep(0)
            assert rig.counters["nvme_written_blocks"] == 1
            assert rig.stack.stats()["nvme_wanted_blocks"] == 1
            assert not rig.stack.troubles()
            rig.stack._demoter._rate = WriteRate(0, 0)
            rig.stack.tick()
            await rig.until(lambda: rig.counters["nvme_written_blocks"] == len(TURNS))

        played(rig, play)

    def test_an_error_of_the_system_that_nobody_foresaw_fences(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: object, **__: object) -> None:
            raise OSError(errno.EBADMSG, "bad message")

        async def play() -> None:
            rig.save(TURNS)
            with monkeypatch.context() as broken:
                broken.setattr(Device, "write", fails)
                broken.setattr(Device, "probe", fails)
                rig.save(path_of(7, 7))
                await rig.persist(path_of(7, 7))
                assert any("Bad message" in each for each in rig.stack.troubles())
            await rig.healed()
            assert await rig.persist(path_of(7, 7)) == 2

        Faults(monkeypatch)
        played(rig, play)

    def test_no_more_than_a_part_of_memory_is_on_its_way(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path, host_bytes=2 << 20)
        path = path_of(*range(1, 101))

        async def play() -> None:
            for end in range(20, 101, 20):
                rig.save(path[:end])
                assert await rig.persist(path[:end]) == end
            rig.forget_in_memory()
            rig.ask(path)
            assert 0 < rig.stack.stats()["nvme_coming_bytes"] <= rig.host_bytes // IN_FLIGHT_PARTS
            await rig.load(path)
            assert rig.stack.stats()["nvme_coming_bytes"] == 0

        played(rig, play)

    def test_too_many_groups_at_once_are_a_miss(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        async def play() -> None:
            for first in (1, 2):
                rig.save(path_of(first, 5))
                assert await rig.persist(path_of(first, 5)) == 2
            rig.forget_in_memory()
            monkeypatch.setattr(leases, "LEASES_MAX", 1)
            assert rig.ask(path_of(1, 5)) == 2
            assert rig.ask(path_of(2, 5)) == 0

        played(rig, play)

    def test_wishes_that_write_nothing_let_others_have_a_turn(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(demote, "BATCH_BLOCKS_MAX", 1)

        async def play() -> None:
            for number in range(100):
                rig.stack.committed(path_of(9, number))
            wanted = []
            while rig.stack.stats()["nvme_wanted_blocks"]:
                wanted.append(rig.stack.stats()["nvme_wanted_blocks"])
                await asyncio.sleep(0)
            assert len(wanted) > 5

        played(rig, play)

    def test_blocks_of_a_namespace_that_is_lost_are_not_told_of(self, rig: Rig) -> None:
        async def save() -> None:
            rig.save(TURNS)
            assert await rig.persist(TURNS) == 30

        played(rig, save)
        for path in rig.paths:
            for file in (path / "namespaces").glob("*.json"):
                file.write_text("{}")
        rig.known = False

        async def play() -> None:
            assert rig.counters["nvme_unknown_blocks"] == 30
            assert rig.stack.stats()["blocks:nvme"] == 0
            assert rig.ask(TURNS) == 0

        played(rig, play)
        rig.known = True

        async def again() -> None:
            assert await rig.load(TURNS) == 30, "nothing of it was thrown away"

        played(rig, again)
