"""Our ends of ``bench_transport.py``: a plain socket, memcpy, and the transports of this project.

    python benchmarks/transport_ends.py read raw:0 [huge] [bare]  a reader, for orders (transport_pool.py); it
                                                                  starts its owner
    python benchmarks/transport_ends.py own raw:0 [huge]          a plain socket: asked for a size, sends all;
                                                                  with so large a send buffer, 0: the system's
    python benchmarks/transport_ends.py own tcp://127.0.0.1:0     a transport of ours, told by notes

``huge``: pools in pages of 2 MiB. ``bare``: ours checks nothing on the clock. ``memcpy`` checks when it is
called ``memcpy:summed``. An owner says its address first and ends with its input.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any, TypeVar

from transport_pool import (
    BATCHES_AT_ONCE,
    CHUNK_BYTES,
    GB,
    IDLE_S,
    MIB,
    POOL_BYTES,
    SMALL_BYTES,
    SMALL_ROUNDS,
    Case,
    Child,
    Pool,
    Reader,
    answer_orders,
    median_us,
    python,
    say_first,
)

from kvcache.clock import NS_PER_S, SystemClock
from kvcache.sums import sum_chunks
from kvcache.transport.base import Endpoint, Ticket, Transport
from kvcache.transport.table import open_transport, scheme_of

CLOCK = SystemClock()
IS_SMALL = 1 << 63

Result = TypeVar("Result")


def soon() -> int:
    return CLOCK.now_ns() + 60 * NS_PER_S


class Raw:
    """A blocking socket, ``sendall`` to ``recv_into``, nothing checked: one request, then all the blocks."""

    def __init__(self, pool: Pool, owner: list[str]) -> None:
        self._pool = pool.view
        self._child = Child(owner)
        host, _, port = self._child.first.rpartition(":")
        self._sock = socket.create_connection((host, int(port)))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def moved(self, case: Case) -> float:
        started = time.perf_counter()
        self._sock.sendall(struct.pack("<Q", case.block_bytes))
        for at in range(0, POOL_BYTES, case.block_bytes):
            self._fill(self._pool[at : at + case.block_bytes])
        return time.perf_counter() - started

    def trips(self) -> dict[str, object]:
        """``SMALL_BYTES`` there and back."""
        request, reply = struct.pack("<Q", SMALL_BYTES | IS_SMALL), memoryview(bytearray(SMALL_BYTES))

        def trip() -> None:
            self._sock.sendall(request)
            self._fill(reply)

        return {"read": median_us(trip)}

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
    """One thread, from one pool into another: both cold, for they are far larger than the caches. With
    ``is_summed`` a second thread sums what has come, as it does behind a transport."""

    def __init__(self, pool: Pool, is_huge: bool, is_summed: bool) -> None:
        self._pool = pool.view
        self._source = Pool(is_huge)
        self._is_summed = is_summed
        self._summing = ThreadPoolExecutor(1)

    def moved(self, case: Case) -> float:
        source, sums = self._source.view, []
        started = time.perf_counter()
        for at in range(0, POOL_BYTES, case.block_bytes):
            block = self._pool[at : at + case.block_bytes]
            block[:] = source[at : at + case.block_bytes]
            if self._is_summed and (at + case.block_bytes) % case.step == 0:
                batch = self._pool[at + case.block_bytes - case.step : at + case.block_bytes]
                sums.append(self._summing.submit(sum_chunks, [batch], CHUNK_BYTES))
        for each in sums:
            each.result()
        return time.perf_counter() - started

    def hot(self, block_bytes: int = MIB) -> dict[str, object]:
        """GB/s of one block into one other, again and again: it never leaves the cache."""
        into, source = self._pool[:block_bytes], self._source.view[:block_bytes]
        started = time.perf_counter()
        for _ in range(POOL_BYTES // block_bytes):
            into[:] = source
        return {"value": POOL_BYTES / GB / (time.perf_counter() - started)}

    def close(self) -> None:
        self._summing.shutdown()


class Ours:
    """A transport of ours: the pool is read in batches, a few at once, and every chunk's sum is
    checked, in another thread, as a node does.

    Tickets are handed over before the clock starts: that is the control channel's work. The loop has a
    thread of its own, for between its turns it must go on saying that it lives.
    """

    def __init__(self, address: str, pool: Pool, owner: list[str], is_bare: bool) -> None:
        self._is_bare = is_bare
        self._scheme = scheme_of(address)
        self._pool = pool.view
        self._sums = sum_chunks([pool.view], CHUNK_BYTES)
        self._summing = ThreadPoolExecutor(1)
        self._heard: asyncio.Queue[bytes] = asyncio.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._transport = self._run(self._opened())
        self._child = Child(owner)
        self._end = self._run(self._joined())

    def moved(self, case: Case) -> float:
        return self._run(self._moved(case))

    def trips(self) -> dict[str, object]:
        """A read of ``SMALL_BYTES``, and a note there and back."""
        return {"read": self._run(self._small_reads()), "note": self._run(self._notes())}

    def idle(self) -> dict[str, object]:
        """Of a core, with an endpoint that nobody uses."""
        mine, theirs = self._run(self._idle())
        return {"caller": mine, "listener": theirs}

    def close(self) -> None:
        self._run(self._transport.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._summing.shutdown()
        self._child.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _opened(self) -> Transport:
        transport = open_transport(self._scheme)
        transport.register(self._pool)
        return transport

    async def _joined(self) -> Endpoint:
        return await self._transport.connect(self._child.first, soon(), self._hear)

    def _hear(self, _: Endpoint, note: bytes) -> None:
        self._heard.put_nowait(note)

    async def _ask(self, word: str) -> bytes:
        await self._end.notify(word.encode(), soon())
        return await asyncio.wait_for(self._heard.get(), 60)

    async def _moved(self, case: Case) -> float:
        tickets = [
            (at, Ticket(await self._ask(f"{at} {case.block_bytes} {case.batch}")))
            for at in range(0, POOL_BYTES, case.step)
        ]
        work = iter(tickets)
        wrong: list[int] = []

        async def reader() -> None:
            for at, ticket in work:
                into = [
                    self._pool[start : start + case.block_bytes]
                    for start in range(at, at + case.step, case.block_bytes)
                ]
                await self._end.read(ticket, into, soon())
                if self._is_bare:
                    continue
                first = at // CHUNK_BYTES * 8
                sums = await self._loop.run_in_executor(self._summing, sum_chunks, into, CHUNK_BYTES)
                if sums != self._sums[first : first + case.step // CHUNK_BYTES * 8]:
                    wrong.append(at)

        started = time.perf_counter()
        await asyncio.gather(*(reader() for _ in range(BATCHES_AT_ONCE)))
        took = time.perf_counter() - started
        if wrong:
            raise RuntimeError(f"{self._scheme} brought wrong bytes at {wrong[:3]}")
        return took

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


# --- owners -----------------------------------------------------------------------------------------


def own_raw(pool: memoryview, send_bytes: int) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    say_first(f"127.0.0.1:{server.getsockname()[1]}")
    sock, _ = server.accept()
    if send_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while request := sock.recv(8, socket.MSG_WAITALL):
        (size,) = struct.unpack("<Q", request)
        if size & IS_SMALL:
            sock.sendall(pool[: size & ~IS_SMALL])
            continue
        for at in range(0, POOL_BYTES, size):
            sock.sendall(pool[at : at + size])


async def own(address: str, pool: memoryview) -> None:
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
    say_first(listener.address)
    await asyncio.Event().wait()


def main() -> None:
    role, what, *rest = sys.argv[1:]
    is_huge = "huge" in rest
    if role == "own":
        pool = Pool(is_huge)
        if what.startswith("raw:"):
            own_raw(pool.view, int(what.removeprefix("raw:")))
        else:
            asyncio.run(own(what, pool.view))
        return
    owner = python("transport_ends.py", "own", what, *rest)
    makers: dict[str, Callable[[Pool], Reader]] = {
        "raw": partial(Raw, owner=owner),
        "memcpy": partial(Memcpy, is_huge=is_huge, is_summed=what.endswith(":summed")),
    }
    make = makers.get(what.partition(":")[0], partial(Ours, what, owner=owner, is_bare="bare" in rest))
    answer_orders(make, Pool(is_huge))


if __name__ == "__main__":
    main()
