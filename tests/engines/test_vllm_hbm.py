"""A real vLLM engine and a node with HBM, on the CPU: whichever tier a block comes from, and whatever happens
to it there, the tokens are those of a cold run.

Tests stand in the order in which they run, on one node and one engine; each leaves them as it says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcache.block import storage_key
from kvcache.config import NodeConfig
from kvcache.testing.processes import NodeProcess
from tests.engines.engine import EngineProcess, start_engine
from tests.engines.scribble import flip_byte_in_hbm, node_stats
from tests.engines.tiny_model import build, prompt
from tests.engines.vllm_process import BLOCK_TOKENS, PATIENT
from tests.server.conftest import EmbeddedNode

pytestmark = [pytest.mark.engine, pytest.mark.slow]
pytest.importorskip("vllm")

LENGTHS = (50, 200, 700, 1500)
BLOCKS = sum((length - 1) // BLOCK_TOKENS for length in LENGTHS)
FIRST = [prompt(length, seed=length) for length in LENGTHS]
"""Computed by an engine without HBM: host memory holds them."""
SECOND = [prompt(length, seed=length + 1) for length in LENGTHS]
"""Computed by the engine with HBM: nothing else holds them."""
MANY = [prompt(700, seed=seed) for seed in range(2, 8)]
BLOCK_BYTES = 1 << 16
LITTLE = {"hbm": str(24 * BLOCK_BYTES), "capacity": str(64 * BLOCK_BYTES)}
"""Of what ``MANY`` is, 21 blocks each."""
EXTERNAL = "vllm:prompt_tokens_by_source{external_kv_transfer}"
COMPUTED = "vllm:prompt_tokens_by_source{local_compute}"
IN_HBM = "vllm:kvcache_hbm_tokens"
LOADED = "vllm:kvcache_loaded_blocks"
FROM_HBM = "vllm:kvcache_store{hbm_loaded_blocks}"
BELOW = "vllm:kvcache_store{fallback_blocks}"
PATIENCE_S = 60.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came to hold"


def start(model: Path, address: str, log: Path, **settings: bool) -> EngineProcess:
    extra = json.dumps({"address": address, **settings, **PATIENT})
    return start_engine("tests.engines.vllm_process", [str(model), extra, "{}"], log)


class Warm:
    """The engine with HBM, its node, and what changed in its metrics since the last run began."""

    def __init__(self, engine: EngineProcess, node: str) -> None:
        self.engine = engine
        self.node = node
        self._salts = count()
        self._seen: dict[str, float] = {}

    def run(self, prompts: list[list[int]]) -> list[list[int]]:
        """With nothing in the engine's own cache."""
        assert self.engine.ask("reset") == {"done": True}
        self._seen = self.engine.ask("metrics")
        tokens: list[list[int]] = self.engine.ask("generate", prompts=prompts)["tokens"]
        return tokens

    def cold(self, prompts: list[list[int]]) -> list[list[int]]:
        answer = self.engine.ask("generate", prompts=prompts, salt=f"cold {next(self._salts)}")
        tokens: list[list[int]] = answer["tokens"]
        return tokens

    def news(self) -> dict[str, float]:
        now = self.engine.ask("metrics")
        changed = {name: value - self._seen.get(name, 0) for name, value in now.items()}
        return {name: value for name, value in changed.items() if value}

    def stats(self) -> dict[str, float]:
        return node_stats(self.node)

    def flip(self, prompt: list[int], position: int) -> None:
        names = self.engine.ask("names", prompt=prompt)
        prefix = [bytes.fromhex(name) for name in names["hashes"]]
        flip_byte_in_hbm(self.node, bytes.fromhex(names["namespace"]), prefix, position, at=12_345)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build(folder / "model")


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[NodeProcess]:
    settings = {"socket": str(folder / "node.sock"), "capacity": "256MiB", "http": "none"}
    with NodeProcess({**settings, "hbm": "64MiB", "hbm_device": "cpu"}, folder / "node.log") as running:
        yield running


