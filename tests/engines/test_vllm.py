"""A real vLLM engine: what one process computed another reads, and when it cannot, it computes the same.

The reference of every comparison is a cold run of the same prompts on the same engine under a cache
salt of its own, which no block is shared with. Tests stand in the order in which they run; each leaves
the store as it says.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kvcache.errors import Unavailable
from kvcache.testing.processes import NodeProcess
from tests.engines.engine import EngineProcess, start_engine
from tests.engines.scribble import flip_byte, node_stats
from tests.engines.tiny_model import build, build_sliding, prompt
from tests.engines.vllm_process import BLOCK_TOKENS, PATIENT

pytestmark = [pytest.mark.engine, pytest.mark.slow]
pytest.importorskip("vllm")

LENGTHS = (50, 200, 700, 1500)
PROMPTS = [prompt(length, seed=length) for length in LENGTHS]
STORED_BLOCKS = [(length - 1) // BLOCK_TOKENS for length in LENGTHS]
EXTERNAL = "vllm:prompt_tokens_by_source{external_kv_transfer}"
COMPUTED = "vllm:prompt_tokens_by_source{local_compute}"
RETURN_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build(folder / "model")


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[NodeProcess]:
    settings = {"socket": str(folder / "node.sock"), "capacity": "256MiB", "http": "none"}
    with NodeProcess(settings, folder / "node.log") as running:
        yield running


def start(model: Path, address: str, log: Path, **changes: Any) -> EngineProcess:
    arguments = [str(model), json.dumps({"address": address, **PATIENT}), json.dumps(changes)]
    return start_engine("tests.engines.vllm_process", arguments, log)


class Warm:
    """The second engine, the answers it must give, and what changed in its metrics since the last look."""

    def __init__(self, engine: EngineProcess, expected: list[list[int]]) -> None:
        self.engine = engine
        self.expected = expected
        self._salts = count()
        self._seen: dict[str, float] = {}

    def run(self) -> list[list[int]]:
        """The prompts, with nothing in the engine's own cache."""
        assert self.engine.ask("reset") == {"done": True}
        tokens: list[list[int]] = self.engine.ask("generate", prompts=PROMPTS)["tokens"]
        return tokens

    def cold(self) -> list[list[int]]:
        salt = f"cold {next(self._salts)}"
        tokens: list[list[int]] = self.engine.ask("generate", prompts=PROMPTS, salt=salt)["tokens"]
        return tokens

    def news(self) -> dict[str, float]:
        now = self.engine.ask("metrics")
        changed = {name: value - self._seen.get(name, 0) for name, value in now.items()}
        self._seen = now
        return {name: value for name, value in changed.items() if value}


@pytest.fixture(scope="module")
def warm(model: Path, node: NodeProcess, folder: Path) -> Iterator[Warm]:
    """Engine A has prefilled the prompts and is gone; engine B runs."""
    with start(model, node.socket, folder / "a.log") as engine:
        first = engine.ask("generate", prompts=PROMPTS)
        assert first["tokens"] == engine.ask("generate", prompts=PROMPTS, salt="cold")["tokens"]
        assert engine.close() == 0
    with start(model, node.socket, folder / "b.log") as engine:
        yield Warm(engine, first["tokens"])


def test_a_new_engine_answers_from_the_store_and_computes_the_rest(warm: Warm, node: NodeProcess) -> None:
    before = Counter(node_stats(node.socket))
    assert warm.run() == warm.expected
    news, after = warm.news(), node_stats(node.socket)
    stored = sum(STORED_BLOCKS)
    assert news[EXTERNAL] == stored * BLOCK_TOKENS
    assert news[COMPUTED] == sum(LENGTHS) - stored * BLOCK_TOKENS
    assert news["vllm:kvcache_loaded_blocks"] == stored
    assert news["vllm:kvcache_store{loaded_blocks}"] == stored
    assert news["vllm:kvcache_lookups{hit}"] == len(PROMPTS)
    assert not any("failed" in name or "errors" in name for name in news), news
    assert after["leases_taken"] - before["leases_taken"] >= len(PROMPTS)
    assert after["hit_tokens"] - before["hit_tokens"] == stored * BLOCK_TOKENS
    assert after["leases"] == 0


