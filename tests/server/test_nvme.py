"""A node with an NVMe tier: what outlives it, what comes back from disk, and what a bad disk costs."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.block import hints
from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.errors import BadInput
from kvcache.tiers.nvme import BlockFault, Device, DeviceFault
from kvcache.tiers.nvme_format import SLOT_HEADER_BYTES, _json_guard
from kvcache.tiers.nvme_slots import Held
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.peer_world import NEVER_LATE, WAIT_MS
from tests.server.talk import HASHES, SIZE, connected, content, deadline, held, lease, opened, save, stats

pytestmark = pytest.mark.slow

HOST_BLOCKS, PATIENCE_S = 32, 20


class Here:
    """One node, its NVMe directory, and a connection without a map."""

    def __init__(self, serve: Serve, tmp_path: Path) -> None:
        self._serve = serve
        self.tier = tmp_path / "tier"
        self.settings: dict[str, object] = {}
        self.node: EmbeddedNode
        self.channel: BlockingChannel
        self.namespace = b""
        self._turn = 0

    def start(self, **settings: object) -> None:
        """A node of this directory; the second time a new one, after the first was closed."""
        self.settings |= settings
        plain: dict[str, object] = NEVER_LATE | {
            "capacity": "1MiB",
            "nvme": f"{self.tier}:16MiB",
            "nvme_segment": "1MiB",
            "nvme_scrub_share": 0.0,
        }
        self.node = self._serve(**{**plain, **self.settings})
        self.open()

    def open(self) -> None:
        self._manager = connected(self.node.node.address)
        self.channel = self._manager.__enter__()
        self.namespace = opened(self.channel)

    def restart(self, **settings: object) -> None:
        self._manager.__exit__(None, None, None)
        self.node.run(self.node.node.close())
        self.start(**settings)

    def persist(self, blocks: list[bytes], wait_ms: int = WAIT_MS) -> int:
        reply = self.channel.call(wire.Persist(self.namespace, b"".join(blocks), wait_ms), deadline())
        assert isinstance(reply, wire.Matched)
        return reply.count

    def lease(self, blocks: list[bytes], wait_ms: int = WAIT_MS, prefill_tokens_s: int = 0) -> wire.Leased:
        request = wire.TakeLease(
            self.namespace, b"".join(blocks), wait_ms=wait_ms, prefill_tokens_s=prefill_tokens_s
        )
        reply = self.channel.call(request, deadline())
        assert isinstance(reply, wire.Leased)
        return reply

    def load(self, blocks: list[bytes], wait_ms: int = WAIT_MS) -> int:
        """Lease, read, compare, release: how many were there."""
        leased = self.lease(blocks, wait_ms)
        if leased.count:
            memory = [memoryview(bytearray(SIZE)) for _ in range(leased.count)]
            self.channel.call(wire.Read(leased.lease, 0, leased.count), deadline(), into=memory)
            self.channel.call(wire.Release(leased.lease), deadline())
            assert [bytes(view) for view in memory] == [content(block) for block in blocks[: leased.count]]
        return leased.count

    def stats(self) -> dict[str, float]:
        return stats(self.channel)

    def troubles(self) -> list[str]:
        reply = self.channel.call(wire.Stats(), deadline())
        assert isinstance(reply, wire.StatsReply)
        return reply.troubles

    def forget_in_memory(self) -> None:
        """Fill the host tier with other blocks, so that what was there before is only on NVMe."""
        self._turn += 1
        others = [bytes([0xE0 + self._turn, at]) * 8 for at in range(HOST_BLOCKS)]
        assert save(self.channel, self.namespace, others) == HOST_BLOCKS

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Ask the node again and again: each question lets its loop go on."""
        end_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
        while not condition():
            assert SystemClock().now_ns() < end_ns, f"never: {what}"

    def until_healed(self) -> None:
        self.until(lambda: self.troubles() == [], "the device works again")


@pytest.fixture
def here(serve: Serve, tmp_path: Path) -> Here:
    return Here(serve, tmp_path)


@pytest.fixture
def started(here: Here) -> Here:
    here.start()
    return here


