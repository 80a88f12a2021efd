"""The worker half beside a forward pass: planes go when they are computed, blocks when all is well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Event, Thread

import pytest

from kvcache.block import BlockHash
from kvcache.client.connectors import vllm_stream
from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.vllm_moves import Moves
from kvcache.client.connectors.vllm_plan import SaveJob, StepPlan, Tally
from kvcache.client.connectors.vllm_stream import StepStream
from kvcache.client.connectors.vllm_worker import WorkerSide
from kvcache.client.store import SaveHints
from kvcache.clock import SystemClock
from kvcache.request_hints import RequestHints
from tests.client.connectors.fake_store import SPEC, FakePages, FakeStore, FakeWriting, namespace

WAIT_S = 20.0
LAYERS = SPEC.plane_count


class Watched(FakeStore):
    """A store that says when a draft was begun, and when its planes were taken; drafts can be held up."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.gate, self.aborted = Event(), Event(), Event()
        self.gate.set()

    def begin_save(self, *arguments: object) -> FakeWriting:  # type: ignore[override]
        writing = super().begin_save(*arguments)  # type: ignore[arg-type]
        advance = writing.advance
        writing.taken = Event()  # type: ignore[attr-defined]

        def gated(planes: int) -> None:
            writing.taken.set()  # type: ignore[attr-defined]
            assert self.gate.wait(WAIT_S)
            advance(planes)

        def aborted() -> None:
            abort()
            self.aborted.set()

        abort = writing.abort
        writing.advance = gated  # type: ignore[method-assign]
        writing.abort = aborted  # type: ignore[method-assign]
        self.begun.set()
        return writing


class Rig:
    def __init__(self) -> None:
        self.store, self.pages, self.tally = Watched(), FakePages(), Tally()
        attachment = Attachment(lambda: self.store, [namespace()], SPEC, SystemClock())
        handle = self.store.open(namespace(), SPEC)
        self.names: list[BlockHash] = handle.hashes(range(64))
        self.side = WorkerSide(attachment, Moves(attachment, self.pages), SystemClock(), self.tally)

    def job(self, request: str, start: int, block_ids: Sequence[int], *, push: str = "") -> SaveJob:
        parent = self.names[start - 1] if start else b""
        hashes = b"".join(self.names[start : start + len(block_ids)])
        return SaveJob(request, parent, hashes, start, tuple(block_ids), streams=True, push=push)

    def compute(self, job: SaveJob, layer: int) -> None:
        for page in job.block_ids:
            self.pages.memory[page][layer][:] = bytes([page + 1]) * SPEC.plane_bytes

    def forward(self, *jobs: SaveJob, computed: bool = True, layers: int = LAYERS) -> None:
        """One step of the engine, which waits after each layer until it was taken."""
        plan = StepPlan(saves=jobs)
        assert self.side.start_stream(plan)
        assert self.store.begun.wait(WAIT_S)
        for layer in range(layers):
            for job in jobs:
                self.compute(job, layer)
            self.side.layers_ready(layer + 1)
        self.side.start_saves(plan, computed)

    def settle(self) -> None:
        self.store.gate.set()
        self.side.close()

    def stored(self) -> list[bytes]:
        return [self.store.blocks[key][:1] for key in self.store.blocks]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.settle()


def test_planes_are_taken_while_the_others_are_computed(rig: Rig) -> None:
    hints = RequestHints("prefill_only")
    job = replace(rig.job("a", 0, [0, 1, 2], push="node-b"), hints=hints)
    plan = StepPlan(saves=(job,))
    assert rig.side.start_stream(plan)
    assert rig.store.begun.wait(WAIT_S)
    (draft,) = rig.store.drafts
    rig.compute(job, 0)
    rig.side.layers_ready(1)
    assert draft.taken.wait(WAIT_S)  # type: ignore[attr-defined]
    assert rig.store.blocks == {}, "nothing is published"
    rig.compute(job, 1)
    rig.side.layers_ready(LAYERS)
    rig.side.start_saves(plan, True)
    rig.settle()
    assert draft.steps[0] == 1
    assert draft.end == "finished"
    assert rig.stored() == [b"\x01", b"\x02", b"\x03"]
    assert rig.store.pushes == ["node-b"]
    assert rig.store.save_hints == [SaveHints("prefill_only", push="node-b")]
    assert rig.side.take_saved() == {"a": 1}
    assert rig.tally.take()["saved_blocks"] == 3


