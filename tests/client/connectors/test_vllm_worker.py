"""The worker half: whole pages to the store and back, and when they may be used again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event, Thread

import pytest

from kvcache.block import split_hashes
from kvcache.client.connectors import vllm_worker
from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.vllm_moves import Moves
from kvcache.client.connectors.vllm_plan import LoadJob, SaveJob, StepPlan, Tally
from kvcache.client.connectors.vllm_worker import WorkerSide
from kvcache.clock import SystemClock
from tests.client.connectors.fake_store import SPEC, FakePages, FakeStore, namespace

WAIT_S = 20.0


class Gate(FakeStore):
    """A store whose save waits until it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.open_gate = Event(), Event()
        self.open_gate.set()

    def save(self, *arguments: object) -> int:  # type: ignore[override]
        self.entered.set()
        assert self.open_gate.wait(WAIT_S)
        return super().save(*arguments)  # type: ignore[arg-type]


class Rig:
    def __init__(self) -> None:
        self.store, self.pages, self.tally = Gate(), FakePages(), Tally()
        attachment = Attachment(lambda: self.store, [namespace()], SPEC, SystemClock())
        self.handle = self.store.open(namespace(), SPEC)
        self.names = self.handle.hashes(range(64))
        self.side = WorkerSide(attachment, Moves(attachment, self.pages), SystemClock(), self.tally)

    def saving(self, request: str, start: int, block_ids: Sequence[int]) -> SaveJob:
        parent = self.names[start - 1] if start else b""
        return SaveJob(
            request, parent, b"".join(self.names[start : start + len(block_ids)]), start, tuple(block_ids)
        )

    def loading(self, request: str, start: int, block_ids: Sequence[int]) -> LoadJob:
        return LoadJob(request, f"e/{request}", b"".join(self.names), start, tuple(block_ids))

    def save(self, *jobs: SaveJob, computed: bool = True) -> None:
        self.side.start_saves(StepPlan(saves=jobs), computed)

    def settle(self) -> None:
        """Wait until nothing is queued or running, by closing."""
        self.store.open_gate.set()
        self.side.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.settle()


def test_what_was_saved_is_loaded_into_other_pages(rig: Rig) -> None:
    for page in range(4):
        rig.pages.fill(page, page + 1)
    rig.save(rig.saving("a", 0, [0, 1, 2, 3]))
    rig.settle()
    again = Rig()
    again.store.blocks = rig.store.blocks
    again.side.start_loads(StepPlan(loads=(again.loading("b", 1, [20, 21, 22]),)))
    again.settle()
    assert again.side.take_received() == ({"b"}, set())
    assert [again.pages.value(page) for page in (20, 21, 22)] == [2, 3, 4]
    assert again.store.leases == {}
    counts = again.tally.take()
    assert counts["loaded_blocks"] == 3
    assert counts["loaded_bytes"] == 3 * SPEC.block_bytes


def test_a_block_that_cannot_be_had_is_named_by_its_page(rig: Rig) -> None:
    rig.save(rig.saving("a", 0, [0, 1, 2, 3]))
    rig.settle()
    again = Rig()
    again.store.blocks, again.store.broken = rig.store.blocks, {rig.names[2]}
    again.side.start_loads(StepPlan(loads=(again.loading("b", 1, [20, 21, 22, 23]),)))
    again.settle()
    assert again.side.take_received() == ({"b"}, {21, 23})
    counts = again.tally.take()
    assert counts["failed_blocks:not_read"] == 1
    assert counts["failed_blocks:lease_lost"] == 1
    assert counts["store:failed_blocks:checksum"] == 1


def test_a_store_that_is_away_fails_the_whole_load_once(rig: Rig) -> None:
    rig.store.away = True
    rig.side.start_loads(StepPlan(loads=(rig.loading("b", 0, [5, 6]),)))
    rig.settle()
    assert rig.side.take_received() == ({"b"}, {5, 6})
    assert rig.side.take_received() == (set(), set())


def test_a_load_that_raises_is_a_load_that_failed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.store, "lease", None)
    rig.side.start_loads(StepPlan(loads=(rig.loading("b", 0, [5, 6]),)))
    rig.settle()
    assert rig.side.take_received() == ({"b"}, {5, 6})
    assert rig.tally.take()["errors:load"] == 1


def test_an_abandoned_load_is_reported_without_a_store(rig: Rig) -> None:
    rig.side.start_loads(StepPlan(abandoned=(rig.loading("b", 0, [5, 6]),)))
    assert rig.side.take_received() == ({"b"}, {5, 6})


def test_pages_that_were_not_computed_are_not_saved(rig: Rig) -> None:
    rig.save(rig.saving("a", 0, [0, 1]), computed=False)
    assert rig.side.take_saved() == {"a": 1}
    rig.settle()
    assert rig.store.blocks == {}


