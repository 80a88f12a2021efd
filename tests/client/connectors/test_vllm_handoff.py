"""Prompts that one engine prefills and another decodes, in the scheduler half."""

from __future__ import annotations

from typing import Any

import pytest

from kvcache.clock import NS_PER_MS
from kvcache.request_hints import RequestHints
from tests.client.connectors.fake_store import BLOCK_TOKENS, FakeRequest
from tests.client.connectors.scheduler_rig import Rig, tokens

NOT_YET = (None, False)
LOAD_WAIT_MS, PROMISE_WAIT_MS = 2_000, 300


def asking(name: str = "r", **ours: object) -> FakeRequest:
    """A prompt of four full blocks and two tokens, with our part of the params."""
    return FakeRequest(name, tokens(18), kv_transfer_params={"kvcache": {"v": 1, **ours}})


class Decode:
    """A rig that decodes a prompt of which ``held`` blocks are here, and a clock that steps move."""

    def __init__(self, held: int, *, busy: bool = True, **ours: object) -> None:
        self.rig = Rig(load_wait_ms=LOAD_WAIT_MS, promise_wait_ms=PROMISE_WAIT_MS)
        self.request = asking(do="decode", **{"source": "node-a", **ours})
        self.names = self.rig.hold(self.request, 4)
        self.later = {name: self.rig.store.blocks.pop(name) for name in self.keys(held)}
        self.busy = busy
        self.step()

    def keys(self, start: int) -> list[Any]:
        return list(self.rig.store.blocks)[start:]

    def step(self, milliseconds: float = 0) -> None:
        self.rig.step({"other": 1} if self.busy else {})
        self.rig.clock.ns += int(milliseconds * NS_PER_MS)

    def lookup(self) -> tuple[int | None, bool]:
        answer = self.rig.side.lookup(self.request, 0)
        self.rig.side.check()
        return answer

    def wait(self, step_ms: float) -> tuple[tuple[int | None, bool], float]:
        begun_ns = self.rig.clock.ns
        while (answer := self.lookup()) == NOT_YET:
            assert not self.rig.store.leases
            self.step(step_ms)
        return answer, (self.rig.clock.ns - begun_ns) / NS_PER_MS

    def arrive(self) -> None:
        self.rig.store.blocks |= self.later


class TestPrefill:
    def finished(self, rig: Rig, request: FakeRequest) -> Any:
        rig.side.known(request)
        plan = rig.step({request.request_id: request.num_tokens})
        params = rig.side.answer(request.request_id)
        rig.side.ended(request.request_id)
        assert rig.side.answer(request.request_id) is None
        return plan.saves, params

    def test_it_answers_where_its_full_blocks_will_be(self) -> None:
        rig = Rig()
        (job,), params = self.finished(rig, asking(do="prefill", push_to="node-b"))
        assert (job.streams, job.push) == (True, "node-b")
        assert params == {
            "kvcache": {
                "v": 1,
                "do": "decode",
                "source": "node-a",
                "blocks": 4,
                "tokens": 4 * BLOCK_TOKENS,
                "pushed": True,
            }
        }
        assert rig.tally.take() == {"handoffs:prefill": 1}

    def test_blocks_that_were_held_are_part_of_the_answer(self) -> None:
        rig = Rig()
        request = asking(do="prefill")
        rig.hold(request, 2)
        assert rig.side.lookup(request, 0) == (8, True)
        rig.side.allocated(request, list(range(100, 200)), 8)
        rig.step()
        rig.side.absorb({"r"}, (), {})
        request.num_computed_tokens = 8
        _, params = self.finished(rig, request)
        assert params["kvcache"]["blocks"] == 4

    def test_a_chunked_prompt_is_a_run_of_blocks_a_step(self) -> None:
        rig = Rig()
        request = asking(do="prefill")
        rig.side.known(request)
        (first,) = rig.step({"r": 9}).saves
        request.num_computed_tokens = 9
        (second,) = rig.step({"r": 9}).saves
        assert [(job.start, len(job.block_ids), job.streams) for job in (first, second)] == [
            (0, 2, True),
            (2, 2, True),
        ]
        assert second.parent == first.hashes[-16:]

    def test_only_who_asks_is_streamed_or_answered(self) -> None:
        rig = Rig()
        (job,), params = self.finished(rig, FakeRequest("r", tokens(18)))
        assert (job.streams, job.push, params) == (False, "", None)
        assert rig.tally.take() == {}

    def test_without_streaming_it_is_answered_all_the_same(self) -> None:
        (job,), params = self.finished(Rig(streams=False), asking(do="prefill", push_to="node-b"))
        assert (job.streams, job.push) == (False, "node-b")
        assert params["kvcache"]["blocks"] == 4

    def test_an_engine_that_does_not_save_promises_nothing(self) -> None:
        saves, params = self.finished(Rig(saves=False), asking(do="prefill"))
        assert (saves, params) == ([], None) or (tuple(saves), params) == ((), None)

    def test_what_cannot_be_named_is_not_promised(self) -> None:
        request = asking(do="prefill")
        request.prompt_embeds = object()
        saves, params = self.finished(Rig(), request)
        assert (tuple(saves), params) == ((), None)

    def test_garbage_is_counted_once_and_computed_as_ever(self) -> None:
        rig = Rig()
        for name, ours in (("a", {"v": 9}), ("b", 5)):
            request = FakeRequest(name, tokens(18), kv_transfer_params={"kvcache": ours})
            (job,), params = self.finished(rig, request)
            assert (job.streams, params) == (False, None)
        assert rig.tally.take() == {"handoffs:ignored_version": 1, "handoffs:ignored_garbage": 1}


