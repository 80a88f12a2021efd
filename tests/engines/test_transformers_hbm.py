"""A real transformers model and a node with HBM, on the CPU: whichever tier a prefix comes from, and whatever
happens to it there, the tokens are those that the model alone says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvcache.block import storage_key
from kvcache.config import NodeConfig
from kvcache.testing.processes import NodeProcess
from kvcache.tiers.space import slot_offset
from tests.engines.engine import EngineProcess, start_engine
from tests.engines.scribble import flip_byte, node_stats
from tests.engines.tiny_model import build, prompt
from tests.server.conftest import EmbeddedNode

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCK_TOKENS = 32
LENGTHS = (50, 400, 700)
PROMPTS = [prompt(length, seed=length) for length in LENGTHS]
STORED_BLOCKS = sum((length - 1) // BLOCK_TOKENS for length in LENGTHS)
STORED_TOKENS = STORED_BLOCKS * BLOCK_TOKENS
FLIPPED = 7
"""A block of the second prompt."""
BLOCKS_BEFORE_FLIPPED = STORED_BLOCKS - (LENGTHS[1] - 1) // BLOCK_TOKENS + FLIPPED
BLOCK_BYTES = 1 << 16
LITTLE_BYTES = 10 * BLOCK_BYTES
LARGER = PROMPTS[1:]
"""Each larger than that."""
LARGER_TOKENS = sum((len(each) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for each in LARGER)
PATIENCE_S = 60.0
HBM = {"capacity": "64MiB", "http": "none", "hbm": "16MiB", "hbm_device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("transformers") / "model")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What the model says, without a store."""
    with start(model, f"unix://{model}/none.sock", "plain") as engine:
        tokens: list[list[int]] = engine.ask("plain", prompts=PROMPTS)["tokens"]
    return tokens


@pytest.fixture
def filled(tmp_path: Path, model: Path, expected: list[list[int]]) -> Iterator[EmbeddedNode]:
    """A node whose HBM holds all prompts, and no other tier any."""
    node = served(tmp_path, HBM)
    answer = once(model, node.node.address, "hbm")
    assert answer["tokens"] == expected
    assert "loaded_tokens" not in answer["counters"]
    stats = node.call(node.node.core.stats)
    assert stats["blocks:hbm"] >= STORED_BLOCKS
    assert stats["blocks:host"] == 0
    yield node
    node.close()


def served(folder: Path, settings: Mapping[str, Any]) -> EmbeddedNode:
    return EmbeddedNode(NodeConfig(socket=str(folder / "node.sock"), **settings))


def start(model: Path, address: str, way: str) -> EngineProcess:
    arguments = [str(model), address, *([] if way == "plain" else [way])]
    return start_engine("tests.engines.transformers_process", arguments, model / f"{way}.log")


def once(model: Path, address: str, way: str) -> dict[str, Any]:
    """What a fresh process answers."""
    with start(model, address, way) as engine:
        answer = engine.ask("generate", prompts=PROMPTS)
        assert engine.close() == 0
    assert "errors" not in answer["counters"]
    return answer


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came to hold"


def grown(before: Mapping[str, float], after: Mapping[str, float], *names: str) -> list[float]:
    return [after.get(name, 0) - before.get(name, 0) for name in names]


def flip(node: EmbeddedNode, names: Mapping[str, Any], position: int) -> None:
    """A bit of this block in HBM."""
    hbm = node.node.core.hbm
    assert hbm is not None
    key = storage_key(bytes.fromhex(names["namespace"]), bytes.fromhex(names["hashes"][position]))
    slot = node.call(lambda: hbm[0].ledger.slot_of(key))
    assert slot is not None
    hbm[0].memory.start(0, 16 << 20)[slot_offset(slot) + 100] ^= 1


