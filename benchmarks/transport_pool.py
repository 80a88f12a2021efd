"""What both ends of every contestant of ``bench_transport.py`` share: memory, blocks, orders.

Imports nothing of this project, for rivals run it under environments in which the project is not installed.

    conductor (bench_transport.py)                      a contestant: two processes, a pool in each
      {"op": "move", "block_bytes": n}  ──►  reader ◄══ blocks ══ owner
      ◄── {"value": GB/s}

Before each round the reader spoils its pool, so bytes of the round before do not pass for new ones; after it
every byte is compared, off the clock (``verified``: ours check sums on the clock as well).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

KIB, MIB = 1 << 10, 1 << 20
POOL_BYTES = 256 * MIB
CHUNK_BYTES = 64 * KIB
BATCH_BYTES = 8 * MIB
BATCHES_AT_ONCE = 4
SMALL_BYTES = 64
SMALL_ROUNDS = 200
IDLE_S = 3.0
GB = 1e9
PATIENCE_S = 20
MADV_COLLAPSE = 25
HUGE_PAGE_BYTES = 2 * MIB

_NOISE = random.Random(1).randbytes(CHUNK_BYTES - 8)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class Case:
    """Blocks of one size; as many go in a transfer as make ``BATCH_BYTES``."""

    block_bytes: int

    @property
    def batch(self) -> int:
        return max(BATCH_BYTES // self.block_bytes, 1)

    @property
    def step(self) -> int:
        """Bytes a transfer."""
        return self.batch * self.block_bytes


class Pool:
    """Shared memory, as a node's slab is. With ``is_huge`` in pages of 2 MiB, else of 4 KiB."""

    def __init__(self, is_huge: bool = False) -> None:
        none, shared, private, fixed, anonymous = 0, 0x01, 0x02, 0x10, 0x20
        both = mmap.PROT_READ | mmap.PROT_WRITE
        reserved = _libc.mmap(None, POOL_BYTES + HUGE_PAGE_BYTES, none, private | anonymous, -1, 0)
        self.address = reserved + -reserved % HUGE_PAGE_BYTES
        mapped = _libc.mmap(self.address, POOL_BYTES, both, shared | anonymous | fixed, -1, 0)
        if mapped != self.address:
            raise RuntimeError(f"no memory: {os.strerror(ctypes.get_errno())}")
        self.view = memoryview((ctypes.c_ubyte * POOL_BYTES).from_address(self.address)).cast("B")
        fill(self.view)
        if is_huge and _libc.madvise(self.address, POOL_BYTES, MADV_COLLAPSE) != 0:
            raise RuntimeError(f"no huge pages: {os.strerror(ctypes.get_errno())} (Linux 6.1 or later)")

    def spoil(self) -> None:
        """Every chunk is wrong now, at its beginning and its end."""
        for at in range(0, POOL_BYTES, CHUNK_BYTES):
            self.view[at : at + 8] = self.view[at + CHUNK_BYTES - 8 : at + CHUNK_BYTES] = bytes(8)

    def mend(self) -> None:
        """As before ``spoil``."""
        for at in range(0, POOL_BYTES, CHUNK_BYTES):
            self.view[at : at + 8] = struct.pack("<Q", at)
            self.view[at + CHUNK_BYTES - 8 : at + CHUNK_BYTES] = _NOISE[-8:]

    def check(self) -> None:
        """Every byte is as ``fill`` made it. RAISES RuntimeError when one is not."""
        rest = CHUNK_BYTES - 8
        for at in range(0, POOL_BYTES, CHUNK_BYTES):
            is_right = self.view[at : at + 8] == struct.pack("<Q", at)
            if not is_right or _libc.memcmp(self.address + at + 8, _NOISE, rest) != 0:
                raise RuntimeError(f"wrong bytes arrived at {at}")


def fill(pool: memoryview) -> None:
    """The same in every process; each chunk is another's but for its number."""
    for at in range(0, POOL_BYTES, CHUNK_BYTES):
        pool[at : at + 8] = struct.pack("<Q", at)
        pool[at + 8 : at + CHUNK_BYTES] = _NOISE


# --- a contestant's reader ------------------------------------------------------------------------


class Reader(Protocol):
    """One that can also say what is small has ``trips`` (``Trips``), and what idle costs: ``idle``."""

    def moved(self, case: Case) -> float:
        """Seconds in which the whole pool came. RAISES when it could not."""

    def close(self) -> None: ...


