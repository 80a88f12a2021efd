"""What recording costs a node: microseconds of its event loop a request, and bytes on disk.

    .venv/bin/python benchmarks/bench_record.py [TRACE ...]

Each trace (default: the published ones beside the project, and else one is generated) is asked for as an
engine with blocks of 16 tokens asks, first to last, with hashes of its own, in batches as the clients make
them. Only the recorder is timed, not the node. The ratio of a time is to the budget of 0.1 us a block and
10 us a request; that of a size is to the 100 bytes a request that "tens of bytes" end at.

On paper: 3 us a look-up, 0.1 us for each of its recorded blocks (8 of the engine's) that is new.
"""

from __future__ import annotations

import sys
import time
from hashlib import blake2b
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Also where the project is not installed.

import harness
from bench_replay import opened
from harness import Figure

from kvcache.eviction.traces.record import Recorder
from kvcache.eviction.traces.record_format import packed_chunk
from kvcache.eviction.traces.trace import Trace
from kvcache.wire import BATCH_BLOCKS_MAX

BLOCK_TOKENS = 16
HASH_BYTES = 16
FLUSH_BYTES = 32 << 10
QUICK_REQUESTS = 1_000
BUDGET_BLOCK_US, BUDGET_REQUEST_US, BUDGET_BYTES = 0.1, 10.0, 100.0


def names_of(trace: Trace) -> list[bytes]:
    """The joined hashes of the small blocks that each block of the trace is."""
    return [
        b"".join(
            blake2b(block.to_bytes(4, "little") + part.to_bytes(4, "little"), digest_size=HASH_BYTES).digest()
            for part in range(trace.tokens[block] // BLOCK_TOKENS)
        )
        for block in range(trace.block_count)
    ]


def record(trace: Trace, names: list[bytes], sample: float) -> tuple[float, int, Recorder]:
    """Seconds in the recorder, bytes that it made."""
    recorder = Recorder(b"s" * 16, 0, sample)
    step = BATCH_BLOCKS_MAX * HASH_BYTES
    total_ns = size = 0
    for request in trace.requests():
        prefix = b"".join(names[block] for block in request.blocks)
        batches = [prefix[at : at + step] for at in range(0, len(prefix), step)]
        parent = b""
        start_ns = time.perf_counter_ns()
        for batch in batches:
            recorder.asked(
                request.arrival_ms * 1_000_000, batch, parent, BLOCK_TOKENS, "", len(batch) == step
            )
            parent = batch[-HASH_BYTES:]
        total_ns += time.perf_counter_ns() - start_ns
        if recorder.waiting_bytes > FLUSH_BYTES:
            size += len(packed_chunk(recorder.take()))
    if recorder.waiting_bytes:
        size += len(packed_chunk(recorder.take()))
    return total_ns / 1e9, size, recorder


def measure(name: str, trace: Trace, sample: float, rounds: int, machine: str) -> list[Figure]:
    names = names_of(trace)
    asked = trace.request_count
    small = sum(len(names[block]) // HASH_BYTES for request in trace.requests() for block in request.blocks)
    runs = [record(trace, names, sample) for _ in range(rounds)]
    spent_us = median(seconds for seconds, _, _ in runs) * 1e6 / asked
    _, size, recorder = runs[0]
    each = size / max(recorder.requests, 1)
    budget_us = BUDGET_REQUEST_US + BUDGET_BLOCK_US * small / asked
    label = f"{name}.{small // asked}blocks" + (f".sample{sample:g}" if sample < 1 else "")
    return [
        Figure(f"record.{label}.request", spent_us, "us", budget_us / spent_us, "budget", rounds, machine),
        Figure(f"record.{label}.request", each, "B", BUDGET_BYTES / each, "budget", rounds, machine),
    ]


def main() -> None:
    parser = harness.parser("what recording costs a node")
    parser.add_argument("traces", nargs="*", type=Path)
    parsed = parser.parse_args()
    chosen = harness.choose(parsed)
    traces = list(opened(parsed.traces))
    machine = harness.machine()
    for name, trace in traces:
        for sample in (1.0, 0.1):
            part = trace.head(QUICK_REQUESTS) if chosen.quick else trace
            harness.report(measure(name, part, sample, chosen.rounds(3, 1), machine), chosen)


if __name__ == "__main__":
    main()
