"""A real transformers model over a real node: the same tokens from another process's blocks, or computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcache.client import connect_blocking
from kvcache.errors import BadInput
from kvcache.testing.processes import NodeProcess
from tests.engines.engine import EngineProcess, start_engine
from tests.engines.scribble import flip_byte, node_stats
from tests.engines.tiny_model import build, build_sliding, prompt

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCK_TOKENS = 32
LENGTHS = (50, 400, 1500)
PROMPTS = [prompt(length, seed=length) for length in LENGTHS]
STORED_TOKENS = sum((length - 1) // BLOCK_TOKENS * BLOCK_TOKENS for length in LENGTHS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[NodeProcess]:
    settings = {"socket": str(folder / "node.sock"), "capacity": "128MiB", "http": "none"}
    with NodeProcess(settings, folder / "node.log") as running:
        yield running


@pytest.fixture(scope="module")
def expected(node: NodeProcess, folder: Path) -> list[list[int]]:
    """What a process without a store answered, after another process filled the store."""
    build(folder / "model")
    with start(folder, node.socket, "a") as engine:
        filled = run(engine)
        assert engine.close() == 0
    with start(folder, node.socket, "plain") as engine:
        plain: list[list[int]] = engine.ask("plain", prompts=PROMPTS)["tokens"]
    assert filled["tokens"] == plain
    assert "loaded_tokens" not in filled["counters"]
    return plain


@pytest.fixture(scope="module")
def warm(expected: list[list[int]], node: NodeProcess, folder: Path) -> Iterator[EngineProcess]:
    with start(folder, node.socket, "b") as engine:
        yield engine


def start(folder: Path, address: str, name: str) -> EngineProcess:
    arguments = [str(folder / "model"), address]
    return start_engine("tests.engines.transformers_process", arguments, folder / f"{name}.log")


def run(engine: EngineProcess) -> dict[str, Any]:
    return engine.ask("generate", prompts=PROMPTS)


def test_a_new_process_computes_only_the_suffix(
    warm: EngineProcess, expected: list[list[int]], node: NodeProcess
) -> None:
    before = node_stats(node.socket)["hit_tokens"]
    answer = run(warm)
    assert answer["tokens"] == expected
    assert answer["counters"]["loaded_tokens"] == STORED_TOKENS
    # The embedding saw so many tokens of the prompts; each of the 7 further steps of a prompt is one more.
    assert answer["embedded"] == sum(LENGTHS) - STORED_TOKENS + 7 * len(PROMPTS)
    assert node_stats(node.socket)["hit_tokens"] - before == STORED_TOKENS
    assert answer["store"]["loaded_blocks"] == STORED_TOKENS // BLOCK_TOKENS


def test_one_wrong_byte_is_never_read(
    warm: EngineProcess, expected: list[list[int]], node: NodeProcess
) -> None:
    names = warm.ask("names", prompt=PROMPTS[1])
    prefix = [bytes.fromhex(name) for name in names["hashes"]]
    flip_byte(node.socket, bytes.fromhex(names["namespace"]), prefix, position=3, at=100)
    answer = run(warm)
    assert answer["tokens"] == expected
    assert answer["store"]["failed_blocks:checksum"] == 1
    assert answer["counters"]["loaded_tokens"] == STORED_TOKENS - (400 - 1) // 32 * 32 + 3 * 32
    assert run(warm)["counters"]["loaded_tokens"] == STORED_TOKENS  # What was computed again was saved.


def test_a_stopped_node_is_a_miss(warm: EngineProcess, expected: list[list[int]], node: NodeProcess) -> None:
    node.pause()
    try:
        answer = run(warm)
    finally:
        node.wake()
    assert answer["tokens"] == expected
    assert "loaded_tokens" not in answer["counters"]
    assert answer["store"]["ended:deadline"] == 1


def test_a_killed_node_is_a_miss(warm: EngineProcess, expected: list[list[int]], node: NodeProcess) -> None:
    node.kill()
    answer = run(warm)
    assert answer["tokens"] == expected
    assert "loaded_tokens" not in answer["counters"]
    assert any(name.startswith(("missed_calls", "ended", "refused")) for name in answer["store"])


def test_other_architectures_are_refused(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from kvcache.client.connectors.transformers import PrefixCache

    model = AutoModelForCausalLM.from_pretrained(build_sliding(folder / "sliding"))
    with pytest.raises(BadInput, match="DynamicSlidingWindowLayer; only full attention"):
        PrefixCache(model, connect_blocking(f"unix://{folder}/none.sock"))


def test_what_cannot_be_named_goes_past_the_store(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from kvcache.client.connectors.transformers import PrefixCache

    model = AutoModelForCausalLM.from_pretrained(build(folder / "local")).eval()
    cache = PrefixCache(model, connect_blocking(f"unix://{folder}/none.sock"))
    ids = torch.tensor([prompt(40, seed=1)])
    cases = {
        "not_one_sequence": ((ids.repeat(2, 1),), {}),
        "padding": ((ids,), {"attention_mask": torch.tensor([[0] + [1] * 39])}),
        "several_outputs": ((ids,), {"num_beams": 2}),
        "own_cache": ((ids,), {"use_cache": False}),
    }
    for positional, named in cases.values():
        cache.generate(*positional, max_new_tokens=1, do_sample=False, **named)
    assert cache.counters == {f"passed_by:{reason}": 1 for reason in cases}


def test_one_changed_number_is_another_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from kvcache.client.connectors.transformers import weights_digest

    model = AutoModelForCausalLM.from_pretrained(build(folder / "local"))
    before = weights_digest(model)
    assert before == weights_digest(AutoModelForCausalLM.from_pretrained(folder / "local"))
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    assert weights_digest(model) != before
