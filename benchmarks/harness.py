"""What every benchmark here shares: fair rounds, medians, one line a figure.

A machine changes its speed while it is measured. So contestants take turns, the order turns too, and
a ratio is the median of the rounds' ratios: both sides of each were taken within one round. Absolute
figures are medians over rounds and say something about that machine and that hour only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Options:
    json: bool
    quick: bool

    def rounds(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of output. ``ratio`` is this project over ``against``, in the same run; higher is better.
    ``value`` None: not measured, and ``against`` says why."""

    name: str
    value: float | None
    unit: str
    ratio: float | None
    against: str
    n: int
    machine: str


def parser(description: str) -> argparse.ArgumentParser:
    """With what every benchmark takes; a script adds its own and gives ``choose`` what was parsed."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", action="store_true", help="one JSON object a line")
    made.add_argument("--quick", action="store_true", help="fewer rounds: under a minute")
    return made


def choose(parsed: argparse.Namespace) -> Options:
    return Options(parsed.json, parsed.quick)


def options(description: str, arguments: Sequence[str] | None = None) -> Options:
    return choose(parser(description).parse_args(arguments))


def machine() -> str:
    """The processor, how much of it, and what runs on it; enough to tell two machines apart."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} CPUs, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def size_name(size_bytes: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit and size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return f"{size_bytes}B"


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleaved(contestants: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What each contestant returned, round by round. One more round goes first and is not counted.

    The order shifts by one each round, so that nobody always follows the same neighbour.
    """
    names = list(contestants)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            result = contestants[name]()
            if turn >= 0:
                results[name].append(result)
    return results


def compare(results: Mapping[str, Sequence[float]], name: str, against: str) -> float:
    """The median over rounds of ``name``'s result over ``against``'s, where higher is better."""
    return median(mine / theirs for mine, theirs in zip(results[name], results[against], strict=True))


def report(figures: Sequence[Figure], chosen: Options) -> None:
    """JSON lines, or a table for a person."""
    if chosen.json:
        for figure in figures:
            print(json.dumps(asdict(figure)), flush=True)
        return
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        if figure.value is None:
            print(f"{figure.name:{width}}  {figure.against}")
            continue
        ratio = "" if figure.ratio is None else f"   {figure.ratio:5.2f} x {figure.against}"
        print(f"{figure.name:{width}}  {figure.value:9.3f} {figure.unit}{ratio}")
    print(f"medians of {figures[0].n} rounds; {figures[0].machine}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()