def test_it_answers_as_a_cold_run_on_the_same_engine(warm: Warm) -> None:
    assert warm.cold() == warm.expected
    assert EXTERNAL not in warm.news()


def test_one_wrong_byte_is_never_read_and_its_block_is_computed(warm: Warm, node: NodeProcess) -> None:
    names = warm.engine.ask("names", prompt=PROMPTS[2])
    prefix = [bytes.fromhex(name) for name in names["hashes"]]
    flip_byte(node.socket, bytes.fromhex(names["namespace"]), prefix, position=5, at=12_345)
    warm.news()
    assert warm.run() == warm.expected
    news = warm.news()
    assert news["vllm:kvcache_store{failed_blocks:checksum}"] == 1
    assert news["vllm:kvcache_failed_blocks{not_read}"] == 1
    assert node_stats(node.socket)["rejected_blocks:checksum"] == 1
    # The engine saved what it computed again: the next one finds all of it.
    assert warm.run() == warm.expected
    assert warm.news()["vllm:kvcache_loaded_blocks"] == sum(STORED_BLOCKS)


def test_a_stopped_node_costs_its_deadline_and_nothing_else(warm: Warm, node: NodeProcess) -> None:
    node.pause()
    try:
        assert warm.run() == warm.expected
        news = warm.news()
    finally:
        node.wake()
    assert EXTERNAL not in news
    assert news[COMPUTED] >= sum(LENGTHS)  # More by what ``reset`` computes until saves have ended.
    assert news["vllm:kvcache_lookup_store{ended:deadline}"] >= 1
    assert news["vllm:kvcache_lookups{unavailable}"] == len(PROMPTS)
    assert warm_again(warm) == warm.expected


def test_a_killed_node_is_a_miss_and_the_next_node_is_used(warm: Warm, node: NodeProcess) -> None:
    node.kill()
    warm.news()
    assert warm.run() == warm.expected
    news = warm.news()
    assert EXTERNAL not in news
    assert news[COMPUTED] >= sum(LENGTHS)  # More by what ``reset`` computes until saves have ended.
    assert news["vllm:kvcache_lookups{unavailable}"] == len(PROMPTS)
    node.start()
    assert warm_again(warm) == warm.expected


def warm_again(warm: Warm) -> list[list[int]]:
    """The answers of the first run that has all from the store again: saving into it on the way."""
    end = time.monotonic() + RETURN_S
    while time.monotonic() < end:
        answers = warm.run()
        if warm.news().get("vllm:kvcache_loaded_blocks") == sum(STORED_BLOCKS):
            return answers
        assert answers == warm.expected
    raise AssertionError("the store is not used again")


def test_other_weights_find_nothing_and_short_memory_harms_nothing(node: NodeProcess, folder: Path) -> None:
    """The same prompts and shapes under other weights; then so little memory that requests lose their
    pages in the middle of being saved, and load again what was saved of them."""
    other = build(folder / "other", seed=1)
    prompts = [prompt(200, seed=seed) for seed in range(8)]
    with start(
        other, node.socket, folder / "other.log", kv_cache_memory_bytes=5 << 20, max_num_seqs=8
    ) as engine:
        engine.ask("generate", prompts=PROMPTS)
        metrics = engine.ask("metrics")
        assert metrics[EXTERNAL] == 0
        assert metrics["vllm:kvcache_lookups{miss}"] == len(PROMPTS)
        answers = [engine.ask("generate", prompts=prompts, salt=salt, tokens=200) for salt in ("x", "x", "y")]
        metrics = engine.ask("metrics")
    assert answers[0]["tokens"] == answers[1]["tokens"] == answers[2]["tokens"]
    assert metrics["vllm:num_preemptions"] > 0
    assert metrics["vllm:kvcache_loaded_blocks"] > 0
    assert "vllm:kvcache_errors" not in " ".join(metrics)


def test_a_sliding_window_is_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(Unavailable, match=r"kvcache cannot serve this engine: .*sliding window"):
        start(build_sliding(folder / "sliding"), "", folder / "sliding.log")
