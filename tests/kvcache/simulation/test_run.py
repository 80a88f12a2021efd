"""The simulator as a whole: nothing is lost, nothing is had for free, and what is told arrives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcache.errors import BadInput
from kvcache.simulation.feed import Stream
from kvcache.simulation.report import figures
from kvcache.simulation.run import ROUTERS, Run, Settings, Simulation, simulate
from kvcache.simulation.worker import HBM, HOST
from kvcache.simulation.workload import Workload
from tests.kvcache.simulation.made import made

TIGHT = Settings(workers=3, capacity=520, down_s=2.0)
AT_ONCE = replace(TIGHT, stream=Stream(delay_s=0))


@pytest.fixture(scope="module")
def workload() -> Workload:
    return made()


def served_once(workload: Workload, run: Run) -> None:
    for job in run.jobs:
        assert 0 <= job.arrival_s < job.first_s <= job.finish_s
        assert 0 <= job.used <= len(job.path)
    assert sum(job.used for job in run.jobs) <= sum(workload.ideals)
    assert run.choices == len(run.jobs) + sum(job.resent for job in run.jobs)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_served_once_and_no_hit_is_for_free(router: str) -> None:
    small = made(120)
    served_once(small, simulate(small, router, TIGHT, check=True))


@pytest.mark.parametrize("policy", ["leaf-lru", "leaf-fifo"])
def test_a_policy_of_the_registry_keeps_the_same_rules(policy: str) -> None:
    small = made(120)
    run = simulate(small, "exact", replace(TIGHT, policy=policy), check=True)
    served_once(small, run)
    assert sum(job.used for job in run.jobs) > 0


def test_leaf_lru_is_what_tail_first_lru_does(workload: Workload) -> None:
    """The two differ in what is older of blocks that one request used and another's end let go."""
    hits = [
        figures(workload, settings, simulate(workload, "round-robin", settings)).hit_blocks
        for settings in (TIGHT, replace(TIGHT, policy="leaf-lru"))
    ]
    assert hits[0] == pytest.approx(hits[1], rel=0.05)


@pytest.mark.parametrize("router", ["exact", "exact-default"])
@pytest.mark.parametrize("restarts", [0, 4])
def test_without_delay_an_exact_index_is_never_wrong(workload: Workload, router: str, restarts: int) -> None:
    run = simulate(workload, router, replace(AT_ONCE, restarts=restarts))
    assert all(job.credited == job.truth for job in run.jobs)
    assert any(job.credited for job in run.jobs)


def test_the_same_seed_gives_the_same_figures(workload: Workload) -> None:
    settings = replace(TIGHT, restarts=2, stream=Stream(delay_s=0.05, loss=0.1))
    for router in ("random", "exact"):
        runs = [simulate(workload, router, settings) for _ in range(2)]
        assert figures(workload, settings, runs[0]) == figures(workload, settings, runs[1])
    other = replace(settings, seed=2)
    first, second = (
        figures(workload, each, simulate(workload, "random", each)) for each in (settings, other)
    )
    assert first != second


@pytest.mark.parametrize("router", ["sticky-session", "approximate", "exact"])
def test_what_a_lost_worker_had_is_served_by_others(workload: Workload, router: str) -> None:
    run = simulate(workload, router, replace(TIGHT, restarts=6), check=True)
    served_once(workload, run)
    assert sum(job.resent for job in run.jobs) > 0


def test_requests_wait_while_nobody_is_up() -> None:
    small = made(60)
    run = simulate(small, "exact", Settings(workers=1, capacity=520, restarts=3, down_s=5.0), check=True)
    served_once(small, run)


