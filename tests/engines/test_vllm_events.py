"""A real vLLM engine, followed by its own KV events: the index has what the scheduler's pool has.

The pool is small, so it evicts; equal prompts run at once, so it holds copies; prompts have salts. The truth
is asked of the pool itself, by hashes that vLLM computes for the same tokens. Tests stand in the order in
which they run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest

from kvcache.block import pack_tokens
from kvcache.clock import SystemClock
from kvcache.engine_events.feed import EngineFeed
from kvcache.engine_events.naming import public_namespace, public_namespaces, salted
from kvcache.engine_events.zmq import EngineFollowing
from kvcache.locality import LocalityIndex
from kvcache.sequence import sequence_hashes
from tests.engines.engine import EngineProcess, start_engine
from tests.engines.tiny_model import build, prompt
from tests.engines.vllm_process import BLOCK_TOKENS

pytestmark = [pytest.mark.engine, pytest.mark.slow]
pytest.importorskip("vllm")

SOURCE = "engine:w"
SPACE = public_namespace("tiny", BLOCK_TOKENS).namespace_id()
POOL_BYTES = 5 << 20
"""80 blocks: six prompts of those below do not fit at once."""
SETTLE_S = 60.0
TOKENS = 40


class Follower:
    """The index, and the thread in which it follows. Use as a context manager."""

    def __init__(self, endpoint: str, replay: str) -> None:
        self.index = LocalityIndex(16 << 20)
        self.feed = EngineFeed(
            SOURCE, public_namespaces("tiny"), time.time_ns(), engine="vllm", replay=bool(replay)
        )
        self.following = EngineFollowing(endpoint, replay, self.feed, self.index, SystemClock())
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self.following.run())
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        self._loop.close()

    def blocks(self, tokens: list[int], salt: str = "") -> int:
        """How many leading blocks of a prompt the index says that the engine has."""
        found = self.index.locate(names(tokens, salt), {SPACE})
        return max((each.blocks for each in found), default=0)

    def holds(self, name: memoryview) -> bool:
        """Whether it has this one, whatever is before it."""
        return any(each.blocks for each in self.index.locate(name, {SPACE}))

    def current(self) -> bool:
        as_of = self.index.as_of(SOURCE)
        return as_of is not None and as_of.synced and as_of.known and not as_of.partial

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())


class Engine:
    """The process, and all that it was given to do."""

    def __init__(self, process: EngineProcess) -> None:
        self.process = process
        self.sequences: list[list[int]] = []
        self.salts: list[str] = []

    def generate(self, prompts: list[list[int]], salt: str = "") -> list[int]:
        """Returns how many tokens of each came from the engine's own cache."""
        answer = self.process.ask("generate", prompts=prompts, salt=salt, tokens=TOKENS)
        self.sequences += [given + made for given, made in zip(prompts, answer["tokens"], strict=True)]
        self.salts += [salt] * len(prompts)
        cached: list[int] = answer["cached"]
        return cached

    def truth(self) -> tuple[set[int], int]:
        """The names of the blocks in its pool, and how many are in it at all."""
        answer = self.process.ask("cached", sequences=self.sequences, salts=self.salts)
        held = {
            names(tokens, salt)[at]
            for tokens, salt, places in zip(self.sequences, self.salts, answer["held"], strict=True)
            for at in places
        }
        return held, answer["blocks"]


def names(tokens: list[int], salt: str = "") -> memoryview:
    return sequence_hashes(pack_tokens(tokens), BLOCK_TOKENS, salted(salt))


def until(true: Callable[[], bool]) -> bool:
    """Events come soon after they happened: whether it comes true in time."""
    waiting = threading.Event()
    end = time.monotonic() + SETTLE_S
    while not (came := true()) and time.monotonic() < end:
        waiting.wait(0.02)
    return came


def assert_exact(engine: Engine, follower: Follower) -> None:
    """Every block of the pool, and none besides, in the index."""
    held, blocks = engine.truth()
    assert len(held) == blocks, "the pool has blocks that nobody asked for"
    every = {
        name
        for tokens, salt in zip(engine.sequences, engine.salts, strict=True)
        for name in names(tokens, salt)
    }

    def exact() -> bool:
        there = {name for name in every if follower.holds(memoryview(name.to_bytes(8, "little")))}
        return there == held and follower.index.entries == blocks and follower.current()

    assert until(exact), (follower.index.entries, blocks, follower.feed.counts, follower.following.trouble)
    follower.index.check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("events")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build(folder / "model")