def test_the_same_tokens_from_each_tier(tmp_path: Path, model: Path, expected: list[list[int]]) -> None:
    settings = {"socket": str(tmp_path / "node.sock"), "nvme": f"{tmp_path / 'tier'}:128MiB", **HBM}
    tiers = ("hbm_hit_blocks", "hit_tokens", "nvme_read_blocks", "hbm_saved_blocks")
    with NodeProcess(settings, tmp_path / "node.log") as node:
        assert once(model, node.socket, "host")["tokens"] == expected
        until(lambda: node_stats(node.socket)["nvme_wanted_blocks"] == 0)
        empty = node_stats(node.socket)
        assert empty["blocks:hbm"] == 0

        host = once(model, node.socket, "hbm")
        warm = node_stats(node.socket)
        assert host["tokens"] == expected
        assert host["counters"]["loaded_tokens"] == STORED_TOKENS
        assert "hbm_tokens" not in host["counters"]
        assert grown(empty, warm, *tiers[:3]) == [0, STORED_TOKENS, 0]
        assert warm["blocks:hbm"] == warm["hbm_saved_blocks"] >= STORED_BLOCKS, (
            "what was loaded goes there too"
        )

        hot = once(model, node.socket, "hbm")
        after = node_stats(node.socket)
        assert hot["tokens"] == expected
        assert hot["counters"]["hbm_tokens"] == hot["counters"]["loaded_tokens"] == STORED_TOKENS
        assert hot["store"]["hbm_loaded_blocks"] == STORED_BLOCKS
        assert grown(warm, after, "hbm_hit_blocks", "nvme_read_blocks", "hbm_saved_blocks") == [
            STORED_BLOCKS,
            0,
            0,
        ]

        node.kill()
        node.start()
        cold = once(model, node.socket, "hbm")
        read = node_stats(node.socket)
        assert cold["tokens"] == expected
        assert cold["counters"]["loaded_tokens"] == STORED_TOKENS
        assert read["nvme_read_blocks"] >= STORED_BLOCKS
        assert read.get("hbm_hit_blocks", 0) == 0


def test_what_hbm_alone_holds(filled: EmbeddedNode, model: Path, expected: list[list[int]]) -> None:
    answer = once(model, filled.node.address, "hbm")
    assert answer["tokens"] == expected
    assert answer["counters"]["hbm_tokens"] == STORED_TOKENS
    assert filled.call(filled.node.core.stats)["hbm_hit_blocks"] == STORED_BLOCKS


def test_a_flipped_byte_in_hbm_is_never_read(
    filled: EmbeddedNode, model: Path, expected: list[list[int]]
) -> None:
    with start(model, filled.node.address, "hbm") as engine:
        flip(filled, engine.ask("names", prompt=PROMPTS[1]), FLIPPED)
        answer = engine.ask("generate", prompts=PROMPTS)
        assert answer["tokens"] == expected
        assert answer["store"]["failed_blocks:checksum"] == 1
        assert answer["counters"]["loaded_tokens"] == BLOCKS_BEFORE_FLIPPED * BLOCK_TOKENS
        assert filled.call(filled.node.core.stats)["hbm_rejected_blocks:reader"] == 1
        assert engine.ask("generate", prompts=PROMPTS)["tokens"] == expected


def test_a_flipped_byte_in_hbm_is_had_from_host_memory(
    filled: EmbeddedNode, model: Path, expected: list[list[int]]
) -> None:
    assert once(model, filled.node.address, "host")["tokens"] == expected
    with start(model, filled.node.address, "hbm") as engine:
        flip(filled, engine.ask("names", prompt=PROMPTS[1]), FLIPPED)
        answer = engine.ask("generate", prompts=PROMPTS)
        assert answer["tokens"] == expected
        assert answer["counters"]["loaded_tokens"] == STORED_TOKENS
        assert answer["store"]["fallback_blocks"] == 1


@pytest.mark.parametrize("who", ["node", "engine"])
def test_a_lost_slab_is_a_miss_and_host_memory_goes_on(
    filled: EmbeddedNode, model: Path, expected: list[list[int]], who: str
) -> None:
    hbm = filled.node.core.hbm
    assert hbm is not None
    with start(model, filled.node.address, "hbm") as engine:
        engine.ask("names", prompt=PROMPTS[0])  # It is connected, and the slab mapped.
        if who == "node":
            filled.call(lambda: hbm.lose(0, "it was reset"))
        else:
            engine.ask("lose")
        answer = engine.ask("generate", prompts=PROMPTS)
        assert answer["tokens"] == expected
        assert "loaded_tokens" not in answer["counters"]
        again = engine.ask("generate", prompts=PROMPTS)
        assert again["tokens"] == expected
        assert again["counters"]["loaded_tokens"] == STORED_TOKENS, "it was saved into host memory"
        assert "hbm_loaded_blocks" not in again["store"]
        assert "errors" not in again["counters"]


