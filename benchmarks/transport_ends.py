"""Both ends of a benchmark of transports: a pool of blocks in another process, and what brings it here.

    python benchmarks/transport_ends.py raw:0                     a plain socket: asked for a size, sends all;
                                                                  with so large a send buffer, 0: the system's
    python benchmarks/transport_ends.py tcp://127.0.0.1:0         a transport of ours, told by notes

Each says its address first and ends with its input. A new contestant is a class with ``name``, ``moved`` and
``close``; ``transport_rivals.py`` has those that are not ours.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

from harness import KIB, MIB

from kvcache.clock import NS_PER_S, SystemClock
from kvcache.sums import sum_chunks
from kvcache.transport.base import Endpoint, Ticket, Transport
from kvcache.transport.table import open_transport, scheme_of

POOL_BYTES = 256 * MIB
CHUNK_BYTES = 64 * KIB
BATCH_BYTES = 8 * MIB
BATCHES_AT_ONCE = 4
SMALL_BYTES = 64
SMALL_ROUNDS = 500
IDLE_S = 3.0
GB = 1e9
CLOCK = SystemClock()

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Case:
    """Blocks of one size; as many go in a transfer as make ``BATCH_BYTES``."""

    block_bytes: int

    @property
    def batch(self) -> int:
        return max(BATCH_BYTES // self.block_bytes, 1)


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    def moved(self, case: Case) -> float:
        """GB/s of the whole pool. RAISES RuntimeError when it could not, or brought wrong bytes."""

    def close(self) -> None: ...


def new_pool() -> memoryview:
    return memoryview(mmap.mmap(-1, POOL_BYTES))


def fill(pool: memoryview) -> None:
    """The same in every process; each chunk is another's but for its number."""
    noise = random.Random(1).randbytes(CHUNK_BYTES - 8)
    for at in range(0, POOL_BYTES, CHUNK_BYTES):
        pool[at : at + 8] = struct.pack("<Q", at)
        pool[at + 8 : at + CHUNK_BYTES] = noise


def soon() -> int:
    return CLOCK.now_ns() + 60 * NS_PER_S


class Child:
    """The other process."""

    def __init__(self, address: str) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), address]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            self.close()
            raise RuntimeError(f"the other end of {address} did not start")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Raw:
    """A blocking socket, ``sendall`` to ``recv_into``, nothing checked: one request, then all the blocks."""

    def __init__(self, pool: memoryview, send_bytes: int = 0) -> None:
        self.name = f"raw socket, send buffer {send_bytes // KIB} KiB" if send_bytes else "raw socket"
        self._pool = pool
        self._child = Child(f"raw:{send_bytes}")
        host, _, port = self._child.address.rpartition(":")
        self._sock = socket.create_connection((host, int(port)))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def moved(self, case: Case) -> float:
        started = time.perf_counter()
        self._sock.sendall(struct.pack("<Q", case.block_bytes))
        for at in range(0, POOL_BYTES, case.block_bytes):
            self._fill(self._pool[at : at + case.block_bytes])
        return POOL_BYTES / GB / (time.perf_counter() - started)

    def round_trip_us(self) -> float:
        """Of ``SMALL_BYTES`` there and back; the median."""
        took = []
        reply = memoryview(bytearray(SMALL_BYTES))
        for _ in range(SMALL_ROUNDS):
            started = time.perf_counter()
            self._sock.sendall(struct.pack("<Q", SMALL_BYTES | 1 << 63))
            self._fill(reply)
            took.append(time.perf_counter() - started)
        return median(took) * 1e6

    def close(self) -> None:
        self._sock.close()
        self._child.close()

    def _fill(self, view: memoryview) -> None:
        at = 0
        while at < len(view):
            if not (count := self._sock.recv_into(view[at:])):
                raise RuntimeError("the other end is gone")
            at += count


class Memcpy:
    """One thread, from one pool into another."""

    name = "memcpy"

    def __init__(self, pool: memoryview) -> None:
        self._pool = pool
        self._source = new_pool()
        fill(self._source)

    def moved(self, case: Case) -> float:
        started = time.perf_counter()
        for at in range(0, POOL_BYTES, case.block_bytes):
            self._pool[at : at + case.block_bytes] = self._source[at : at + case.block_bytes]
        return POOL_BYTES / GB / (time.perf_counter() - started)

    def close(self) -> None:
        self._source.release()


