"""What it costs a node to tell what it holds, and a follower to know it.

    publish   a ledger's changes of 64 blocks into batches, packed for frames       against 1 M blocks/s
    ingest    a batch of one event of 64 blocks: decode, apply to a LocalityIndex   against 6 M blocks/s
    snapshot  bytes a block on the wire, in runs of 1, 8 and 64                     against 10
    copy      what the node's loop waits for a snapshot of a million blocks         against 20 ms
    resync    copy, pages, encode, decode, apply: a million blocks, end to end      against 0.3 s
    visible   published in one process, in the index of another, over unix and tcp  against 150 us

On paper: a batch is 5 us of Python at either side and 64 blocks are 3 us of index, so 8 M blocks/s; a million
blocks are 8 MB, which are copied six times, and 0.1 s of index; an event is two system calls, two wake-ups of
an event loop and 20 us of Python.

    python benchmarks/bench_events.py           half a minute; --json, --quick as everywhere
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random
from statistics import median

from harness import MIB, Figure, Options, machine, options, report, seconds

from kvcache.block import StorageKey
from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.config import NodeConfig
from kvcache.event_ring import Told
from kvcache.events import TIER_HOST, Publisher
from kvcache.following import Following
from kvcache.ledger import Change
from kvcache.locality import Applied, LocalityIndex
from kvcache.server.node import Node
from kvcache.wire import HEADER, PROTOCOL_VERSION, EventBatch, Hello, Welcome, decode_reply, frame

EVENT_BLOCKS = 64
SPACE = b"s" * 16
INDEX_BYTES = 512 * MIB
TOKEN = "a-token-of-a-follower"
CREDENTIALS = f"""
master_key = "{"0f" * 32}"
credential = [{{ token = "{TOKEN}", tenant = "nodes", roles = ["reader", "writer", "peer"] }}]
"""
PAUSE_S = 0.002
PATIENCE_S = 30


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--follower"]:
        asyncio.run(follow(arguments[1], int(arguments[2])))
        return
    chosen = options("What a node tells, and what a follower knows", arguments)
    figures = [*telling(chosen), *snapshots(chosen), *visible(chosen)]
    report(figures, chosen)


def figure(name: str, values: list[float], unit: str, goal: float, *, higher: bool = False) -> Figure:
    value = median(values)
    ratio = value / goal if higher else goal / value
    against = f"a goal of {goal:g} {unit}"
    return Figure(name, round(value, 3), unit, round(ratio, 2), against, len(values), machine())


# --- batches ------------------------------------------------------------------------------------


def telling(chosen: Options) -> list[Figure]:
    """Both of a million blocks, in turns."""
    blocks = 1 << (18 if chosen.quick else 20)
    published: list[float] = []
    ingested: list[float] = []
    for turn in range(chosen.rounds(7, 3)):
        changes = list(runs(blocks, EVENT_BLOCKS, turn))
        frames, spent = publish(changes)
        published.append(blocks / spent / 1e6)
        ingested.append(blocks / ingest(frames) / 1e6)
    return [
        figure("events.publish.64", published, "M blocks/s", 1, higher=True),
        figure("events.ingest.64", ingested, "M blocks/s", 6, higher=True),
    ]


def publish(changes: list[Change]) -> tuple[list[bytes], float]:
    """The frames' bodies, and how long it took to make what frames are made of."""
    publisher = Publisher("node", 1)
    told: list[bytes] = []

    def work() -> None:
        for change in changes:
            told.extend(Told(batch).packed for batch in publisher.publish([change]))

    spent = seconds(work)
    return [frame(1, each)[HEADER.size :] for each in told], spent


def ingest(bodies: list[bytes]) -> float:
    index = LocalityIndex(INDEX_BYTES)
    index.apply(EventBatch("node", 1, 0, True, []), 0)

    def work() -> None:
        for body in bodies:
            applied = index.apply(decoded(body), 0)
            assert applied is Applied.TAKEN, applied

    return seconds(work)


def decoded(body: bytes) -> EventBatch:
    batch = decode_reply(body)[1]
    assert isinstance(batch, EventBatch)
    return batch


