"""Policies beside leaf-lru: what each finds more, the worst that it finds less, and what it costs.

    .venv/bin/python benchmarks/bench_policy.py [TRACE ...] [--capacity 1,3,10,30] [--policy leaf-hazard,...]

``gain``: points of prefix-token hit above ``leaf-lru``; its ``ratio`` is the share of the gap between that
and the optimum (Belady's MIN). ``worst``: the least gain of all sizes and traces, those included that
teach nothing: requests made up with memoryless gaps, and each trace with all its requests at one instant.
``time``: of one core, for a request, the replay included; its ``ratio`` is to leaf-lru in the same run.
Without traces, the published ones beside the project, and else one is generated.

On paper: to choose what goes, leaf-hazard ranks 20 leaves at 1 us, and some 20 dictionary look-ups a block
that comes and goes cost 2 us: 70 us a request of 24 new blocks, where leaf-lru takes 20 with the replay.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Also where the project is not installed.

import harness
from bench_replay import traces
from harness import Figure

from kvcache.eviction.simulate.replay import BELADY, replay
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate

ROUNDS, QUICK_ROUNDS = 5, 1
QUICK_BLOCKS = 1_000_000
USUAL = "leaf-lru"
SEEDS = (7, 8, 9)
ONE_INSTANT_MS = 5
CLEAR = 1e-4


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--capacity", default="1,3,10,30", help="in per cent of the trace's blocks")
    parser.add_argument("--policy", default="leaf-hazard,leaf-arc")
    parsed = parser.parse_args(arguments)
    chosen = harness.choose(parsed)
    percents = [float(percent) for percent in parsed.capacity.split(",")]
    policies = parsed.policy.split(",")
    figures: list[Figure] = []
    least = dict.fromkeys(policies, (float("inf"), ""))
    for name, forest in traces(parsed.traces):
        if chosen.quick and _accesses(forest) > QUICK_BLOCKS:
            continue
        for each, part in ((name, forest), (f"{name}.one-instant", one_instant(forest))):
            figures += gains(each, part, policies, percents, least)
        figures += times(name, forest, policies, percents, chosen.rounds(ROUNDS, QUICK_ROUNDS))
    for seed in SEEDS:
        made = Forest(generate(Workload(request_count=4_000, seed=seed)))
        figures += gains(f"made-{seed}", made, policies, percents, least)
    machine = harness.machine()
    for policy, (points, cell) in least.items():
        figures.append(Figure(f"worst.{policy}", points, f"points ({cell})", None, "", 1, machine))
    harness.report(figures, chosen)


def one_instant(forest: Forest) -> Forest:
    """The same requests in the same order, and no time passes."""
    count = forest.trace.request_count
    return Forest(replace(forest.trace, arrivals_ms=array("q", [ONE_INSTANT_MS]) * count))


def gains(
    name: str,
    forest: Forest,
    policies: Sequence[str],
    percents: Sequence[float],
    least: dict[str, tuple[float, str]],
) -> Iterator[Figure]:
    """``least``: of each policy, its least gain so far and where that was."""
    machine = harness.machine()
    for percent in percents:
        blocks = _blocks(forest, percent)
        usual, best = (replay(forest, policy, blocks).prefix_token_hit_ratio for policy in (USUAL, BELADY))
        for policy in policies:
            more = replay(forest, policy, blocks).prefix_token_hit_ratio - usual
            cell = f"{name}.{percent:g}%"
            least[policy] = min(least[policy], (100 * more, cell))
            share = more / (best - usual) if best - usual > CLEAR else None
            title = f"{name}.gain.{policy}.{percent:g}%"
            yield Figure(title, 100 * more, "points", share, "the gap", 1, machine)


def times(
    name: str, forest: Forest, policies: Sequence[str], percents: Sequence[float], rounds: int
) -> Iterator[Figure]:
    machine = harness.machine()
    for percent in percents:
        blocks = _blocks(forest, percent)
        taken = harness.interleaved(
            {policy: partial(taken_us, forest, policy, blocks) for policy in (USUAL, *policies)}, rounds
        )
        for policy in policies:
            ratio = harness.compare(taken, policy, USUAL)
            middle = sorted(taken[policy])[rounds // 2]
            title = f"{name}.time.{policy}.{percent:g}%"
            yield Figure(title, middle, "us a request", ratio, USUAL, rounds, machine)


def taken_us(forest: Forest, policy: str, blocks: int) -> float:
    """Of a processor, for a request."""
    start = time.process_time()
    replay(forest, policy, blocks)
    return (time.process_time() - start) / forest.trace.request_count * 1e6


def _blocks(forest: Forest, percent: float) -> int:
    return max(1, int(forest.trace.block_count * percent / 100 + 1e-9))


def _accesses(forest: Forest) -> int:
    return sum(forest.depth[leaf] for leaf in forest.trace.leaves if leaf >= 0)


if __name__ == "__main__":
    main()
