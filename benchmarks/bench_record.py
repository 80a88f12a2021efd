"""What recording costs a node: microseconds of its event loop a request, and bytes on disk.

    python benchmarks/bench_record.py [TRACE ...] [--quick]

Each trace (default: a made-up one) is asked for as an engine with blocks of 16 tokens asks, first to last,
with hashes of its own; batches as the clients make them. Only the recorder is timed, not the node.
"""

from __future__ import annotations

import argparse
import time
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

from kvcache.eviction.generate import Workload, generate
from kvcache.eviction.record import Recorder
from kvcache.eviction.trace import Trace
from kvcache.eviction.trace_files import open_trace
from kvcache.eviction.trace_recorded import Head, packed_chunk, read_recorded
from kvcache.wire import BATCH_BLOCKS_MAX

BLOCK_TOKENS = 16
HASH_BYTES = 16
FLUSH_BYTES = 32 << 10


def names_of(trace: Trace) -> list[bytes]:
    """The hashes of the small blocks that each block of the trace is."""
    return [
        b"".join(
            blake2b(block.to_bytes(4, "little") + part.to_bytes(4, "little"), digest_size=HASH_BYTES).digest()
            for part in range(trace.tokens[block] // BLOCK_TOKENS)
        )
        for block in range(trace.block_count)
    ]


def measure(name: str, trace: Trace, sample: float) -> str:
    names = names_of(trace)
    recorder = Recorder(b"s" * 16, 0, sample)
    out, total_ns, calls = bytearray(), 0, 0
    for request in trace.requests():
        prefix = b"".join(names[block] for block in request.blocks)
        step = BATCH_BLOCKS_MAX * HASH_BYTES
        batches = [prefix[at : at + step] for at in range(0, len(prefix), step)]
        now_ns = request.arrival_ms * 1_000_000
        parent = b""
        start_ns = time.perf_counter_ns()
        for batch in batches:
            recorder.asked(now_ns, batch, parent, BLOCK_TOKENS, "", len(batch) == step)
            parent = batch[-HASH_BYTES:]
        total_ns += time.perf_counter_ns() - start_ns
        calls += len(batches)
        if recorder.waiting_bytes > FLUSH_BYTES:
            out += packed_chunk(recorder.take())
    if recorder.waiting_bytes:
        out += packed_chunk(recorder.take())
    asked = trace.request_count
    blocks = (
        sum(len(request.blocks) for request in trace.requests()) / asked * trace.block_tokens / BLOCK_TOKENS
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "t.kvrec"
        path.write_bytes(Head("a" * 16, 0, 1, 0, 0, recorder.group_tokens, sample).packed() + out)
        read = read_recorded(path)
    return (
        f"{name}, sample {sample:g}: {total_ns / 1_000 / asked:.1f} us a request of {blocks:,.0f} blocks "
        f"({calls / asked:.1f} calls), {len(out) / max(read.request_count, 1):.1f} bytes a request recorded, "
        f"{recorder.known_blocks:,} blocks known"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    made = Workload(request_count=500 if chosen.quick else 5_000, block_tokens=512, question_tokens=3_000)
    traces = [(path.stem, open_trace(path)) for path in chosen.traces] or [("made up", generate(made))]
    for name, trace in traces:
        for sample in (1.0, 0.1):
            print(measure(name, trace, sample), flush=True)


if __name__ == "__main__":
    main()
