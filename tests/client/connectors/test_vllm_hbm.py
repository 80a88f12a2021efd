"""The vLLM connector with HBM: what the scheduler asks for and hands out, what the worker does by its device.

Without an engine: the store is in memory, and says of its first blocks that they are in HBM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kvcache.block import BlockHash, BlockSpec
from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.vllm_moves import Moves
from kvcache.client.connectors.vllm_plan import LoadJob, SaveJob, StepPlan, Tally
from kvcache.client.connectors.vllm_worker import WorkerSide
from kvcache.client.store import NO_HINTS, Grant, Handle, Lease, SaveHints
from kvcache.clock import SystemClock
from kvcache.errors import Unavailable
from kvcache.wire_hbm import HBM
from tests.client.connectors.fake_store import SPEC, FakePages, FakeRequest, FakeStore, namespace
from tests.client.connectors.scheduler_rig import Rig, tokens

HOT = 2
PREFILL = {"kvcache": {"v": 1, "do": "prefill"}}


class HotStore(FakeStore):
    """The leading ``hot`` blocks of what is held are in HBM, for who asks for it; the others are below."""

    def __init__(self) -> None:
        super().__init__()
        self.hot = HOT
        self.asked: list[str] = []  # What was called, and by which name.
        self.into: list[tuple[int, ...]] = []

    def lease(self, handle: Handle, prefix: Sequence[BlockHash], request: str = "", **rest: Any) -> Lease:  # type: ignore[override]
        self.asked.append(f"lease {request}".strip())
        return super().lease(handle, prefix, request, **rest)

    def lease_device(
        self, handle: Handle, prefix: Sequence[BlockHash], request: str = "", **rest: Any
    ) -> Lease:
        self.asked.append(f"lease_device {request}".strip())
        whole = super().lease(handle, prefix, request, **rest)
        hot = min(self.hot, whole.count)
        grants = [Grant(9, 0, hot, (), b"", 0, HBM), Grant(1, hot, whole.count - hot, (), b"", 0)]
        return Lease(handle, whole.prefix, tuple(each for each in grants if each.count), 1, whole.coming)

    def load_device(self, lease: Lease, into: FakeBlocks, start: int = 0) -> frozenset[int]:
        self.asked.append("load_device")
        self.into.append(into.block_ids)
        return frozenset()

    def load(self, lease: Lease, *rest: Any) -> frozenset[int]:  # type: ignore[override]
        self.asked.append("load")
        return super().load(lease, *rest)

    def save(self, *rest: Any) -> int:  # type: ignore[override]
        self.asked.append("save")
        return super().save(*rest)

    def save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: FakeBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        self.asked.append("save_device" + " below" * hints.below)
        self.into.append(blocks.block_ids)
        return len(prefix)

    def begin_save_device(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: FakeBlocks,
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> Writing:
        self.asked.append("begin_save_device" + " below" * hints.below)
        return Writing(self.asked, len(prefix))


class Writing:
    """What was called, among what else was."""

    def __init__(self, asked: list[str], count: int) -> None:
        self.asked = asked
        self.count = count

    def advance(self, planes: int) -> None:
        self.asked.append(f"advance {planes}")

    def finish(self) -> int:
        self.asked.append("finish")
        return self.count

    def abort(self) -> None:
        self.asked.append("abort")


class FakeBlocks:
    def __init__(self, block_ids: Sequence[int]) -> None:
        self.block_ids = tuple(block_ids)

    def __len__(self) -> int:
        return len(self.block_ids)

    def check(self, spec: BlockSpec) -> None:
        """They have any shape."""


class FakeDevice:
    """``has_slab`` is what it is told."""

    def __init__(self, has_slab: bool = True) -> None:
        self.has_slab = has_slab
        self.fails = False
        self.marks = 0
        self.behind: list[int] = []

    def mark(self) -> Any:
        if self.fails:
            raise Unavailable("unavailable", "the device failed", "it fell off the bus")
        self.marks += 1
        return self.marks

    def follow(self, behind: Any) -> None:
        self.behind.append(behind)

    def blocks(self, block_ids: Sequence[int]) -> Any:
        return FakeBlocks(block_ids)


def scheduler(hbm: bool = True) -> Rig:
    rig = Rig()
    rig.store = HotStore()
    rig.side.use_hbm(hbm)
    return rig


def asked(rig: Rig) -> list[str]:
    assert isinstance(rig.store, HotStore)
    return rig.store.asked


class TestScheduler:
    def test_it_asks_for_what_hbm_holds_and_says_so_to_the_worker(self) -> None:
        rig = scheduler()
        request = FakeRequest("a", tokens(21))
        rig.hold(request, 5)
        (load,) = rig.load(request).loads
        assert asked(rig) == ["lease_device engine/a"]
        assert load.hbm
        assert len(load.block_ids) == 5
        counts = rig.tally.take()
        assert (counts["hit_tokens"], counts["hbm_tokens"]) == (20, 8)

    def test_what_came_from_below_is_handed_out_for_hbm(self) -> None:
        rig = scheduler()
        request = FakeRequest("a", tokens(21))
        rig.hold(request, 5)
        rig.load(request)
        rig.side.absorb(["a"], (), {})
        request.num_computed_tokens = 20
        (save,) = rig.step({"a": 1}).saves
        assert (save.start, len(save.block_ids), save.hbm) == (HOT, 5 - HOT, True)

    def test_what_could_not_be_loaded_is_saved_from_where_it_began_to_be_wrong(self) -> None:
        rig = scheduler()
        assert isinstance(rig.store, HotStore)
        rig.store.hot = 4
        request = FakeRequest("a", tokens(21))
        rig.hold(request, 5)
        (load,) = rig.load(request).loads
        rig.side.absorb(["a"], [load.block_ids[1]], {})
        request.num_computed_tokens = 4
        (save,) = rig.step({"a": 17}).saves
        assert (save.start, len(save.block_ids)) == (1, 4)

    def test_a_block_that_failed_below_hbm_leaves_what_is_to_go_there(self) -> None:
        rig = scheduler()
        request = FakeRequest("a", tokens(21))
        rig.hold(request, 5)
        (load,) = rig.load(request).loads
        rig.side.absorb(["a"], [load.block_ids[4]], {})
        request.num_computed_tokens = 16
        (save,) = rig.step({"a": 5}).saves
        assert save.start == HOT

    def test_without_hbm_all_is_as_before(self) -> None:
        rig = scheduler(hbm=False)
        request = FakeRequest("a", tokens(21))
        rig.hold(request, 4)
        (load,) = rig.load(request).loads
        assert asked(rig) == ["lease engine/a"]
        assert not load.hbm
        rig.side.absorb(["a"], (), {})
        request.num_computed_tokens = 16
        (save,) = rig.step({"a": 5}).saves
        assert (save.start, save.hbm) == (4, False)

    def test_a_prompt_for_another_engine_goes_to_where_other_nodes_find_it(self) -> None:
        rig = scheduler()
        request = FakeRequest("a", tokens(21), kv_transfer_params=PREFILL)
        rig.hold(request, 2)
        rig.load(request)
        assert asked(rig) == ["lease engine/a"]
        rig.side.absorb(["a"], (), {})
        request.num_computed_tokens = 8
        (save,) = rig.step({"a": 13}).saves
        assert (save.start, save.hbm, save.streams) == (2, False, True)

    @pytest.mark.parametrize(("blocks", "streams"), [(3, False), (4, True)])
    def test_a_prompt_of_some_length_goes_layer_by_layer(self, blocks: int, streams: bool) -> None:
        for hbm in (True, False):
            rig = scheduler(hbm)
            request = FakeRequest("a", tokens(4 * blocks + 1))
            rig.side.lookup(request, 0)
            (save,) = rig.step({"a": 4 * blocks + 1}).saves
            assert (len(save.block_ids), save.streams) == (blocks, streams and hbm)

    def test_a_worker_that_lacks_hbm_ends_it(self) -> None:
        """What was promised meanwhile is the worker's to fail; what is asked next is not in HBM."""
        rig = scheduler()
        for name, hbm in (("a", True), ("b", False), ("c", True)):
            rig.side.use_hbm(hbm)
            request = FakeRequest(name, tokens(21))
            rig.hold(request, 5)
            rig.load(request)
        assert asked(rig) == ["lease_device engine/a", "lease engine/b", "lease_device engine/c"]


