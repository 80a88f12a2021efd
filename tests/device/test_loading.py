"""Loads from host memory while the link is slow: nothing ends before its copies, and parts overlap."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from kvcache.device import engine as module
from kvcache.device import line
from kvcache.device.engine import EngineDevice, PagedBlocks
from kvcache.device.pages import Moves
from kvcache.device.slab import CpuMemory
from kvcache.device.streams import CpuStream, CpuStreams, Event
from kvcache.errors import Unavailable
from kvcache.sums import sum_chunks
from kvcache.testing.stores import SIZE, SPEC
from tests.device.engine_cache import Engine, Shape, engine

PATIENCE_S = 20
SHAPE = Shape(layers=1, pages=12, heads=SPEC.head_count, tokens=SPEC.block_tokens, row=256)
PAGES = [[6], [1], [4], [0], [2], [11]]


class Link:
    """What goes over the link waits for ``gate``, copy by copy; ``copied`` is how many were done."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.copied = 0
        self.changed = threading.Condition()
        self.asked = threading.Semaphore(0)
        self.streams: list[Gated] = []
        self.is_failing = False

    def until(self, copied: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.copied >= copied, PATIENCE_S)

    def open(self) -> None:
        self.gate.release(len(PAGES) + 1)


class Gated(CpuStream):
    def __init__(self, link: Link) -> None:
        super().__init__("link")
        self._link = link
        link.streams.append(self)

    def run(self, work: Callable[[], None]) -> None:
        def later() -> None:
            self._link.asked.release()
            assert self._link.gate.acquire(timeout=PATIENCE_S)
            work()
            with self._link.changed:
                self._link.copied += 1
                self._link.changed.notify_all()

        super().run(later)

    def mark(self) -> Event:
        return Mark(self._link, super().mark())


@dataclass
class Mark:
    """Once something failed, the link goes on only for who waits for it."""

    link: Link
    event: Event

    def is_done(self) -> bool:
        return self.event.is_done()

    def wait(self, timeout_s: float) -> bool:
        if self.link.is_failing:
            self.link.gate.release()
        return self.event.wait(timeout_s)


class Streams(CpuStreams):
    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def new(self, name: str, *, urgent: bool) -> CpuStream:
        self._streams.append(Gated(self._link))
        return self._streams[-1]

    def close(self) -> None:
        """As a GPU's: it waits for nothing."""
        self._streams.clear()


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    made = Link()
    monkeypatch.setattr(line, "streams_of", lambda device: Streams(made))
    monkeypatch.setattr(module, "STAGING_BYTES", 2 * SIZE)
    yield made
    made.open()
    for stream in made.streams:
        stream.close()


@pytest.fixture
def cache() -> Engine:
    return engine("flashinfer_hnd", SHAPE)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def content(count: int) -> list[bytes]:
    return [bytes([17 * at + 1]) * SIZE for at in range(count)]


def begin(
    pool: ThreadPoolExecutor, cache: Engine, device: EngineDevice | None = None
) -> tuple[Future[bytes], Sequence[bytes]]:
    whole = content(len(PAGES))
    blocks = PagedBlocks(device or EngineDevice(CpuMemory()), cache.cache, PAGES)
    views = [memoryview(bytearray(each)) for each in whole]
    return pool.submit(blocks.put, views, 0), whole


def test_it_returns_when_the_last_copy_is_done(link: Link, cache: Engine, pool: ThreadPoolExecutor) -> None:
    loading, whole = begin(pool, cache)
    for done in range(len(PAGES)):
        assert link.asked.acquire(timeout=PATIENCE_S)
        assert link.copied == done
        assert not loading.done()
        link.gate.release()
    assert loading.result(PATIENCE_S) == sum_chunks(whole, SPEC.chunk_bytes)
    cache.put(PAGES, whole, 0, SPEC.plane_count)
    cache.check_memory()


def test_what_is_under_way_is_waited_for_when_it_fails(
    link: Link, cache: Engine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a late copy would go into memory that is another's by then."""
    calls = 0
    moved = module.scatter_and_sum

    def refuse(moves: Moves, slab: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:  # The third part is under way.
            link.is_failing = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        return moved(moves, slab)

    monkeypatch.setattr(module, "scatter_and_sum", refuse)
    loading, _ = begin(pool, cache)
    link.gate.release(2)
    with pytest.raises(Unavailable, match="failed under a copy"):
        loading.result(PATIENCE_S)
    assert link.copied == 3


def test_one_that_comes_over_the_link_does_not_wait_for_the_one_before(
    link: Link, cache: Engine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one part is scattered, the next is copied; the one after that waits for its memory."""
    moved = module.scatter_and_sum
    scattered = 0

    def slow(moves: Moves, slab: torch.Tensor) -> torch.Tensor:
        nonlocal scattered
        assert link.copied >= scattered + 1
        link.until(min(scattered + 2, len(PAGES)))
        scattered += 1
        return moved(moves, slab)

    monkeypatch.setattr(module, "scatter_and_sum", slow)
    loading, whole = begin(pool, cache)
    link.open()
    assert loading.result(PATIENCE_S) == sum_chunks(whole, SPEC.chunk_bytes)
    cache.put(PAGES, whole, 0, SPEC.plane_count)
    cache.check_memory()
