"""Blocks from another process, by every transport that can be had here, verified, beside a raw socket.

One round: each contestant brings the same pool of 256 MiB, block by block of one size; they take turns. Ours
check the sum of every chunk within the time; the raw socket (``sendall`` to ``recv_into``, one request) and
``memcpy`` check nothing. A raw socket with the send buffer that tcp takes on one host runs as well. Then a
small read's round trip, and what an endpoint costs that nobody uses.

    python benchmarks/bench_transport.py [--json] [--quick] [--only tcp,ucx]

A transport that cannot be loaded is a line that says so. Rivals that are not ours are in
``transport_rivals.py``, when it is there: a dictionary ``RIVALS`` of names to what makes a ``Contestant``.

On paper: loopback costs the sender's side 0.4 ms a MiB and the receiver's side less; the sums (30 GB/s) hide
there, as do 20 us of Python a chunk of 1 MiB. So tcp should reach 0.9 to 1.0 of the raw socket from 1 MiB on,
and 64 KiB blocks the same, for they go 128 a transfer. A small read is four wake-ups: 100 to 200 us.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import harness
from harness import KIB, MIB, Figure
from transport_ends import Case, Contestant, Memcpy, Ours, Raw, new_pool

from kvcache.errors import BadInput

ADDRESSES = {
    "tcp": "tcp://127.0.0.1:0",
    "ucx": "ucx://127.0.0.1:0",
    "nixl": "nixl://127.0.0.1:0",
}
SIZES = (64 * KIB, 256 * KIB, MIB, 2 * MIB, 8 * MIB, 32 * MIB)
SIZES_QUICK = (64 * KIB, 2 * MIB, 32 * MIB)
ROUNDS = 11
ROUNDS_QUICK = 3
UNDER = "GB/s"


def rivals() -> dict[str, Callable[[memoryview], Contestant]]:
    """Others' engines, on the same work."""
    if importlib.util.find_spec("transport_rivals") is None:
        return {}
    found: dict[str, Callable[[memoryview], Contestant]] = importlib.import_module("transport_rivals").RIVALS
    return found


def start(
    makers: dict[str, Callable[[memoryview], Contestant]], stack: contextlib.ExitStack, pool: memoryview
) -> tuple[list[Contestant], dict[str, str]]:
    """Those that run here, and why the others do not."""
    there: list[Contestant] = []
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            contestant = make(pool)
        except (BadInput, RuntimeError, OSError, ImportError) as error:
            missing[name] = str(error)[:300]
            continue
        stack.callback(contestant.close)
        there.append(contestant)
    return there, missing


def speeds(case: Case, contestants: Sequence[Contestant], raw: Raw, rounds: int) -> list[Figure]:
    """One figure a contestant, against the raw socket."""
    turns: dict[str, Callable[[], float]] = {
        one.name: partial(one.moved, case) for one in (raw, *contestants)
    }
    results = harness.interleaved(turns, rounds)
    base = round(median(results[raw.name]), 2)
    size = harness.size_name(case.block_bytes)
    return [
        Figure(
            f"transport.{name}.{size}",
            round(median(took), 3),
            UNDER,
            None if name == raw.name else round(harness.compare(results, name, raw.name), 3),
            "" if name == raw.name else f"{raw.name} ({base} GB/s)",
            rounds,
            harness.machine(),
        )
        for name, took in results.items()
    ]


def small(contestants: Sequence[Contestant], raw: Raw, rounds: int) -> list[Figure]:
    """Round trips and what idle costs; no ratio but the raw socket's in words."""
    found = []
    for one in contestants:
        if not isinstance(one, Ours):
            continue
        turns = {"raw": raw.round_trip_us, "read": one.round_trip_us, "note": one.note_us}
        results = harness.interleaved(turns, rounds)
        base = f"{raw.name} ({round(median(results['raw']))} us)"
        for kind in ("read", "note"):
            value = round(median(results[kind]), 1)
            ratio = round(1 / harness.compare(results, kind, "raw"), 3)
            name = f"transport.{one.name}.{kind}.round_trip"
            found.append(Figure(name, value, "us", ratio, base, rounds, harness.machine()))
        for side, percent in zip(("caller", "listener"), one.idle_percent(), strict=True):
            name = f"transport.{one.name}.idle.{side}"
            found.append(Figure(name, round(percent, 2), "% of a core", None, "", 1, harness.machine()))
    return found


def main() -> None:
    parser = harness.parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="contestants, with commas; the raw socket always runs")
    parsed = parser.parse_args()
    chosen = harness.choose(parsed)
    makers: dict[str, Callable[[memoryview], Contestant]] = {"memcpy": Memcpy}
    makers["raw256"] = partial(Raw, send_bytes=256 * KIB)
    makers |= {scheme: partial(Ours, address) for scheme, address in ADDRESSES.items()}
    makers |= rivals()
    if parsed.only:
        makers = {name: makers[name] for name in parsed.only.split(",")}
    rounds = chosen.rounds(ROUNDS, ROUNDS_QUICK)
    pool = new_pool()
    found: list[Figure] = []
    with contextlib.ExitStack() as stack:
        raw = Raw(pool)
        stack.callback(raw.close)
        contestants, missing = start(makers, stack, pool)
        for size in SIZES_QUICK if chosen.quick else SIZES:
            found += speeds(Case(size), contestants, raw, rounds)
        found += small(contestants, raw, rounds)
    for name, why in missing.items():
        found.append(
            Figure(f"transport.{name}", 0.0, UNDER, None, f"did not run: {why}", 0, harness.machine())
        )
    harness.report(found, chosen)


if __name__ == "__main__":
    main()
