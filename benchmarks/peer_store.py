"""Other stores on the same work as ``bench_store.py``. Runs under .venv-peers (benchmarks/peers.sh).

    python benchmarks/peer_store.py mooncake|redis POOL_BYTES
    stdin   {"op": "put" | "get", "block_bytes": n, "batch": n, "round": n}     (JSON, one a line)
    stdout  {"ready": true}, then {"seconds": s, "wrong": blocks} or {"error": text} for each

``get`` reads what the ``put`` before it wrote, and compares every byte after the clock has stopped.
Both move the whole pool, block by block or in batches, between memory of this process and the store.
Imports nothing of this project: it runs where the project is not installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

START_S = 10.0
LEASE_MS = 300
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Pool:
    """Memory that is there, aligned to pages, and its address."""

    def __init__(self, pool_bytes: int) -> None:
        self.memory = mmap.mmap(-1, pool_bytes)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        noise = os.urandom(1 << 20)
        for start in range(0, pool_bytes, len(noise)):
            self.view[start : start + len(noise)] = noise

    def stamp(self, block_bytes: int, mark: str) -> None:
        """Make every block unlike every other, and unlike what it was in the round before."""
        for start in range(0, len(self.view), block_bytes):
            text = f"{mark} {start}".encode().ljust(64)
            self.view[start : start + 64] = text
            self.view[start + block_bytes - 64 : start + block_bytes] = text


class Peer(Protocol):
    def put(self, keys: Sequence[str], starts: Sequence[int], block_bytes: int) -> None:
        """Blocks of the source pool at ``starts`` go in. Raises when one did not."""

    def get(self, keys: Sequence[str], starts: Sequence[int], block_bytes: int) -> list[bytes]:
        """Blocks come out: into the target pool (then the list is empty), or as bytes."""

    def clear(self) -> None:
        """Forget everything."""


class Mooncake:
    """Its store with the segment in this very process: no other process, no socket on the data path."""

    def __init__(self, source: Pool, target: Pool, home: Path, pool_bytes: int) -> None:
        from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]  # .venv-peers

        port, metrics_port = free_ports(2)
        master = Path(sys.executable).parent / "mooncake_master"
        options = [
            "--port",
            str(port),
            "--metrics_port",
            str(metrics_port),
            "--default_kv_lease_ttl",
            str(LEASE_MS),
        ]
        spawn([str(master), *options], home / "mooncake_master.log")
        wait_for(lambda: connects(("127.0.0.1", port)))
        self._store = MooncakeDistributedStore()
        name = f"127.0.0.1:{free_ports(1)[0]}"
        segment_bytes = pool_bytes * 2
        status = self._store.setup(
            name, "P2PHANDSHAKE", segment_bytes, 64 << 20, "tcp", "", f"127.0.0.1:{port}"
        )
        check(status == 0, f"setup returned {status}")
        self._source, self._target = source, target
        for pool in (source, target):
            check(self._store.register_buffer(pool.address, pool_bytes) == 0, "register_buffer failed")

    def put(self, keys: Sequence[str], starts: Sequence[int], block_bytes: int) -> None:
        if len(keys) == 1:
            results = [self._store.put_from(keys[0], self._source.address + starts[0], block_bytes)]
        else:
            addresses = [self._source.address + start for start in starts]
            results = self._store.batch_put_from(list(keys), addresses, [block_bytes] * len(keys))
        check(not any(results), f"put returned {results}")

    def get(self, keys: Sequence[str], starts: Sequence[int], block_bytes: int) -> list[bytes]:
        if len(keys) == 1:
            results = [self._store.get_into(keys[0], self._target.address + starts[0], block_bytes)]
        else:
            addresses = [self._target.address + start for start in starts]
            results = self._store.batch_get_into(list(keys), addresses, [block_bytes] * len(keys))
        check(all(result == block_bytes for result in results), f"get returned {results}")
        return []

    def clear(self) -> None:
        time.sleep(2 * LEASE_MS / 1_000)  # What was read is leased, and stays until that has ended.
        self._store.remove_all()


class Redis:
    """redis-server over a unix socket, redis-py with hiredis."""

    def __init__(self, source: Pool, target: Pool, home: Path, pool_bytes: int) -> None:
        import redis  # type: ignore[import-not-found]  # .venv-peers

        server = shutil.which("redis-server")
        check(server is not None, "there is no redis-server (Debian: apt-get install redis-server)")
        path = home / "redis.sock"
        options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
        spawn([str(server), *options, "--dir", str(home)], home / "redis.log")
        wait_for(path.exists)
        self._client = redis.Redis(unix_socket_path=str(path))
        self._client.ping()
        self._source = source

    def put(self, keys: Sequence[str], starts: Sequence[int], block_bytes: int) -> None:
        blocks = [self._source.view[start : start + block_bytes] for start in starts]
        if len(keys) == 1:
            self._client.set(keys[0], blocks[0])
        else:
            self._client.mset(dict(zip(keys, blocks, strict=True)))

    def get(self, keys: Sequence[str], starts: Sequence[int], block_bytes: int) -> list[bytes]:
        found = [self._client.get(keys[0])] if len(keys) == 1 else self._client.mget(keys)
        check(all(block is not None for block in found), "a block is gone")
        return [bytes(block) for block in found if isinstance(block, bytes)]

    def clear(self) -> None:
        self._client.flushall()


PEERS: dict[str, Callable[[Pool, Pool, Path, int], Peer]] = {"mooncake": Mooncake, "redis": Redis}


def answer(peer: Peer, source: Pool, target: Pool, order: dict[str, object]) -> dict[str, object]:
    """Do one order: the whole pool once."""
    block_bytes, batch = int(str(order["block_bytes"])), int(str(order["batch"]))
    mark = f"{block_bytes}/{batch}/{order['round']}"
    starts = range(0, len(source.view), block_bytes)
    calls = [
        ([f"{mark}/{start}" for start in starts[at : at + batch]], starts[at : at + batch])
        for at in range(0, len(starts), batch)
    ]
    if order["op"] == "put":
        peer.clear()
        source.stamp(block_bytes, mark)
        started = time.perf_counter()
        for keys, places in calls:
            peer.put(keys, places, block_bytes)
        return {"seconds": time.perf_counter() - started, "wrong": 0}
    seconds, wrong = 0.0, 0
    for keys, places in calls:
        started = time.perf_counter()
        blocks = peer.get(keys, places, block_bytes)
        seconds += time.perf_counter() - started
        for index, block in enumerate(blocks):
            wrong += source.view[places[index] : places[index] + block_bytes] != block
    if not blocks:
        wrong = sum(
            _libc.memcmp(source.address + start, target.address + start, block_bytes) != 0 for start in starts
        )
    return {"seconds": seconds, "wrong": wrong}


# --- processes ----------------------------------------------------------------------------------


def spawn(command: list[str], log: Path) -> None:
    """A server that dies with this process."""
    with log.open("wb") as sink:
        subprocess.Popen(
            command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
        )


def die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            found.append(int(listener.getsockname()[1]))
        return found


def connects(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + START_S
    while not holds():
        check(time.monotonic() < end, "its server did not start")
        time.sleep(0.02)


def check(holds: bool, why: str) -> None:
    if not holds:
        raise RuntimeError(why)


@contextlib.contextmanager
def replies() -> Iterator[Callable[[dict[str, object]], None]]:
    """Our own standard output; what libraries print goes to standard error instead."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def reply(values: dict[str, object]) -> None:
            print(json.dumps(values), file=out, flush=True)

        yield reply


def main() -> None:
    name, pool_bytes = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="kvcache-peer-") as home, replies() as reply:
        try:
            source, target = Pool(pool_bytes), Pool(pool_bytes)
            peer = PEERS[name](source, target, Path(home), pool_bytes)
        except Exception as error:  # Others' code: whatever it raises is the line that is reported.
            reply({"error": f"{type(error).__name__}: {error}"})
            return
        reply({"ready": True})
        for line in sys.stdin:
            try:
                reply(answer(peer, source, target, json.loads(line)))
            except Exception as error:  # As above.
                reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
