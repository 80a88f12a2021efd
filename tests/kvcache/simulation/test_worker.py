"""One worker: what a prompt and an answer take, and what its caches keep."""

from __future__ import annotations

from array import array
from random import Random

import pytest

from kvcache.simulation.cache import BlockCache, TailLru
from kvcache.simulation.policy_cache import PolicyCache, depths
from kvcache.simulation.service import Service
from kvcache.simulation.worker import HBM, HOST, Told, Worker
from kvcache.simulation.workload import Job, name_of

BLOCK = 100
SERVICE = Service(prompt_s=1, token_s=0.01, pair_s=0, load_s=0.001, chunk_tokens=100, step_s=0.1,
                  sequence_step_s=0, context_step_s=0, slots=2)  # fmt: skip
PARENTS = array("i", [-1, 0, 1, 2, 1, 4, -1, 6, 7])


def path(leaf: int) -> tuple[int, ...]:
    return (*path(PARENTS[leaf]), leaf) if leaf >= 0 else ()


def job(number: int, leaf: int, answer: int = 1) -> Job:
    blocks = path(leaf)
    names = array("Q", map(name_of, blocks))
    return Job(number, 0.0, blocks, names, len(blocks) * BLOCK + 1, answer, -(-answer // BLOCK), -1)


def worker(capacity: int = 20, host: int = 0) -> Worker:
    return Worker(0, SERVICE, BLOCK, TailLru(capacity), TailLru(host) if host else None)


def compute(at: Worker, one: Job, now_s: float = 0.0) -> float:
    """Seconds that its prompt takes on a worker that computes no other."""
    at.submit(one)
    done_s = at.start(now_s, Told())
    assert done_s is not None
    at.computed(done_s, Told())
    return done_s - now_s


def test_only_what_is_not_cached_is_computed() -> None:
    at = worker()
    assert compute(at, job(0, 3)) == pytest.approx(1 + 401 * 0.01)
    assert compute(at, job(1, 3), 10) == pytest.approx(1 + 1 * 0.01)
    assert compute(at, job(2, 5), 20) == pytest.approx(1 + 201 * 0.01)


def test_one_prompt_after_the_other_in_order() -> None:
    at = worker()
    first, second = job(0, 3), job(1, 8)
    at.submit(first)
    at.submit(second)
    done_s = at.start(0, Told())
    assert done_s is not None and at.start(0, Told()) is None
    assert at.computed(done_s, Told()) is first
    assert at.start(done_s, Told()) is not None and not at.waiting()


def test_answers_advance_together_and_a_prompt_holds_them_up() -> None:
    at = worker()
    compute(at, job(0, 3, answer=11), 0)  # Until 5.01 s; ten more tokens to say.
    assert at.next_end_s() == pytest.approx(5.01 + 10 * 0.1)
    at.submit(job(1, 8, answer=3))  # 301 tokens: four chunks, and a step of decode behind each.
    done_s = at.start(5.51, Told())
    assert done_s == pytest.approx(5.51 + 1 + 3.01 + 4 * 0.1)
    chunk_s = (1 + 3.01) / 4
    assert at.next_end_s() == pytest.approx(5.51 + 5 * (0.1 + chunk_s))
    at.computed(done_s, Told())  # After four of those steps; two more tokens of the second, one of the first.
    assert at.next_end_s() == pytest.approx(done_s + 0.1)
    assert [each.number for each in at.ended(done_s + 0.1)] == [0]
    assert at.next_end_s() == pytest.approx(done_s + 0.2)


def test_no_more_run_than_there_are_slots() -> None:
    at = worker()
    for number in range(2):
        compute(at, job(number, 3, answer=50), number * 10.0)
    at.submit(job(2, 3, answer=50))
    assert at.start(30, Told()) is None
    assert at.ended(1e6) and at.start(1e6, Told()) is not None


def test_a_prompt_waits_for_room_that_is_in_use() -> None:
    at = worker(capacity=6)
    compute(at, job(0, 3, answer=150), 0)  # Four blocks, and two for its answer.
    at.submit(job(1, 8))
    assert at.start(6, Told()) is None
    at.check()
    told = Told()
    at.ended(1e6)
    assert at.start(1e6, told) is not None
    assert told.removed == [(HBM, [3, 2])]  # The last first, and no more than is wanted.
    at.check()


def test_host_memory_is_loaded_from() -> None:
    at = worker(capacity=5, host=20)
    compute(at, job(0, 3))
    compute(at, job(1, 8), 10)
    assert at.cache.match(path(3)) == 1 and at.match(path(3)) == 4
    told = Told()
    again = job(2, 3)
    at.submit(again)
    done_s = at.start(20, told)
    assert done_s == pytest.approx(20 + 1 + 1 * 0.01 + 300 * 0.001)
    assert (again.hit, again.loaded) == (4, 3)
    at.computed(done_s, told)
    assert [(tier, list(blocks), before) for tier, blocks, before in told.stored] == [(HBM, [1, 2, 3], 1)]
    assert at.host is not None and sorted(at.host.content()) == [0, 1, 2, 3, 6, 7, 8]
    assert not any(tier == HOST for tier, _ in told.removed)


def test_one_that_goes_down_gives_back_all_and_keeps_nothing() -> None:
    at = worker()
    compute(at, job(0, 3, answer=50))
    for number in (1, 2):
        at.submit(job(number, 8))
    at.start(6, Told())
    assert sorted(each.number for each in at.kill(7)) == [0, 1, 2]
    assert at.match(path(3)) == 0 and not at.cache.content() and at.next_end_s() is None
    at.check()


def policy_cache(capacity: int) -> BlockCache:
    return PolicyCache(capacity, "leaf-lru", PARENTS, depths(PARENTS))


@pytest.mark.parametrize("make", [TailLru, policy_cache])
def test_a_cache_keeps_prefixes_whole_under_any_use(make: type[TailLru]) -> None:
    random, cache = Random(5), make(7)
    running: list[tuple[int, ...]] = []
    for _ in range(2_000):
        if running and random.random() < 0.5:
            cache.finish(running.pop(random.randrange(len(running))), 1)
        else:
            blocks = path(random.randrange(len(PARENTS)))
            hit = cache.match(blocks)
            if cache.begin(blocks, hit, 1, 0.0) is not None:
                assert cache.commit(blocks, hit, 0.0) == blocks[hit:]
                running.append(blocks)
        cache.check()
        cached = set(cache.content())
        assert all(block in cached for blocks in running for block in blocks)
        assert all(PARENTS[block] in cached for block in cached if PARENTS[block] >= 0)
        for leaf in range(len(PARENTS)):
            blocks = path(leaf)
            assert cache.match(blocks) == next(
                (at for at, block in enumerate(blocks) if block not in cached), len(blocks)
            )