class TestHints:
    def test_they_go_with_the_look_up_and_with_what_is_saved(self) -> None:
        rig = Rig()
        request = asking(hint="tool_call", session=7, gap_ms=4_000)
        rig.side.lookup(request, 0)
        (job,) = rig.step({request.request_id: request.num_tokens}).saves
        said = RequestHints("tool_call", session=7, gap_ms=4_000)
        assert rig.store.hints == [said]
        assert (job.hints, job.streams) == (said, False)

    def test_a_prompt_that_another_engine_decodes_is_marked(self) -> None:
        for said, marked in (({}, "prefill_only"), ({"hint": "turn_end"}, "turn_end")):
            rig = Rig()
            request = asking(do="prefill", **said)
            rig.side.lookup(request, 0)
            (job,) = rig.step({request.request_id: request.num_tokens}).saves
            assert [*rig.store.hints, job.hints] == [RequestHints(marked)] * 2


class TestDecode:
    def test_each_lookup_names_the_source(self) -> None:
        decode = Decode(4, pushed=True)
        assert decode.lookup() == (16, True)
        assert decode.rig.store.sources == [("node-a", True)]
        assert decode.rig.tally.take()["handoffs:decode"] == 1

    def test_it_does_not_start_with_a_part_while_the_rest_is_coming(self) -> None:
        decode = Decode(2, blocks=4)
        decode.arrive()
        decode.rig.store.on_disk = set(decode.names[2:])
        assert decode.lookup() == NOT_YET
        decode.step(200)
        decode.rig.store.on_disk.clear()
        assert decode.lookup() == (16, True)

    def test_at_the_end_of_its_wait_it_takes_what_is_there(self) -> None:
        decode = Decode(2, blocks=4)
        decode.arrive()
        decode.rig.store.on_disk = set(decode.names[2:])
        answer, waited_ms = decode.wait(step_ms=7)
        assert answer == (8, True)
        assert LOAD_WAIT_MS <= waited_ms <= LOAD_WAIT_MS + 7

    def test_the_router_says_how_long_it_is_worth_waiting(self) -> None:
        decode = Decode(2, blocks=4, wait_ms=9_000)
        decode.arrive()
        decode.rig.store.on_disk = set(decode.names[2:])
        answer, waited_ms = decode.wait(step_ms=7)
        assert answer == (8, True)
        assert 9_000 <= waited_ms <= 9_007

    @pytest.mark.parametrize("blocks", [{"blocks": 4}, {}])
    def test_what_is_promised_is_asked_for_again_soon(self, blocks: dict[str, int]) -> None:
        """The engine that prefilled answers before its last blocks are published."""
        decode = Decode(1, **blocks)
        assert decode.lookup() == NOT_YET
        decode.step(20)
        decode.arrive()
        assert decode.lookup() == (16, True)
        assert decode.rig.tally.take()["lookups:coming"] == 1

    def test_a_promise_alone_is_not_waited_for_long(self) -> None:
        for held, taken in ((0, (0, False)), (3, (12, True))):
            answer, waited_ms = Decode(held, blocks=4).wait(step_ms=3)
            assert answer == taken
            assert PROMISE_WAIT_MS <= waited_ms <= PROMISE_WAIT_MS + 3

    def test_a_promise_that_the_router_gives_time_is_waited_for(self) -> None:
        _, waited_ms = Decode(0, wait_ms=5_000).wait(step_ms=3)
        assert 5_000 <= waited_ms <= 5_003

    def test_what_the_source_does_not_have_is_not_waited_for(self) -> None:
        """A node that follows the source cannot know that there will be no more."""
        decode = Decode(4, blocks=2)
        decode.rig.store.on_disk = set(decode.names[2:])
        assert decode.lookup() == (8, True)

    def test_no_more_is_waited_for_than_was_promised(self) -> None:
        assert Decode(3, blocks=3).lookup() == (12, True)
        assert Decode(0, blocks=0).lookup() == (0, False)
        assert Decode(0, source="").lookup() == (0, False)

    def test_an_idle_engine_does_not_ask_without_a_pause(self) -> None:
        decode = Decode(0, busy=False, blocks=4)
        decode.wait(step_ms=0.1)
        assert len(decode.rig.store.waits) < 60