class TestWhatOutlivesTheNode:
    def test_durable_blocks_are_served_by_the_next_node(self, started: Here) -> None:
        assert save(started.channel, started.namespace, HASHES[:8]) == 8
        assert started.persist(HASHES[:8]) == 8
        started.restart()
        assert started.stats()["nvme_restored_blocks"] == 8
        assert held(started.channel, started.namespace, HASHES[:10]) == 8
        assert started.load(HASHES[:10]) == 8
        assert started.stats()["nvme_read_blocks"] == 8

    def test_written_through_without_being_asked(self, started: Here) -> None:
        save(started.channel, started.namespace, HASHES[:8])
        started.until(lambda: started.stats().get("nvme_written_blocks", 0) == 8, "all were written")
        started.restart()
        assert started.load(HASHES[:8]) == 8

    def test_a_namespace_is_known_before_anybody_opens_it(self, started: Here) -> None:
        save(started.channel, started.namespace, HASHES[:8])
        started.persist(HASHES[:8])
        started.restart()
        with connected(started.node.node.address) as watcher:
            names = watcher.call(wire.Watch(), deadline())
            assert isinstance(names, wire.EventBatch)
        assert [namespace["model"] for namespace in names.namespaces] == ["m"]
        telling = started.node.node.core.telling
        pages = started.node.call(lambda: list(telling.watch(0, lambda told: None, 0, 0)))
        told = [(event.tier, event.hashes) for page in pages for event in page.batch.events]
        assert told == [("nvme", hints(HASHES[:8]))]

    def test_another_node_on_the_same_directory_is_refused(self, started: Here, serve: Serve) -> None:
        with pytest.raises(BadInput, match="tier") as caught:
            serve(
                socket=str(started.tier.parent / "other.sock"),
                nvme=f"{started.tier}:16MiB",
                nvme_segment="1MiB",
            )
        assert caught.value.code == "address_in_use"

    def test_without_an_nvme_tier_nothing_is_durable(self, here: Here) -> None:
        here.start(nvme="none")
        save(here.channel, here.namespace, HASHES[:8])
        assert here.persist(HASHES[:8]) == 0
        assert here.troubles() == []


class TestComingBackFromDisk:
    def test_what_memory_let_go_is_read_again(self, started: Here) -> None:
        save(started.channel, started.namespace, HASHES[:8])
        started.persist(HASHES[:8])
        started.forget_in_memory()
        assert started.load(HASHES[:8]) == 8

    def test_who_does_not_wait_is_told_what_is_coming(self, started: Here) -> None:
        save(started.channel, started.namespace, HASHES[:8])
        started.persist(HASHES[:8])
        started.forget_in_memory()
        first = started.lease(HASHES[:8], wait_ms=0)
        assert (first.count, first.coming) == (0, 8)
        started.until(lambda: started.lease(HASHES[:8], wait_ms=0).count == 8, "they came")

    def test_match_starts_the_reading(self, started: Here) -> None:
        save(started.channel, started.namespace, HASHES[:8])
        started.persist(HASHES[:8])
        started.forget_in_memory()
        assert held(started.channel, started.namespace, HASHES[:8]) == 8
        started.until(lambda: started.stats().get("nvme_read_blocks", 0) == 8, "they were read")
        assert lease(started.channel, started.namespace, HASHES[:8]).count == 8

    def test_one_read_however_many_ask(self, started: Here) -> None:
        save(started.channel, started.namespace, HASHES[:8])
        started.persist(HASHES[:8])
        started.forget_in_memory()
        for _ in range(10):
            started.lease(HASHES[:8], wait_ms=0)
        started.load(HASHES[:8])
        assert started.stats()["nvme_read_blocks"] == 8

    def test_a_load_slower_than_computing_is_a_miss(self, started: Here) -> None:
        save(started.channel, started.namespace, HASHES[:8])
        started.persist(HASHES[:8])
        started.forget_in_memory()
        stack = started.node.node.core.stack
        assert stack is not None
        for _ in range(20):
            stack.drives[0].rate.add(SIZE, 1_000_000_000)  # One block a second.
        assert started.lease(HASHES[:8], prefill_tokens_s=1_000).count == 0
        assert started.stats()["nvme_declined_loads"] == 1
        assert started.load(HASHES[:8]) == 8, "who does not say how fast he computes gets them"

    def test_more_than_memory_holds(self, started: Here) -> None:
        prompts = [[bytes([turn + 1, number + 1]) * 8 for number in range(24)] for turn in range(4)]
        for prompt in prompts:
            assert save(started.channel, started.namespace, prompt) == 24
            assert started.persist(prompt) == 24
        for prompt in prompts * 3:
            assert started.load(prompt) == 24
        assert started.stats()["nvme_read_blocks"] > 2 * 24


