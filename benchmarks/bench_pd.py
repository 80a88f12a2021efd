"""Prefill on one node, decode on another: how soon the blocks are there, with layer streaming and without.

Two real nodes (``kvcache serve``) with tcp:// between them, each with an engine of its own: four processes.
The engine that prefills computes nothing: layer ``i`` is ready at ``(i + 1) * pace`` after the start and not
before, as if a GPU had it; it sleeps until then, so the time between is free for copying, as the host's
processor is while a GPU computes. Then, by mode:

    off     save all blocks when the last layer is ready; the other engine is told; it leases and loads
    pull    save layer by layer; the other engine asks at the start, and its node follows
    push    save layer by layer; the node brings the blocks to the named one as they are written

The end is when all blocks are verified in the memory of the engine that decodes: there a first token can be
computed. Every byte is compared off the clock. Times are from the end of prefill, and from its start.

    python benchmarks/bench_pd.py [--json] [--quick] [--modes off,pull,push]

On paper: without streaming nothing moves before the end of prefill; then all bytes are copied into the one
node, sent, and copied out of the other: ``bytes / copy + bytes / tcp + bytes / copy``. With it all but the
last layer is there by then, if a layer's bytes go in a layer's time: what is left is one of 32 layers on its
way, and the copy out of the node, ``bytes / 32 / tcp + bytes / copy``; if they do not, the wire is the limit,
and ``bytes / tcp - time of prefill`` is left too. ``bound`` is that sum with the speeds of a raw socket and
of memcpy, measured in the same rounds, and of nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import harness
from bench_transport import plain
from harness import KIB, MIB, Figure
from transport_pool import GB, Case, Child, Contestant, own_output, python

from kvcache.block import BlockSpec
from kvcache.client import connect_blocking
from kvcache.client.store import BlockingStore, Handle, SaveHints
from kvcache.namespace import Namespace, shape_of
from kvcache.testing.processes import NodeProcess

LAYERS = 32
SPEC = BlockSpec(16, 2 * LAYERS, 8, 4 * KIB)
"""2 MiB for 16 tokens: 8 heads of 128, K and V, 2 bytes, 32 layers, as in models of 8 billion parameters."""
NODES = ("prefill", "decode")
STAMP_BYTES = 64
START_NS = 50_000_000
WAIT_MS = 20_000
MODES = ("off", "pull", "push")
ROUNDS, ROUNDS_QUICK = 7, 2
COPY_CASE = Case(2 * MIB)
NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: int
    pace_us: int
    """So long takes a layer."""

    @property
    def block_count(self) -> int:
        return self.tokens // SPEC.block_tokens

    @property
    def byte_count(self) -> int:
        return self.block_count * SPEC.block_bytes

    @property
    def prefill_ms(self) -> float:
        return LAYERS * self.pace_us / 1e3

    @property
    def name(self) -> str:
        return f"{self.tokens}tokens.{self.prefill_ms:.0f}ms"


PROMPTS = (Prompt(512, 1_500), Prompt(512, 6_000), Prompt(2_048, 3_000), Prompt(2_048, 12_000))
PROMPTS_QUICK = (Prompt(512, 1_500), Prompt(2_048, 6_000))


# --- what both engines have -----------------------------------------------------------------------------


class Memory:
    """An engine's memory for the KV of one prompt."""

    def __init__(self, byte_count: int) -> None:
        self.view = memoryview(mmap.mmap(-1, byte_count))
        noise = bytes(range(256)) * (MIB // 256)
        for at in range(0, byte_count, MIB):
            self.view[at : at + MIB] = noise

    def blocks(self, count: int) -> list[list[memoryview]]:
        size = SPEC.block_bytes
        return [[self.view[at : at + size]] for at in range(0, count * size, size)]

    def stamp(self, count: int, mark: str) -> None:
        """Make every block unlike all others, and unlike what it was in the round before."""
        for index, (block,) in enumerate(self.blocks(count)):
            for at in (0, SPEC.block_bytes - STAMP_BYTES):
                block[at : at + STAMP_BYTES] = f"{mark} {index}".encode().ljust(STAMP_BYTES)


def opened(address: str) -> tuple[BlockingStore, Handle]:
    store = connect_blocking(address, timeout_ms=WAIT_MS)
    names = Namespace(
        model="bench",
        weights="bench",
        dtype="bfloat16",
        layout="canonical",
        block_tokens=SPEC.block_tokens,
        shape=shape_of(SPEC),
    )
    return store, store.open(names, SPEC)


def hashes(handle: Handle, count: int, mark: str) -> list[bytes]:
    """A prompt that nobody has had before."""
    first = int.from_bytes(mark.encode(), "big") % (1 << 31)
    return list(handle.hashes([first + index for index in range(count * SPEC.block_tokens)]))


def sleep_until(when_ns: int) -> None:
    while (left := when_ns - time.monotonic_ns()) > 0:
        time.sleep(left / 1e9)


# --- the engine that prefills ------------------------------------------------------------------------------


def prefill(address: str, byte_count: int) -> None:
    """Take orders, one a line; answer each when its blocks are published."""
    with own_output() as say:
        store, handle = opened(address)
        memory = Memory(byte_count)
        say("ready")
        for line in sys.stdin:
            order = json.loads(line)
            count, mark = int(order["blocks"]), str(order["mark"])
            memory.stamp(count, mark)
            prefix = hashes(handle, count, mark)
            say("stamped")
            start_ns, pace_us = json.loads(sys.stdin.readline()), int(order["pace_us"])
            held = compute(store, handle, prefix, memory.blocks(count), start_ns, pace_us, str(order["mode"]))
            say(json.dumps({"held": held, "streamed": store.counters.get("streamed_blocks", 0)}))


def compute(
    store: BlockingStore,
    handle: Handle,
    prefix: Sequence[bytes],
    blocks: Sequence[Sequence[memoryview]],
    start_ns: int,
    pace_us: int,
    mode: str,
) -> int:
    """How many blocks are published in the end."""
    prefix = list(prefix)
    if mode == "off":
        sleep_until(start_ns + LAYERS * pace_us * 1_000)
        return store.save(handle, prefix, blocks)  # type: ignore[arg-type]  # NewTypes went through JSON.
    sleep_until(start_ns)
    hints = SaveHints(push="decode" if mode == "push" else "")
    writing = store.begin_save(handle, prefix, blocks, hints=hints)  # type: ignore[arg-type]  # As above.
    for layer in range(1, LAYERS + 1):
        sleep_until(start_ns + layer * pace_us * 1_000)
        if layer < LAYERS:
            writing.advance(2 * layer)
    return writing.finish()


# --- the engine that decodes, and the conductor -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Taken:
    """Milliseconds."""

    from_start: float
    after_prefill: float


class Pair:
    """Two nodes and two engines; this process is the one that decodes."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, byte_count: int) -> None:
        ports = free_ports(2)
        self.nodes = []
        for name, port, peer in zip(NODES, ports, reversed(ports), strict=True):
            settings = {
                "name": name,
                "socket": str(folder / f"{name}.sock"),
                "tcp": f"127.0.0.1:{port}",
                "peers": f"tcp://127.0.0.1:{peer}",
                "http": "none",
                "capacity": f"{4 * byte_count // MIB + 256}MiB",
            }
            node = NodeProcess(settings, folder / f"{name}.log")
            stack.callback(node.close)
            node.start()
            self.nodes.append(node)
        self._engine = Child(python("bench_pd.py", "--prefill", self.nodes[0].socket, str(byte_count)))
        stack.callback(self._engine.close)
        self._store, self._handle = opened(self.nodes[1].socket)
        stack.callback(self._store.close)
        self._memory, self._expected = Memory(byte_count), Memory(byte_count)
        self._rounds = self._streamed = 0

    def run(self, prompt: Prompt, mode: str) -> Taken:
        """RAISES RuntimeError when blocks did not come, or wrong ones did."""
        self._rounds += 1
        count, mark = prompt.block_count, f"{self._rounds}"
        prefix = hashes(self._handle, count, mark)
        order = {"mode": mode, "blocks": count, "mark": mark, "pace_us": prompt.pace_us}
        self._engine.say(json.dumps(order))
        if self._engine.hear() != "stamped":
            raise RuntimeError(f"the engine that prefills: {self._engine.last_words()}")
        start_ns = time.monotonic_ns() + START_NS
        self._engine.say(json.dumps(start_ns))
        saved = ""
        if mode == "off":
            saved = self._engine.hear()
        else:
            sleep_until(start_ns)
        self._load(prefix, count, is_pushed=mode == "push")
        end_ns = time.monotonic_ns()
        answer = json.loads(saved or self._engine.hear())
        if answer["held"] != count:
            raise RuntimeError(f"{answer['held']} of {count} blocks were saved")
        streamed = answer["streamed"] - self._streamed
        self._streamed += streamed
        if streamed != (0 if mode == "off" else count):
            raise RuntimeError(f"{streamed} of {count} blocks were streamed")
        self._expected.stamp(count, mark)
        if self._memory.view[: prompt.byte_count] != self._expected.view[: prompt.byte_count]:
            raise RuntimeError("wrong bytes arrived")
        from_start = (end_ns - start_ns) / NS_PER_MS
        return Taken(from_start, from_start - prompt.prefill_ms)

    def _load(self, prefix: Sequence[bytes], count: int, *, is_pushed: bool) -> None:
        until_ns = time.monotonic_ns() + WAIT_MS * NS_PER_MS
        while time.monotonic_ns() < until_ns:
            lease = self._store.lease(
                self._handle,
                list(prefix),  # type: ignore[arg-type]  # NewTypes went through a list of bytes.
                wait_ms=WAIT_MS,
                source=NODES[0],
                pushed=is_pushed,
            )
            if lease.count == count:
                failed = self._store.load(lease, self._memory.blocks(count))
                self._store.release(lease)
                if failed:
                    raise RuntimeError(f"{len(failed)} blocks could not be loaded: {self._store.counters}")
                return
            self._store.release(lease)
            time.sleep(0.001)
        raise RuntimeError(f"{lease.count} of {count} blocks came: {self._store.counters}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            found.append(int(listener.getsockname()[1]))
        return found


@contextlib.contextmanager
def yardsticks() -> Iterator[tuple[Contestant, Contestant]]:
    """A raw socket between two processes, and memcpy."""
    with contextlib.ExitStack() as stack:
        raw, memcpy = plain("raw socket", "raw:0"), plain("memcpy", "memcpy")
        stack.callback(raw.close)
        stack.callback(memcpy.close)
        yield raw, memcpy


def bound_ms(prompt: Prompt, mode: str, tcp_gb_s: float, copy_gb_s: float) -> float:
    """The least time from the end of prefill, by the sum of the module's docstring."""
    wire_ms = prompt.byte_count / GB / tcp_gb_s * 1e3
    copy_ms = prompt.byte_count / GB / copy_gb_s * 1e3
    if mode == "off":
        return copy_ms + wire_ms + copy_ms
    return max(wire_ms / LAYERS, wire_ms - prompt.prefill_ms * (LAYERS - 1) / LAYERS) + copy_ms


def measure(pair: Pair, prompt: Prompt, modes: Sequence[str], rounds: int) -> list[Figure]:
    takes: dict[str, list[Taken]] = {mode: [] for mode in modes}
    bounds: dict[str, list[float]] = {mode: [] for mode in modes}
    with yardsticks() as (raw, memcpy):
        for turn in range(-1, rounds):
            tcp, copy = raw.moved(COPY_CASE), memcpy.moved(COPY_CASE)
            for mode in modes[turn % len(modes) :] + modes[: turn % len(modes)]:
                taken = pair.run(prompt, mode)
                if turn >= 0:
                    takes[mode].append(taken)
                    bounds[mode].append(bound_ms(prompt, mode, tcp, copy))
    found, machine = [], harness.machine()
    for mode in modes:
        label = f"pd.{prompt.name}.{mode}"
        after = [taken.after_prefill for taken in takes[mode]]
        from_start = [taken.from_start for taken in takes[mode]]
        ratio, against = None, ""
        if mode != "off" and "off" in modes:
            pairs = zip(takes["off"], takes[mode], strict=True)
            ratio = round(median(off.after_prefill / on.after_prefill for off, on in pairs), 2)
            against = f"off ({median(taken.after_prefill for taken in takes['off']):.0f} ms)"
        found += [
            Figure(f"{label}.after_prefill", round(median(after), 2), "ms", ratio, against, rounds, machine),
            Figure(f"{label}.from_start", round(median(from_start), 2), "ms", None, "", rounds, machine),
        ]
        share = median(bound / took for bound, took in zip(bounds[mode], after, strict=True))
        bound = round(median(bounds[mode]), 2)
        found.append(
            Figure(f"{label}.bound", bound, "ms", round(share, 2), "what was taken", rounds, machine)
        )
    return found


def main() -> None:
    parser = harness.parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--prefill", nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.prefill:
        prefill(parsed.prefill[0], int(parsed.prefill[1]))
        return
    chosen = harness.choose(parsed)
    prompts = PROMPTS_QUICK if chosen.quick else PROMPTS
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="kvcache-pd-") as folder, contextlib.ExitStack() as stack:
        pair = Pair(Path(folder), stack, max(prompt.byte_count for prompt in prompts))
        for prompt in prompts:
            figures += measure(pair, prompt, parsed.modes.split(","), chosen.rounds(ROUNDS, ROUNDS_QUICK))
    harness.report(figures, chosen)


if __name__ == "__main__":
    main()
