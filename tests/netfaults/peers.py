"""Peers on the other host, ready at once: one process imports everything, and forks a child for each.

    python -m tests.netfaults.peers     "ADDRESS LIMITS..." on a line of standard input; "PID ADDRESS" of a
                                        child that listens there on a line of standard output

A child is an ``Obedient`` that also does as it is asked with tickets of ours:

    read SIZE COUNT TICKET      reads them;   answers "has DIGEST", or "failed" and why
    write SIZE COUNT TICKET     writes ``peer_bytes`` there; answers "wrote", or "failed" and why

The sum: a child takes 5 ms; an interpreter that imports the same, 300 ms.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from types import TracebackType

from kvcache.clock import NS_PER_S, SystemClock
from kvcache.testing.transport_peer import Obedient, digest
from kvcache.transport.base import (
    Endpoint,
    Limits,
    PeerLost,
    Ticket,
    TransferLate,
    TransferRefused,
    Transport,
)
from kvcache.transport.table import open_transport, scheme_of
from tests.faults.nursery import wait_until_stopped

ROOT = Path(__file__).resolve().parent.parent.parent
END_S = 20.0
DEADLINE_NS = 5 * NS_PER_S


class Willing(Obedient):
    """An ``Obedient`` that reads and writes as well."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self._doing: set[asyncio.Task[None]] = set()

    def _say(self, endpoint: Endpoint, note: bytes) -> None:
        self._spawn(self._tell(endpoint, note))

    def hear(self, endpoint: Endpoint, note: bytes) -> None:
        word, *_ = note.split()
        if word not in (b"read", b"write"):
            super().hear(endpoint, note)
            return
        self._spawn(self._do(endpoint, note.decode()))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._doing.add(task)
        task.add_done_callback(self._doing.discard)

    async def _do(self, endpoint: Endpoint, note: str) -> None:
        word, size, count, ticket = note.split()
        until_ns = SystemClock().now_ns() + DEADLINE_NS
        token = Ticket(bytes.fromhex(ticket))
        try:
            if word == "read":
                room = [memoryview(bytearray(int(size))) for _ in range(int(count))]
                await endpoint.read(token, room, until_ns)
                answer = b"has " + digest(room)
            else:
                await endpoint.write(token, self.bytes_of(int(count), int(size)), until_ns)
                answer = b"wrote"
        except (PeerLost, TransferLate, TransferRefused) as error:
            answer = f"failed {error!r}".encode()
        await self._tell(endpoint, answer)

    async def _tell(self, endpoint: Endpoint, note: bytes) -> None:
        with suppress(PeerLost, TransferLate):  # Who asked sees it himself.
            await endpoint.notify(note, SystemClock().now_ns() + DEADLINE_NS)


class Peer:
    """A child that listens. ``stop`` and ``wake`` as often as wanted; ``kill`` once."""

    def __init__(self, pid: int, address: str) -> None:
        self.pid = pid
        self.address = address

    def stop(self) -> None:
        """It says nothing more, and keeps everything; when this returns, it stands."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until_stopped([self.pid])

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL. Its sockets are closed by the system, soon."""
        os.kill(self.pid, signal.SIGKILL)


class Peers:
    """The process that forks. Make it in the host where the peers are to be; use as a context manager."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-B", "-m", "tests.netfaults.peers"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(END_S)
        self._process.stdout.close()

    def start(self, address: str, limits: Limits) -> Peer:
        """A peer that listens already."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join([address, *map(str, astuple(limits))]) + "\n")
        self._process.stdin.flush()
        pid, listens = self._process.stdout.readline().split()
        return Peer(int(pid), listens)


async def _serve(address: str, limits: Limits, ready: int) -> None:
    """Until it is killed."""
    transport = open_transport(scheme_of(address), limits)
    willing = Willing(transport)
    listener = await transport.listen(address, willing.accepted, willing.hear)
    os.write(ready, listener.address.encode() + b"\n")
    await asyncio.Event().wait()


def _child(address: str, limits: Limits, ready: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    asyncio.run(_serve(address, limits, ready))


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody asks how they ended.
    open_transport("tcp", Limits(), SystemClock())  # What it imports, every child has.
    children = []
    for line in sys.stdin:
        address, *limits = line.split()
        hears, ready = os.pipe()
        pid = os.fork()
        if not pid:
            _child(address, Limits(*map(int, limits)), ready)
            os._exit(1)
        os.close(ready)
        children.append(os.pidfd_open(pid))
        with os.fdopen(hears) as told:
            sys.stdout.write(f"{pid} {told.readline()}")
            sys.stdout.flush()
    for child in children:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
