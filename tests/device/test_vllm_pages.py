"""vLLM's pages as blocks of a device: whatever their strides, and behind what the engine had queued.

Without vLLM: tensors of its shape. (Its own layouts: tests/engines/test_vllm_layouts.py.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvcache.block import BlockSpec
from kvcache.client import connect_device_blocking
from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.vllm_moves import Moves
from kvcache.client.connectors.vllm_pages import CpuPages, DevicePages
from kvcache.client.connectors.vllm_plan import LoadJob, SaveJob, StepPlan, Tally
from kvcache.client.connectors.vllm_worker import WorkerSide
from kvcache.clock import SystemClock
from kvcache.device.engine import EngineDevice
from kvcache.device.slab import CpuMemory
from kvcache.device.streams import CpuCaller, CpuEvent, Event
from kvcache.errors import BadInput
from kvcache.namespace import Namespace, shape_of
from tests.device.hbm_rig import TIMEOUT_MS, settings
from tests.server.conftest import EmbeddedNode

LAYERS, PAGES, HEADS, TOKENS, CONTENT = 3, 8, 2, 4, 16
NAMES = [f"layer {number}" for number in range(LAYERS)]
SPEC = BlockSpec(TOKENS, LAYERS, HEADS, TOKENS * CONTENT * 4)
PATIENCE_S = 20.0


def tensors(seed: int, pieces: int = 1) -> dict[str, torch.Tensor]:
    """``[page, head, token, K and V]``, the tokens of all heads next to one another."""
    torch.manual_seed(seed)
    shape = (PAGES * pieces, TOKENS // pieces, HEADS, CONTENT)
    return {name: torch.rand(shape).transpose(1, 2) for name in NAMES}


def block(of: dict[str, torch.Tensor], number: int, pieces: int = 1) -> torch.Tensor:
    """``[layer, head, token, number]``."""
    pages = range(number * pieces, (number + 1) * pieces)
    return torch.stack([torch.cat([tensor[page] for page in pages], 1) for tensor in of.values()])


class Engine:
    """A worker half whose pages are on a device alone, as on CUDA."""

    def __init__(self, address: str, held: dict[str, torch.Tensor]) -> None:
        self.held = held
        self.gpu = EngineDevice(CpuMemory())
        names = Namespace(
            model="m",
            weights="w",
            dtype="float32",
            layout="vllm",
            block_tokens=TOKENS,
            layer_count=LAYERS,
            shape=shape_of(SPEC),
        )
        self.attachment = Attachment(
            lambda: connect_device_blocking(self.gpu, address, timeout_ms=TIMEOUT_MS),
            [names],
            SPEC,
            SystemClock(),
        )
        self.tally = Tally()
        moves = Moves(self.attachment, None, DevicePages(self.gpu, held, NAMES, SPEC))
        self.side = WorkerSide(self.attachment, moves, SystemClock(), self.tally)

    def names(self, count: int) -> list[bytes]:
        [handle] = self.attachment.handles()
        return handle.hashes(list(range(count * TOKENS)))

    def save(self, names: Sequence[bytes], pages: Sequence[int], hbm: bool) -> None:
        job = SaveJob("a", b"", b"".join(names), 0, tuple(pages), hbm=hbm)
        self.side.start_saves(StepPlan(saves=(job,)), True)
        self.until(lambda: bool(self.side.take_saved()))

    def load(self, names: Sequence[bytes], pages: Sequence[int], hbm: bool) -> set[int]:
        """The pages that could not be filled."""
        job = LoadJob("a", "e/a", b"".join(names), 0, tuple(pages), hbm)
        self.side.start_loads(StepPlan(loads=(job,)))
        bad: set[int] = set()

        def done() -> bool:
            received, failed = self.side.take_received()
            bad.update(failed)
            return bool(received)

        self.until(done)
        return bad

    def until(self, holds: object) -> None:
        ended = threading.Event()
        while not holds():  # type: ignore[operator]
            ended.wait(0.001)


@pytest.fixture(params=["hbm", "none"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a node with HBM, and without."""
    given = {} if request.param == "hbm" else {"hbm": "none"}
    node = EmbeddedNode(settings(tmp_path, **given))
    yield node.node.address
    node.close()


@pytest.mark.parametrize("hbm", [True, False])
def test_there_and_back_between_engines_whose_pages_differ(address: str, hbm: bool) -> None:
    """Also where there is no HBM, or none is asked for: then by host memory."""
    one, other = Engine(address, tensors(1)), Engine(address, tensors(2, pieces=2))
    names = one.names(3)
    one.save(names, [5, 0, 3], hbm)
    assert one.tally.take()["saved_blocks"] == 3
    before = {name: tensor.clone() for name, tensor in other.held.items()}
    assert other.load(names, [1, 7, 4], hbm) == set()
    for page, from_page in ((1, 5), (7, 0), (4, 3)):
        assert block(other.held, page, 2).equal(block(one.held, from_page))
    for page in (0, 2, 3, 5, 6):
        assert block(other.held, page, 2).equal(block(before, page, 2))
    for engine in (one, other):
        engine.side.close()


class HeldStreams:
    """The engine's work is done when ``done`` is."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.done = CpuEvent()
        self.asked: list[str] = []

    def current(self) -> HeldCaller:
        return HeldCaller(self)

    def new(self, name: str, *, urgent: bool) -> HeldCaller:
        return HeldCaller(self)

    def close(self) -> None:
        """Nothing is held."""


class HeldCaller(CpuCaller):
    def __init__(self, streams: HeldStreams) -> None:
        self._streams = streams

    def mark(self) -> Event:
        self._streams.asked.append(f"mark {threading.current_thread().name}")
        return self._streams.done

    def after(self, event: Event) -> None:
        self._streams.asked.append(f"after {threading.current_thread().name}")
        super().after(event)


def test_pages_are_read_behind_what_the_engine_had_queued() -> None:
    streams = HeldStreams()
    pages = DevicePages(EngineDevice(CpuMemory()), tensors(1), NAMES, SPEC, streams)
    behind = pages.mark()
    made = threading.Event()

    def make() -> None:
        pages.follow(behind)
        pages.blocks([1])
        made.set()

    other = threading.Thread(target=make, name="other")
    other.start()
    while len(streams.asked) < 2:
        pass  # Until it waits.
    assert not made.is_set()
    streams.done.settle(None)
    assert made.wait(PATIENCE_S)
    assert streams.asked == [f"mark {threading.current_thread().name}", "after other"]


@pytest.mark.parametrize(
    "changed",
    [
        lambda tensor: tensor[..., : CONTENT // 2],
        lambda tensor: tensor[:, :1],
        lambda tensor: tensor[:, :, :3],
        lambda tensor: tensor.double(),
    ],
    ids=["content", "heads", "tokens", "numbers"],
)
def test_pages_that_are_not_what_the_namespace_says_are_refused(changed: object) -> None:
    other = {name: changed(tensor) for name, tensor in tensors(1).items()}  # type: ignore[operator]
    with pytest.raises(BadInput) as caught:
        DevicePages(EngineDevice(CpuMemory()), other, NAMES, SPEC)
    assert caught.value.code == "unsupported_engine"
    with pytest.raises(BadInput):
        CpuPages(other, NAMES, SPEC)