class TestWhatIsWritten:
    def test_only_what_was_wanted_twice(self, here: Here) -> None:
        here.start(nvme_admission="touched>=2", nvme_write_rate="500MB")
        save(here.channel, here.namespace, HASHES[:8])
        assert here.stats()["nvme_skipped_blocks:admission"] == 8
        assert lease(here.channel, here.namespace, HASHES[:4]).count == 4
        here.until(
            lambda: here.stats().get("nvme_written_blocks", 0) == 4, "what was wanted again is written"
        )
        assert here.persist(HASHES[:8]) == 8, "who asks for it passes the filter by"

    def test_back_writes_only_what_lives_long_enough(self, here: Here) -> None:
        here.start(nvme_write="back", nvme_back_ms=86_400_000)
        save(here.channel, here.namespace, HASHES[:8])
        here.forget_in_memory()
        assert here.stats().get("nvme_written_blocks", 0) == 0
        assert here.persist([bytes([0xE1, number]) * 8 for number in range(4)]) == 4

    def test_evict_writes_what_would_go_next(self, here: Here) -> None:
        here.start(nvme_write="evict")
        save(here.channel, here.namespace, HASHES[:4])
        here.until(lambda: here.stats().get("nvme_written_blocks", 0) == 4, "cold blocks are written")

    def test_not_more_than_the_daily_budget(self, here: Here) -> None:
        here.start(nvme_writes_a_day=4 * (SIZE + SLOT_HEADER_BYTES) / (16 << 20))
        save(here.channel, here.namespace, HASHES[:8])
        assert here.persist(HASHES[:8]) == 4
        assert here.stats()["nvme_skipped_blocks:budget"] > 0
        (trouble,) = here.troubles()
        assert "daily write budget" in trouble
        here.restart()
        assert here.persist(HASHES[:8]) == 4, "a restart gives no new budget"

    def test_a_tier_that_is_full_lets_leaves_go(self, here: Here) -> None:
        here.start(nvme=f"{here.tier}:2MiB")
        for turn in range(4):
            chain = [bytes([turn + 1, number + 1]) * 8 for number in range(20)]
            save(here.channel, here.namespace, chain)
            assert here.persist(chain) == 20
        values = here.stats()
        assert values["nvme_removed_blocks:evicted"] + values.get("nvme_removed_blocks:reclaimed", 0) > 0
        assert values["used_bytes:nvme"] <= values["capacity_bytes:nvme"] == 2 << 20


