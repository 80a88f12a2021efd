"""Blocks into a node and out again, from another process, verified, beside memcpy and other stores.

One round: one thread's memcpy over the pools before and after ours, and each store puts its whole pool as new blocks and gets
it back. Rounds are interleaved, so that a busy machine slows all alike; the first, which pays for first
touches, is not counted. Pools are 512 MiB or more: no cache holds them. Put includes evicting what the
round before left. Every byte got is compared after the clock has stopped.

    .venv/bin/python benchmarks/bench_store.py [--json] [--quick] [--no-peers]

Peers run under .venv-peers (benchmarks/peers.sh); one that cannot run is a line with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Also where the project is not installed.

from kvcache.block import BlockSpec  # noqa: E402
from kvcache.client import connect_blocking  # noqa: E402
from kvcache.namespace import Namespace, shape_of  # noqa: E402
from kvcache.sums import NATIVE  # noqa: E402
from kvcache.testing.processes import NodeProcess  # noqa: E402

KIB, MIB, GB = 1 << 10, 1 << 20, 1e9
POOL_BYTES = 512 * MIB
STAMP_BYTES = 64
PLANE_BYTES = 32 * KIB
ROUNDS = 7
ROUNDS_QUICK = 1
PEERS = ("mooncake", "redis")
MEMCPY = "memcpy"

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class Case:
    """One size, and how many blocks go in one call."""

    block_bytes: int
    batch: int

    @property
    def name(self) -> str:
        size = self.block_bytes
        text = f"{size // MIB}MiB" if size >= MIB else f"{size // KIB}KiB"
        return f"{text}.single" if self.batch == 1 else f"{text}.batch{self.batch}"


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

    def __init__(self, name: str, log: Path) -> None:
        python = ROOT / ".venv-peers" / "bin" / "python"
        self.name = name
        self.error = ""
        self._process: subprocess.Popen[str] | None = None
        if not python.exists():
            self.error = "there is no .venv-peers: run benchmarks/peers.sh"
            return
        command = [str(python), str(ROOT / "benchmarks" / "peer_store.py"), name, str(POOL_BYTES)]
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


@dataclass(slots=True)
class Timings:
    """Seconds a round, by contestant and operation, one case."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, who: str, op: str, seconds: float) -> None:
        self.seconds.setdefault((who, op), []).append(seconds)

    def gb_a_second(self, who: str, op: str) -> float:
        return POOL_BYTES / GB / statistics.median(self.seconds[who, op])

    def ratio(self, op: str, against: str) -> float:
        """Ours over theirs, round by round; the median."""
        ours = self.seconds["kvcache", op]
        theirs = self.seconds[against, "copy" if against == MEMCPY else op]
        return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def run_case(case: Case, ours: Ours, peers: Sequence[Peer], pools: tuple[Pool, Pool], rounds: int) -> Timings:
    """``rounds`` and one before them that is not counted."""
    source, target = pools
    timings = Timings()
    for number in range(rounds + 1):
        copied = copy_pool(source, target, case.block_bytes)
        source.stamp(case.block_bytes, f"{case.name} {number}")
        put, named = ours.put(case.batch)
        got = ours.get(case.batch, named)
        compare(source, target, case.block_bytes)
        copied = (copied + copy_pool(source, target, case.block_bytes)) / 2
        others = [(peer, peer.run("put", case, number), peer.run("get", case, number)) for peer in peers]
        if number == 0:
            continue
        timings.add(MEMCPY, "copy", copied)
        timings.add("kvcache", "put", put)
        timings.add("kvcache", "get", got)
        for peer, their_put, their_get in others:
            if not peer.error:
                timings.add(peer.name, "put", their_put)
                timings.add(peer.name, "get", their_get)
    return timings


def compare(source: Pool, target: Pool, block_bytes: int) -> None:
    """Every byte. RAISES SystemExit: a figure for wrong bytes is none."""
    for start in range(0, POOL_BYTES, block_bytes):
        if _libc.memcmp(source.address + start, target.address + start, block_bytes) != 0:
            raise SystemExit(f"wrong bytes in the block at {start}")


def report(
    case: Case, timings: Timings, peers: Sequence[Peer], rounds: int, say: Callable[[dict[str, object]], None]
) -> None:
    """One line for each operation and each thing it is held against."""
    for op in ("put", "get"):
        line: dict[str, object] = {
            "name": f"store.{op}.{case.name}",
            "value": round(timings.gb_a_second("kvcache", op), 3),
            "unit": "GB/s",
        }
        tail = {"n": rounds, "machine": machine()}
        memcpy = round(timings.gb_a_second(MEMCPY, "copy"), 3)
        say(
            {**line, "ratio": round(timings.ratio(op, MEMCPY), 3), "against": MEMCPY, "other": memcpy, **tail}
        )
        for peer in peers:
            if peer.error:
                say({**line, "ratio": None, "against": peer.name, "error": peer.error, **tail})
                continue
            other = round(timings.gb_a_second(peer.name, op), 3)
            say(
                {
                    **line,
                    "ratio": round(timings.ratio(op, peer.name), 3),
                    "against": peer.name,
                    "other": other,
                    **tail,
                }
            )


def machine() -> str:
    """Processor, cores, kernel, and whether the native module is in use."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model} x{os.cpu_count()}, Linux {platform.release()}, native={NATIVE}"


def as_text(line: dict[str, object]) -> str:
    if "error" in line:
        return (
            f"{line['name']:<26} {line['value']:>8} GB/s   against {line['against']}: error: {line['error']}"
        )
    held = f"{line['ratio']:>7} x {line['against']} ({line['other']} GB/s)"
    return f"{line['name']:<26} {line['value']:>8} GB/s   {held}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--quick", action="store_true", help="batches only, few rounds: under a minute")
    parser.add_argument("--no-peers", action="store_true", help="this store and memcpy only")
    options = parser.parse_args()
    rounds = ROUNDS_QUICK if options.quick else ROUNDS
    cases = [case for case in CASES if case.batch > 1 or not options.quick]
    say = (
        (lambda line: print(json.dumps(line), flush=True))
        if options.json
        else (lambda line: print(as_text(line), flush=True))
    )
    pools = Pool(), Pool()
    with tempfile.TemporaryDirectory(prefix="kvcache-bench-") as home, contextlib.ExitStack() as stack:
        peers = [] if options.no_peers else [Peer(name, Path(home) / f"{name}.log") for name in PEERS]
        for peer in peers:
            stack.callback(peer.close)
        for block_bytes in sorted({case.block_bytes for case in cases}):
            with contextlib.closing(Ours(block_bytes, *pools, Path(home))) as ours:
                for case in cases:
                    if case.block_bytes == block_bytes:
                        report(case, run_case(case, ours, peers, pools, rounds), peers, rounds, say)


if __name__ == "__main__":
    main()