def runs(blocks: int, length: int, seed: int) -> Iterator[Change]:
    """So many blocks that nobody has yet, in runs that branch nowhere."""
    chance = Random(seed)
    for _ in range(blocks // length):
        joined = chance.randbytes(16 * length)
        keys = tuple(StorageKey(SPACE + joined[at : at + 16]) for at in range(0, len(joined), 16))
        yield Change("stored", keys, None, "committed")


# --- snapshots ----------------------------------------------------------------------------------


def snapshots(chosen: Options) -> list[Figure]:
    blocks = 256_000 if chosen.quick else 1_000_000
    found = []
    for length in (1, 8, 64):
        publisher = Publisher("node", 1)
        for change in runs(blocks, length, 7):
            publisher.publish([change])
        taken = [resync(publisher, blocks) for _ in range(chosen.rounds(7, 3))]
        bytes_a_block = [size / blocks for size, _, _ in taken]
        copies = [copy * 1e3 * 1_000_000 / blocks for _, copy, _ in taken]
        whole = [spent * 1_000_000 / blocks for _, _, spent in taken]
        found.append(figure(f"events.snapshot.runs_{length}", bytes_a_block, "bytes a block", 10))
        found.append(figure(f"events.copy.runs_{length}", copies, "ms a million", 20))
        found.append(figure(f"events.resync.runs_{length}", whole, "s a million", 0.3))
    return found


def resync(publisher: Publisher, blocks: int) -> tuple[int, float, float]:
    """Bytes on the wire, seconds of the copy, seconds in all."""
    index = LocalityIndex(INDEX_BYTES)
    size = 0
    start = time.perf_counter()
    snapshot = publisher.capture()
    copied = time.perf_counter()
    for page in snapshot.pages():
        sent = frame(1, Told(page).packed)
        size += len(sent)
        applied = index.apply(decoded(sent[HEADER.size :]), 0)
        assert applied is Applied.TAKEN, applied
    spent = time.perf_counter() - start
    assert index.entries == blocks
    return size, copied - start, spent


# --- from one process to another ----------------------------------------------------------------


def visible(chosen: Options) -> list[Figure]:
    events = chosen.rounds(2_000, 300)
    with tempfile.TemporaryDirectory() as folder:
        credentials = Path(folder) / "credentials.toml"
        credentials.touch(0o600)
        credentials.write_text(CREDENTIALS)
        config = NodeConfig(
            socket=f"{folder}/node.sock",
            tcp="127.0.0.1:0",
            http="none",
            capacity="8MiB",
            credentials=str(credentials),
        )
        return asyncio.run(delays(config, events))


async def delays(config: NodeConfig, events: int) -> list[Figure]:
    node = Node(config)
    await node.start()
    try:
        found = []
        for name, address in (("unix", node.address), ("tcp", node.tcp_address)):
            taken = sorted(await delays_at(node, address, events))
            found.append(figure(f"events.visible.{name}", taken, "us", 150))
            found.append(figure(f"events.visible_p99.{name}", [taken[len(taken) * 99 // 100]], "us", 1_000))
        return found
    finally:
        await node.close()


async def delays_at(node: Node, address: str, events: int) -> list[float]:
    """Microseconds from before an event is published to when a look-up in the other process has it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--follower", address, str(events)]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert follower.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert await asyncio.to_thread(follower.stdout.readline) == b"ready\n"
        told_ns: list[int] = []
        for change in runs(events * EVENT_BLOCKS, EVENT_BLOCKS, os.getpid()):
            await asyncio.sleep(PAUSE_S)
            told_ns.append(time.monotonic_ns())
            node.core.telling.publish([change], TIER_HOST)
        async with asyncio.timeout(PATIENCE_S):
            lines = (await asyncio.to_thread(follower.stdout.read)).split()
    finally:
        follower.kill()
        follower.wait()
        follower.stdout.close()
    assert len(lines) == events, len(lines)
    return [(int(line) - at) / 1e3 for line, at in zip(lines, told_ns, strict=True)]


class Seen(LocalityIndex):
    """Notes when each batch had been applied."""

    def __init__(self, done: Callable[[], None], events: int) -> None:
        super().__init__(INDEX_BYTES)
        self.at_ns: list[int] = []
        self._done = done
        self._events = events

    def apply(self, batch: EventBatch, now_ns: int) -> Applied:
        applied = super().apply(batch, now_ns)
        if batch.events and not batch.snapshot:
            assert applied is Applied.TAKEN, applied
            self.at_ns.append(time.monotonic_ns())
            if len(self.at_ns) == self._events:
                self._done()
        elif batch.snapshot and not batch.left:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
        return applied


class Anyone:
    """Follows whoever is there."""

    def met(self, welcome: Welcome) -> None:
        """It is the one."""

    def parted(self, reason: str) -> None:
        raise AssertionError(reason)


async def follow(address: str, events: int) -> None:
    """The other process: applies ``events`` batches, and says when it had each."""
    clock, done = SystemClock(), asyncio.Event()
    index = Seen(done.set, events)
    names = count()

    async def connect() -> AsyncChannel:
        hello = Hello(PROTOCOL_VERSION, token=TOKEN, node=f"follower-{next(names)}")
        return await AsyncChannel.connect(address, hello, clock.now_ns() + 5 * NS_PER_S)

    following = asyncio.create_task(Following("node", connect, index, Anyone(), clock).run())
    done_task = asyncio.create_task(done.wait())
    await asyncio.wait({following, done_task}, return_when=asyncio.FIRST_COMPLETED)
    if following.done():
        await following
    following.cancel()
    sys.stdout.write("".join(f"{at}\n" for at in index.at_ns))


if __name__ == "__main__":
    main(sys.argv[1:])