@pytest.fixture(scope="module")
def expected(model: Path, node: NodeProcess, folder: Path) -> list[list[int]]:
    """The answers to ``FIRST``, by an engine without HBM that is gone again."""
    with start(model, node.socket, folder / "a.log", hbm=False) as engine:
        answer = engine.ask("generate", prompts=FIRST)["tokens"]
        assert engine.ask("generate", prompts=FIRST, salt="cold")["tokens"] == answer
        assert engine.close() == 0
    return list(answer)


@pytest.fixture(scope="module")
def warm(model: Path, node: NodeProcess, expected: list[list[int]], folder: Path) -> Iterator[Warm]:
    assert node_stats(node.socket)["blocks:host"] >= BLOCKS
    with start(model, node.socket, folder / "b.log", hbm=True) as engine:
        yield Warm(engine, node.socket)
        assert engine.close() == 0


def fine(news: dict[str, float]) -> bool:
    return not any("failed" in name or "errors" in name for name in news)


def test_what_comes_from_host_memory_goes_into_hbm(warm: Warm, expected: list[list[int]]) -> None:
    assert warm.run(FIRST) == expected
    news = warm.news()
    assert news[LOADED] == BLOCKS
    assert IN_HBM not in news and FROM_HBM not in news
    until(lambda: warm.stats().get("hbm_promoted_blocks", 0) >= BLOCKS)
    assert fine(news), news


def test_then_it_is_loaded_from_there_and_not_computed(warm: Warm, expected: list[list[int]]) -> None:
    before = warm.stats()
    assert warm.run(FIRST) == expected
    news, after = warm.news(), warm.stats()
    assert news[EXTERNAL] == news[IN_HBM] == BLOCKS * BLOCK_TOKENS
    assert news[COMPUTED] == sum(LENGTHS) - BLOCKS * BLOCK_TOKENS
    assert news[LOADED] == news[FROM_HBM] == BLOCKS
    assert after["hbm_hit_blocks"] - before["hbm_hit_blocks"] >= BLOCKS
    assert after["hit_tokens"] - before["hit_tokens"] == BLOCKS * BLOCK_TOKENS, "one lease, of two who ask"
    until(lambda: warm.stats()["leases"] == warm.stats()["hbm_leases"] == 0)
    assert fine(news), news


def test_a_flipped_byte_in_hbm_is_had_from_host_memory(warm: Warm, expected: list[list[int]]) -> None:
    warm.flip(FIRST[2], position=5)
    assert warm.run(FIRST) == expected
    news = warm.news()
    assert news[LOADED] == BLOCKS
    assert news[BELOW] == news["vllm:kvcache_store{failed_blocks:checksum}"] == 1
    assert not any(name.startswith("vllm:kvcache_failed") for name in news)
    assert warm.stats()["hbm_rejected_blocks:reader"] == 1


def test_what_only_hbm_holds_is_found(warm: Warm) -> None:
    host = warm.stats()["blocks:host"]
    assert warm.run(SECOND) == (cold := warm.cold(SECOND))
    assert warm.news()["vllm:kvcache_store{streamed_blocks}"] > BLOCKS // 2, "long prompts go layer by layer"
    assert warm.run(SECOND) == cold
    news = warm.news()
    assert warm.stats()["blocks:host"] == host
    assert news[EXTERNAL] == news[IN_HBM] == BLOCKS * BLOCK_TOKENS
    assert news[COMPUTED] == sum(LENGTHS) - BLOCKS * BLOCK_TOKENS
    assert fine(news), news


def test_a_flipped_byte_there_is_never_read(warm: Warm) -> None:
    cold = warm.cold(SECOND)
    warm.flip(SECOND[3], position=5)
    assert warm.run(SECOND) == cold
    news = warm.news()
    assert news["vllm:kvcache_failed_blocks{not_read}"] >= 1
    assert warm.stats()["hbm_rejected_blocks:reader"] == 2
    assert warm.run(SECOND) == cold
    assert warm.news()[LOADED] == BLOCKS, "the engine saved what it computed again"


