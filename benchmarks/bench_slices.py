"""Loading half of the heads of every block, against loading whole blocks: over the map and over a socket.

Three shapes: where a plane is one chunk (all of it is read and half dropped), where half of a plane is whole
chunks (half is read, straight to its place), and where it ends within one (two of three are read). A decode
engine with twice the ranks loads so. The time is that of ``load`` of 64 blocks that are in memory.

    python benchmarks/bench_slices.py           a table for a person; --json, --quick as everywhere
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median

from harness import Figure, Options, compare, interleaved, machine, options, report, seconds, size_name

from kvcache.block import BlockSpec
from kvcache.client import connect_blocking
from kvcache.client.store import BlockingStore, Lease
from kvcache.namespace import Namespace, shape_of
from kvcache.testing.processes import NodeProcess

BLOCKS = 64
HEAD_DIM_BYTES = 256
SHAPES = {
    "one_chunk": BlockSpec(16, 64, 8, 16 * HEAD_DIM_BYTES),
    "whole_chunks": BlockSpec(64, 16, 8, 64 * HEAD_DIM_BYTES),
    "within_chunks": BlockSpec(64, 24, 6, 64 * HEAD_DIM_BYTES * 2),
}


def main(arguments: list[str]) -> None:
    chosen = options("Half of the heads of every block", arguments)
    figures = [figure for name, spec in SHAPES.items() for figure in measured(name, spec, chosen)]
    report(figures, chosen)


def measured(name: str, spec: BlockSpec, chosen: Options) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"socket": f"{folder}/node.sock", "tcp": "none", "http": "none", "capacity": "512MiB"}
        with NodeProcess(settings) as node:
            return [
                figure
                for path in ("map", "socket")
                for figure in over(node.socket, path, name, spec, chosen.rounds(31, 7))
            ]


def over(address: str, path: str, name: str, spec: BlockSpec, rounds: int) -> list[Figure]:
    store = connect_blocking(address, timeout_ms=20_000, mapped=path == "map")
    try:
        loads = loads_of(store, leased(store, spec), spec)
        taken = interleaved({each: partial(seconds, load) for each, load in loads.items()}, rounds)
    finally:
        store.close()
    speeds = {each: [1 / second for second in times] for each, times in taken.items()}
    unit, where = "ms", f"slices.{name}.{path}.{size_name(spec.block_bytes)}"
    made = []
    for each, times in taken.items():
        ratio = compare(speeds, "half", "whole") if each == "half" else None
        against = "whole" if ratio is not None else ""
        made.append(Figure(f"{where}.{each}", median(times) * 1e3, unit, ratio, against, rounds, machine()))
    return made


def leased(store: BlockingStore, spec: BlockSpec) -> Lease:
    namespace = Namespace(
        model="m",
        weights="w",
        dtype="bfloat16",
        layout="canonical",
        block_tokens=spec.block_tokens,
        shape=shape_of(spec),
    )
    handle = store.open(namespace, spec)
    prefix = handle.hashes(range(BLOCKS * spec.block_tokens))
    block = os.urandom(spec.block_bytes)
    assert store.save(handle, prefix, [[block]] * BLOCKS) == BLOCKS
    return store.lease(handle, prefix, duration_ms=600_000)


def loads_of(store: BlockingStore, lease: Lease, spec: BlockSpec) -> dict[str, Callable[[], object]]:
    whole = [[bytearray(spec.block_bytes)] for _ in range(BLOCKS)]
    part = [[bytearray(spec.block_bytes // 2)] for _ in range(BLOCKS)]
    half = spec.head_count // 2

    def load(into: list[list[bytearray]], heads: tuple[int, int] | None) -> None:
        assert store.load(lease, into, heads=heads) == frozenset()

    return {"whole": partial(load, whole, None), "half": partial(load, part, (half, half))}


if __name__ == "__main__":
    main(sys.argv[1:])
