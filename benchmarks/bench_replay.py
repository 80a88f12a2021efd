"""Replay of traces: what policies find of what can be found, what a lower tier costs, and how fast it goes.

    .venv/bin/python benchmarks/bench_replay.py [TRACE ...] [--capacity 1,3,10,30] [--policy leaf-lru,...]

Hit ratios are the same on every machine; their ``ratio`` is to the optimum (Belady's MIN) at that size. Of
two tiers (1 % of the blocks in memory, 10 % below), ``ratio`` is to what admitting all finds, and to what it
writes, the other way round. Speed is blocks of prompts a second, and its ``ratio`` is to an LRU over single
blocks in the same run. Without traces, the published ones beside the project, and else one is generated.

On paper: a request costs 10 us, and a block that is missing 0.4 us (it is walked, entered, stamped, chosen,
verified and left); what is found costs nothing. The LRU over single blocks takes 0.2 us for every block.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Also where the project is not installed.

import harness
from harness import Figure

from kvcache.cli_simulate import MADE
from kvcache.eviction.admission import parse_admission
from kvcache.eviction.simulate.replay import BELADY, replay
from kvcache.eviction.simulate.spill import Below
from kvcache.eviction.simulate.tiers import replay_tiers
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.files import open_trace
from kvcache.eviction.traces.generate import generate
from kvcache.eviction.traces.trace import Trace

SHARED = Path(__file__).resolve().parents[2] / "shared" / "traces"
ROUNDS, QUICK_ROUNDS = 5, 1
PER_BLOCK = "lru-rev"
RULES = ("touched>=2", "branch-reused", "hazard=30%", "hazard=50%")
QUICK_BLOCKS = 1_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--capacity", default="1,3,10,30", help="in per cent of the trace's blocks")
    parser.add_argument("--policy", default="leaf-lru,leaf-fifo")
    parsed = parser.parse_args(arguments)
    chosen = harness.choose(parsed)
    percents = [float(percent) for percent in parsed.capacity.split(",")]
    figures: list[Figure] = []
    for name, forest in traces(parsed.traces):
        accesses = sum(forest.depth[leaf] for leaf in forest.trace.leaves if leaf >= 0)
        if chosen.quick and accesses > QUICK_BLOCKS:
            continue
        figures += found(name, forest, parsed.policy.split(","), percents)
        figures += below(name, forest)
        figures += speed(name, forest, accesses, percents, chosen.rounds(ROUNDS, QUICK_ROUNDS))
    harness.report(figures, chosen)


def opened(paths: Sequence[Path]) -> Iterator[tuple[str, Trace]]:
    """These, else the published ones, else one that is made up."""
    paths = paths or sorted(SHARED.glob("*.npz"))
    if not paths:
        yield "generated", generate(MADE)
    for path in paths:
        yield path.stem, open_trace(path)


def traces(paths: Sequence[Path]) -> Iterator[tuple[str, Forest]]:
    for name, trace in opened(paths):
        yield name, Forest(trace)


def found(name: str, forest: Forest, policies: Sequence[str], percents: Sequence[float]) -> Iterator[Figure]:
    """Prefix-token hit ratios."""
    machine = harness.machine()
    for percent in percents:
        blocks = _blocks(forest, percent)
        best = replay(forest, BELADY, blocks).prefix_token_hit_ratio
        yield Figure(f"{name}.hit.{BELADY}.{percent:g}%", best, "of tokens", None, "", 1, machine)
        for policy in policies:
            hit = replay(forest, policy, blocks).prefix_token_hit_ratio
            ratio = hit / best if best else None
            yield Figure(f"{name}.hit.{policy}.{percent:g}%", hit, "of tokens", ratio, BELADY, 1, machine)


def below(name: str, forest: Forest) -> Iterator[Figure]:
    machine = harness.machine()
    memory, lower = _blocks(forest, 1), _blocks(forest, 10)
    every = replay_tiers(forest, "leaf-lru", memory, Below(lower))
    hit = every.whole.prefix_token_hit_ratio
    yield Figure(f"{name}.nvme.hit.all", hit, "of tokens", None, "", 1, machine)
    yield Figure(f"{name}.nvme.written.all", every.written_ratio, "a token computed", None, "", 1, machine)
    for rule in RULES:
        some = replay_tiers(forest, "leaf-lru", memory, Below(lower, admission=parse_admission(rule)))
        mine = some.whole.prefix_token_hit_ratio
        ratio = mine / hit if hit else None
        less = every.written_blocks / some.written_blocks if some.written_blocks else None
        yield Figure(f"{name}.nvme.hit.{rule}", mine, "of tokens", ratio, "all", 1, machine)
        written = some.written_ratio
        yield Figure(f"{name}.nvme.written.{rule}", written, "a token computed", less, "all", 1, machine)


def speed(
    name: str, forest: Forest, accesses: int, percents: Sequence[float], rounds: int
) -> Iterator[Figure]:
    machine = harness.machine()
    for percent in percents:
        blocks = _blocks(forest, percent)
        rates = harness.interleaved(
            {
                policy: lambda policy=policy, blocks=blocks: (
                    accesses / replay(forest, policy, blocks).seconds / 1e6
                )
                for policy in ("leaf-lru", PER_BLOCK)
            },
            rounds,
        )
        ratio = harness.compare(rates, "leaf-lru", PER_BLOCK)
        middle = sorted(rates["leaf-lru"])[rounds // 2]
        name_of = f"{name}.speed.leaf-lru.{percent:g}%"
        yield Figure(name_of, middle, "M blocks/s", ratio, PER_BLOCK, rounds, machine)


def _blocks(forest: Forest, percent: float) -> int:
    return max(1, int(forest.trace.block_count * percent / 100 + 1e-9))


if __name__ == "__main__":
    main()
