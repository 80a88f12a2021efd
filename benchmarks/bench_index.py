"""The index of leading blocks beside Dynamo's RadixTree, through Python, answers compared.

    python benchmarks/bench_index.py [--json] [--quick] [--rows 16,64,256,1024,hot] [--blocks 1000000]
    python benchmarks/bench_index.py --churn 600

Dynamo takes part where ``pip install ai-dynamo-runtime==1.6.1`` was done (a virtual environment of its
own does, with xxhash: only this tree has to be importable, its C++ modules built). A row is a number of
workers (index_workload.py); ``hot`` is 1,024 of which 834 hold the root that is asked for. Events are of 64
blocks. Ours gets ``array('Q')``, gives the columns of workers and of blocks; Dynamo gets a list and JSON
made beforehand, and gives ``scores``. They take turns of 50 queries. ``cold`` is the C++ core alone on
prompts of one holder, 78 blocks, each asked once. ``--churn`` changes everything for so many seconds
(index_churn.py).

On paper: a match is a call (0.3 us), a cache miss or two for each chain on the way, some more where a prompt
leaves a chain in the middle, and an answer of 28 bytes a worker: 1 to 2 us whatever the length. A stored
block is 8 bytes copied and a miss in the table, 50 to 100 ns. ``ratio`` is Dynamo's time over ours; where
there is no Dynamo, the goal's over ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from array import array
from pathlib import Path
from random import Random
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Also where the project is not installed.

import harness
from harness import Figure
from index_churn import churn, rss_bytes
from index_workload import Event, Workload, hashes, queries_of, workload

from kvcache import index

try:
    from dynamo._core import RadixTree
except ImportError:
    RadixTree = None

TURN = 50
ROWS = ("16", "64", "256", "1024", "hot")
HOT_WORKERS = 1024
MAIN_ROW = "64"  # The one whose events and memory are measured.
LENGTHS = (128, 1024, 2048, 8192)
OVERLAPS = (1.0, 0.5, 0.0)
GOAL_US = {128: 2.0, 1024: 2.0, 2048: 3.0, 8192: 3.0}
GOAL_STORE, GOAL_REMOVE, GOAL_RSS, GOAL_COLD_NS = 6.0, 5.4, 40.0, 960.0
BYTES_MAX = 1 << 36
COLD_BLOCKS = 78


class Ours:
    name = "ours"

    def __init__(self, workers: int) -> None:
        self.index = index.make_index(BYTES_MAX)
        self.holders = [self.index.open(worker) for worker in range(workers)]

    def stores(self, events: list[Event]) -> list[tuple[int, array[int], int | None]]:
        return [(self.holders[event.worker], event.hashes, event.parent) for event in events]

    def store(self, made: list[tuple[int, array[int], int | None]]) -> None:
        store = self.index.store
        for holder, run, parent in made:
            store(holder, 0, run, parent)

    def removes(self, events: list[Event]) -> list[tuple[int, array[int]]]:
        return [(self.holders[event.worker], event.hashes) for event in events]

    def remove(self, made: list[tuple[int, array[int]]]) -> None:
        remove = self.index.remove
        for holder, run in made:
            remove(holder, 0, run)

    def query(self, prompt: array[int]) -> array[int]:
        return prompt[:]  # As fresh from being made as Dynamo's list.

    def ask(self, query: array[int]) -> tuple[int, dict[tuple[int, int], int]]:
        match = self.index.match
        start = time.perf_counter_ns()
        found = match(query)
        columns = (found.workers, found.blocks)
        spent = time.perf_counter_ns() - start
        assert len(columns[0]) == len(columns[1])
        return spent, found.as_dict()


class Dynamo:
    name = "dynamo"

    def __init__(self, workers: int) -> None:
        self.tree = RadixTree()

    def stores(self, events: list[Event]) -> list[tuple[int, bytes]]:
        made = []
        for event in events:
            blocks = [{"block_hash": block, "tokens_hash": block} for block in event.hashes]
            stored = {"stored": {"parent_hash": event.parent, "blocks": blocks}}
            made.append((event.worker, json.dumps({"event_id": 0, "data": stored, "dp_rank": 0}).encode()))
        return made

    def removes(self, events: list[Event]) -> list[tuple[int, bytes]]:
        made = []
        for event in events:
            removed = {"removed": {"block_hashes": event.hashes.tolist()}}
            made.append((event.worker, json.dumps({"event_id": 0, "data": removed, "dp_rank": 0}).encode()))
        return made

    def store(self, made: list[tuple[int, bytes]]) -> None:
        for worker, event in made:
            self.tree.apply_event(worker, event)
        self.tree.find_matches([1])  # It has a thread of its own: wait until that is done.

    remove = store

    def query(self, prompt: array[int]) -> list[int]:
        return prompt.tolist()

    def ask(self, query: list[int]) -> tuple[int, dict[tuple[int, int], int]]:
        find = self.tree.find_matches
        start = time.perf_counter_ns()
        scores = find(query).scores
        return time.perf_counter_ns() - start, dict(scores)


def rates(
    contestants: list[Ours | Dynamo], kind: str, events: list[Event], rounds: int
) -> dict[str, list[float]]:
    """Million blocks a second, in ``rounds`` parts that are told in turn."""
    found: dict[str, list[float]] = {each.name: [] for each in contestants}
    step = -(-len(events) // rounds)
    for turn, at in enumerate(range(0, len(events), step)):
        part = events[at : at + step]
        blocks = sum(len(event.hashes) for event in part)
        for each in contestants[:: -1 if turn % 2 else 1]:
            made = getattr(each, f"{kind}s")(part)
            gc.collect()
            tell = getattr(each, kind)
            found[each.name].append(blocks / harness.seconds(lambda tell=tell, made=made: tell(made)) / 1e6)
    return found


def asked(contestants: list[Ours | Dynamo], queries: list[array[int]]) -> dict[str, list[float]]:
    """Microseconds of each query. Contestants take turns of ``TURN`` queries; their answers are compared."""
    found: dict[str, list[float]] = {each.name: [] for each in contestants}
    gc.collect()
    gc.freeze()
    for at in range(0, len(queries), TURN):
        answers = []
        for each in contestants[:: -1 if at // TURN % 2 else 1]:
            told = [each.ask(each.query(prompt)) for prompt in queries[at : at + TURN]]
            found[each.name] += [spent / 1e3 for spent, _ in told]
            answers.append([answer for _, answer in told])
        assert all(answer == answers[0] for answer in answers), "the answers differ"
    return found


def workers_of(row: str) -> int:
    return HOT_WORKERS if row == "hot" else int(row)


def memory(kind: str, blocks: int) -> float:
    """Resident bytes a unique block, in a process of its own."""
    command = [sys.executable, __file__, "--rss", kind, "--blocks", str(blocks)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(kind: str, blocks: int) -> None:
    workers = workers_of(MAIN_ROW)
    load = workload(workers, blocks)
    each = Ours(workers) if kind == "ours" else Dynamo(workers)
    gc.collect()
    before = rss_bytes()
    for at in range(0, len(load.events), 256):
        each.store(each.stores(load.events[at : at + 256]))
    print((rss_bytes() - before) / load.unique)


def cold(chains: int) -> tuple[list[int], float]:
    """Nanoseconds of each query, and the bytes a block that the index says it takes."""
    generator = Random(2)
    made = index.make_index(BYTES_MAX)
    holders = [made.open(worker) for worker in range(256)]
    prompts = [hashes(generator, COLD_BLOCKS) for _ in range(chains)]
    for prompt in prompts:
        made.store(generator.choice(holders), 0, prompt)
    generator.shuffle(prompts)
    joined = array("Q")
    for prompt in prompts:
        joined += prompt
    ends = array("Q", range(COLD_BLOCKS, len(joined) + 1, COLD_BLOCKS))
    return sorted(made.match_times(joined, ends)), made.bytes / len(joined)


class Table:
    """The figures so far. ``found``: by contestant, what was measured."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self._machine = harness.machine()

    def add(
        self, name: str, unit: str, found: dict[str, list[float]], value: float, goal: float, higher: bool
    ) -> None:
        theirs = median(found["dynamo"]) if "dynamo" in found else goal
        ratio = value / theirs if higher else theirs / value
        self.note(name, unit, value, ratio, "dynamo" if "dynamo" in found else "goal", len(found["ours"]))

    def note(self, name: str, unit: str, value: float, ratio: float, against: str, count: int) -> None:
        self.figures.append(Figure(f"index.{name}", value, unit, ratio, against, count, self._machine))


