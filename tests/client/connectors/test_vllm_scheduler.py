"""The scheduler half, driven step by step against a store in memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from kvcache.client.connectors.vllm_scheduler import LEASE_RENEW_NS, STEP_BUDGET_NS
from tests.client.connectors.fake_store import FakeRequest, feature, namespace
from tests.client.connectors.scheduler_rig import Rig, tokens


class TestLookup:
    def test_a_hit_is_whole_blocks_beyond_what_the_engine_has(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 3)
        assert rig.side.lookup(request, 0) == (12, True)
        assert rig.side.lookup(request, 4) == (8, True)
        assert rig.side.lookup(request, 12) == (0, False)

    def test_one_token_is_left_to_compute(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(16))
        rig.hold(request, 4)
        assert rig.side.lookup(request, 0) == (12, True)

    def test_asking_twice_takes_one_lease(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 3)
        assert rig.side.lookup(request, 0) == rig.side.lookup(request, 0)
        assert rig.store.leases == {1: "engine/r"}

    def test_an_old_lease_is_taken_anew(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 3)
        rig.side.lookup(request, 0)
        rig.clock.ns += LEASE_RENEW_NS + 1
        rig.side.lookup(request, 0)
        assert rig.store.leases == {2: "engine/r"}

    def test_a_miss_holds_nothing(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 1)
        assert rig.side.lookup(request, 4) == (0, False)
        assert rig.store.leases == {}
        assert rig.tally.take() == {"lookups:miss": 1}

    def test_the_rank_that_holds_least_decides(self) -> None:
        rig = Rig(ranks=2)
        request = FakeRequest("r", tokens(18))
        names = rig.hold(request, 4)
        del rig.store.blocks[namespace(1, 2).namespace_id(), names[2]]
        assert rig.side.lookup(request, 0) == (8, True)
        assert len(rig.store.leases) == 2

    def test_a_store_that_is_away_costs_a_miss(self) -> None:
        rig = Rig()
        rig.store.away = True
        assert rig.side.lookup(FakeRequest("r", tokens(18)), 0) == (0, False)
        assert rig.tally.take() == {"lookups:unavailable": 1}

    def test_a_store_that_goes_away_later_is_told_from_a_miss(self) -> None:
        rig = Rig()
        assert rig.side.lookup(FakeRequest("first", tokens(18)), 0) == (0, False)
        rig.store.away = True
        assert rig.side.lookup(FakeRequest("second", tokens(18)), 0) == (0, False)
        assert rig.tally.take() == {
            "lookups:miss": 1,
            "lookups:unavailable": 1,
            "lookup_store:missed_calls:away": 1,
        }

    def test_a_slow_store_costs_a_step_no_more_than_its_budget(self) -> None:
        rig = Rig()
        slow, lease = FakeRequest("slow", tokens(18)), rig.store.lease

        def late(*arguments: object, **keywords: object) -> object:
            rig.clock.ns += STEP_BUDGET_NS
            return lease(*arguments, **keywords)  # type: ignore[arg-type]

        rig.store.lease = late  # type: ignore[assignment, method-assign]
        assert rig.side.lookup(slow, 0) == (0, False)
        assert rig.side.lookup(FakeRequest("next", tokens(18)), 0) == (None, False)
        rig.step()
        assert rig.side.lookup(FakeRequest("next", tokens(18)), 0) == (0, False)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda r: setattr(r, "prompt_embeds", object()), "prompt_embeds"),
            (lambda r: setattr(r, "resumable", True), "streaming_input"),
            (lambda r: setattr(r, "skip_reading_prefix_cache", True), "not_wanted"),
            (lambda r: setattr(r, "lora_request", _adapter("", False)), "adapter_unknown"),
            (lambda r: setattr(r, "lora_request", _adapter("a", True)), "adapter_in_place"),
        ],
    )
    def test_what_cannot_be_named_is_not_asked_for(
        self, change: Callable[[FakeRequest], None], reason: str
    ) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 3)
        change(request)
        assert rig.side.lookup(request, 0) == (0, False)
        assert rig.tally.take() == {f"lookups:{reason}": 1}


def _adapter(path: str, in_place: bool) -> SimpleNamespace:
    return SimpleNamespace(lora_name="n", lora_int_id=1, lora_path=path, load_inplace=in_place)


class TestNames:
    """What else a block depends on is part of its name."""

    @pytest.mark.parametrize(
        "change",
        [
            {"cache_salt": "s"},
            {"lora_request": _adapter("adapter", False)},
            {"mm_features": [feature("image", 0, 4)]},
            {"all_token_ids": tokens(18, first=1)},
        ],
    )
    def test_another_content_is_another_block(self, change: dict[str, object]) -> None:
        rig = Rig()
        plain = FakeRequest("plain", tokens(18))
        rig.hold(plain, 4)
        assert rig.side.lookup(plain, 0) == (16, True)
        other = FakeRequest("other", **{"all_token_ids": tokens(18), **change})  # type: ignore[arg-type]
        assert rig.side.lookup(other, 0) == (0, False)

    def test_an_item_names_the_blocks_it_lies_in_and_those_after(self) -> None:
        rig = Rig()
        plain = FakeRequest("plain", tokens(18))
        rig.hold(plain, 4)
        late = FakeRequest("late", tokens(18), mm_features=[feature("image", 9, 2)])
        assert rig.side.lookup(late, 0) == (8, True)

    def test_an_item_elsewhere_in_its_block_is_another_block(self) -> None:
        plans = []
        for offset in (0, 1):
            rig = Rig()
            request = FakeRequest("r", tokens(4), mm_features=[feature("image", offset, 2)])
            rig.side.known(request)
            plans.append(rig.step({"r": 4}).saves[0].hashes)
        assert plans[0] != plans[1]

    def test_a_salt_that_is_no_text_is_only_a_salt(self) -> None:
        rig = Rig()
        assert rig.side.lookup(FakeRequest("r", tokens(18), cache_salt="\ud800"), 0) == (0, False)
        assert rig.tally.take() == {"lookups:miss": 1}


class TestLoad:
    def test_the_plan_says_which_pages_get_which_blocks(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        names = rig.hold(request, 3)
        (job,) = rig.load(request, computed=4).loads
        assert (job.request, job.lease_name, job.start) == ("r", "engine/r", 1)
        assert job.block_ids == (101, 102)
        assert job.prefix.startswith(b"".join(names))
        assert rig.step().loads == ()

    def test_the_lease_ends_with_the_load(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 3)
        rig.load(request)
        assert rig.store.leases
        rig.side.absorb(["r"], [], {})
        assert rig.store.leases == {}
        rig.side.allocated(request, [], 0)
        rig.side.check()

    def test_another_connectors_load_gives_the_lease_back(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 3)
        rig.side.lookup(request, 0)
        rig.side.allocated(request, list(range(100, 200)), 0)
        assert rig.store.leases == {}
        assert rig.step().loads == ()

    def test_what_was_loaded_is_not_saved(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 3)
        rig.load(request)
        rig.side.absorb(["r"], [], {})
        request.num_computed_tokens = 12
        (job,) = rig.step({"r": 6}).saves
        assert (job.start, job.block_ids) == (3, (103,))

    def test_after_a_failed_load_the_recomputed_blocks_are_saved_and_nothing_is_asked(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 4)
        rig.load(request)
        rig.side.absorb([], [102], {})
        rig.side.absorb(["r"], [], {})
        assert rig.side.lookup(request, 0) == (0, False)
        request.num_computed_tokens = 8
        (job,) = rig.step({"r": 10}).saves
        assert (job.start, job.block_ids) == (2, (102, 103))

    def test_a_load_without_its_lease_is_abandoned_not_forgotten(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.side.known(request)
        rig.side.allocated(request, list(range(100, 200)), 8)
        plan = rig.step()
        assert plan.loads == ()
        assert [job.block_ids for job in plan.abandoned] == [(100, 101)]


class TestSave:
    def test_chunks_of_a_prompt_are_saved_as_their_blocks_fill(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.side.known(request)
        starts = []
        for scheduled in (6, 1, 11):
            jobs = rig.step({"r": scheduled}).saves
            starts.append([(job.start, job.block_ids) for job in jobs])
            request.num_computed_tokens += scheduled
        assert starts == [[(0, (100,))], [], [(1, (101, 102, 103))]]

    def test_jobs_name_their_parent(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(16))
        names = rig.attachment.handles()[0].hashes(request.all_token_ids)
        rig.side.known(request)
        (first,) = rig.step({"r": 8}).saves
        request.num_computed_tokens = 8
        (second,) = rig.step({"r": 8}).saves
        assert (first.parent, first.hashes) == (b"", b"".join(names[:2]))
        assert (second.parent, second.hashes) == (names[1], b"".join(names[2:]))

    def test_tokens_not_known_yet_make_no_block(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(7))
        rig.side.known(request)
        (job,) = rig.step({"r": 9}).saves  # Two of them are guesses.
        assert job.block_ids == (100,)

    @pytest.mark.parametrize(("option", "pages"), [(True, (100, 101)), (False, (100,))])
    def test_generated_tokens_are_saved_when_wanted(self, option: bool, pages: tuple[int, ...]) -> None:
        rig = Rig(save_generated=option)
        request = FakeRequest("r", tokens(8), prompt_tokens=6)
        rig.side.known(request)
        (job,) = rig.step({"r": 8}).saves
        assert job.block_ids == pages

    @pytest.mark.parametrize("options", [{"saves": False}, {"saves": True}])
    def test_a_consumer_saves_nothing(self, options: dict[str, bool]) -> None:
        rig = Rig(**options)
        rig.side.known(FakeRequest("r", tokens(8)))
        assert bool(rig.step({"r": 8}).saves) is options["saves"]

    def test_blocks_the_store_lost_are_saved_again_though_the_engine_has_them(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 1)
        rig.side.lookup(request, 12)
        rig.side.allocated(request, list(range(100, 200)), 0)
        request.num_computed_tokens = 12
        (job,) = rig.step({"r": 6}).saves
        assert (job.start, job.block_ids) == (1, (101, 102, 103))

    def test_while_the_store_is_away_nothing_is_planned_and_later_all_of_it(self) -> None:
        rig = Rig()
        rig.store.away = True
        request = FakeRequest("r", tokens(16))
        rig.side.known(request)
        assert rig.step({"r": 8}).saves == ()
        rig.store.away, rig.clock.ns, request.num_computed_tokens = False, 10**12, 8
        (job,) = rig.step({"r": 8}).saves
        assert job.block_ids == (100, 101, 102, 103)

    def test_a_fault_in_planning_saves_keeps_the_loads(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 3)
        found, _ = rig.side.lookup(request, 0)
        rig.side.allocated(request, list(range(100, 200)), found or 0)
        other = FakeRequest("other", tokens(8))
        rig.side.known(other)
        plan = rig.side.plan({"other": 8}, lambda _: (), ())
        assert len(plan.loads) == 1
        assert plan.saves == ()
        assert rig.tally.take()["errors:plan"] == 1


class TestEnd:
    def test_pages_stay_until_every_rank_has_saved(self) -> None:
        rig = Rig(ranks=2)
        rig.side.known(FakeRequest("r", tokens(8)))
        rig.step({"r": 8})
        rig.side.absorb([], [], {"r": 1})
        assert rig.side.ended("r")
        assert rig.step().freeing == ("r",)

    def test_pages_are_free_at_once_when_all_is_saved(self) -> None:
        rig = Rig(ranks=2)
        rig.side.known(FakeRequest("r", tokens(8)))
        rig.step({"r": 8})
        rig.side.absorb([], [], {"r": 2})
        assert not rig.side.ended("r")
        assert rig.step().forgotten == ("r",)

    def test_a_request_that_ends_while_loading_is_kept_by_the_load_alone(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.side.known(request)
        rig.step({"r": 18})  # Saves that nobody has reported yet,
        rig.step(preempted=("r",))
        rig.hold(request, 3)
        rig.load(request)
        assert not rig.side.ended("r")
        assert rig.store.leases == {}
        rig.side.absorb(["r"], [100], {"r": 1})

    def test_a_preempted_request_asks_again_and_saves_what_is_missing(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.side.known(request)
        rig.step({"r": 18})
        rig.hold(request, 2)
        assert rig.step(preempted=("r",)).preempted == ("r",)
        assert rig.side.lookup(request, 0) == (8, True)
        rig.side.allocated(request, list(range(100, 200)), 8)
        rig.step()
        rig.side.absorb(["r"], [], {})
        request.num_computed_tokens = 8
        (job,) = rig.step({"r": 10}).saves
        assert job.start == 2

    def test_after_a_reset_nothing_from_before_is_found_or_saved(self) -> None:
        rig = Rig()
        request, fresh = FakeRequest("r", tokens(18)), FakeRequest("fresh", tokens(18))
        rig.hold(request, 3)
        rig.side.lookup(request, 0)
        rig.side.reset()
        assert rig.store.leases == {}
        assert rig.step({"r": 18}).saves == ()
        assert rig.side.lookup(request, 0) == (0, False)
        assert rig.side.lookup(fresh, 0) == (0, False)
        assert rig.tally.take()["lookups:before_reset"] == 1
        (job,) = rig.step({"fresh": 18}).saves
        assert job.hashes[:16] not in {name for _, name in rig.store.blocks}

    def test_closing_gives_leases_back(self) -> None:
        rig = Rig()
        request = FakeRequest("r", tokens(18))
        rig.hold(request, 3)
        rig.side.lookup(request, 0)
        rig.side.close()
        assert rig.store.leases == {}
        assert rig.store.closed
