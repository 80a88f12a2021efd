"""A transformers cache as pages: the bytes that cutting it by hand gives, from the cache and back into it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from kvcache.client.connectors.transformers_pages import Shape, every, kept, load_staged, paged, staged
from kvcache.client.store import BlockingStore, Lease
from kvcache.device.engine import EngineDevice
from kvcache.device.slab import CpuMemory
from kvcache.errors import BadInput
from tests.device.rigs import DEVICES

COUNT = 5
SHAPES = [
    Shape(layers=3, heads=2, tokens=4, dim=8, dtype=torch.float32),
    Shape(layers=1, heads=1, tokens=32, dim=64, dtype=torch.bfloat16),
    Shape(layers=2, heads=3, tokens=1, dim=3, dtype=torch.float16),
]


def states(shape: Shape, kind: str) -> list[torch.Tensor]:
    """The keys and values of each layer, with some tokens that fill no block."""
    torch.manual_seed(0)
    sizes = (1, shape.heads, COUNT * shape.tokens + 3, shape.dim)
    return [torch.randn(sizes).to(kind, shape.dtype) for _ in range(2 * shape.layers)]


def cache_of(planes: Sequence[torch.Tensor]) -> Any:
    pairs = zip(planes[::2], planes[1::2], strict=True)
    return SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=values) for keys, values in pairs])


def by_hand(planes: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
    rows = shape.rows(COUNT)
    for block in range(COUNT):
        for at, plane in enumerate(planes):
            tokens = slice(block * shape.tokens, (block + 1) * shape.tokens)
            rows[block, at // 2, at % 2] = plane[0, :, tokens].cpu()
    return rows


class Rows:
    """A store of these blocks. It fills the places of those that failed too, with what is wrong."""

    def __init__(self, rows: torch.Tensor, failing: frozenset[int]) -> None:
        self._rows = rows.flatten(1).view(torch.uint8)
        self._failing = failing
        self.starts: list[int] = []

    def load(self, lease: Lease, into: Sequence[Sequence[Any]], start: int) -> frozenset[int]:
        self.starts.append(start)
        positions = range(start, start + len(into))
        for position, [piece] in zip(positions, into, strict=True):
            wrong = 255 if position in self._failing else 0
            memoryview(piece)[:] = (self._rows[position] ^ wrong).numpy()
        return self._failing.intersection(positions)


@pytest.fixture(autouse=True)
def two_blocks_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shape, "batch", lambda shape: 2)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.dtype))
def test_blocks_are_cut_from_a_cache(shape: Shape, kind: str) -> None:
    planes = states(shape, kind)
    pages = paged(kept(cache_of(planes), shape, COUNT), shape)
    wanted = by_hand(planes, shape)
    assert staged(pages, 0, COUNT, shape).equal(wanted)
    assert staged(pages, 2, 4, shape).equal(wanted[2:4])


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.dtype))
@pytest.mark.parametrize(("failing", "calls"), [(frozenset(), 3), (frozenset({3}), 2), (frozenset({0}), 1)])
def test_blocks_are_put_into_a_cache(shape: Shape, kind: str, failing: frozenset[int], calls: int) -> None:
    planes = states(shape, kind)
    store = Rows(by_hand(planes, shape), failing)
    whole = shape.room(COUNT, torch.device(kind))
    pages = paged(list(whole.flatten(0, 1)), shape)
    lease = cast(Lease, SimpleNamespace(count=COUNT))
    assert load_staged(cast(BlockingStore, store), lease, pages, shape) == failing
    assert store.starts == [0, 2, 4][:calls]
    right = min(failing, default=COUNT) * shape.tokens
    for at, plane in enumerate(planes):
        assert whole[at // 2, at % 2][:, :, :right].equal(plane[:, :, :right])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.dtype))
def test_they_are_blocks_of_the_namespace(shape: Shape) -> None:
    pages = paged(kept(cache_of(states(shape, "cpu")), shape, COUNT), shape)
    blocks = every(pages, EngineDevice(CpuMemory()))
    assert len(blocks) == COUNT
    blocks.check(shape.spec)


def test_a_cache_of_another_shape_is_refused() -> None:
    shape = SHAPES[0]
    planes = states(shape, "cpu")
    for wrong in (planes[0][:, :1], planes[0].double(), planes[0][:, :, :2], planes[0].expand(2, -1, -1, -1)):
        with pytest.raises(BadInput, match="layer 1 holds"):
            kept(cache_of([*planes[:3], wrong, *planes[4:]]), shape, COUNT)
