"""Other projects' transfer engines on the work of ``bench_transport.py``, each by its own API.

    python benchmarks/transport_rival_ends.py read nixl-read|nixl-write|mooncake-read|mooncake-write [huge]
    python benchmarks/transport_rival_ends.py own ...     what the reader starts: says where its memory is

Runs under the environment that has the engine (transport_rivals.py says which), and imports nothing of this
project. As ours: batches of 8 MiB, four at once. Nothing is checked on the clock. In ``-write`` the process
that is measured writes into the other's pool, and the other compares afterwards.
"""

from __future__ import annotations

import base64
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from transport_pool import (
    BATCHES_AT_ONCE,
    POOL_BYTES,
    SMALL_BYTES,
    Case,
    Child,
    Pool,
    Reader,
    answer_orders,
    median_us,
    own_output,
    python,
)

POLL_S = 0.001


def starts(case: Case) -> Iterator[list[int]]:
    """Where the blocks of each batch begin."""
    for at in range(0, POOL_BYTES, case.step):
        yield list(range(at, at + case.step, case.block_bytes))


class Nixl:
    """NIXL's agents. A read over a socket is emulated, and needs the owner's progress thread."""

    def __init__(self, pool: Pool, owner: list[str], operation: str) -> None:
        self._pool, self._operation = pool, operation
        self._agent = nixl_agent_of(pool, f"reader-{os.getpid()}")
        self._child = Child(owner)
        address, described = self._child.first.split()
        self._there = int(address)
        self._peer = self._agent.add_remote_agent(base64.b64decode(described))
        self._small = self._request([0], SMALL_BYTES)
        self._finish(self._small)

    def moved(self, case: Case) -> float:
        if self._operation == "WRITE":
            self._child.say("spoil")
            self._pool.mend()
            self._child.hear()
        requests = [self._request(batch, case.block_bytes) for batch in starts(case)]
        started = time.perf_counter()
        waiting, flying = list(reversed(requests)), []
        while waiting or flying:
            while waiting and len(flying) < BATCHES_AT_ONCE:
                request = waiting.pop()
                if not self._is_done(self._agent.transfer(request)):
                    flying.append(request)
            flying = [one for one in flying if not self._is_done(self._agent.check_xfer_state(one))]
        took = time.perf_counter() - started
        for request in requests:
            self._agent.release_xfer_handle(request)
        if self._operation == "WRITE":
            check_there(self._child)
        return took

    def trips(self) -> dict[str, object]:
        return {"read": median_us(lambda: self._finish(self._small))}

    def close(self) -> None:
        self._child.close()
        os._exit(0)  # The bundled libnl crashes at the interpreter's ordinary end.

    def _request(self, places: list[int], length: int) -> Any:
        here = [(self._pool.address + at, length, 0) for at in places]
        there = [(self._there + at, length, 0) for at in places]
        described = [self._agent.get_xfer_descs(each, "DRAM") for each in (here, there)]
        return self._agent.initialize_xfer(self._operation, *described, self._peer)

    def _finish(self, request: Any) -> None:
        state = self._agent.transfer(request)
        while not self._is_done(state):
            state = self._agent.check_xfer_state(request)

    def _is_done(self, state: str) -> bool:
        if state not in ("DONE", "PROC"):
            raise RuntimeError(f"a transfer is {state}")
        return state == "DONE"


def nixl_agent_of(pool: Pool, name: str) -> Any:
    from nixl_cu12._api import nixl_agent, nixl_agent_config  # type: ignore[import-not-found]  # .venv-nixl

    has_thread = os.environ.get("UCX_PROTO_EMULATION_ENABLE") == "y"
    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=has_thread, backends=["UCX"]))
    agent.register_memory([(pool.address, POOL_BYTES, 0, "")], "DRAM")
    return agent


def own_nixl(pool: Pool, say: Callable[[str], None]) -> None:
    agent = nixl_agent_of(pool, f"owner-{os.getpid()}")
    described = base64.b64encode(agent.get_agent_metadata()).decode()
    serve(pool, say, f"{pool.address} {described}", agent.get_new_notifs)


class Mooncake:
    """Mooncake's transfer engine, peers by handshake, no metadata server."""

    def __init__(self, pool: Pool, owner: list[str], operation: str) -> None:
        self._pool, self._operation = pool, operation
        self._engine = mooncake_of(pool)
        self._child = Child(owner)
        address, self._peer = self._child.first.split()
        self._there = int(address)
        self._submit = getattr(self._engine, f"batch_transfer_async_{operation}")

    def moved(self, case: Case) -> float:
        if self._operation == "write":
            self._child.say("spoil")
            self._pool.mend()
            self._child.hear()
        work = starts(case)
        flying: list[int] = []
        started = time.perf_counter()
        for batch in work:
            if len(flying) == BATCHES_AT_ONCE:
                self._wait(flying.pop(0))
            flying.append(self._begin(batch, case.block_bytes))
        for one in flying:
            self._wait(one)
        took = time.perf_counter() - started
        if self._operation == "write":
            check_there(self._child)
        return took

    def trips(self) -> dict[str, object]:
        read = partial(
            self._engine.transfer_sync_read, self._peer, self._pool.address, self._there, SMALL_BYTES
        )
        return {"read": median_us(read)}

    def close(self) -> None:
        self._child.close()
        os._exit(0)

    def _begin(self, places: list[int], length: int) -> int:
        here = [self._pool.address + at for at in places]
        there = [self._there + at for at in places]
        number: int = self._submit(self._peer, here, there, [length] * len(places))
        if number == 0:
            raise RuntimeError("a transfer was not taken")
        return number

    def _wait(self, number: int) -> None:
        if self._engine.get_batch_transfer_status([number]) != 0:
            raise RuntimeError("a transfer failed")


def mooncake_of(pool: Pool) -> Any:
    from mooncake.engine import TransferEngine  # type: ignore[import-not-found]  # .venv-peers

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError("initialize failed")
    if engine.register_memory(pool.address, POOL_BYTES) != 0:
        raise RuntimeError("register_memory failed")
    return engine


def own_mooncake(pool: Pool, say: Callable[[str], None]) -> None:
    engine = mooncake_of(pool)
    serve(pool, say, f"{pool.address} 127.0.0.1:{engine.get_rpc_port()}", lambda: None)


# --- small things -----------------------------------------------------------------------------------


def serve(pool: Pool, say: Callable[[str], None], first: str, progress: Callable[[], object]) -> None:
    """An owner's life: ``spoil`` and ``check`` its pool when told so, until its input ends."""
    say(first)
    while True:
        while not select.select([sys.stdin], [], [], POLL_S)[0]:
            progress()
        if not (line := sys.stdin.readline()):
            os._exit(0)
        try:
            pool.spoil() if line.strip() == "spoil" else pool.check()
            say("ok")
        except RuntimeError as error:
            say(str(error))


def check_there(child: Child) -> None:
    child.say("check")
    if (said := child.hear()) != "ok":
        raise RuntimeError(said)


def main() -> None:
    role, what, *rest = sys.argv[1:]
    engine, _, operation = what.partition("-")
    pool = Pool(rest == ["huge"])
    if role == "own":
        with own_output() as say:
            {"nixl": own_nixl, "mooncake": own_mooncake}[engine](pool, say)
        return
    owner = python("transport_rival_ends.py", "own", what, *rest)
    make: dict[str, Callable[[Pool], Reader]] = {
        "nixl": partial(Nixl, owner=owner, operation=operation.upper()),
        "mooncake": partial(Mooncake, owner=owner, operation=operation),
    }
    answer_orders(make[engine], pool)


if __name__ == "__main__":
    main()