def test_a_step_that_fails_publishes_nothing(rig: Rig) -> None:
    rig.forward(rig.job("a", 0, [0, 1]), computed=False, layers=1)
    assert rig.store.aborted.wait(WAIT_S), "its slots are given back at once"
    rig.settle()
    assert [draft.end for draft in rig.store.drafts] == ["aborted"]
    assert rig.store.blocks == {}
    assert rig.side.take_saved() == {"a": 1}
    assert rig.tally.take()["unsaved_blocks:not_computed"] == 2


def test_a_step_whose_end_is_never_told_publishes_nothing(rig: Rig) -> None:
    job = rig.job("a", 0, [0, 1])
    rig.side.start_stream(StepPlan(saves=(job,)))
    assert rig.store.begun.wait(WAIT_S)
    assert not rig.side.start_stream(StepPlan())
    assert rig.store.aborted.wait(WAIT_S)
    rig.settle()
    assert [draft.end for draft in rig.store.drafts] == ["aborted"]
    assert rig.store.blocks == {}


def test_what_is_under_way_at_the_end_is_given_back(rig: Rig) -> None:
    rig.side.start_stream(StepPlan(saves=(rig.job("a", 0, [0, 1]),)))
    assert rig.store.begun.wait(WAIT_S)
    rig.settle()
    assert [draft.end for draft in rig.store.drafts] == ["aborted"]
    assert rig.store.closed


def test_a_chunked_prompt_goes_step_by_step_behind_its_parents(rig: Rig) -> None:
    rig.forward(rig.job("a", 0, [0, 1]))
    rig.store.begun.clear()
    rig.forward(rig.job("a", 2, [2, 3]))
    rig.settle()
    assert rig.stored() == [b"\x01", b"\x02", b"\x03", b"\x04"]
    assert [parent for parent, _ in rig.store.saves] == [b"", rig.names[1]]


def test_saves_of_earlier_steps_go_first(rig: Rig) -> None:
    """They may be parents of what is computed now. Here all is due when the thread has time again."""
    rig.store.gate.clear()
    first = rig.job("first", 0, [0])
    rig.side.start_stream(StepPlan(saves=(first,)))
    assert rig.store.begun.wait(WAIT_S)
    rig.side.layers_ready(1)
    assert rig.store.drafts[0].taken.wait(WAIT_S)  # type: ignore[attr-defined]
    plain = SaveJob("a", b"", rig.names[0] + rig.names[1], 0, (0, 1))
    rig.side.start_saves(StepPlan(saves=(plain,)), True)
    rig.store.begun.clear()
    saves_before: list[int] = []
    begin = rig.store.begin_save

    def begun(*arguments: object) -> FakeWriting:
        saves_before.append(len(rig.store.saves))
        return begin(*arguments)

    rig.store.begin_save = begun  # type: ignore[method-assign]
    rig.side.start_stream(StepPlan(saves=(rig.job("a", 2, [2]),)))
    rig.store.gate.set()
    assert rig.store.begun.wait(WAIT_S)
    rig.settle()
    assert saves_before == [1]


def test_what_stands_behind_a_gap_is_not_begun(rig: Rig) -> None:
    rig.store.block_limit = 1
    rig.forward(rig.job("a", 0, [0, 1]))
    rig.store.begun.clear()
    job = rig.job("a", 2, [2])
    rig.side.start_stream(StepPlan(saves=(job,)))
    rig.side.layers_ready(LAYERS)
    assert not rig.store.begun.wait(0.05)
    rig.side.start_saves(StepPlan(saves=(job,)), True)
    rig.settle()
    counts = rig.tally.take()
    assert counts["unsaved_blocks:not_taken"] == 1
    assert counts["unsaved_blocks:parent_not_saved"] == 1
    assert len(rig.store.saves) == 1