def start(model: Path, folder: Path) -> EngineProcess:
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"ipc://{folder}/events",
        "replay_endpoint": f"ipc://{folder}/replay",
    }
    changes = {"kv_events_config": events, "kv_cache_memory_bytes": POOL_BYTES}
    arguments = [str(model), json.dumps(None), json.dumps(changes)]
    return start_engine("tests.engines.vllm_process", arguments, folder / "engine.log")


@pytest.fixture(scope="module")
def follower(folder: Path) -> Iterator[Follower]:
    with Follower(f"ipc://{folder}/events", f"ipc://{folder}/replay") as following:
        yield following


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, follower: Follower) -> Iterator[Engine]:
    with start(model, folder) as process:
        yield Engine(process)


def prompts(count: int, seed: int) -> list[list[int]]:
    """They share beginnings, and are of lengths that are no whole number of blocks."""
    draw = random.Random(seed)
    families = [prompt(600, seed=family) for family in range(3)]
    made = []
    for number in range(count):
        shared = draw.choice(families)[: draw.randrange(100, 500)]
        made.append(shared + prompt(draw.randrange(20, 200), seed=1_000 * seed + number))
    return made


def test_every_block_that_the_scheduler_has_is_in_the_index_and_no_other(
    engine: Engine, follower: Follower
) -> None:
    for prompt_tokens in prompts(12, seed=1):
        engine.generate([prompt_tokens])
    assert_exact(engine, follower)
    assert follower.feed.counts["removed_blocks"] > 0, "nothing was evicted"


def test_equal_prompts_at_once_and_salts_are_followed_too(engine: Engine, follower: Follower) -> None:
    """Both of two equal prompts have blocks of their own, which go one after the other."""
    for number, prompt_tokens in enumerate(prompts(6, seed=2)):
        engine.generate([prompt_tokens, prompt_tokens, prompt_tokens[:150]], salt=("", "s")[number % 2])
        assert_exact(engine, follower)
    assert follower.feed.counts["unknown_removed"] == follower.feed.counts["unnamed_blocks"] == 0


def test_what_the_index_says_of_a_prompt_is_what_vllm_then_finds(engine: Engine, follower: Follower) -> None:
    """One token at least is always computed."""
    hits = 0
    for number, prompt_tokens in enumerate(prompts(12, seed=1) + prompts(6, seed=3)):
        salt = "s" if number % 4 == 0 else ""
        assert_exact(engine, follower)
        expected = min(follower.blocks(prompt_tokens, salt), (len(prompt_tokens) - 1) // BLOCK_TOKENS)
        assert engine.generate([prompt_tokens], salt) == [expected * BLOCK_TOKENS]
        hits += expected
    assert hits > 0


def test_a_router_that_comes_late_has_the_same(engine: Engine, folder: Path, follower: Follower) -> None:
    with Follower(f"ipc://{folder}/events", f"ipc://{folder}/replay") as late:
        assert_exact(engine, late)
        assert late.index.entries == follower.index.entries


def test_a_reset_cache_is_empty_after_the_next_step(engine: Engine, follower: Follower) -> None:
    assert engine.process.ask("reset") == {"done": True}
    engine.generate([prompt(100, seed=77)])
    assert_exact(engine, follower)
    assert 0 < follower.index.entries < 10


def test_the_first_event_after_a_kill_and_a_restart_suffices(
    engine: Engine, model: Path, folder: Path, follower: Follower
) -> None:
    """What the killed one had is gone, and what the new one has is right."""
    engine.generate(prompts(2, seed=1))
    assert_exact(engine, follower)
    incarnation = follower.feed.incarnation
    os.kill(engine.process.pid, signal.SIGKILL)
    assert until(lambda: not follower.current())
    with start(model, folder) as process:
        again = Engine(process)
        again.generate([prompt(100, seed=5)])
        assert_exact(again, follower)
        assert follower.feed.incarnation > incarnation
        assert follower.blocks(prompts(2, seed=1)[0]) == 0
        again.generate(prompts(2, seed=2))
        assert_exact(again, follower)
