"""A peer that does as notes tell it: in a process of its own, that can be stopped, woken and killed.

    export COUNT SIZE     exports COUNT pieces of SIZE bytes; answers with the ticket
    post COUNT SIZE       posts such pieces; answers with the ticket, and ``filled DIGEST`` once they are

What it exports is ``peer_bytes``. Run as ``python -m kvcache.testing.transport_peer`` with the address to
listen at and the limits; it says its address on the first line of its output, and ends with its input.
"""

from __future__ import annotations

import asyncio
import os
import random
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple
from hashlib import sha256
from typing import Protocol

from kvcache.clock import NS_PER_S, SystemClock
from kvcache.errors import Unavailable
from kvcache.transport.base import Endpoint, Limits, Transport
from kvcache.transport.table import open_transport, scheme_of

READY_S = 60.0
END_S = 60.0
UNTIL_NS = 3_600 * NS_PER_S


def peer_bytes(count: int, size: int) -> list[bytes]:
    """What the pieces of a peer's export hold."""
    noise = random.Random(f"{count} {size}").randbytes(min(size, 1 << 20)).replace(b"\0", b"\1")
    rest = noise * ((size - 8) // len(noise)) + noise[: (size - 8) % len(noise)] if size > 8 else b""
    return [at.to_bytes(8, "little")[:size] + rest for at in range(count)]


def digest(pieces: Sequence[memoryview]) -> bytes:
    summed = sha256()
    for piece in pieces:
        summed.update(piece)
    return summed.hexdigest().encode()


class Obedient:
    """Does what notes say on ``transport``; give ``hear`` to its ``listen``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._saying: set[asyncio.Task[None]] = set()
        self._made: dict[tuple[int, int], list[memoryview]] = {}

    def accepted(self, _: Endpoint) -> None:
        """Nothing to do until it speaks."""

    def hear(self, endpoint: Endpoint, note: bytes) -> None:
        word, count, size = note.decode().split()
        until_ns = SystemClock().now_ns() + UNTIL_NS
        if word == "export":
            self._say(endpoint, self._transport.export(self.bytes_of(int(count), int(size)), until_ns))
            return
        assert word == "post", word
        room = [memoryview(bytearray(int(size))) for _ in range(int(count))]
        ticket = self._transport.post(room, until_ns, lambda: self._say(endpoint, b"filled " + digest(room)))
        self._say(endpoint, ticket)

    def bytes_of(self, count: int, size: int) -> list[memoryview]:
        """``peer_bytes``, made once: for as long as that takes, the peer says nothing."""
        if (count, size) not in self._made:
            self._made[count, size] = [memoryview(data) for data in peer_bytes(count, size)]
        return self._made[count, size]

    def _say(self, endpoint: Endpoint, note: bytes) -> None:
        deadline_ns = SystemClock().now_ns() + 20 * NS_PER_S
        task = asyncio.ensure_future(endpoint.notify(note, deadline_ns))
        self._saying.add(task)
        task.add_done_callback(self._saying.discard)


class Stoppable(Protocol):
    """A peer that a test can treat badly."""

    address: str

    def stop(self) -> None:
        """It says nothing more, and keeps everything."""

    def wake(self) -> None: ...

    async def kill(self) -> None:
        """It is gone, without a word."""

    async def close(self) -> None: ...


class PeerProcess:
    """A ``Stoppable`` in a process of its own."""

    def __init__(self, address: str, limits: Limits) -> None:
        command = [sys.executable, "-m", "kvcache.testing.transport_peer", address]
        command += map(str, astuple(limits))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(READY_S) else ""
        if not line:
            self._end()
            raise Unavailable("unavailable", "the peer's process did not start")
        self.address = line.strip()

    def stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)  # It stands now, not soon.

    def wake(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    async def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    async def close(self) -> None:
        self._end()

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait(END_S)
        self._process.stdin.close()
        self._process.stdout.close()


async def _serve(address: str, limits: Limits) -> None:
    transport = open_transport(scheme_of(address), limits)
    obedient = Obedient(transport)
    listener = await transport.listen(address, obedient.accepted, obedient.hear)
    sys.stdout.write(f"{listener.address}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transport.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], Limits(*map(int, sys.argv[2:]))))