def test_several_prompts_of_a_step_take_turns(rig: Rig) -> None:
    jobs = [SaveJob(name, b"", rig.names[at], 0, (at,), streams=True) for at, name in enumerate("abc")]
    rig.forward(*jobs)
    rig.settle()
    assert len(rig.store.drafts) == 3
    assert sorted(rig.stored()) == [b"\x01", b"\x02", b"\x03"]
    assert rig.side.take_saved() == {"a": 1, "b": 1, "c": 1}


def test_pages_that_are_taken_are_not_read_any_more(rig: Rig) -> None:
    rig.store.gate.clear()
    job = rig.job("a", 0, [0, 1])
    plan = StepPlan(saves=(job,))
    rig.side.start_stream(plan)
    assert rig.store.begun.wait(WAIT_S)
    rig.side.layers_ready(1)
    (draft,) = rig.store.drafts
    assert draft.taken.wait(WAIT_S)  # type: ignore[attr-defined]
    rig.side.start_saves(plan, True)
    released = Event()
    taker = Thread(target=lambda: (rig.side.release_pages(["a"]), released.set()))
    taker.start()
    while not (rig.side._taken or released.is_set()):
        pass  # Until it waits for the planes that are being copied.
    assert not released.wait(0.05)
    rig.store.gate.set()
    taker.join(WAIT_S)
    assert released.is_set()
    rig.settle()
    assert draft.end == "aborted"
    assert rig.store.blocks == {}
    assert rig.tally.take()["unsaved_blocks:preempted"] == 2


def test_a_store_that_is_away_costs_the_save_only(rig: Rig) -> None:
    rig.store.away = True
    job = rig.job("a", 0, [0, 1])
    plan = StepPlan(saves=(job,))
    rig.side.start_stream(plan)
    for layer in range(LAYERS):
        rig.compute(job, layer)
        rig.side.layers_ready(layer + 1)
    rig.side.start_saves(plan, True)
    rig.settle()
    assert rig.tally.take()["unsaved_blocks:unavailable"] == 2


def test_a_draft_that_raises_is_saved_whole(rig: Rig) -> None:
    def broken(*arguments: object) -> FakeWriting:
        rig.store.begun.set()
        raise RuntimeError("no")

    rig.store.begin_save = broken  # type: ignore[method-assign]
    rig.forward(rig.job("a", 0, [0, 1]))
    rig.settle()
    assert rig.stored() == [b"\x01", b"\x02"]
    assert rig.tally.take()["errors:stream"] == 1


def test_a_load_never_waits_for_more_than_a_batch(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is far behind catches up a plane at a time."""
    monkeypatch.setattr(vllm_stream, "BATCH_BYTES", 2 * SPEC.plane_bytes)
    job = rig.job("a", 0, [0, 1])
    stream = StepStream([job])
    stream.ready = LAYERS
    taken = [stream.take(SPEC.plane_bytes) for _ in range(LAYERS + 2)]
    assert taken == [(job, 0), *((job, at + 1) for at in range(LAYERS)), None]
    plan = StepPlan(saves=(job,))
    rig.side.start_stream(plan)
    assert rig.store.begun.wait(WAIT_S)
    for layer in range(LAYERS):
        rig.compute(job, layer)
    rig.side.start_saves(plan, True)
    rig.settle()
    (draft,) = rig.store.drafts
    assert draft.steps == list(range(1, LAYERS)), "then the end, with the last plane"
    assert rig.stored() == [b"\x01", b"\x02"]


def test_what_does_not_stream_is_left_to_the_end(rig: Rig) -> None:
    plain = SaveJob("a", b"", rig.names[0], 0, (0,))
    assert not rig.side.start_stream(StepPlan(saves=(plain,)))
    rig.pages.fill(0, 1)
    rig.side.start_saves(StepPlan(saves=(plain,)), True)
    rig.settle()
    assert rig.store.drafts == []
    assert rig.stored() == [b"\x01"]
