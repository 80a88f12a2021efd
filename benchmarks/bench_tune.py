"""Tuning: how fast the exact curve is, how far estimates are off, and how good advice turns out to be.

    .venv/bin/python benchmarks/bench_tune.py [TRACE ...] [--part speed,estimates,advice]

``speed``: blocks of prompts a second for leaf-lru at every size; its ``ratio`` is to one replay at one size.
``estimates``: how far ``tune mrc`` is off a replay of the whole, in points, the worst of 1, 3, 10 and 30 %.
``advice``: what the setting that is named from the first half finds in the second half; its ``ratio`` is to
the best that trying all finds there. ``below``: how many points it lacks. Without traces, the published ones
beside the project, and else one is generated.

On paper: the curve costs 4 us a request and as much for each run of blocks that were used alike last: some
10 us, so prompts of 24 blocks go at a few million blocks a second, and of 242 at some tens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Also where the project is not installed.

import harness
from bench_replay import traces
from harness import Figure

from kvcache.eviction.advise.advice import Adviser
from kvcache.eviction.simulate.curves import Estimator
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.stack_curve import stack_curve
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.simulate.trial import Machine, Setting, try_setting
from kvcache.eviction.traces.edit import split_by_time

ROUNDS, QUICK_ROUNDS = 5, 1
PERCENTS = (1, 3, 10, 30)
ESTIMATED = ("leaf-hazard", "leaf-arc", "arc-rev", "s3-fifo-rev", "belady")
QUICK_BLOCKS = 1_000_000
PLAIN = ("leaf-lru", "leaf-hazard", "leaf-arc", "leaf-fifo")
SETTINGS = {
    "samples": (0, 32, 256),
    "decay": (0.5, 0.9, 0.95, 1.0),
    "memory": (0, 1, 64),
    "decline": (0, 0.5, 2, 4),
}
PARTS = ("speed", "estimates", "advice")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--part", default=",".join(PARTS))
    parsed = parser.parse_args(arguments)
    chosen = harness.choose(parsed)
    parts = {"speed": speed, "estimates": estimates, "advice": advice}
    figures: list[Figure] = []
    for name, forest in traces(parsed.traces):
        accesses = sum(forest.depth[leaf] for leaf in forest.trace.leaves if leaf >= 0)
        if chosen.quick and accesses > QUICK_BLOCKS:
            continue
        for part in parsed.part.split(","):
            if part != "advice" or not chosen.quick:
                figures += parts[part](name, forest, chosen.rounds(ROUNDS, QUICK_ROUNDS))
    harness.report(figures, chosen)


def speed(name: str, forest: Forest, rounds: int) -> Iterator[Figure]:
    accesses = sum(forest.depth[leaf] for leaf in forest.trace.leaves if leaf >= 0)
    blocks = _blocks(forest, 3)
    rates = harness.interleaved(
        {
            "curve": lambda: accesses / harness.seconds(lambda: stack_curve(forest)) / 1e6,
            "replay": lambda: accesses / harness.seconds(lambda: replay(forest, "leaf-lru", blocks)) / 1e6,
        },
        rounds,
    )
    ratio = harness.compare(rates, "curve", "replay")
    middle = sorted(rates["curve"])[rounds // 2]
    against = "one replay"
    yield Figure(f"{name}.speed", middle, "M blocks/s", ratio, against, rounds, harness.machine())


def estimates(name: str, forest: Forest, rounds: int) -> Iterator[Figure]:
    machine, estimator = harness.machine(), Estimator(forest)
    sizes = [_blocks(forest, percent) for percent in PERCENTS]
    for policy in ESTIMATED:
        errors = [
            estimator.estimate(policy, blocks).prefix_token_hit_ratio
            - replay(forest, policy, blocks).prefix_token_hit_ratio
            for blocks in sizes
        ]
        worst = max(map(abs, errors)) * 100
        yield Figure(f"{name}.off.{policy}", worst, "points", None, "", len(sizes), machine)
    exact = estimator.exact
    errors = [
        estimator.shards(blocks).prefix_token_hit_ratio - exact.prefix_token_hit_ratio(blocks)
        for blocks in sizes
    ]
    yield Figure(f"{name}.off.shards", max(map(abs, errors)) * 100, "points", None, "", len(sizes), machine)


def advice(name: str, forest: Forest, rounds: int) -> Iterator[Figure]:
    machine = harness.machine()
    first, second = (Forest(part) for part in split_by_time(forest.trace, 0.5))
    for percent in PERCENTS:
        adviser = Adviser(first, Machine(_blocks(first, percent)))
        named = adviser.advise(Setting("leaf-lru")).named.setting
        blocks = _blocks(second, percent)
        found = try_setting(second, Machine(blocks), named).ratio()
        best = max(try_setting(second, Machine(blocks), each).ratio() for each in every_setting())
        title = f"{name}.advice.{percent}%"
        yield Figure(title, found, f"of tokens ({named})", found / best if best else None, "best", 1, machine)
        below = (best - found) * 100
        yield Figure(f"{title}.below", below, "points", None, "", 1, machine)


def every_setting() -> Iterator[Setting]:
    yield from map(Setting, PLAIN)
    for name, values in SETTINGS.items():
        yield from (Setting("leaf-hazard").with_(name, value) for value in values)


def _blocks(forest: Forest, percent: float) -> int:
    return max(1, int(forest.trace.block_count * percent / 100 + 1e-9))


if __name__ == "__main__":
    main()
