"""The contract of an index of leading blocks (``kvcache.index.Index``): what every one of them passes."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcache.errors import BadInput
from kvcache.index import RUN_BLOCKS_MAX, TIER_COUNT, Index
from kvcache.testing.index_model import BYTES_MAX, IndexPair, answers, blocks, path, random_step


class IndexContract:
    """Subclass it with ``make``; every index passes."""

    make: ClassVar[Callable[[int], Index]]

    def pair(self) -> IndexPair:
        return IndexPair(type(self).make(BYTES_MAX))

    def test_an_empty_index_and_an_empty_query(self) -> None:
        pair = self.pair()
        pair.compare(path(range(5)))
        pair.open(1)
        pair.compare([])
        pair.check()

    def test_a_hole_and_its_refill(self) -> None:
        pair, prompt = self.pair(), path(range(64))
        holder = pair.open(7)
        pair.store(holder, 0, prompt)
        pair.remove(holder, 0, prompt[11:12])
        assert pair.index.match(blocks(prompt)).as_dict() == {(7, 0): 11}
        pair.store(holder, 0, prompt[11:12], prompt[10])
        assert pair.index.match(blocks(prompt)).as_dict() == {(7, 0): 64}
        pair.remove(holder, 0, prompt[40:])
        pair.compare(prompt)
        pair.check()

    def test_many_holes_all_refilled(self) -> None:
        pair, prompt = self.pair(), path([1] * 200)
        holders = [pair.open(worker) for worker in range(8)]
        for holder in holders:
            pair.store(holder, 0, prompt)
        holes = [(holder, place) for holder in holders for place in range(holder % 7, 200, 9)]
        for holder, place in holes:
            pair.remove(holder, 0, prompt[place : place + 1])
            pair.compare(prompt)
        for holder, place in holes:
            pair.store(holder, 0, prompt[place : place + 1])
        assert set(pair.index.match(blocks(prompt)).blocks) == {200}
        pair.check()
        assert pair.index.stats()["spans"] == 1

    def test_a_child_before_its_parent(self) -> None:
        pair, prompt = self.pair(), path(range(64))
        holder = pair.open(7)
        pair.store(holder, 0, prompt[32:], prompt[31])
        pair.compare(prompt)
        pair.store(holder, 0, prompt[:32])
        assert list(pair.index.match(blocks(prompt)).blocks) == [64]
        pair.check()

    def test_tiers_interleaved_inside_one_prefix(self) -> None:
        pair, prompt = self.pair(), path(range(48))
        holder = pair.open(7, 3)
        pair.store(holder, 0, prompt[:16])
        pair.store(holder, 1, prompt[16:32], prompt[15])
        pair.store(holder, 0, prompt[32:], prompt[31])
        pair.store(holder, 1, prompt[40:44])
        found = pair.index.match(blocks(prompt))
        assert (list(found.workers), list(found.dp_ranks), list(found.blocks)) == ([7], [3], [48])
        assert [list(found.tier(tier)) for tier in range(4)] == [[32], [20], [0], [0]]
        assert list(pair.index.match(blocks(prompt), tiers=1).blocks) == [16]
        pair.compare(prompt[10:])

    def test_the_same_middle_and_end_under_another_root_is_another_prompt(self) -> None:
        pair = self.pair()
        one, other = path([0] * 8 + [1] * 64 + [2] * 56), path([0] * 8 + [3] * 64 + [2] * 56)
        pair.store(pair.open(1), 0, one)
        assert pair.index.match(blocks(other)).as_dict() == {(1, 0): 8}

    def test_a_new_generation_starts_empty_and_fences_the_old_one_off(self) -> None:
        pair, prompt = self.pair(), path(range(20))
        old = pair.open(5)
        pair.store(old, 0, prompt)
        new = pair.open(5)
        pair.compare(prompt)
        with pytest.raises(BadInput, match="bad_holder"):
            pair.index.store(old, 0, blocks(prompt))
        pair.store(new, 0, prompt[:4])
        pair.compare(prompt)
        pair.check()

    def test_a_shadow_is_loaded_while_the_old_one_answers(self) -> None:
        pair, prompt = self.pair(), path(range(20))
        pair.store(pair.open(5), 0, prompt[:8])
        shadow = pair.open(5, shadow=True)
        pair.store(shadow, 0, prompt)
        assert pair.index.match(blocks(prompt)).as_dict() == {(5, 0): 8}
        pair.serve(shadow)
        assert pair.index.match(blocks(prompt)).as_dict() == {(5, 0): 20}
        pair.check()

    def test_everything_gone_leaves_nothing(self) -> None:
        pair = self.pair()
        empty = pair.index.bytes
        for worker in range(20):
            pair.store(pair.open(worker), worker % 4, path([worker % 3] * (50 + worker)))
        for holder in list(pair.model.held):
            pair.close(holder)
        pair.check()
        assert {*pair.index.stats().values()} == {0}
        assert pair.index.bytes < empty + 300_000  # Rows, chains' headers and empty tables stay.

    def test_what_is_held_comes_as_runs_in_prefix_order(self) -> None:
        pair = self.pair()
        root, one, other = path([0] * 40), path([0] * 40 + [1] * 30)[40:], path([0] * 40 + [2] * 20)[40:]
        first, second = pair.open(1), pair.open(2)
        for at in range(0, 40, 10):
            pair.store(first, 0, root[at : at + 10], root[at - 1] if at else None)
        pair.store(first, 0, one, root[-1])
        pair.store(first, 0, other, root[-1])
        pair.store(second, 0, root[5:25])
        assert self.runs(pair, first) == sorted([root + one, other])
        assert self.runs(pair, second) == [root[5:25]]
        pair.remove(first, 0, [*root[8:10], root[3]])
        assert self.runs(pair, first) == sorted([root[:3], root[4:8], root[10:] + one, other])
        pair.store_loose(first, 1, other[:2])
        assert self.runs(pair, first, 1) == [other[:2]]  # Known already as blocks that follow one another.
        pair.store_loose(first, 1, path([7, 7, 7]))
        assert len(self.runs(pair, first, 1)) == 4
        assert self.runs(pair, first, 2) == []
        with pytest.raises(BadInput, match="bad_holder"):
            pair.index.runs(first, TIER_COUNT)

    def test_long_runs_are_cut(self) -> None:
        index, long = type(self).make(BYTES_MAX), blocks(range(1, 2 * RUN_BLOCKS_MAX + 4))
        holder = index.open(1)
        index.store(holder, 0, long)
        hashes, lengths = index.runs(holder, 0)
        assert list(hashes) == list(long)
        assert list(lengths) == [RUN_BLOCKS_MAX, RUN_BLOCKS_MAX, 3]
        assert index.store_runs(index.open(2), 0, hashes, lengths) == 0
        assert index.stats()["spans"] == 1

    def test_runs_that_are_none_are_refused(self) -> None:
        index, prompt = type(self).make(BYTES_MAX), blocks(path(range(6)))
        holder = index.open(1)
        for lengths in ((5,), (6, 1), ()):
            with pytest.raises(BadInput, match="bad_prefix"):
                index.store_runs(holder, 0, prompt, array("H", lengths))
        with pytest.raises(BadInput, match="bad_holder"):
            index.store_runs(holder + 1, 0, b"", b"")
        assert index.stats()["members"] == 0

    @staticmethod
    def runs(pair: IndexPair, holder: int, tier: int = 0) -> list[list[int]]:
        hashes, lengths = pair.index.runs(holder, tier)
        ends = [0, *accumulate(lengths)]
        return sorted(list(hashes[start:end]) for start, end in pairwise(ends))

    def test_hundreds_of_holders_each_ending_elsewhere(self) -> None:
        pair, prompt = self.pair(), path([1] * 300)
        for worker in range(200):
            pair.store(pair.open(worker), 0, prompt[: 50 + worker])
        pair.compare(prompt)
        pair.compare(prompt[:130])

    def test_only_candidates_and_only_the_best(self) -> None:
        pair, prompt = self.pair(), path([1] * 30)
        for worker in (3, 70_000, (1 << 32) - 1):
            for rank in range(3):
                pair.store(pair.open(worker, rank), rank, prompt[: 5 + 5 * rank])
        for candidates in ([], [3], [70_000, 5], [(1 << 32) - 1, 3, 3], range(4)):
            for limit in (0, 1, 2, 4, 9):
                pair.compare_chosen(prompt, candidates, limit)
        found = pair.index.match(blocks(prompt), limit=4)
        assert list(zip(found.workers, found.dp_ranks, found.blocks, strict=True)) == [
            (3, 2, 15),
            (70_000, 2, 15),
            ((1 << 32) - 1, 2, 15),
            (3, 1, 10),
        ]
        with pytest.raises(BadInput, match="bad_prefix"):
            pair.index.match(blocks(prompt), candidates=blocks([3]))

    def test_many_queries_in_one_call(self) -> None:
        pair = self.pair()
        prompts = [path([0, 1, choice, *range(choice)]) for choice in range(9)]
        for worker, prompt in enumerate(prompts[:5]):
            pair.store(pair.open(worker), 0, prompt)
        joined = blocks(block for prompt in prompts for block in prompt)
        ends = blocks(sum(map(len, prompts[: at + 1])) for at in range(len(prompts)))
        found = pair.index.match_many(joined, ends)
        width, start = 3 + TIER_COUNT, 0
        for prompt, end in zip(prompts, found.ends, strict=True):
            assert answers(found.table[start * width : end * width]) == pair.model.match(prompt, 15)
            start = end
        with pytest.raises(BadInput, match="bad_prefix"):
            pair.index.match_many(joined, blocks([3, 2]))
        with pytest.raises(BadInput, match="bad_prefix"):
            pair.index.match_many(joined, blocks([len(joined) + 1]))

    def test_buffers_of_other_things_are_refused(self) -> None:
        pair, prompt = self.pair(), path(range(4))
        holder = pair.open(1)
        pair.store(holder, 0, prompt)
        raw = blocks(prompt).tobytes()
        for same in (raw, bytearray(raw), memoryview(raw), memoryview(b"x" + raw)[1:], array("q", raw)):
            assert list(pair.index.match(same).blocks) == [4]
        for wrong in (array("d", [1.0]), array("I", [1, 2]), raw[:7], memoryview(blocks(prompt))[::2]):
            with pytest.raises(BadInput, match="bad_prefix"):
                pair.index.match(wrong)
        with pytest.raises(TypeError):
            pair.index.match(prompt)  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="bad_holder"):
            pair.index.store(holder, TIER_COUNT, raw)
        with pytest.raises(BadInput, match="bad_holder"):
            pair.index.digest(holder + 1, 0)

    def test_memory_is_bounded_and_comes_back(self) -> None:
        index = type(self).make(1 << 20)
        holder = index.open(1)
        refused, held = 0, set()
        for number in range(2_000):
            prompt = path([number % 251, number // 251] + [0] * 30)
            over = index.store(holder, 0, blocks(prompt))
            held.update(prompt[: len(prompt) - over])
            refused += over
            assert index.bytes <= index.bytes_max == 1 << 20
        assert 0 < refused < 2_000 * 32
        assert index.digest(holder, 0)[0] == len(held)
        index.check()
        index.clear(holder, 0)
        assert index.store(holder, 0, blocks(path([9] * 32))) == 0

    @pytest.mark.parametrize("as_runs", [False, True])
    def test_what_is_refused_are_the_last_blocks(self, as_runs: bool) -> None:
        index, generator = type(self).make(600_000), random.Random(5)
        holder, refusals = index.open(1), 0
        while refusals < 4:
            told = array("Q", [generator.getrandbits(64) for _ in range(600)])
            if as_runs:
                refused = index.store_runs(holder, 0, told, array("H", [200] * 3))
            else:
                refused = index.store(holder, 0, told)
            held = set(index.held(holder, 0))
            assert [block in held for block in told] == [True] * (600 - refused) + [False] * refused
            refusals += refused > 0
        index.check()

    def test_a_run_that_is_cut_up_stays_within_the_bound(self) -> None:
        """Each block that another holds too is a span of its own, and a chain's spans grow by doubling."""
        generator = random.Random(4)
        told = array("Q", [generator.getrandbits(64) for _ in range(20_000)])
        index = type(self).make(600_000)
        one, other = index.open(1), index.open(2)
        held = len(told) - index.store(one, 0, told)
        for at in range(0, held, 2):
            if index.store(other, 0, told[at : at + 1]):
                break
            assert index.bytes <= index.bytes_max
        else:
            pytest.fail("all of it fitted")
        index.check()

    def test_churn_leaves_no_growth(self) -> None:
        pair, generator = self.pair(), random.Random(3)
        holders = [pair.open(worker) for worker in range(4)]
        kept: list[tuple[int, list[int]]] = []
        sizes = []
        for turn in range(800):
            holder = generator.choice(holders)
            kept.append((holder, path([turn % 3, turn % 256, turn // 256] + [0] * generator.randrange(20))))
            pair.store(holder, 0, kept[-1][1])
            if len(kept) > 100:
                holder, prompt = kept.pop(0)
                needed = {block for other, blocks in kept if other == holder for block in blocks}
                pair.remove(holder, 0, [block for block in prompt if block not in needed])
            sizes.append(pair.index.bytes)
        pair.check()
        assert max(sizes[400:]) <= 1.15 * max(sizes[:400])

    @pytest.mark.parametrize("seed", range(6))
    def test_random_events_and_questions(self, seed: int) -> None:
        pair, generator = self.pair(), random.Random(seed)
        for step in range(250):
            random_step(pair, generator, 6 << seed % 4)
            if step % 50 == 0:
                pair.check()
            if step == 200:
                pair.reload(type(self).make(BYTES_MAX))
        pair.check()

    def test_any_order_of_events(self) -> None:
        maker = type(self).make

        class Machine(IndexMachine):
            make = maker

        run_state_machine_as_test(
            Machine, settings=settings(max_examples=15, stateful_step_count=30, deadline=None, database=None)
        )


CHOICES = st.lists(st.integers(0, 1), max_size=12)


class IndexMachine(RuleBasedStateMachine):
    make: ClassVar[Callable[[int], Index]]

    def __init__(self) -> None:
        super().__init__()
        self.pair = IndexPair(type(self).make(BYTES_MAX))

    def holder(self, number: int) -> int:
        return list(self.pair.model.held)[number % len(self.pair.model.held)]

    @rule(worker=st.integers(0, 3), rank=st.integers(0, 1), shadow=st.booleans())
    def open(self, worker: int, rank: int, shadow: bool) -> None:
        self.pair.open(worker, rank, shadow)

    @precondition(lambda self: self.pair.model.held)
    @rule(number=st.integers(0, 7))
    def serve(self, number: int) -> None:
        self.pair.serve(self.holder(number))

    @precondition(lambda self: self.pair.model.held)
    @rule(number=st.integers(0, 7))
    def close(self, number: int) -> None:
        self.pair.close(self.holder(number))

    @precondition(lambda self: self.pair.model.held)
    @rule(number=st.integers(0, 7), tier=st.integers(0, 3), choices=CHOICES, first=st.integers(0, 12))
    def store(self, number: int, tier: int, choices: list[int], first: int) -> None:
        prompt = path(choices)
        parent = prompt[first - 1] if 0 < first <= len(prompt) else None
        self.pair.store(self.holder(number), tier, prompt[first:], parent)

    @precondition(lambda self: self.pair.model.held)
    @rule(number=st.integers(0, 7), tier=st.integers(0, 3), choices=CHOICES, keep=st.sets(st.integers(0, 11)))
    def remove(self, number: int, tier: int, choices: list[int], keep: set[int]) -> None:
        gone = [block for place, block in enumerate(path(choices)) if place not in keep]
        self.pair.remove(self.holder(number), tier, gone)

    @rule(choices=CHOICES, tiers=st.integers(0, 15))
    def match(self, choices: list[int], tiers: int) -> None:
        self.pair.compare(path(choices), tiers)

    @rule(choices=CHOICES, candidates=st.sets(st.integers(0, 5)), limit=st.integers(0, 3))
    def match_some(self, choices: list[int], candidates: set[int], limit: int) -> None:
        self.pair.compare_chosen(path(choices), sorted(candidates), limit)

    @invariant()
    def check(self) -> None:
        self.pair.check()
