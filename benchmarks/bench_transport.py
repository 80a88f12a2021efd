"""Blocks from another process: our transports, verified, beside raw sockets, memcpy and other engines.

One round: each contestant brings the same pool of 256 MiB, block by block of one size; they take turns, each
in two processes of its own. Ours check the sum of every chunk within the time, unless their name says not;
of the others only what is called "and sums" does. Then a small read's round trip, and what an endpoint costs
that nobody uses.

    python benchmarks/bench_transport.py [--json] [--quick] [--only 'tcp;nixl'] [--sizes 2MiB] [--lives 3]

Where memory lies differs from process to process, and is worth 20 %; so a full run has several lives: all
contestants are started anew, and rounds of all lives count together. Rivals and their environments are in
``transport_rivals.py``; who cannot be started is a line that says how to install it.

On paper: loopback costs the sender's side 0.2 to 0.4 ms a MiB and the receiver's side less; the sums (30
GB/s) hide there, as do 20 us of Python a chunk of 1 MiB. So tcp should reach 0.9 to 1.0 of the raw socket
from 1 MiB on, and 64 KiB blocks the same, for they go 128 a transfer. Within one host a reader's system call
copies: in pages of 2 MiB at memcpy's speed, in pages of 4 KiB at half of it, for each is pinned by itself.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Protocol

import harness
from harness import KIB, MIB, Figure
from transport_pool import Case, Contestant, python
from transport_rivals import RIVALS, ROOT, interpreter

OURS = ("tcp", "ucx", "nixl", "nixl, huge pages", "nixl, huge pages, not verified")
RAW, RAW_TUNED = "raw socket", "raw socket, send buffer 256 KiB"
MEMCPY, MEMCPY_HUGE, MEMCPY_SUMMED = "memcpy", "memcpy, huge pages", "memcpy and sums, huge pages"
AGAINST = {
    "tcp": (
        RAW,
        RAW_TUNED,
        "nixl tcp read",
        "nixl tcp write",
        "mooncake tcp read",
        "mooncake tcp write",
    ),
    "ucx": (RAW, "ucx_perftest", "ucx_perftest, sleeping"),
    "nixl": (MEMCPY, "nixl cma"),
    "nixl, huge pages": (MEMCPY_HUGE, MEMCPY_SUMMED, "nixl cma, huge pages"),
    "nixl, huge pages, not verified": (MEMCPY_HUGE, "nixl cma, huge pages"),
}
"""The first is on the line of the contestant; every other has a line of its own."""
SIZES = (64 * KIB, 256 * KIB, MIB, 2 * MIB, 8 * MIB, 32 * MIB)
SIZES_QUICK = (2 * MIB,)
ROUNDS, LIVES = 5, 3
ROUNDS_QUICK, LIVES_QUICK = 2, 1
UNDER = "GB/s"


class Mover(Protocol):
    @property
    def name(self) -> str: ...

    def moved(self, case: Case) -> float: ...

    def close(self) -> None: ...


Makers = Mapping[str, Callable[[], Mover]]


def ours(name: str, scheme: str, *options: str) -> Contestant:
    """Under the interpreter that has what the scheme needs."""
    command = python("transport_ends.py", "read", f"{scheme}://127.0.0.1:0", *options)
    if scheme != "tcp":
        command[0] = interpreter(f".venv-{scheme}")
    return Contestant(name, command, project(), is_at_peace=True)


def plain(name: str, what: str, *options: str) -> Contestant:
    return Contestant(name, python("transport_ends.py", "read", what, *options), project())


def project() -> dict[str, str]:
    """This checkout, whatever is installed."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))}


MAKERS: Makers = {
    RAW: partial(plain, RAW, "raw:0"),
    RAW_TUNED: partial(plain, RAW_TUNED, f"raw:{256 * KIB}"),
    MEMCPY: partial(plain, MEMCPY, "memcpy"),
    MEMCPY_HUGE: partial(plain, MEMCPY_HUGE, "memcpy", "huge"),
    MEMCPY_SUMMED: partial(plain, MEMCPY_SUMMED, "memcpy:summed", "huge"),
    "tcp": partial(ours, "tcp", "tcp"),
    "ucx": partial(ours, "ucx", "ucx"),
    "nixl": partial(ours, "nixl", "nixl"),
    "nixl, huge pages": partial(ours, "nixl, huge pages", "nixl", "huge"),
    "nixl, huge pages, not verified": partial(ours, "nixl, huge pages, not verified", "nixl", "huge", "bare"),
    **RIVALS,
}


class Results:
    """What was measured, over all lives."""

    def __init__(self) -> None:
        self.speeds: dict[int, dict[str, list[float]]] = {}
        self.small: dict[tuple[str, str], list[float]] = {}
        self.missing: dict[str, str] = {}

    def add(self, kind: str, name: str, value: object) -> None:
        self.small.setdefault((kind, name), []).append(float(str(value)))