def contestants_of(row: str) -> list[Ours | Dynamo]:
    contestants: list[Ours | Dynamo] = [Ours(workers_of(row))]
    if RadixTree is not None:
        contestants.append(Dynamo(workers_of(row)))
    return contestants


def measure_row(table: Table, row: str, blocks: int, chosen: harness.Options) -> None:
    load = workload(workers_of(row), blocks, row == "hot")
    contestants = contestants_of(row)
    found = rates(contestants, "store", load.events, chosen.rounds(12, 4))
    if row == MAIN_ROW:
        table.add("store", "Mblocks/s", found, median(found["ours"]), GOAL_STORE, True)
    for length in LENGTHS:
        for overlap in OVERLAPS:
            found = asked(contestants, queries_of(load, length, overlap, chosen.rounds(1500, 150)))
            name = f"match.{row}.{length}.{overlap}"
            table.add(f"{name}.p50", "us", found, median(found["ours"]), GOAL_US[length], False)
            p99 = {each: [sorted(times)[len(times) * 99 // 100]] for each, times in found.items()}
            table.add(f"{name}.p99", "us", p99, p99["ours"][0], 20.0, False)
    if row == MAIN_ROW:
        measure_remove(table, contestants, load, chosen)


def measure_remove(
    table: Table, contestants: list[Ours | Dynamo], load: Workload, chosen: harness.Options
) -> None:
    """Of the last third, last first: Dynamo loses blocks whose parents went before."""
    events = load.events[-len(load.events) // 3 :][::-1]
    found = rates(contestants, "remove", events, chosen.rounds(12, 4))
    table.add("remove", "Mblocks/s", found, median(found["ours"]), GOAL_REMOVE, True)


def measure_cold(table: Table, chosen: harness.Options) -> None:
    times, per_block = cold(chosen.rounds(40_000, 10_000))
    for name, at in (("p50", len(times) // 2), ("p99", len(times) * 99 // 100)):
        table.note(f"cold.{name}", "ns", times[at], GOAL_COLD_NS / times[at], "goal", len(times))
    table.note("cold.counted", "B/block", per_block, 28 / per_block, "goal", 1)


def measure_churn(table: Table, seconds: float) -> None:
    """Growth is the largest of the last third over the largest of the first."""
    samples = churn(seconds)
    third = len(samples) // 3
    for name in ("rss_bytes", "index_bytes", "members"):
        values = [float(getattr(sample, name)) for sample in samples]
        growth = max(values[-third:]) / max(values[:third])
        table.note(f"churn.{name}", "at the end", values[-1], 1 / growth, "begin", len(samples))
    rate = samples[-1].stored / samples[-1].seconds / 1e6
    table.note("churn.store", "Mblocks/s", rate, 1.0, "itself", len(samples))


def measure(parsed: argparse.Namespace, chosen: harness.Options) -> list[Figure]:
    table = Table()
    if parsed.churn:
        measure_churn(table, parsed.churn)
        return table.figures
    for row in parsed.rows.split(","):
        measure_row(table, row, parsed.blocks, chosen)
    taken = {name: [memory(name, parsed.blocks)] for name in ("ours", *(["dynamo"] if RadixTree else []))}
    table.add("rss", "B/unique", taken, taken["ours"][0], GOAL_RSS, False)
    if index.NATIVE:
        measure_cold(table, chosen)
    return table.figures


def main() -> None:
    parser = harness.parser("the index of leading blocks, beside Dynamo's")
    parser.add_argument("--rows", default=",".join(ROWS), help="numbers of workers, and hot")
    parser.add_argument("--blocks", type=int, default=0, help="unique ones; 1,000,000, with --quick 200,000")
    parser.add_argument("--rss", default="", help="of the contestant named, its bytes a block, nothing else")
    parser.add_argument("--churn", type=float, default=0, help="change everything for so many seconds")
    parsed = parser.parse_args()
    chosen = harness.choose(parsed)
    parsed.blocks = parsed.blocks or chosen.rounds(1_000_000, 200_000)
    if parsed.rss:
        print_memory(parsed.rss, parsed.blocks)
    else:
        harness.report(measure(parsed, chosen), chosen)


if __name__ == "__main__":
    main()