def test_a_node_without_hbm(tmp_path: Path, model: Path, expected: list[list[int]]) -> None:
    node = served(tmp_path, {"capacity": "64MiB", "http": "none"})
    first = once(model, node.node.address, "hbm")
    second = once(model, node.node.address, "hbm")
    assert first["tokens"] == second["tokens"] == expected
    assert second["counters"]["loaded_tokens"] == STORED_TOKENS
    assert not [name for name in {**first["store"], **second["store"]} if "hbm" in name]
    node.close()


def test_what_hbm_has_no_room_for_goes_to_host_memory(
    tmp_path: Path, model: Path, expected: list[list[int]]
) -> None:
    """With what stands before it, which is in HBM alone. The node copies nothing there by itself."""
    node = served(tmp_path, {**HBM, "hbm": str(LITTLE_BYTES)})
    with start(model, node.node.address, "hbm") as engine:
        engine.ask("names", prompt=PROMPTS[0])  # It is connected, and the slab made.
        hbm = node.node.core.hbm
        assert hbm is not None
        demoter = hbm._demoters[0]
        node.call(lambda: setattr(demoter, "_tips", lambda: []))
        assert engine.ask("generate", prompts=LARGER)["tokens"] == expected[1:]
        stats = node.call(node.node.core.stats)
        assert stats["hbm_saved_blocks"] >= LITTLE_BYTES // BLOCK_BYTES
        assert stats["blocks:host"] * BLOCK_TOKENS >= LARGER_TOKENS
        answer = engine.ask("generate", prompts=LARGER)
    assert answer["tokens"] == expected[1:]
    assert answer["counters"]["loaded_tokens"] == LARGER_TOKENS
    node.close()


def test_hbm_that_is_too_small_beside_a_node_that_copies_out_of_it(
    tmp_path: Path, model: Path, expected: list[list[int]]
) -> None:
    """What the node is copying itself, an engine cannot save meanwhile: then it comes with the next save."""
    node = served(tmp_path, {**HBM, "hbm": str(LITTLE_BYTES)})

    def loads_all(engine: EngineProcess) -> bool:
        answer = engine.ask("generate", prompts=LARGER)
        assert answer["tokens"] == expected[1:]
        return bool(answer["counters"].get("loaded_tokens", 0) == LARGER_TOKENS)

    for _ in range(2):
        with start(model, node.node.address, "hbm") as engine:
            until(partial(loads_all, engine))
    node.close()


@pytest.mark.parametrize(("save", "load"), [("host", "staged"), ("staged", "host")])
def test_by_way_of_staging_memory(
    tmp_path: Path, model: Path, expected: list[list[int]], save: str, load: str
) -> None:
    """Blocks are the same bytes, in batches or not, and a wrong one is not used either way."""
    node = served(tmp_path, {"capacity": "64MiB", "http": "none"})
    assert once(model, node.node.address, save)["tokens"] == expected
    with start(model, node.node.address, load) as engine:
        answer = engine.ask("generate", prompts=PROMPTS)
        assert answer["tokens"] == expected
        assert answer["counters"]["loaded_tokens"] == STORED_TOKENS
        names = engine.ask("names", prompt=PROMPTS[1])
        prefix = [bytes.fromhex(name) for name in names["hashes"]]
        flip_byte(node.node.address, bytes.fromhex(names["namespace"]), prefix, FLIPPED, 100)
        answer = engine.ask("generate", prompts=PROMPTS)
        assert answer["tokens"] == expected
        assert answer["counters"]["loaded_tokens"] == BLOCKS_BEFORE_FLIPPED * BLOCK_TOKENS
    node.close()
