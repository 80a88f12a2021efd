"""What a node copies out of a GPU: by way of locked memory, part by part, and late bytes hurt nobody."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from kvcache.device import served
from kvcache.device.served import Outlet
from kvcache.device.streams import CpuStreams
from kvcache.errors import Unavailable
from kvcache.sums import sum_chunks

CHUNK = 4096
POISON = 0xA5
PATIENCE_S = 20


@pytest.fixture
def outlet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Outlet]:
    monkeypatch.setattr(served, "HALF_BYTES", 4 * CHUNK + 100)
    made = Outlet(CpuStreams())
    yield made
    made.close()


def blocks(count: int, chunks: int) -> tuple[list[torch.Tensor], list[memoryview]]:
    content = random.Random(7).randbytes(count * chunks * CHUNK)
    sources = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(count, -1)
    return list(sources), [memoryview(bytearray([POISON]) * (chunks * CHUNK)) for _ in range(count)]


@pytest.mark.parametrize(("count", "chunks"), [(1, 1), (3, 2), (5, 3), (2, 9), (1, 16), (7, 4)])
def test_whatever_fits_a_half(outlet: Outlet, count: int, chunks: int) -> None:
    for _ in range(2):  # The second time into halves that were used.
        sources, targets = blocks(count, chunks)
        sums = outlet.copy(sources, targets, CHUNK)
        assert sums == [sum_chunks([source.numpy()], CHUNK) for source in sources]
        assert [bytes(target) for target in targets] == [source.numpy().tobytes() for source in sources]


def test_a_copy_that_comes_late_is_written_to_no_block(
    outlet: Outlet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots may be used again as soon as it raises."""
    goes_on, late = threading.Event(), threading.Event()
    copying = served.copying

    def hanging(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        copy = copying(target, source)

        def later() -> None:
            assert goes_on.wait(PATIENCE_S)
            copy()
            late.set()

        return later

    monkeypatch.setattr(served, "COPY_S", 0.05)
    sources, targets = blocks(2, 4)
    with monkeypatch.context() as patched:
        patched.setattr(served, "copying", hanging)
        with pytest.raises(Unavailable, match="over"):
            outlet.copy(sources, targets, CHUNK)
    assert outlet.is_stuck
    goes_on.set()
    assert late.wait(PATIENCE_S)
    assert {byte for target in targets for byte in target} == {POISON}
    with pytest.raises(Unavailable, match="has not ended"):
        outlet.copy(sources, targets, CHUNK)


def test_a_gpu_that_fails_in_the_middle(outlet: Outlet, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, asked = served.copying, 0

    def failing(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        nonlocal asked
        asked += 1
        if asked < 3:
            return copying(target, source)

        def refuse() -> None:
            raise RuntimeError("CUDA error: unspecified launch failure")

        return refuse

    monkeypatch.setattr(served, "copying", failing)
    sources, targets = blocks(4, 4)
    with pytest.raises(Unavailable, match="failed under a copy"):
        outlet.copy(sources, targets, CHUNK)
    assert {byte for target in targets[2:] for byte in target} == {POISON}