def answer_orders(make: Callable[[Pool], Reader], pool: Pool) -> None:
    """The life of a reader's process."""
    with own_output() as say, contextlib.ExitStack() as stack:

        def reply(values: dict[str, object]) -> None:
            say(json.dumps(values))

        try:
            reader = make(pool)
            stack.callback(reader.close)
        except Exception as error:  # Others' code: whatever it raises is the line that is reported.
            reply({"error": f"{type(error).__name__}: {error}"})
            return
        reply({"ready": True})
        for line in sys.stdin:
            try:
                reply(_answer(reader, pool, json.loads(line)))
            except Exception as error:  # As above.
                reply({"error": f"{type(error).__name__}: {error}"})


def _answer(reader: Reader, pool: Pool, order: Mapping[str, object]) -> dict[str, object]:
    if order["op"] != "move":
        found: dict[str, object] = getattr(reader, str(order["op"]))()
        return found
    pool.spoil()
    seconds = reader.moved(Case(int(str(order["block_bytes"]))))
    pool.check()
    return {"value": POOL_BYTES / GB / seconds}


def median_us(action: Callable[[], object]) -> float:
    """Of ``SMALL_ROUNDS``."""
    took = []
    for _ in range(SMALL_ROUNDS):
        started = time.perf_counter()
        action()
        took.append(time.perf_counter() - started)
    return median(took) * 1e6


@contextlib.contextmanager
def own_output() -> Iterator[Callable[[str], None]]:
    """Says a line on our own standard output; what libraries print there goes to standard error instead."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def say(line: str) -> None:
            print(line, file=out, flush=True)

        yield say


# --- other processes --------------------------------------------------------------------------------


class Child:
    """A process that says a line first, and ends with its input."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        is_leader: bool = False,
    ) -> None:
        """``is_leader``: signals go to it and to all that it starts."""
        self._is_leader = is_leader
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  # Closed by close.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, **(environment or {})},
            text=True,
            start_new_session=is_leader,
        )
        self.first = self.hear()
        if not self.first:
            why = self.last_words()
            self.close()
            raise RuntimeError(f"{' '.join(command)} did not start: {why}")

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def hear(self) -> str:
        """Its next line; empty when it has ended, or says nothing for ``PATIENCE_S``."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE_S)[0]:
            self.send_signal(signal.SIGKILL)
        return self._process.stdout.readline().strip()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if self._is_leader else os.kill)(self._process.pid, number)

    def last_words(self) -> str:
        """The last line of its standard error."""
        self._complaints.seek(0)
        return self._complaints.read().strip().rpartition("\n")[2]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._complaints.close()


def python(*arguments: str) -> list[str]:
    """A command: a script of this folder under the interpreter that runs this."""
    return [sys.executable, str(Path(__file__).with_name(arguments[0])), *arguments[1:]]


def say_first(line: str) -> None:
    """A child's first line; from now on it ends with its input, whatever it is about."""
    print(line, flush=True)
    threading.Thread(target=_end_with_input, daemon=True).start()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


class Contestant:
    """A reader in a process of its own, driven by orders, and the owner that it has started.

    Between their turns both are stopped: some engines spin while they wait, which would cost the others
    their turns. With ``is_at_peace`` they are not, because stopped peers would be given up."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        is_at_peace: bool = False,
    ) -> None:
        """RAISES RuntimeError when it does not start."""
        self.name = name
        self._is_at_peace = is_at_peace
        self._child = Child(command, environment, is_leader=True)
        try:
            self._checked(self._child.first)
        except RuntimeError:
            self._child.close()
            raise
        self._rest()

    def moved(self, case: Case) -> float:
        """GB/s. RAISES RuntimeError when it could not, or brought wrong bytes."""
        return float(str(self.ask("move", block_bytes=case.block_bytes)["value"]))

    def ask(self, op: str, **values: object) -> dict[str, object]:
        """RAISES RuntimeError."""
        self._child.send_signal(signal.SIGCONT)
        self._child.say(json.dumps({"op": op, **values}))
        answer = self._child.hear()
        self._rest()
        return self._checked(answer)

    def close(self) -> None:
        self._child.send_signal(signal.SIGCONT)
        self._child.close()

    def _rest(self) -> None:
        if not self._is_at_peace:
            self._child.send_signal(signal.SIGSTOP)

    def _checked(self, line: str) -> dict[str, object]:
        answer: dict[str, object] = json.loads(line) if line else {"error": self._child.last_words()}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer
