"""Blocks into a node and out again, from another process, verified, beside memcpy and other stores.

One round: each store puts its whole pool as new blocks and gets it back, and one thread's memcpy runs
over the pools before and after ours. Stores take turns; the first round, which pays for first touches,
is not counted. Pools are 512 MiB: no cache holds them. Put includes evicting what the round before left.
Every byte got is compared after the clock has stopped.

    python benchmarks/bench_store.py [--json] [--quick]

Peers run under .venv-peers (benchmarks/peers.sh), on the same work. One that cannot run is a line that
says so. Mooncake keeps the blocks in the very process that puts them; the others, like ours, do not.

On paper: a call costs two round trips (reserve and commit, lease and release) of about 0.1 ms each, the
copy runs at memcpy's speed or better. So 16 blocks of 2 MiB (2 ms of copying) should reach 0.85 to 1.0 of
memcpy, 16 of 256 KiB (0.25 ms) half of it, and single small blocks are all round trip.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import harness
from harness import KIB, MIB, Figure

from kvcache.block import BlockSpec
from kvcache.client import connect_blocking
from kvcache.namespace import Namespace, shape_of
from kvcache.testing.processes import NodeProcess

ROOT = Path(__file__).resolve().parent.parent
POOL_BYTES = 512 * MIB
STAMP_BYTES = 64
PLANE_BYTES = 32 * KIB
ROUNDS = 7
ROUNDS_QUICK = 1
PEERS = ("mooncake", "redis")
GB = 1e9

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class Case:
    """One size, and how many blocks go in one call."""

    block_bytes: int
    batch: int

    @property
    def name(self) -> str:
        size = harness.size_name(self.block_bytes)
        return f"{size}.single" if self.batch == 1 else f"{size}.batch{self.batch}"


CASES = tuple(
    Case(block_bytes, batch)
    for block_bytes, batches in ((256 * KIB, (1, 16)), (2 * MIB, (1, 16)), (32 * MIB, (1, 4)))
    for batch in batches
)


class Pool:
    """Memory that is there, aligned to pages, and its address."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, POOL_BYTES)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        noise = os.urandom(MIB)
        for start in range(0, POOL_BYTES, MIB):
            self.view[start : start + MIB] = noise

    def stamp(self, block_bytes: int, mark: str) -> None:
        """Make every block unlike every other, and unlike what it was in the round before."""
        for start in range(0, POOL_BYTES, block_bytes):
            text = f"{mark} {start}".encode().ljust(STAMP_BYTES)
            self.view[start : start + STAMP_BYTES] = text
            self.view[start + block_bytes - STAMP_BYTES : start + block_bytes] = text


def copy_pool(source: Pool, target: Pool, block_bytes: int) -> float:
    """One thread's memcpy over both pools, block by block. Seconds."""
    started = time.perf_counter()
    for start in range(0, POOL_BYTES, block_bytes):
        ctypes.memmove(target.address + start, source.address + start, block_bytes)
    return time.perf_counter() - started


class Ours:
    """A node in its own process, and a blocking store here that maps its memory."""

    def __init__(self, block_bytes: int, source: Pool, target: Pool, home: Path) -> None:
        settings = {
            "socket": str(home / f"node-{block_bytes}.sock"),
            "http": "none",
            "capacity": f"{2 * POOL_BYTES // MIB + 128}MiB",
        }
        self._node = NodeProcess(settings, home / "node.log")
        self._node.start()
        spec = BlockSpec(16, block_bytes // PLANE_BYTES, 8, PLANE_BYTES // 8)
        names = Namespace(
            model="bench",
            weights="bench",
            dtype="bfloat16",
            layout="canonical",
            block_tokens=16,
            shape=shape_of(spec),
        )
        self._store = connect_blocking(self._node.socket, timeout_ms=10_000)
        self._handle = self._store.open(names, spec)
        self._source, self._target, self._block_bytes = source, target, block_bytes
        self._calls = 0

    def put(self, batch: int) -> tuple[float, list[bytes]]:
        """Seconds, and the tokens that name each call's blocks."""
        named = []
        started = time.perf_counter()
        for at in range(0, POOL_BYTES, batch * self._block_bytes):
            self._calls += 1
            tokens = self._calls.to_bytes(4, "little") * 16 * batch
            held = self._store.save(
                self._handle, self._handle.hashes(tokens), self._blocks(self._source, at, batch)
            )
            assert held == batch, f"{held} of {batch} blocks saved: {self._store.counters}"
            named.append(tokens)
        return time.perf_counter() - started, named

    def get(self, batch: int, named: Sequence[bytes]) -> float:
        """Seconds; lease, copy, verify, release."""
        started = time.perf_counter()
        for index, tokens in enumerate(named):
            lease = self._store.lease(self._handle, self._handle.hashes(tokens))
            failed = self._store.load(
                lease, self._blocks(self._target, index * batch * self._block_bytes, batch)
            )
            self._store.release(lease)
            assert lease.count == batch, f"{lease.count} of {batch} blocks leased"
            assert not failed, f"not loaded: {failed}, {self._store.counters}"
        return time.perf_counter() - started

    def _blocks(self, pool: Pool, start: int, count: int) -> list[list[memoryview]]:
        size = self._block_bytes
        return [[pool.view[at : at + size]] for at in range(start, start + count * size, size)]

    def close(self) -> None:
        self._store.close()
        self._node.close()


class Peer:
    """Another store, in a process of its own (``peer_store.py``)."""

    def __init__(self, name: str, pool_bytes: int, log: Path) -> None:
        python = ROOT / ".venv-peers" / "bin" / "python"
        self.name = name
        self.pool_bytes = pool_bytes
        self.error = ""
        self._process: subprocess.Popen[str] | None = None
        if not python.exists():
            self.error = "there is no .venv-peers: run benchmarks/peers.sh"
            return
        command = [str(python), str(ROOT / "benchmarks" / "peer_store.py"), name, str(pool_bytes)]
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True
            )
        self._reply()

    def run(self, op: str, case: Case, number: int) -> float:
        """Seconds; 0 after an error, which then stands in ``error``."""
        if self.error or self._process is None or self._process.stdin is None:
            return 0.0
        order = {"op": op, "block_bytes": case.block_bytes, "batch": case.batch, "round": number}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        if reply.get("wrong"):
            self.error = f"{reply['wrong']} blocks came back wrong"
        return float(str(reply.get("seconds", 0.0)))

    def _reply(self) -> dict[str, object]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        reply: dict[str, object] = json.loads(line) if line else {"error": "its process ended"}
        if "error" in reply:
            self.error = str(reply["error"])[:300]
        return reply

    def close(self) -> None:
        if self._process is None:
            return
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


