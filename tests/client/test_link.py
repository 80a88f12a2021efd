"""When to connect again, who still holds a lease, and a map that goes with its last user."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec import structs

from kvcache.client.hbm import Count
from kvcache.client.link import BACKOFF_NS_MAX, BACKOFF_NS_MIN, Link, Options, Outage, Tally, options_for
from kvcache.client.local import Slab
from kvcache.client.steps import BadReply, Call, Post
from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput, Unavailable
from kvcache.wire import PROTOCOL_VERSION, HbmSlab, Persist, Release, Stats, TakeLease, Welcome

PAGE = mmap.PAGESIZE
WELCOME = Welcome(PROTOCOL_VERSION, "node", 1, "default", [], b"", 4 * PAGE)


class Registering:
    """A GPU that registers maps, and has not undone it when it is told to."""

    gpu = b""
    joined = ()
    pins = True
    is_stuck = False

    def __init__(self) -> None:
        self.memory: memoryview | None = None
        self.unit_bytes = self.closed = 0

    def open(self, slab: HbmSlab, descriptor: int) -> None:
        raise AssertionError("it is given none")

    def is_lost(self, incarnation: bytes) -> bool:
        return False

    def pin(self, memory: memoryview, descriptor: int, unit_bytes: int, count: Count) -> Undoing:
        self.memory, self.unit_bytes = memory, unit_bytes
        return Undoing(self)

    def close(self, incarnation: bytes) -> None:
        raise AssertionError("it was given none")


@dataclass
class Undoing:
    gpu: Registering

    def close(self) -> None:
        self.gpu.closed += 1


class TestOutage:
    def test_the_first_try_is_at_once_and_the_pauses_double_to_a_limit(self) -> None:
        outage, now_ns = Outage(), 0
        assert outage.may_try(now_ns)
        pauses = []
        for _ in range(8):
            outage.failed(now_ns)
            pause_ns = BACKOFF_NS_MIN
            while not outage.may_try(now_ns + pause_ns):
                pause_ns *= 2
            assert not outage.may_try(now_ns + pause_ns // 2 - 1)
            pauses.append(min(pause_ns, BACKOFF_NS_MAX))
            now_ns += pause_ns
        assert pauses == [min(BACKOFF_NS_MIN * 2**at, BACKOFF_NS_MAX) for at in range(8)]

    def test_an_answer_starts_over(self) -> None:
        outage = Outage()
        for _ in range(6):
            outage.failed(0)
        outage.answered()
        outage.failed(0)
        assert outage.may_try(BACKOFF_NS_MIN)
        assert not outage.may_try(BACKOFF_NS_MIN - 1)


class TestDeadlines:
    def test_a_call_has_its_timeout_and_the_wait_it_asked_for(self) -> None:
        link, options = Link(1, WELCOME, None), Options("tcp://h:1", timeout_ms=100)
        assert link.deadline_ns(options, 0, Call(Stats())) == 100 * NS_PER_MS
        assert link.deadline_ns(options, 0, Call(TakeLease(b"", b"", wait_ms=50))) == 150 * NS_PER_MS

    def test_behind_a_wait_time_counts_from_its_end(self) -> None:
        link, options = Link(1, WELCOME, None), Options("tcp://h:1", timeout_ms=100)
        link.deadline_ns(options, 0, Call(Persist(b"", b"", wait_ms=50)))
        for now_ms, deadline_ms in ((0, 150), (40, 150), (60, 160)):
            deadline_ns = link.deadline_ns(options, now_ms * NS_PER_MS, Post(Release(1)))
            assert deadline_ns == deadline_ms * NS_PER_MS

    def test_waits_that_follow_one_another_do_not_add_up(self) -> None:
        """Else many short ones, soon over, would leave a dead node undetected for their sum."""
        link, options = Link(1, WELCOME, None), Options("tcp://h:1", timeout_ms=100)
        for _ in range(1_000):
            link.deadline_ns(options, 0, Call(TakeLease(b"", b"", wait_ms=50)))
        assert link.deadline_ns(options, 0, Call(Stats())) == 150 * NS_PER_MS


SEVEN = ("host", 7)


class TestHolders:
    def test_the_last_holder_reports_what_all_found(self) -> None:
        link = Link(1, WELCOME, None)
        link.hold(SEVEN)
        link.hold(SEVEN)
        link.blame(SEVEN, [3])
        assert link.let_go(SEVEN) is None
        assert link.holds(SEVEN)
        link.blame(SEVEN, [1, 3])
        assert link.let_go(SEVEN) == [1, 3]
        assert not link.holds(SEVEN)
        assert link.let_go(SEVEN) is None, "released already"
        assert link.let_go(("hbm", 7)) is None, "never held"
        link.hold(SEVEN)
        assert link.let_go(SEVEN) == []


class TestOptions:
    def test_the_deadline_grows_with_the_bytes_on_the_wire(self) -> None:
        options = Options("unix:///a.sock", timeout_ms=5)
        assert options.deadline_ns(100) == 100 + 5 * NS_PER_MS
        call = Call(Stats(), [memoryview(bytes(1_000))], [memoryview(bytes(500))])
        assert options.deadline_ns(100, call.payload_bytes) == 100 + 5 * NS_PER_MS + 15_000

    def test_a_map_is_wanted_on_unix_sockets_only(self) -> None:
        assert Options("unix:///a.sock").hello("me", again=False).map
        assert not Options("unix:///a.sock", mapped=False).hello("me", again=False).map
        assert not Options("tcp://localhost:1").hello("me", again=False).map

    def test_the_token_stays_out_of_logs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVCACHE_TOKEN", "secret")
        options = options_for("/a.sock", None, 10, True, "")
        assert options.token == "secret"
        assert "secret" not in repr(options)
        assert options_for("/a.sock", "", 10, True, "").token == ""

    @pytest.mark.parametrize(("address", "timeout_ms"), [("nowhere", 10), ("/a.sock", 0)])
    def test_what_cannot_work_is_refused_at_once(self, address: str, timeout_ms: int) -> None:
        with pytest.raises(BadInput):
            options_for(address, "", timeout_ms, True, "")


def test_the_tally_counts_what_happened() -> None:
    tally = Tally()
    tally.add("a")
    tally.add("a", 4)
    tally.add("b", 0)
    assert tally.copy() == {"a": 5}


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4 * PAGE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    yield descriptor
    os.close(descriptor)


def mapped_here(descriptor: int) -> bool:
    inode = os.fstat(descriptor).st_ino
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(line.split()[4] == str(inode) and "memfd:slab" in line for line in lines)


class TestSlab:
    def test_slots_are_cut_like_the_blocks(self, memory: int) -> None:
        slab = Slab(memory, 4 * PAGE)
        shapes = [[memoryview(bytes(100)), memoryview(bytes(28))], [memoryview(bytes(128))]]
        cut = slab.pieces([0, PAGE], shapes, 128)
        assert [len(piece) for piece in cut] == [100, 28, 128]
        cut[1][0] = 9
        cut[2][0] = 8
        assert os.pread(memory, 1, 100) == b"\x09"
        assert os.pread(memory, 1, PAGE) == b"\x08"
        del cut
        slab.close()

    @pytest.mark.parametrize("offset", [-1, 4 * PAGE - 127, 1 << 50])
    def test_a_slot_outside_is_refused(self, memory: int, offset: int) -> None:
        slab = Slab(memory, 4 * PAGE)
        with pytest.raises(BadReply):
            slab.pieces([offset], [[memoryview(bytes(128))]], 128)
        slab.close()

    def test_the_last_slot_is_within(self, memory: int) -> None:
        slab = Slab(memory, 4 * PAGE)
        assert len(slab.pieces([4 * PAGE - 128], [[memoryview(bytes(128))]], 128)) == 1
        slab.close()

    def test_it_is_unmapped_at_once_without_a_copy_and_after_it_with_one(self, memory: int) -> None:
        slab = Slab(memory, 4 * PAGE)
        assert mapped_here(memory)
        slab.close()
        slab.close()
        assert not mapped_here(memory)
        slab = Slab(memory, 4 * PAGE)
        copying = slab.pieces([0], [[memoryview(bytes(128))]], 128)
        slab.close()
        assert mapped_here(memory)
        copying[0][:] = b"x" * 128
        with pytest.raises(Unavailable):
            slab.pieces([0], [[memoryview(bytes(128))]], 128)
        del copying
        assert not mapped_here(memory)

    def test_a_map_that_a_gpu_has_registered_goes_when_that_is_undone(self, memory: int) -> None:
        gpu = Registering()
        link = Link(1, structs.replace(WELCOME, pinned_unit=PAGE), Slab(memory, 4 * PAGE))
        link.pin(gpu, memory, Tally())
        assert gpu.unit_bytes == PAGE
        link.close()
        link.close()
        assert gpu.closed == 1
        assert mapped_here(memory)
        gpu.memory = None
        assert not mapped_here(memory)

    def test_a_map_that_the_node_lets_nobody_register(self, memory: int) -> None:
        link = Link(1, WELCOME, Slab(memory, 4 * PAGE))
        gpu = Registering()
        link.pin(gpu, memory, Tally())
        Link(1, structs.replace(WELCOME, pinned_unit=PAGE), None).pin(gpu, None, Tally())
        assert not gpu.unit_bytes
        link.close()

    def test_a_forked_child_does_not_inherit_the_map(self, memory: int) -> None:
        slab = Slab(memory, 4 * PAGE)
        inode = os.fstat(memory).st_ino
        smaps = Path("/proc/self/smaps").read_text().split("VmFlags:")
        ours = [at for at, part in enumerate(smaps) if f" {inode} " in part and "memfd:slab" in part]
        assert ours
        assert " dc" in smaps[ours[0] + 1].splitlines()[0], "VmFlags dc: do not copy on fork"
        slab.close()
