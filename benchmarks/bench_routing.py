"""What a way of routing is worth: the time to the first token (99th percentile), ours beside each rival's.

    .venv/bin/python benchmarks/bench_routing.py [TRACE ...] [--workers 16] [--speed 4]

A simulation (docs/routing-simulation.md), so the figures are the same on every machine; ``ratio`` is the
rival's time over ours, or our hit rate over its. Without a trace, one is generated. Only how many choices a
second the router makes is measured, with the index's look-up, and depends on the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Also where the project is not installed.

import harness
from harness import Figure

from kvcache.cli_simulate import MADE
from kvcache.eviction.traces.files import open_trace
from kvcache.eviction.traces.generate import generate
from kvcache.simulation.report import Figures, figures
from kvcache.simulation.run import OURS, ROUTERS, Settings, simulate
from kvcache.simulation.workload import Workload, prepare

QUICK_REQUESTS = 1_500
NO_RIVALS = (OURS, "oracle")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--speed", type=float, default=4.0)
    parsed = parser.parse_args(arguments)
    chosen = harness.choose(parsed)
    count = QUICK_REQUESTS if chosen.quick else 0
    found: list[Figure] = []
    for workload in workloads(parsed.traces, parsed.speed, count):
        found += compared(workload, Settings(workers=parsed.workers))
    harness.report(found, chosen)


def workloads(paths: Sequence[Path], speed: float, count: int) -> Iterator[Workload]:
    if not paths:
        yield prepare("generated", generate(MADE), speed, count)
    for path in paths:
        yield prepare(path.stem, open_trace(path), speed, count)


def compared(workload: Workload, settings: Settings) -> list[Figure]:
    machine = harness.machine()
    found: dict[str, Figures] = {}
    rate = 0.0
    for router in ROUTERS:
        run = simulate(workload, router, settings)
        found[router] = figures(workload, settings, run)
        if router == OURS:
            rate = run.choices / run.choose_s
    ours, name = found[OURS], workload.name
    rows = [Figure(f"{name}.choices", rate, "a second", None, "", 1, machine)]
    for router, theirs in found.items():
        if router in NO_RIVALS:
            continue
        p99 = theirs.ttft_p99 / ours.ttft_p99
        rows.append(Figure(f"{name}.ttft_p99.{router}", ours.ttft_p99, "s", p99, router, 1, machine))
        hits = ours.hit_tokens / theirs.hit_tokens if theirs.hit_tokens else None
        rows.append(
            Figure(f"{name}.hit_rate.{router}", ours.hit_tokens, "of tokens", hits, router, 1, machine)
        )
    return rows


if __name__ == "__main__":
    main()
