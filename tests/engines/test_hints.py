"""What is said of a request to a real engine is what the node's eviction policy hears, and what it goes by.

The node runs in this process, so that a policy can write down what it is told; around it is ``keep``, as an
operator would have it. Each engine has a node of its own, too small for all that is asked of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvcache.config import NodeConfig
from kvcache.eviction.registry import POLICIES
from kvcache.eviction.traces import record_files
from kvcache.eviction.traces.files import open_trace
from kvcache.eviction.traces.trace import Trace
from kvcache.leaf_lru import LeafLru
from kvcache.policy import RequestContext
from kvcache.request_hints import session_number
from tests.engines.engine import EngineProcess, start_engine
from tests.engines.scribble import node_stats
from tests.engines.tiny_model import build, prompt
from tests.engines.vllm_process import BLOCK_TOKENS, PATIENT
from tests.server.conftest import EmbeddedNode

pytestmark = [pytest.mark.engine, pytest.mark.slow]
pytest.importorskip("vllm")

NODE_BLOCKS = 128
BLOCK_BYTES = 64 << 10
LENGTH = 700
STORED_TOKENS = (LENGTH - 1) // BLOCK_TOKENS * BLOCK_TOKENS
EXTERNAL = "vllm:prompt_tokens_by_source{external_kv_transfer}"
TOOL_CALL = {"hint": "tool_call", "priority": 70, "gap_ms": 8_000, "keep_ms": 60_000}
TURN_END = {"hint": "turn_end", "session": 5}
DEAR = {"priority": 90, "keep_ms": 3_600_000}
WAIT_S = 20.0
FLOOD = [prompt(1_500, seed=100 + at) for at in range(6)]
"""More than twice what the node holds."""

Told = tuple[str, int, int, int | None, int | None]
CHAT_17: Told = ("tool_call", session_number("chat-17"), 70, 8_000, 60_000)
CHAT_5: Told = ("turn_end", 5, 50, None, None)
NOTHING: Told = ("unknown", -1, 50, None, None)


class HearingNode:
    """A node whose policy is ``keep`` around one that writes down what it is told, and goes by use."""

    def __init__(self, folder: Path) -> None:
        self._requests: list[RequestContext] = []
        self._saves: list[RequestContext] = []
        self._recording = folder / "recording"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(POLICIES, "hearing", self._policy())
            self._embedded = EmbeddedNode(
                NodeConfig(
                    socket=str(folder / "node.sock"),
                    capacity=f"{NODE_BLOCKS * BLOCK_BYTES}B",
                    unit=f"{BLOCK_BYTES}B",
                    policy="hearing+keep",
                    record=str(self._recording),
                    http="none",
                )
            )
        self.address = self._embedded.node.address

    def _policy(self) -> type[LeafLru]:
        requests, saves = self._requests, self._saves

        class Hearing(LeafLru):
            def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
                requests.append(context)
                super().on_request(context, path)

            def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
                saves.append(context)
                super().on_admitted(context, blocks)

        return Hearing

    def heard(self) -> tuple[set[Told], set[Told]]:
        """What was said with look-ups, and with what was saved, since the last call."""
        both = set(map(told, self._requests)), set(map(told, self._saves))
        self._requests.clear()
        self._saves.clear()
        return both

    def stats(self) -> dict[str, float]:
        return node_stats(self.address)

    def recorded(self) -> Trace:
        """What it was asked until now. It records no more."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record_files, "CLOSE_S", WAIT_S)  # However slow the disk is just now.
            self._embedded.call(self._embedded.node.core.recording.close)
        return open_trace(self._recording)

    def close(self) -> None:
        self._embedded.close()


def told(context: RequestContext) -> Told:
    return (
        context.hint,
        context.session,
        context.priority,
        context.expected_gap_ms,
        context.keep_ms,
    )