class Worker:
    def __init__(self, device: FakeDevice | None, on_cuda: bool = False) -> None:
        self.store, self.pages, self.tally = HotStore(), None if on_cuda else FakePages(), Tally()
        attachment = Attachment(lambda: self.store, [namespace()], SPEC, SystemClock())
        self.handle = self.store.open(namespace(), SPEC)
        self.names = self.handle.hashes(range(64))
        for name in self.names:
            self.store.blocks[self.handle.namespace_id, name] = bytes(SPEC.block_bytes)
        self.side = WorkerSide(attachment, Moves(attachment, self.pages, device), SystemClock(), self.tally)

    def until(self, asked: list[str]) -> None:
        """What of the store was called."""
        while self.store.asked != asked:
            pass

    def run(self, hbm: bool) -> list[str]:
        """A load and a save; what of the store was called."""
        job = LoadJob("a", "e/a", b"".join(self.names[:4]), 1, (11, 12, 13), hbm)
        self.side.start_loads(StepPlan(loads=(job,)))
        save = SaveJob("a", self.names[3], self.names[4], 4, (14,), hbm=hbm)
        self.side.start_saves(StepPlan(saves=(save,)), True)
        self.side.close()
        assert self.side.take_received() == ({"a"}, set())
        assert self.side.take_saved() == {"a": 1}
        return self.store.asked


