"""Clients of a whole node, several at once: they save, persist, load and compare every byte.

What a block must be follows from its key, what a prompt's blocks are called from its number, so whatever
a node gives out after any number of restarts can be compared.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvcache.block import BlockHash, BlockSpec, storage_key
from kvcache.channel import BlockingChannel
from kvcache.client import connect_blocking
from kvcache.client.store import BlockingStore, Handle
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.errors import KVCacheError
from kvcache.namespace import Namespace, shape_of
from kvcache.testing.pattern import Pattern
from kvcache.wire import PROTOCOL_VERSION, Hello, Stats, StatsReply

SPECS = (BlockSpec(4, 2, 2, 4_096), BlockSpec(4, 2, 2, 5_000))
"""16 KiB, and no whole number of pages."""
PROMPTS = 24
PROMPT_BLOCKS = 12
TIMEOUT_MS = 20_000
WAIT_MS = 10_000
TRIES = 5
PATIENCE_NS = 60 * NS_PER_S
AGAIN_S = 0.01
LATE_MS = "10000"
"""Of a device that a busy machine must not make look slow."""

Prompt = tuple[int, int]
"""Which of ``SPECS``, and a number."""

_PATTERNS = [Pattern(99, spec.block_bytes) for spec in SPECS]


@dataclass(slots=True)
class Book:
    """What all clients saw together. ``durable``: how many leading blocks of a prompt were said to be."""

    durable: dict[Prompt, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    loaded: int = 0
    saved: int = 0
    persisted: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """One connection, for one thread. RAISES KVCacheError when there is no node."""

    def __init__(self, socket: str, book: Book, *, mapped: bool) -> None:
        self._book = book
        self._store: BlockingStore = connect_blocking(socket, timeout_ms=TIMEOUT_MS, mapped=mapped)
        self._handles: list[Handle] = []
        try:
            for spec in SPECS:
                namespace = Namespace(
                    model="m",
                    weights="w",
                    dtype="u8",
                    layout="canonical",
                    block_tokens=4,
                    shape=shape_of(spec),
                )
                self._handles.append(self._store.open(namespace, spec))
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        self._store.close()

    def step(self, way: random.Random) -> None:
        prompt = way.randrange(len(SPECS)), way.randrange(PROMPTS)
        count = way.randint(1, PROMPT_BLOCKS)
        choice = way.random()
        if choice < 0.4:
            self.save(prompt, count)
        elif choice < 0.6:
            self.persist(prompt, count)
        else:
            self.load(prompt, count, way.choice((0, 50, WAIT_MS)))

    def save(self, prompt: Prompt, count: int) -> int:
        handle, prefix = self._names(prompt, count)
        blocks = []
        for name in prefix:
            block = bytearray(handle.spec.block_bytes)
            _PATTERNS[prompt[0]].fill(block, storage_key(handle.namespace_id, name))
            blocks.append([block])
        saved = self._store.save(handle, prefix, blocks)
        with self._book.lock:
            self._book.saved += saved
        return saved

    def persist(self, prompt: Prompt, count: int) -> int:
        handle, prefix = self._names(prompt, count)
        durable = self._store.persist(handle, prefix, WAIT_MS)
        with self._book.lock:
            self._book.durable[prompt] = max(self._book.durable.get(prompt, 0), durable)
            self._book.persisted += durable
        return durable

    def load(self, prompt: Prompt, count: int, wait_ms: int) -> int:
        """How many leading blocks there were; those are right, or ``wrong`` says which are not."""
        handle, prefix = self._names(prompt, count)
        lease = self._store.lease(handle, prefix, wait_ms=wait_ms)
        into = [bytearray(handle.spec.block_bytes) for _ in range(lease.count)]
        failed = self._store.load(lease, [[block] for block in into])
        self._store.release(lease)
        good = 0
        for at, block in enumerate(into):
            if at not in failed:
                good += 1
                if _PATTERNS[prompt[0]].wrong_bytes(block, storage_key(handle.namespace_id, prefix[at])):
                    self._book.wrong.append(f"prompt {prompt}, block {at}")
        with self._book.lock:
            self._book.loaded += good
        return min(failed, default=lease.count)

    def look(self) -> list[str]:
        """At all prompts: what was durable and is not there."""
        missing = []
        for space in range(len(SPECS)):
            for number in range(PROMPTS):
                prompt, found = (space, number), -1
                wanted = self._book.durable.get(prompt, 0)
                for _ in range(TRIES):
                    found = self.load(prompt, PROMPT_BLOCKS, WAIT_MS)
                    if found >= wanted:
                        break
                if found < wanted:
                    missing.append(f"prompt {prompt}: {wanted} blocks were durable, {found} are there")
        return missing

    def _names(self, prompt: Prompt, count: int) -> tuple[Handle, Sequence[BlockHash]]:
        handle = self._handles[prompt[0]]
        return handle, handle.hashes([prompt[1], *range(1, count * handle.spec.block_tokens)])


def until_open(socket: str) -> None:
    """No device of the node is being read any more: a node does not wait for a slow one for ever."""
    end_ns = SystemClock().now_ns() + PATIENCE_NS
    channel = BlockingChannel.connect(socket, Hello(PROTOCOL_VERSION), end_ns)
    try:
        while True:
            reply = channel.call(Stats(), end_ns)
            assert isinstance(reply, StatsReply)
            if not reply.values["nvme_devices:loading"]:
                return
            threading.Event().wait(AGAIN_S)
    finally:
        channel.close()


def until_persisted(book: Book, count: int) -> None:
    """Clients at work have persisted so many blocks in all: how soon depends on the machine."""
    end_ns = SystemClock().now_ns() + PATIENCE_NS
    while book.persisted <= count:
        assert SystemClock().now_ns() < end_ns, f"{book.persisted} blocks, not {count}"
        threading.Event().wait(AGAIN_S)


@contextlib.contextmanager
def client(socket: str, book: Book) -> Iterator[Client]:
    """Of a node whose devices are open."""
    until_open(socket)
    made = Client(socket, book, mapped=True)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def load_on(socket: str, book: Book, seed: int, count: int = 2) -> Iterator[None]:
    """Clients at work, one with a map and one without, until the end of the block."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(at: int) -> None:
        way = random.Random(f"{seed} {at}")
        try:
            made = Client(socket, book, mapped=at % 2 == 0)
        except KVCacheError:
            return  # The node was gone before it could be asked.
        try:
            while not stop.is_set():
                made.step(way)
        except BaseException as error:
            failures.append(error)
        finally:
            made.close()

    threads = [threading.Thread(target=work, args=(at,)) for at in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