def ends(trace: Trace) -> list[tuple[str, int]]:
    """How requests ended and in which session, in the order in which they came."""
    return [(each.kind, each.session) for each in trace.requests()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[HearingNode]:
    node = HearingNode(tmp_path)
    yield node
    node.close()


class Vllm:
    """One at a time, so that what is recorded has an order."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._external = 0.0

    def answer(self, tokens: list[int], hints: Mapping[str, object]) -> list[int]:
        params = {"kvcache": {"v": 1, **hints}} if hints else {}
        (answer,) = self._engine.ask("hand", prompts=[tokens], params=[params], tokens=8)["tokens"]
        return [int(token) for token in answer]

    def cold(self, tokens: list[int]) -> list[int]:
        (answer,) = self._engine.ask("generate", prompts=[tokens], salt="cold")["tokens"]
        return [int(token) for token in answer]

    def forget(self) -> None:
        assert self._engine.ask("reset") == {"done": True}

    def loaded(self) -> int:
        """Tokens that came from the node, since the last call."""
        before, self._external = self._external, self._engine.ask("metrics").get(EXTERNAL, 0.0)
        return int(self._external - before)

    def metrics(self) -> dict[str, Any]:
        return self._engine.ask("metrics")


@pytest.fixture
def vllm(model: Path, node: HearingNode, tmp_path: Path) -> Iterator[Vllm]:
    arguments = [str(model), json.dumps({"address": node.address, **PATIENT}), "{}"]
    with start_engine("tests.engines.vllm_process", arguments, tmp_path / "engine.log") as engine:
        yield Vllm(engine)


def test_vllm_says_it_with_what_it_looks_up_and_with_what_it_saves(vllm: Vllm, node: HearingNode) -> None:
    first, second, third, fourth = (prompt(LENGTH, seed=at) for at in range(4))
    for tokens, hints, expected in (
        (first, {**TOOL_CALL, "session": "chat-17"}, CHAT_17),
        (second, TURN_END, CHAT_5),
        (third, {}, NOTHING),
        (fourth, {"hint": "soon", "priority": 90}, NOTHING),
    ):
        answer = vllm.answer(tokens, hints)
        assert node.heard() == ({expected}, {expected})
        vllm.forget()
        assert vllm.answer(tokens, hints) == answer == vllm.cold(tokens)
        assert expected in node.heard()[0]
        assert vllm.loaded() == STORED_TOKENS
    assert vllm.metrics()["vllm:kvcache_handoffs{ignored_garbage}"] == 2
    stats = node.stats()
    assert (stats["policy_faults"], stats["hit_tokens"]) == (0, 4 * STORED_TOKENS)
    cold = ("unknown", -1)
    assert ends(node.recorded()) == [
        *(("tool_call", 0), ("tool_call", 0), cold),
        *(("turn_end", 1), ("turn_end", 1), cold),
        *[cold] * 6,
    ]


def test_vllm_finds_again_what_it_said_to_be_worth_keeping(vllm: Vllm, node: HearingNode) -> None:
    dear, plain = prompt(LENGTH, seed=1), prompt(LENGTH, seed=2)
    answers = [vllm.answer(dear, DEAR), vllm.answer(plain, {})]
    for tokens in FLOOD:
        vllm.answer(tokens, {})
    vllm.forget()
    assert vllm.loaded() == 0
    assert vllm.answer(dear, {}) == answers[0]
    assert vllm.loaded() == STORED_TOKENS
    assert vllm.answer(plain, {}) == answers[1]
    assert vllm.loaded() == 0
    assert node.stats()["policy_faults"] == 0


def test_transformers_says_it_and_finds_again_what_is_worth_keeping(
    model: Path, node: HearingNode, tmp_path: Path
) -> None:
    arguments = [str(model), node.address]
    dear, plain = prompt(LENGTH, seed=1), prompt(LENGTH, seed=2)
    with start_engine("tests.engines.transformers_process", arguments, tmp_path / "engine.log") as engine:

        def loaded(tokens: list[int], **hints: object) -> int:
            counters = engine.ask("generate", prompts=[tokens], hints=hints)["counters"]
            return int(counters.get("loaded_tokens", 0))

        said = {**TOOL_CALL, "session": session_number("chat-17")}
        assert loaded(dear, **said) == 0
        assert node.heard() == ({CHAT_17}, {CHAT_17})
        assert loaded(dear, **DEAR) == STORED_TOKENS
        assert node.heard()[0] == {("unknown", -1, 90, None, 3_600_000)}
        assert loaded(plain) == 0
        assert node.heard() == ({NOTHING}, {NOTHING})
        for tokens in FLOOD:
            assert loaded(tokens) == 0
        assert (loaded(dear), loaded(plain)) == (STORED_TOKENS, 0)
    assert node.stats()["policy_faults"] == 0
    assert ends(node.recorded())[:3] == [("tool_call", 0), ("unknown", -1), ("unknown", -1)]