class TestWorker:
    def test_it_takes_part_in_the_lease_and_moves_by_its_device(self) -> None:
        device = FakeDevice()
        worker = Worker(device)
        assert worker.run(hbm=True) == ["lease_device e/a", "load_device", "save_device"]
        assert device.behind == [1, 2], "what the engine had queued when each was planned"
        assert worker.store.into == [(11, 12, 13), (14,)]
        assert not worker.side.lacks_hbm

    def test_what_was_leased_without_hbm_goes_by_host_memory(self) -> None:
        assert Worker(FakeDevice()).run(hbm=False) == ["lease e/a", "load", "save"]

    def test_what_is_below_alone_goes_by_host_memory(self) -> None:
        worker = Worker(FakeDevice())
        worker.store.hot = 0
        assert worker.run(hbm=True) == ["lease_device e/a", "load", "save_device"]

    @pytest.mark.parametrize("device", [FakeDevice(has_slab=False), None])
    def test_without_a_slab_saves_go_to_host_memory(self, device: FakeDevice | None) -> None:
        worker = Worker(device)
        worker.store.hot = 0
        assert worker.run(hbm=True)[1:] == ["load", "save"]
        assert worker.side.lacks_hbm == (device is not None)

    @pytest.mark.parametrize("has_slab", [True, False])
    def test_pages_on_a_device_alone_go_by_it_to_host_memory_too(self, has_slab: bool) -> None:
        worker = Worker(FakeDevice(has_slab), on_cuda=True)
        worker.store.hot = 0
        assert worker.run(hbm=False) == ["lease e/a", "load_device", "save_device below"]

    def test_layers_are_copied_behind_those_that_compute_them(self) -> None:
        device = FakeDevice()
        worker, asked = Worker(device), []
        job = SaveJob("a", b"", b"".join(worker.names[:4]), 0, (1, 2, 3, 4), streams=True, hbm=True)
        plan = StepPlan(saves=(job,))
        assert worker.side.start_stream(plan)
        worker.until(["begin_save_device"])
        worker.side.layers_ready(1)
        worker.until(["begin_save_device", "advance 1"])
        worker.side.layers_ready(SPEC.plane_count)
        worker.side.start_saves(plan, True)
        worker.side.close()
        asked = worker.store.asked
        assert asked[:2] == ["begin_save_device", "advance 1"]
        assert asked[-1] == "finish"
        assert device.behind == sorted(device.behind)
        assert device.behind[-1] == device.marks == 4, "published behind the whole pass"
        assert worker.side.take_saved() == {"a": 1}

    def test_layers_behind_nobody_knows_what_are_not_read(self) -> None:
        device = FakeDevice()
        worker = Worker(device)
        job = SaveJob("a", b"", b"".join(worker.names[:4]), 0, (1, 2, 3, 4), streams=True, hbm=True)
        worker.side.start_stream(StepPlan(saves=(job,)))
        worker.until(["begin_save_device"])
        device.fails = True
        worker.side.layers_ready(SPEC.plane_count)
        worker.side.start_saves(StepPlan(saves=(job,)), True)
        worker.side.close()
        assert worker.store.asked == ["begin_save_device", "abort"]
        assert worker.side.take_saved() == {"a": 1}

    def test_a_pass_that_fails_publishes_nothing(self) -> None:
        worker = Worker(FakeDevice())
        job = SaveJob("a", b"", b"".join(worker.names[:4]), 0, (1, 2, 3, 4), streams=True, hbm=True)
        worker.side.start_stream(StepPlan(saves=(job,)))
        worker.until(["begin_save_device"])
        worker.side.start_saves(StepPlan(saves=(job,)), False)
        worker.side.close()
        assert worker.store.asked == ["begin_save_device", "abort"]

    def test_a_device_that_failed_is_not_asked(self) -> None:
        """The engine will hear of it by itself."""
        device = FakeDevice()
        device.fails = True
        worker = Worker(device)
        job = LoadJob("a", "e/a", b"".join(worker.names[:4]), 1, (11, 12, 13), True)
        worker.side.start_loads(StepPlan(loads=(job,)))
        worker.side.close()
        assert worker.side.take_received() == ({"a"}, {11, 12, 13})
        assert worker.store.asked == ["lease_device e/a"]
        assert worker.store.leases == {}

    def test_a_slab_that_comes_back_is_noticed(self) -> None:
        device = FakeDevice(has_slab=False)
        worker = Worker(device)
        job = SaveJob("a", b"", worker.names[0], 0, (1,), hbm=True)
        worker.side.start_saves(StepPlan(saves=(job,)), True)
        while not worker.side.take_saved():
            pass  # Until the thread has done it.
        device.has_slab = True
        worker.side.start_saves(StepPlan(saves=(job,)), True)
        worker.side.close()
        assert not worker.side.lacks_hbm

    def test_the_store_is_connected_before_the_first_request(self) -> None:
        """A slab of HBM is made for who connects."""
        worker = Worker(FakeDevice(has_slab=False))
        worker.side.connect()
        worker.side.close()
        assert worker.store.closed
        assert worker.side.lacks_hbm