def test_a_large_save_goes_in_batches_behind_one_another(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_worker, "BATCH_BYTES", 2 * SPEC.block_bytes)
    rig.save(rig.saving("a", 0, [0, 1, 2, 3, 4]))
    rig.settle()
    assert rig.store.saves == [(b"", 2), (rig.names[1], 2), (rig.names[3], 1)]
    assert rig.side.take_saved() == {"a": 1}


def test_a_load_goes_before_saves_that_wait(rig: Rig) -> None:
    rig.store.open_gate.clear()
    order: list[str] = []
    save, lease = FakeStore.save, FakeStore.lease
    rig.store.lease = lambda *a, **k: (order.append("load"), lease(rig.store, *a, **k))[1]  # type: ignore
    rig.store.save = lambda *a: (order.append("save"), Gate.save(rig.store, *a))[1]  # type: ignore
    rig.save(rig.saving("a", 0, [0]))
    assert rig.store.entered.wait(WAIT_S)
    rig.save(rig.saving("a", 1, [1]))
    rig.side.start_loads(StepPlan(loads=(rig.loading("b", 0, [9]),)))
    rig.settle()
    assert order == ["save", "load", "save"]
    assert save is FakeStore.save


def test_after_a_save_fell_short_later_blocks_are_left_out(rig: Rig) -> None:
    rig.store.block_limit = 1
    rig.save(rig.saving("a", 0, [0, 1]), rig.saving("a", 2, [2]))
    rig.settle()
    assert len(rig.store.saves) == 1
    assert rig.side.take_saved() == {"a": 2}
    counts = rig.tally.take()
    assert counts["unsaved_blocks:not_taken"] == 1
    assert counts["unsaved_blocks:parent_not_saved"] == 1


def test_a_save_from_before_the_gap_mends_it(rig: Rig) -> None:
    rig.store.block_limit = 1
    rig.save(rig.saving("a", 0, [0, 1]))
    rig.settle()
    again = Rig()
    again.store.blocks = rig.store.blocks
    again.side._gap = {"a": 1}
    again.save(again.saving("a", 1, [1, 2]), again.saving("a", 3, [3]))
    again.settle()
    assert len(again.store.blocks) == 4


def test_an_ended_request_is_freed_when_its_last_save_is_done(rig: Rig) -> None:
    rig.store.open_gate.clear()
    rig.save(rig.saving("a", 0, [0]))
    rig.side.start_saves(StepPlan(freeing=("a",)), True)
    assert rig.store.entered.wait(WAIT_S)
    assert rig.side.take_freed() == set()
    rig.settle()
    assert rig.side.take_freed() == {"a"}
    assert rig.side.take_freed() == set()


def test_pages_taken_from_a_request_are_not_read_any_more(rig: Rig) -> None:
    rig.store.open_gate.clear()
    rig.save(rig.saving("a", 0, [0]), rig.saving("a", 1, [1]), rig.saving("b", 0, [2]))
    assert rig.store.entered.wait(WAIT_S)
    taken = Event()
    taker = Thread(target=lambda: (rig.side.release_pages(["a"]), taken.set()))
    taker.start()
    while not (rig.side._taken or taken.is_set()):
        pass  # Until it waits for the first copy, which still runs.
    assert not taken.wait(0.05)
    rig.store.open_gate.set()
    taker.join(WAIT_S)
    assert taken.is_set()
    rig.settle()
    assert [count for _, count in rig.store.saves] == [1, 1]
    assert rig.tally.take()["unsaved_blocks:preempted"] == 1
    assert rig.side.take_saved() == {"a": 2, "b": 1}


def test_pages_taken_in_the_middle_of_a_large_save_are_not_read_any_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_worker, "BATCH_BYTES", SPEC.block_bytes)
    rig.store.open_gate.clear()
    rig.save(rig.saving("a", 0, [0, 1, 2]))
    assert rig.store.entered.wait(WAIT_S)
    taker = Thread(target=rig.side.release_pages, args=(["a"],))
    taker.start()
    while not rig.side._taken:
        pass  # Until it waits for the first batch.
    rig.store.open_gate.set()
    taker.join(WAIT_S)
    rig.settle()
    assert rig.store.saves == [(b"", 1)], "what the engine writes there next is another block"
    assert rig.tally.take()["unsaved_blocks:preempted"] == 2
    assert rig.side.take_saved() == {"a": 1}


def test_a_save_that_waited_too_long_is_left_out(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_worker, "SAVE_AGE_NS", -1)
    rig.save(rig.saving("a", 0, [0]))
    rig.settle()
    assert rig.tally.take()["unsaved_blocks:too_late"] == 1
    assert rig.store.saves == []


def test_closing_finishes_what_is_queued_and_closes_the_store(rig: Rig) -> None:
    rig.save(*(rig.saving("a", start, [start]) for start in range(8)))
    rig.side.close()
    rig.side.close()
    assert len(rig.store.blocks) == 8
    assert rig.store.closed


def test_joined_hashes_are_the_names(rig: Rig) -> None:
    assert split_hashes(rig.saving("a", 0, [0, 1]).hashes) == rig.names[:2]