class TestABadDisk:
    def save_and_forget(self, here: Here) -> None:
        save(here.channel, here.namespace, HASHES[:8])
        assert here.persist(HASHES[:8]) == 8
        here.forget_in_memory()

    def test_a_flipped_byte_is_a_miss_and_is_written_again(self, started: Here) -> None:
        self.save_and_forget(started)
        segment = next((started.tier / "segments").glob("*.seg"))
        with segment.open("r+b") as file:
            data = bytearray(file.read())
            at = data.index(content(HASHES[3]))
            file.seek(at + 100)
            file.write(b"\xff")
        assert started.load(HASHES[:8]) == 3
        assert started.stats()["nvme_rejected_blocks:checksum"] == 1
        save(started.channel, started.namespace, HASHES[3:8], HASHES[2])
        assert started.persist(HASHES[:8]) == 8
        started.forget_in_memory()
        assert started.load(HASHES[:8]) == 8

    def test_an_io_error_fences_the_device_and_memory_serves_on(
        self, started: Here, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.save_and_forget(started)

        def fails(*_: object, **__: object) -> bytes:
            raise DeviceFault(errno.EIO, "reading failed: Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(Device, "_read_run", fails)
            broken.setattr(Device, "probe", fails)
            assert started.load(HASHES[:8]) == 0
            (trouble,) = started.troubles()
            assert "is not used" in trouble and "Input/output error" in trouble
            assert started.stats()["nvme_devices:fenced"] == 1
            started.until(lambda: started.stats()["blocks:nvme"] == 0, "its blocks have left")
            assert save(started.channel, started.namespace, HASHES[8:16]) == 8
            assert started.load(HASHES[8:16]) == 8
            assert started.persist(HASHES[8:16]) == 0
        started.until_healed()
        assert started.load(HASHES[:8]) == 8

    def test_one_bad_sector_costs_one_block(self, started: Here, monkeypatch: pytest.MonkeyPatch) -> None:
        self.save_and_forget(started)
        read = Device._read_run

        def bad_at(device: Device, run: Sequence[Held]) -> list[bytes | BlockFault]:
            if any(expected.key.endswith(HASHES[3]) for expected, _ in run):
                raise DeviceFault(errno.EIO, "reading failed: Input/output error")
            return read(device, run)

        monkeypatch.setattr(Device, "_read_run", bad_at)
        assert started.load(HASHES[:8]) == 3
        assert started.stats()["nvme_rejected_blocks:unreadable"] == 1
        assert started.troubles() == []
        assert started.load(HASHES[:3]) == 3

    def test_no_space_stops_the_writes_only(self, started: Here, monkeypatch: pytest.MonkeyPatch) -> None:
        self.save_and_forget(started)

        def full(*_: object, **__: object) -> list[object]:
            raise DeviceFault(errno.ENOSPC, "making a segment: No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(Device, "write", full)
            broken.setattr(Device, "probe", full)
            save(started.channel, started.namespace, HASHES[8:16])
            assert started.persist(HASHES[8:16]) == 0
            (trouble,) = started.troubles()
            assert "takes no new blocks: the file system is full" in trouble
            assert started.load(HASHES[:8]) == 8
        started.until_healed()
        assert started.persist(HASHES[8:16]) == 8

    def test_a_slow_read_is_a_miss_at_the_deadline(
        self, started: Here, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.save_and_forget(started)
        go_on = threading.Event()
        read = Device._read_run

        def slow(device: Device, run: Sequence[Held]) -> list[bytes | BlockFault]:
            assert go_on.wait(30)
            return read(device, run)

        monkeypatch.setattr(Device, "_read_run", slow)
        leased = started.lease(HASHES[:8], wait_ms=20)
        assert (leased.count, leased.coming) == (0, 8)
        assert started.stats()["nvme_late_loads"] == 1
        go_on.set()
        assert started.load(HASHES[:8]) == 8

    def test_another_format_is_not_touched(self, here: Here) -> None:
        here.start()
        save(here.channel, here.namespace, HASHES[:8])
        assert here.persist(HASHES[:8]) == 8
        file = here.tier / "tier.json"
        newer = newer_superblock(file.read_bytes())
        file.write_bytes(newer)
        here.restart()
        (trouble,) = here.troubles()
        assert "is not used" in trouble and "use the newer kvcache" in trouble
        assert here.load(HASHES[:8]) == 0
        save(here.channel, here.namespace, HASHES[:8])
        assert here.load(HASHES[:8]) == 8
        assert file.read_bytes() == newer


def newer_superblock(text: bytes) -> bytes:
    fields = json.loads(text)
    del fields["checksum"]
    fields["version"] += 1
    return json.dumps({**fields, "checksum": _json_guard(fields)}).encode()


def test_scrub_finds_what_nobody_read(started: Here) -> None:
    save(started.channel, started.namespace, HASHES[:8])
    started.persist(HASHES[:8])
    segment = next((started.tier / "segments").glob("*.seg"))
    with segment.open("r+b") as file:
        data = bytearray(file.read())
        file.seek(data.index(content(HASHES[5])) + 7)
        file.write(b"\xff")
    assert started.channel.call(wire.Scrub(), deadline()) == wire.Done()
    started.until(lambda: started.stats()["scrub_passes"] == 1, "the pass is over")
    values = started.stats()
    assert (values["scrubbed_blocks"], values["scrub_bad_blocks"]) == (6, 1), "what it breaks off is gone"
    started.forget_in_memory()
    assert started.load(HASHES[:8]) == 5


def test_without_an_nvme_tier_there_is_nothing_to_scrub(here: Here) -> None:
    here.start(nvme="none")
    with pytest.raises(BadInput, match="no NVMe tier"):
        here.channel.call(wire.Scrub(), deadline())