@pytest.mark.parametrize(
    "stream", [Stream(delay_s=0.5), Stream(delay_s=0.01, loss=0.2), Stream(delay_s=0.0, loss=0.3)]
)
@pytest.mark.parametrize("host_blocks", [0, 900])
def test_after_all_has_arrived_the_index_is_what_the_workers_hold(
    workload: Workload, stream: Stream, host_blocks: int
) -> None:
    settings = replace(TIGHT, stream=stream, restarts=2, host_blocks=host_blocks)
    simulation = Simulation(workload, "exact", settings)
    run = simulation.run()
    feed = simulation.feed
    assert feed is not None and run.refused_blocks == 0
    assert (run.lost_batches > 0) == (run.resyncs > 0) == (stream.loss > 0)
    assert not any(feed.suspect)
    for worker in simulation.workers:
        tiers = [(HBM, worker.cache)] + ([(HOST, worker.host)] if worker.host is not None else [])
        for tier, cache in tiers:
            names = {workload.block_names[block] for block in cache.content()}
            assert set(feed.held(worker.number, tier)) == names


def credit(run: Run) -> tuple[int, int]:
    """Blocks over and under."""
    gaps = [job.credited - job.truth for job in run.jobs]
    return sum(max(0, gap) for gap in gaps), sum(max(0, -gap) for gap in gaps)


@pytest.mark.parametrize("router", ["exact-default", "exact"])
def test_late_lost_and_interrupted_events_are_seen_in_what_is_credited(
    workload: Workload, router: str
) -> None:
    quiet = replace(TIGHT, stream=Stream(delay_s=0))
    assert credit(simulate(workload, router, quiet)) == (0, 0)
    late = credit(simulate(workload, router, replace(TIGHT, stream=Stream(delay_s=20))))
    lossy = credit(simulate(workload, router, replace(TIGHT, stream=Stream(delay_s=0, loss=0.5))))
    torn = credit(simulate(workload, router, replace(TIGHT, stream=Stream(delay_s=20), restarts=6)))
    assert min(late) > 0 and sum(lossy) > 0 and torn != late


def test_a_router_without_events_believes_in_what_a_lost_worker_had(workload: Workload) -> None:
    over = [credit(simulate(workload, "approximate", replace(TIGHT, restarts=n)))[0] for n in (0, 6)]
    assert over[1] > over[0]


def test_host_memory_saves_computing_and_takes_time(workload: Workload) -> None:
    settings = replace(AT_ONCE, capacity=300)
    alone = simulate(workload, "exact", settings)
    both = simulate(workload, "exact", replace(settings, host_blocks=4_000))
    assert sum(job.loaded for job in alone.jobs) == 0
    assert sum(job.loaded for job in both.jobs) > 0
    assert sum(job.used for job in both.jobs) > sum(job.used for job in alone.jobs)
    assert all(job.credited == job.truth for job in both.jobs)


def test_what_cannot_be_simulated_is_said(workload: Workload) -> None:
    with pytest.raises(BadInput, match="no router is called 'best'"):
        simulate(workload, "best", TIGHT)
    with pytest.raises(BadInput, match="the largest request"):
        simulate(workload, "random", replace(TIGHT, capacity=10))
    for change in ({"workers": 0}, {"capacity": 0}, {"stream": Stream(loss=1.5)}, {"down_s": -1}):
        with pytest.raises(BadInput, match="is possible"):
            replace(TIGHT, **change)  # type: ignore[arg-type]


@pytest.mark.slow
def test_looking_at_what_is_cached_pays_and_so_does_weighing_it() -> None:
    """The ordering that the comparison is for, on a service that is busy but not overrun."""
    busy = made(2_500, speed=3.4, turns=8, question_tokens=700, one_shot_tokens=4_000)
    settings = Settings(workers=8, capacity=1_500)
    found = {router: figures(busy, settings, simulate(busy, router, settings)) for router in ROUTERS}
    ours = found["exact"]
    for blind in ("random", "round-robin", "least-loaded"):
        assert ours.hit_tokens > 1.3 * found[blind].hit_tokens
        assert ours.ttft_p99 < 0.8 * found[blind].ttft_p99
    for rival in ("sticky-prefix", "approximate", "exact-default"):
        assert ours.ttft_p99 < found[rival].ttft_p99
    for rival in ("approximate", "exact-default"):
        assert ours.hit_tokens > found[rival].hit_tokens
    assert found["sticky-prefix"].imbalance > ours.imbalance
    assert ours.ttft_p99 < 1.5 * found["oracle"].ttft_p99