class Ours:
    """A transport of ours: the pool is read in batches, a few at once, and every chunk's sum is checked.

    Tickets are handed over before the clock starts: that is the control channel's work. The loop has a
    thread of its own, for between its turns it must go on saying that it lives.
    """

    def __init__(self, address: str, pool: memoryview) -> None:
        self.name = scheme_of(address)
        self._pool = pool
        self._sums = _expected_sums()
        self._heard: asyncio.Queue[bytes] = asyncio.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._child = Child(address)
        self._transport, self._end = self._run(self._joined())

    def moved(self, case: Case) -> float:
        return self._run(self._moved(case))

    def round_trip_us(self) -> float:
        """Of a read of ``SMALL_BYTES``; the median."""
        return self._run(self._small_reads())

    def note_us(self) -> float:
        """Of a note there and one back; the median."""
        return self._run(self._notes())

    def idle_percent(self) -> tuple[float, float]:
        """Of a core, with an endpoint that nobody uses: this side's, the other's."""
        return self._run(self._idle())

    def close(self) -> None:
        self._run(self._transport.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._child.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _joined(self) -> tuple[Transport, Endpoint]:
        transport = open_transport(self.name)
        transport.register(self._pool)
        return transport, await transport.connect(self._child.address, soon(), self._hear)

    def _hear(self, _: Endpoint, note: bytes) -> None:
        self._heard.put_nowait(note)

    async def _ask(self, word: str) -> bytes:
        await self._end.notify(word.encode(), soon())
        return await asyncio.wait_for(self._heard.get(), 60)

    async def _moved(self, case: Case) -> float:
        step = case.batch * case.block_bytes
        tickets = [
            (at, Ticket(await self._ask(f"{at} {case.block_bytes} {case.batch}")))
            for at in range(0, POOL_BYTES, step)
        ]
        work = iter(tickets)
        wrong: list[int] = []

        async def reader() -> None:
            for at, ticket in work:
                into = [
                    self._pool[start : start + case.block_bytes]
                    for start in range(at, at + step, case.block_bytes)
                ]
                await self._end.read(ticket, into, soon())
                first = at // CHUNK_BYTES * 8
                if sum_chunks(into, CHUNK_BYTES) != self._sums[first : first + step // CHUNK_BYTES * 8]:
                    wrong.append(at)

        started = time.perf_counter()
        await asyncio.gather(*(reader() for _ in range(BATCHES_AT_ONCE)))
        took = time.perf_counter() - started
        if wrong:
            raise RuntimeError(f"{self.name} brought wrong bytes at {wrong[:3]}")
        return POOL_BYTES / GB / took

    async def _small_reads(self) -> float:
        took = []
        into = [self._pool[:SMALL_BYTES]]
        for _ in range(SMALL_ROUNDS):
            ticket = Ticket(await self._ask(f"0 {SMALL_BYTES} 1"))
            started = time.perf_counter()
            await self._end.read(ticket, into, soon())
            took.append(time.perf_counter() - started)
        return median(took) * 1e6

    async def _notes(self) -> float:
        took = []
        for _ in range(SMALL_ROUNDS):
            started = time.perf_counter()
            await self._ask("cpu")
            took.append(time.perf_counter() - started)
        return median(took) * 1e6

    async def _idle(self) -> tuple[float, float]:
        theirs = float(await self._ask("cpu"))
        mine, started = time.process_time(), time.perf_counter()
        await asyncio.sleep(IDLE_S)
        took = time.perf_counter() - started
        mine = time.process_time() - mine
        return 100 * mine / took, 100 * (float(await self._ask("cpu")) - theirs) / took


def _expected_sums() -> bytes:
    pool = new_pool()
    fill(pool)
    return sum_chunks([pool], CHUNK_BYTES)


def _serve_raw(pool: memoryview, send_bytes: int) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    _say_address(f"127.0.0.1:{server.getsockname()[1]}")
    sock, _ = server.accept()
    if send_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while request := sock.recv(8, socket.MSG_WAITALL):
        (size,) = struct.unpack("<Q", request)
        if size >> 63:
            sock.sendall(pool[: size & ~(1 << 63)])
            continue
        for at in range(0, POOL_BYTES, size):
            sock.sendall(pool[at : at + size])


async def _serve(address: str, pool: memoryview) -> None:
    transport = open_transport(scheme_of(address))
    transport.register(pool)
    saying: set[asyncio.Task[None]] = set()

    def say(endpoint: Endpoint, note: bytes) -> None:
        task = asyncio.ensure_future(endpoint.notify(note, soon()))
        saying.add(task)
        task.add_done_callback(saying.discard)

    def hear(endpoint: Endpoint, note: bytes) -> None:
        if note == b"cpu":
            say(endpoint, str(time.process_time()).encode())
            return
        at, size, count = map(int, note.split())
        pieces = [pool[start : start + size] for start in range(at, at + size * count, size)]
        say(endpoint, transport.export(pieces, soon()))

    listener = await transport.listen(address, lambda _: None, hear)
    _say_address(listener.address)
    await asyncio.Event().wait()


def _say_address(address: str) -> None:
    print(address, flush=True)
    threading.Thread(target=_end_with_input, daemon=True).start()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    blocks = new_pool()
    fill(blocks)
    if sys.argv[1].startswith("raw:"):
        _serve_raw(blocks, int(sys.argv[1].removeprefix("raw:")))
    else:
        asyncio.run(_serve(sys.argv[1], blocks))