def start(makers: Makers, stack: contextlib.ExitStack, missing: dict[str, str]) -> list[Mover]:
    """Those that run here; ``missing`` says why the others do not."""
    with ThreadPoolExecutor(4) as several:
        coming = {name: several.submit(make) for name, make in makers.items()}
    there: list[Mover] = []
    for name, future in coming.items():
        try:
            contestant = future.result()
        except (RuntimeError, OSError) as error:
            missing[name] = str(error)[:300]
            continue
        stack.callback(contestant.close)
        there.append(contestant)
    return there


def attempt(one: Mover, case: Case, missing: dict[str, str]) -> float:
    """No number when it failed; then it is not measured at all."""
    if one.name in missing:
        return math.nan
    try:
        return one.moved(case)
    except (RuntimeError, OSError) as error:
        missing[one.name] = str(error)[:300]
        return math.nan


def live(makers: Makers, sizes: Sequence[int], rounds: int, results: Results) -> None:
    """Start all, measure all, end all."""
    with contextlib.ExitStack() as stack:
        there = start(makers, stack, results.missing)
        for size in sizes:
            turns = {one.name: partial(attempt, one, Case(size), results.missing) for one in there}
            for name, took in harness.interleaved(turns, rounds).items():
                results.speeds.setdefault(size, {}).setdefault(name, []).extend(took)
        talkers = [one for one in there if isinstance(one, Contestant) and one.name not in results.missing]
        for _ in range(rounds):
            for one in talkers:
                ask_small(one, results)
        idle_ones = [one for one in talkers if one.name in OURS]
        with ThreadPoolExecutor() as together:
            for one, sides in zip(idle_ones, together.map(ask_idle, idle_ones), strict=True):
                for side, percent in sides.items():
                    results.add(f"idle.{side}", one.name, percent)


def ask_small(one: Contestant, results: Results) -> None:
    if one.name in (MEMCPY, MEMCPY_HUGE, MEMCPY_SUMMED):
        results.add("hot", one.name, one.ask("hot")["value"])
        return
    for kind, took_us in one.ask("trips").items():
        results.add(f"{kind}.round_trip", one.name, took_us)


def ask_idle(one: Contestant) -> dict[str, object]:
    return one.ask("idle")


def figures(results: Results) -> list[Figure]:
    found: list[Figure] = []
    machine = harness.machine()
    for size, speeds in results.speeds.items():
        names = [name for name in speeds if name not in results.missing]
        for name in names:
            label = f"transport.{slug(name)}.{harness.size_name(size)}"
            value, n = round(median(speeds[name]), 3), len(speeds[name])
            rivals = [rival for rival in AGAINST.get(name, ()) if rival in names]
            if not rivals:
                found.append(Figure(label, value, UNDER, None, "", n, machine))
            for index, rival in enumerate(rivals):
                ratio = round(harness.compare(speeds, name, rival), 3)
                against = f"{rival} ({median(speeds[rival]):.2f} GB/s)"
                own = label if index == 0 else f"{label}.of.{slug(rival)}"
                found.append(Figure(own, value, UNDER, ratio, against, n, machine))
    for (kind, name), values in results.small.items():
        unit = "us" if kind.endswith("round_trip") else UNDER if kind == "hot" else "% of a core"
        label = f"transport.{slug(name)}.{kind}"
        found.append(Figure(label, round(median(values), 2), unit, None, "", len(values), machine))
    for name, why in results.missing.items():
        found.append(Figure(f"transport.{slug(name)}", 0.0, UNDER, None, f"not measured: {why}", 0, machine))
    return found


def slug(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def parse_size(text: str) -> int:
    for unit, size in (("KiB", KIB), ("MiB", MIB)):
        if text.endswith(unit):
            return int(text.removesuffix(unit)) * size
    raise SystemExit(f"{text!r} is no size: write 64KiB or 2MiB")


def main() -> None:
    parser = harness.parser((__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", default="", help="ours, with semicolons; whom they are compared with runs too"
    )
    parser.add_argument("--sizes", default="", help="of a block, with commas: 64KiB,2MiB")
    parser.add_argument("--lives", type=int, default=0, help="how often all are started anew")
    parsed = parser.parse_args()
    chosen = harness.choose(parsed)
    sizes: Sequence[int] = SIZES_QUICK if chosen.quick else SIZES
    if parsed.sizes:
        sizes = [parse_size(text) for text in parsed.sizes.split(",")]
    makers = MAKERS
    if parsed.only:
        wanted = set(parsed.only.split(";"))
        wanted |= {rival for name in wanted for rival in AGAINST.get(name, ())} | {RAW}
        makers = {name: make for name, make in MAKERS.items() if name in wanted}
    results = Results()
    for _ in range(parsed.lives or (LIVES_QUICK if chosen.quick else LIVES)):
        live(makers, sizes, chosen.rounds(ROUNDS, ROUNDS_QUICK), results)
    harness.report(figures(results), chosen)


if __name__ == "__main__":
    main()