def test_an_engine_that_loses_its_gpu_goes_on_with_host_memory(warm: Warm) -> None:
    cold = warm.cold(SECOND)
    warm.engine.ask("lose")
    assert warm.run(SECOND) == cold
    assert FROM_HBM not in warm.news()

    def all_from_host() -> bool:
        assert warm.run(SECOND) == cold
        news = warm.news()
        return news.get(LOADED) == BLOCKS and IN_HBM not in news

    until(all_from_host)


def test_a_killed_node_is_a_miss_and_the_hbm_of_the_next_is_used(warm: Warm, node: NodeProcess) -> None:
    cold = warm.cold(SECOND)
    node.kill()
    assert warm.run(SECOND) == cold
    assert EXTERNAL not in warm.news()
    node.start()

    def all_from_hbm() -> bool:
        assert warm.run(SECOND) == cold
        return warm.news().get(FROM_HBM) == BLOCKS

    until(all_from_hbm)


def test_less_hbm_and_host_memory_than_is_wanted(model: Path, tmp_path: Path) -> None:
    """What leaves HBM goes to host memory, and from there to NVMe; then the GPU is lost. All pages go by
    way of the device, as on CUDA."""
    places: dict[str, Any] = {"socket": str(tmp_path / "node.sock"), "nvme": f"{tmp_path / 'tier'}:64MiB"}
    node = EmbeddedNode(NodeConfig(http="none", hbm_device="cpu", **LITTLE, **places))

    def stats(name: str) -> float:
        return node.call(node.node.core.stats).get(name, 0)

    with start(model, node.node.address, tmp_path / "c.log", cuda=True) as engine:
        warm = Warm(engine, node.node.address)
        cold = [warm.cold([each])[0] for each in MANY]
        tiers = ("hbm_hit_blocks", "hbm_demoted_blocks", "nvme_read_blocks")

        def all_tiers() -> bool:
            assert [warm.run([each])[0] for each in MANY] == cold
            assert warm.run(MANY[:2]) == cold[:2]
            return all(stats(name) > 0 for name in tiers)

        until(all_tiers)
        other = prompt(200, seed=99)
        engine.ask("hand", prompts=[other], params=[{"kvcache": {"v": 1, "do": "prefill"}}], tokens=1)
        names = engine.ask("names", prompt=other)
        keys = [
            storage_key(bytes.fromhex(names["namespace"]), bytes.fromhex(name)) for name in names["hashes"]
        ]
        until(lambda: node.call(lambda: node.node.core.ledger.match(keys)) == len(keys))
        hbm = node.node.core.hbm
        assert hbm is not None
        node.call(lambda: hbm.lose(0, "it was reset"))
        for _ in range(2):
            assert [warm.run([each])[0] for each in MANY] == cold
        news = warm.news()
        assert "vllm:kvcache_errors" not in " ".join(news)
        assert engine.close() == 0
    node.close()


@pytest.mark.filterwarnings("ignore")  # vLLM's own, as it is imported.
def test_ranks_on_several_gpus_go_without_hbm_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank says where it is, in a process of its own."""
    from kvcache.client.connectors import vllm

    told: list[bool] = []
    said: list[str] = []
    connector: Any = SimpleNamespace(_scheduling=SimpleNamespace(use_hbm=told.append))
    monkeypatch.setattr(vllm._log, "warning", lambda text, *given: said.append(text % given))
    ranks = {rank: vllm.KVCacheHandshake(gpu) for rank, gpu in enumerate([b"first", b"second", b"second"])}
    vllm.KVCacheConnector.set_xfer_handshake_metadata(connector, dict(ranks))
    assert not told
    assert said == ["kvcache: HBM is not used: the ranks are on 2 GPUs, one is served"]
    vllm.KVCacheConnector.set_xfer_handshake_metadata(connector, {1: ranks[1], 2: ranks[2]})
    assert (told, len(said)) == ([True], 1)