Speeds = dict[str, list[float]]
"""GB/s, round by round, of ``memcpy``, ``kvcache.put``, ``mooncake.get`` and so on."""


def run_case(case: Case, ours: Ours, peers: Sequence[Peer], pools: tuple[Pool, Pool], rounds: int) -> Speeds:
    """``rounds`` and one before them that is not counted. The order of the stores turns."""
    speeds: Speeds = {}
    for number in range(-1, rounds):
        turns = [None, *peers]
        turns = turns[number % len(turns) :] + turns[: number % len(turns)]
        for peer in turns:
            took = _our_turn(case, ours, pools, number) if peer is None else _their_turn(case, peer, number)
            for name, speed in took.items():
                if number >= 0:
                    speeds.setdefault(name, []).append(speed)
    return speeds


def _our_turn(case: Case, ours: Ours, pools: tuple[Pool, Pool], number: int) -> dict[str, float]:
    source, target = pools
    before = copy_pool(source, target, case.block_bytes)
    source.stamp(case.block_bytes, f"{case.name} {number}")
    put, named = ours.put(case.batch)
    got = ours.get(case.batch, named)
    compare(source, target, case.block_bytes)
    after = copy_pool(source, target, case.block_bytes)
    took = {"memcpy": (before + after) / 2, "kvcache.put": put, "kvcache.get": got}
    return {name: POOL_BYTES / GB / seconds for name, seconds in took.items()}


def _their_turn(case: Case, peer: Peer, number: int) -> dict[str, float]:
    took = {f"{peer.name}.{op}": peer.run(op, case, number) for op in ("put", "get")}
    return {} if peer.error else {name: peer.pool_bytes / GB / seconds for name, seconds in took.items()}


def compare(source: Pool, target: Pool, block_bytes: int) -> None:
    """Every byte. RAISES SystemExit: a figure for wrong bytes is none."""
    for start in range(0, POOL_BYTES, block_bytes):
        if _libc.memcmp(source.address + start, target.address + start, block_bytes) != 0:
            raise SystemExit(f"wrong bytes in the block at {start}")


def figures(case: Case, speeds: Speeds, peers: Sequence[Peer], rounds: int) -> list[Figure]:
    """One for each operation and each thing it is held against, and the peers' own."""
    machine = harness.machine()
    found = []
    for op in ("put", "get"):
        name, ours = f"store.{op}.{case.name}", f"kvcache.{op}"
        value = round(median(speeds[ours]), 3)

        def figure(
            other: str, against: str, name: str = name, value: float = value, ours: str = ours
        ) -> Figure:
            ratio = round(harness.compare(speeds, ours, other), 3)
            return Figure(name, value, "GB/s", ratio, against, rounds, machine)

        memcpy = round(median(speeds["memcpy"]), 2)
        found.append(figure("memcpy", f"memcpy ({memcpy} GB/s)"))
        for peer in peers:
            if peer.error:
                why = f"{peer.name}: did not run: {peer.error}"
                found.append(Figure(name, value, "GB/s", None, why, rounds, machine))
                continue
            theirs = f"{peer.name}.{op}"
            found.append(figure(theirs, f"{peer.name} ({round(median(speeds[theirs]), 2)} GB/s)"))
    return found


def main() -> None:
    chosen = harness.options((__doc__ or "").partition("\n")[0])
    rounds = chosen.rounds(ROUNDS, ROUNDS_QUICK)
    cases = [case for case in CASES if case.batch > 1 or not chosen.quick]
    # Redis is slow and far from any cache's speed: a part of the pool says the same in the short form.
    sizes = {"mooncake": POOL_BYTES, "redis": POOL_BYTES // 4 if chosen.quick else POOL_BYTES}
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="kvcache-bench-") as home, contextlib.ExitStack() as stack:
        pools = Pool(), Pool()
        peers = [Peer(name, sizes[name], Path(home) / f"{name}.log") for name in PEERS]
        for peer in peers:
            stack.callback(peer.close)
        for block_bytes in sorted({case.block_bytes for case in cases}):
            with contextlib.closing(Ours(block_bytes, *pools, Path(home))) as ours:
                for case in cases:
                    if case.block_bytes == block_bytes:
                        found += figures(case, run_case(case, ours, peers, pools, rounds), peers, rounds)
        for peer in peers:
            if peer.error:
                print(f"{peer.name} did not run: {peer.error}", file=sys.stderr)
    harness.report(found, chosen)


if __name__ == "__main__":
    main()
