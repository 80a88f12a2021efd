"""vLLM's own layouts of a KV cache, made by its own functions, on the CPU: a block is the same for each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest

from kvcache.block import BlockSpec
from kvcache.client import connect_device_blocking
from kvcache.client.hbm import BlockingDeviceStore
from kvcache.config import NodeConfig
from kvcache.namespace import Namespace, shape_of
from tests.server.conftest import EmbeddedNode

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

PAGES, TOKENS, HEADS, DIM = 6, 32, 4, 16
NAMES = ["layer 0", "layer 1", "layer 2"]
SPEC = BlockSpec(TOKENS, len(NAMES), HEADS, TOKENS * 2 * DIM * 2)
SAVED, LOADED = [4, 0, 3], [1, 5, 2]


def cache(layout: Any, kernel_tokens: int, seed: int) -> dict[str, Any]:
    """The tensors that a worker registers: ``[page, head, token, K and V]``, bfloat16."""
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheTensor,
        compute_layout_strides,
        create_kv_cache_views,
    )

    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=DIM, dtype=torch.bfloat16)
    size = PAGES * len(NAMES) * spec.page_size_bytes
    strides = compute_layout_strides(spec, PAGES, len(NAMES), layout)
    placed = KVCacheTensor(size=size, layers=NAMES, layer_stride=strides[0], block_stride=strides[1])
    raw = torch.zeros(size, dtype=torch.int8)
    views = create_kv_cache_views(raw, spec, PAGES, layout, placed, kernel_block_size=kernel_tokens)
    assert sum(prod(view.shape) * 2 for view in views) == size
    torch.manual_seed(seed)
    for view in views:
        view.copy_(torch.rand(view.shape))
    return dict(zip(NAMES, views, strict=True))


def block(held: dict[str, Any], number: int, kernel_tokens: int) -> Any:
    """What vLLM's kernels find there: ``[layer, head, token, K and V]``."""
    pieces = TOKENS // kernel_tokens
    pages = range(number * pieces, (number + 1) * pieces)
    return torch.stack([torch.cat([tensor[page] for page in pages], 1) for tensor in held.values()])


def layouts() -> list[tuple[str, int]]:
    """Those whose pages are dense may have smaller ones for kernels."""
    names = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
    return [(name, TOKENS) for name in names] + [(name, TOKENS // 2) for name in ("LBHNC", "LBNHC")]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("layouts")
    node = EmbeddedNode(
        NodeConfig(
            socket=str(folder / "node.sock"), http="none", capacity="8MiB", hbm="64MiB", hbm_device="cpu"
        )
    )
    yield node.node.address
    node.close()


@pytest.fixture(scope="module")
def gpu() -> Any:
    from kvcache.device.engine import EngineDevice

    return EngineDevice.of(torch.device("cpu"))


@pytest.fixture(scope="module")
def store(address: str, gpu: Any) -> Iterator[BlockingDeviceStore]:
    made = connect_device_blocking(gpu, address, timeout_ms=30_000)
    yield made
    made.close()


@pytest.mark.parametrize(("saved", "loaded"), list(product(layouts(), layouts())))
def test_what_one_saves_the_other_loads(
    store: BlockingDeviceStore, gpu: Any, saved: tuple[str, int], loaded: tuple[str, int]
) -> None:
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from kvcache.client.connectors.vllm_pages import DevicePages

    weights = f"{saved} {loaded}"
    names = Namespace(
        model="m",
        weights=weights,
        dtype="bfloat16",
        layout="vllm",
        block_tokens=TOKENS,
        layer_count=len(NAMES),
        shape=shape_of(SPEC),
    )
    handle = store.open(names, SPEC)
    prompt = handle.hashes(list(range(len(SAVED) * TOKENS)))
    one = cache(KVCacheLayout[saved[0]], saved[1], seed=1)
    other = cache(KVCacheLayout[loaded[0]], loaded[1], seed=2)
    before = {name: tensor.clone() for name, tensor in other.items()}
    pages = DevicePages(gpu, one, NAMES, SPEC)
    assert store.save_device(handle, prompt, pages.blocks(SAVED)) == len(SAVED)
    into = DevicePages(gpu, other, NAMES, SPEC)
    lease = store.lease_device(handle, prompt)
    assert not store.load_device(lease, into.blocks(LOADED))
    store.release(lease)
    for page, from_page in zip(LOADED, SAVED, strict=True):
        assert block(other, page, loaded[1]).equal(block(one, from_page, saved[1]))
    for page in set(range(PAGES)).difference(LOADED):
        assert block(other, page, loaded[1]).equal(block(before, page, loaded[1]))


class Worker:
    """What a connector hands on of the end of a step."""

    def __init__(self) -> None:
        self.computed: list[bool] = []
        self.lacks_hbm = False

    def start_stream(self, plan: Any) -> bool:
        return False

    def start_loads(self, plan: Any) -> None:
        """There are none."""

    def start_saves(self, plan: Any, computed: bool) -> None:
        self.computed.append(computed)

    def take_received(self) -> tuple[set[str], set[int]]:
        return set(), set()

    def take_freed(self) -> set[str]:
        return set()

    def take_saved(self) -> dict[str, int]:
        return {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # What vLLM imports.
def test_on_cuda_a_pass_that_raised_is_told_from_one_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's own way around a pass; a graph calls nobody for each layer."""
    from vllm.v1.worker import kv_connector_model_runner_mixin as mixin

    from kvcache.client.connectors.vllm import KVCacheConnector, KVCacheMetadata
    from kvcache.client.connectors.vllm_plan import Tally

    connector, worker = object.__new__(KVCacheConnector), Worker()
    vars(connector).update(
        _on_cuda=True,
        _worker=worker,
        _tally=Tally(),
        _layers=NAMES,
        _computed_layers=set(),
        _bad_blocks=set(),
        _connector_metadata=None,
    )
    step = SimpleNamespace(
        kv_connector_metadata=KVCacheMetadata(), has_sync_kv_loads=False, finished_req_ids=set()
    )
    monkeypatch.setattr(mixin, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(mixin, "get_forward_context", lambda: None)
    with mixin.KVConnectorModelRunnerMixin._get_kv_connector_output(step):
        pass
    with (
        pytest.raises(RuntimeError, match="a kernel failed"),
        mixin.KVConnectorModelRunnerMixin._get_kv_connector_output(step),
    ):
        raise RuntimeError("a kernel failed")
    assert worker.computed == [True, False]
