"""What a decision costs: reserve, commit, lease, match and eviction in one process, no bytes moved; and
taking back, and losing, the blocks of a device.

    .venv/bin/python benchmarks/bench_ledger.py [--json] [--quick]

The ledger is plain Python on the node's event loop, so each of these is time in which the node answers
nobody. ``ratio`` is the budget over what was measured (higher is better, under 1 is too slow).
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import Random
from statistics import median
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Also where the project is not installed.

import harness
from harness import Figure

from kvcache.block import KEY_BYTES, StorageKey
from kvcache.eviction.registry import POLICIES, policy_class
from kvcache.ledger import Ledger, Reservation, Restored
from kvcache.policy import RequestContext
from kvcache.tiers.space import NVME_LAYOUT, Space, make_slot

BLOCK_BYTES = 2 << 20
BLOCK_COUNT = 16_000
BATCH = 16
OWNER = 1
CONTEXT = RequestContext(now_ns=1)
FAR_NS = 1 << 60

Result = TypeVar("Result")

BUDGET_US = {
    "reserve.16": 60.0,
    "commit.16": 60.0,
    "lease.16": 60.0,
    "release.16": 60.0,
    "reserve_full.16": 200.0,
    "evict.4000_of_16000": 100_000.0,
    "match.8000": 2_000.0,
    "lease.8000": 10_000.0,
    "restore.300000": 700_000.0,
    "withdraw.300000": 1_000_000.0,
}


DEVICE_BLOCKS = 300_000
CHAIN_BLOCKS = 50
WRITTEN_BLOCKS = 25
SEGMENT_BYTES = 128 << 20


def keys(name: str, count: int) -> list[StorageKey]:
    return [
        StorageKey(blake2b(f"{name}/{at}".encode(), digest_size=KEY_BYTES).digest()) for at in range(count)
    ]


class Bench:
    def __init__(self, policy: str, spent: dict[str, list[float]]) -> None:
        space = Space(BLOCK_COUNT * BLOCK_BYTES, 128 * BLOCK_BYTES)
        self.arena = space.add_arena()
        self.ledger = Ledger(space, policy_class(policy))
        self.spent = spent

    def timed(self, name: str, call: Callable[[], Result]) -> Result:
        start = time.perf_counter_ns()
        result = call()
        self.spent.setdefault(name, []).append((time.perf_counter_ns() - start) / 1_000)
        return result

    def reserve(self, path: list[StorageKey]) -> Reservation:
        return self.ledger.reserve(self.arena, None, path, BLOCK_BYTES, OWNER, CONTEXT)

    def commit(self, made: Reservation) -> None:
        checksums, sums = [b"c" * 16] * len(made.keys), [b"s" * 256] * len(made.keys)
        self.ledger.commit(made.reservation_id, OWNER, checksums, sums)
        self.ledger.take_changes()

    def fill(self) -> None:
        """Save the tier full, in batches; then as much again, so that every batch evicts one."""
        batches = BLOCK_COUNT // BATCH
        for at in range(batches + batches // 2):
            path = keys(str(at), BATCH)
            made = self.timed(
                "reserve.16" if at < batches else "reserve_full.16", partial(self.reserve, path)
            )
            assert len(made.keys) == BATCH
            self.timed("commit.16", partial(self.commit, made))
        for at in range(batches, batches + batches // 2):
            path = keys(str(at), BATCH)
            lease = self.timed("lease.16", partial(self.ledger.lease, path, OWNER, FAR_NS, CONTEXT))
            assert len(lease.keys) == BATCH
            self.timed("release.16", partial(self.ledger.release, lease.lease_id, OWNER, 2))

    def long_prompts(self) -> None:
        path = keys("evict", 4_000)
        made = self.timed("evict.4000_of_16000", partial(self.reserve, path))
        assert len(made.keys) == 4_000
        self.commit(made)
        path = keys("long", 8_000)
        self.commit(self.reserve(path))
        assert self.timed("match.8000", partial(self.ledger.match, path)) == 8_000
        lease = self.timed("lease.8000", partial(self.ledger.lease, path, OWNER, FAR_NS, CONTEXT))
        self.ledger.release(lease.lease_id, OWNER, 2)


def entries() -> Iterator[Restored]:
    """Of a full device: chains, written a part at a time, in the order of their slots."""
    parts = [
        chain[at : at + WRITTEN_BLOCKS]
        for chain in map(pairs, range(DEVICE_BLOCKS // CHAIN_BLOCKS))
        for at in range(0, CHAIN_BLOCKS, WRITTEN_BLOCKS)
    ]
    Random(1).shuffle(parts)
    stride = NVME_LAYOUT.stride(BLOCK_BYTES)
    a_segment = NVME_LAYOUT.slot_count(SEGMENT_BYTES, stride)
    for place, (key, before) in enumerate(pair for part in parts for pair in part):
        segment, at = divmod(place, a_segment)
        offset = segment * SEGMENT_BYTES + NVME_LAYOUT.extent_header_bytes + at * stride
        # Keys that were read from a disk are objects of their own.
        parent = StorageKey(bytes(bytearray(before))) if before else None
        yield Restored(key, parent, make_slot(0, offset), BLOCK_BYTES, b"c" * 16)


def pairs(chain: int) -> list[tuple[StorageKey, StorageKey | None]]:
    path = keys(f"chain/{chain}", CHAIN_BLOCKS)
    return list(zip(path, [None, *path[:-1]], strict=True))


def device(policy: str, there: list[Restored], spent: dict[str, list[float]]) -> None:
    capacity = -(-DEVICE_BLOCKS // 60) * SEGMENT_BYTES
    space = Space(capacity, SEGMENT_BYTES, NVME_LAYOUT)
    arena = space.add_arena(capacity)
    ledger = Ledger(space, policy_class(policy))
    start = time.perf_counter_ns()
    assert ledger.restore(there) == []
    restored = time.perf_counter_ns()
    ledger.take_changes()
    begun = time.perf_counter_ns()
    assert ledger.withdraw_arena(arena, 1) == DEVICE_BLOCKS
    spent.setdefault("withdraw.300000", []).append((time.perf_counter_ns() - begun) / 1_000)
    spent.setdefault("restore.300000", []).append((restored - start) / 1_000)
    assert ledger.policy.last_fault == ""


def figures(policy: str, rounds: int, there: list[Restored], machine: str) -> Iterator[Figure]:
    spent: dict[str, list[float]] = {}
    for _ in range(rounds):
        bench = Bench(policy, spent)
        bench.fill()
        bench.long_prompts()
        assert bench.ledger.policy.last_fault == ""
    for _ in range(rounds):
        device(policy, there, spent)
    for name, budget_us in BUDGET_US.items():
        taken_us = median(spent[name])
        yield Figure(
            name=f"ledger.{policy}.{name}",
            value=round(taken_us, 1),
            unit="us",
            ratio=round(budget_us / taken_us, 2),
            against=f"a budget of {budget_us:g} us",
            n=len(spent[name]),
            machine=machine,
        )


def main() -> None:
    chosen = harness.options("what a decision of the ledger costs")
    rounds, machine, there = chosen.rounds(5, 1), harness.machine(), list(entries())
    gc.collect()
    gc.freeze()  # The entries are the bench's, not the ledger's: no collection need look through them.
    harness.report(
        [figure for policy in POLICIES for figure in figures(policy, rounds, there, machine)],
        chosen,
    )


if __name__ == "__main__":
    main()
