"""``kvcache demo --engine``: two real vLLM processes, and what the second need not compute.

    demo ──starts──► node (kvcache serve) ◄──── engine A (kvcache.demo_engine_worker): computes, saves, leaves
      └─────────────────── JSON lines ────────► engine B, a new process: loads, computes the rest

The prompts are what a service sees: one long system prompt, and behind it questions. A answers some of
them. B answers those and new ones three times: each under a cache salt of its own, so that nothing is
found anywhere (the reference); from the node, with the engine's own cache emptied before each; and again
with the node killed. A token that differs is the one thing that must not be.

What came from kvcache is read off the connector's counter of blocks that were loaded and verified, not off
what the scheduler promised. The sum: the prefill of 1,000 tokens is some 50 GFLOP, a second of one core;
their KV is 16 MB, some milliseconds.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvcache.clock import NS_PER_S
from kvcache.demo_engine_worker import BLOCK_TOKENS, DEMO_KV_BYTES_A_TOKEN, prompt
from kvcache.errors import Unavailable
from kvcache.testing.engines import EngineProcess
from kvcache.testing.processes import NodeProcess

if TYPE_CHECKING:
    from kvcache.demo import Teller

WORKER = "kvcache.demo_engine_worker"
NEEDED = ("torch", "transformers", "vllm")
CAPACITY = "256MiB"
SYSTEM_TOKENS = 1_000
QUESTION_TOKENS = (40, 75, 120)
NEW_QUESTION_TOKENS = (60, 100)
ANSWER_TOKENS = 8
WARMUP_TOKENS = 1_100
ENGINE_ARGUMENTS = {"max_num_batched_tokens": 2048, "kv_cache_memory_bytes": 128 << 20}
CONNECTOR = {"lookup_timeout_ms": 5_000, "move_timeout_ms": 30_000, "load_wait_ms": 30_000}
"""More patience than an engine in service has: the demo's machine may have two cores, and both busy."""
LOADED = "vllm:kvcache_loaded_blocks"
COLUMNS = "  {:<16}{:>8}{:>14}{:>14}{:>14}{:>10}   {}"
NEXT = """\
How to go on:
  kvcache serve --capacity 8GiB       a node for the engines on this host
  README.md, "An engine"              the line that connects your vLLM to it
  kvcache demo                        many clients and a trace, without an engine"""


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt: the system prompt and a question."""

    name: str
    tokens: list[int]
    new: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine said to it, how long its first token took, and how much of it came from the node."""

    tokens: list[int]
    first_s: float
    hit_tokens: int


@dataclass(slots=True)
class Report:
    """Answers in the order of the questions."""

    questions: Sequence[Question]
    earlier: list[Answer] = field(default_factory=list)
    cold: list[Answer] = field(default_factory=list)
    warm: list[Answer] = field(default_factory=list)
    alone: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(len(question.tokens) for question in self.questions)

    @property
    def hit_tokens(self) -> int:
        return sum(answer.hit_tokens for answer in self.warm)

    @property
    def wrong_tokens(self) -> int:
        """Over all answers, of A, of B from the node, and of B without it."""
        return sum(
            wrong_tokens(answer, cold)
            for answers in (self.earlier, self.warm, self.alone)
            for answer, cold in zip(answers, self.cold, strict=False)  # A was asked only the first ones.
        )

    @property
    def exit_status(self) -> int:
        """The first hit is A's work: what comes after it may be what B saved itself."""
        return 1 if self.wrong_tokens or not self.warm[0].hit_tokens else 0


def wrong_tokens(answer: Answer, reference: Answer) -> int:
    """Positions that differ, and those that one of them lacks."""
    same = sum(a == b for a, b in zip(answer.tokens, reference.tokens, strict=False))
    return max(len(answer.tokens), len(reference.tokens)) - same


def questions() -> list[Question]:
    system = prompt(SYSTEM_TOKENS, seed=0)
    lengths = [(tokens, False) for tokens in QUESTION_TOKENS] + [
        (tokens, True) for tokens in NEW_QUESTION_TOKENS
    ]
    return [
        Question(f"question {number}{' (new)' if new else ''}", system + prompt(tokens, seed=number), new)
        for number, (tokens, new) in enumerate(lengths, 1)
    ]


class Engine:
    """One engine process, as the demo talks to it: a prompt at a time."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process

    def answer(self, question: Question, salt: str = "") -> Answer:
        """RAISES Unavailable when the engine is gone."""
        before = self._loaded_blocks()
        got = self._process.ask("generate", prompts=[question.tokens], salt=salt, tokens=ANSWER_TOKENS)
        loaded = self._loaded_blocks() - before
        return Answer(got["tokens"][0], got["seconds"][0], loaded * BLOCK_TOKENS)

    def answer_afresh(self, question: Question) -> Answer:
        """With nothing in the engine's own cache. RAISES Unavailable when the engine is gone."""
        if not self._process.ask("reset")["done"]:
            raise Unavailable(
                "unavailable", "the engine did not empty its cache", "it is still saving blocks"
            )
        return self.answer(question)

    def warm_up(self) -> None:
        """Once through both paths, so that no question pays for what happens once in a process."""
        other = Question("", prompt(WARMUP_TOKENS, seed=99), new=True)
        self.answer(other)
        self.answer_afresh(other)

    def _loaded_blocks(self) -> int:
        return int(self._process.ask("metrics").get(LOADED, 0))


class EngineDemo:
    """One run. REQUIRES: ``missing()`` is empty."""

    def __init__(self, tell: Teller) -> None:
        self._tell = tell
        self._started_ns = time.monotonic_ns()
        self._report = Report(questions())

    def run(self) -> Report:
        """RAISES Unavailable when the node or an engine does not do its part. No process is left behind."""
        with ExitStack() as ends:
            ends.callback(self._tell.clear)
            home = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kvcache-demo-")))
            settings = {"socket": str(home / "node.sock"), "capacity": CAPACITY, "http": "none"}
            node = ends.enter_context(NodeProcess(settings, home / "node.log"))
            self._tell.line(self._opening(node))
            self._fill(home, node)
            self._reuse(home, node)
        self._report.seconds = self._elapsed_s
        return self._report

    def _fill(self, home: Path, node: NodeProcess) -> None:
        report = self._report
        old = [question for question in report.questions if not question.new]
        self._tell.progress("  engine A makes the model and gets ready")
        with self._engine("A", home, node) as (engine, process):
            report.earlier = [engine.answer(question) for question in old]
            computed = sum(len(question.tokens) for question in old)
            self._happened(
                f"engine A (process {process.pid}) answers questions 1 to {len(old)}: {computed:,} tokens"
            )
            if process.close():
                raise Unavailable("unavailable", "engine A did not leave in order", _log_end(home, "A"))
        self._happened("engine A has left, and its memory with it")

    def _reuse(self, home: Path, node: NodeProcess) -> None:
        report = self._report
        self._tell.progress("  engine B gets ready")
        with self._engine("B", home, node) as (engine, process):
            self._happened(f"engine B (process {process.pid}), a new one, has computed nothing yet")
            engine.warm_up()
            for question in report.questions:
                report.cold.append(engine.answer(question, salt=f"cold {question.name}"))
                self._tell.progress(f"  engine B computes {question.name}: what the node must not change")
            report.warm = [engine.answer_afresh(question) for question in report.questions]
            self._tell.line(table(report, report.warm))
            pid = node.pid
            node.kill()
            self._happened(f"the node is killed (SIGKILL to process {pid}); engine B goes on alone")
            report.alone = [engine.answer_afresh(question) for question in report.questions]
            self._tell.line(table(report, report.alone))

    @contextmanager
    def _engine(self, name: str, home: Path, node: NodeProcess) -> Iterator[tuple[Engine, EngineProcess]]:
        extra = {"address": node.socket, **CONNECTOR}
        arguments = [str(home / "model"), json.dumps(extra), json.dumps(ENGINE_ARGUMENTS)]
        with EngineProcess(WORKER, arguments, home / f"{name}.log") as process:
            process.wait_ready()
            yield Engine(process), process

    # --- words ----------------------------------------------------------------------------------

    @property
    def _elapsed_s(self) -> float:
        return (time.monotonic_ns() - self._started_ns) / NS_PER_S

    def _happened(self, text: str) -> None:
        self._tell.line(f"  {self._elapsed_s:5.1f} s  {text}")

    def _opening(self, node: NodeProcess) -> str:
        count = len(self._report.questions)
        return "\n".join(
            [
                f"model      24 M random weights, made on the spot; {DEMO_KV_BYTES_A_TOKEN:,} bytes a token",
                f"node       {CAPACITY} of host memory, process {node.pid}, {node.socket}",
                f"prompts    one system prompt of {SYSTEM_TOKENS:,} tokens, and {count} questions behind it",
                "",
            ]
        )


def table(report: Report, answers: Sequence[Answer]) -> str:
    """A line a question: what came from the node, how long the first token took, and whether it is right."""
    lines = [
        "",
        COLUMNS.format("", "prompt", "tokens from", "first token", "first token", "", "same tokens"),
        COLUMNS.format("", "tokens", "kvcache", "cold", "here", "faster", "as cold"),
    ]
    for question, answer, cold in zip(report.questions, answers, report.cold, strict=True):
        lines.append(
            COLUMNS.format(
                question.name,
                f"{len(question.tokens):,}",
                f"{answer.hit_tokens:,}",
                f"{cold.first_s * 1e3:,.0f} ms",
                f"{answer.first_s * 1e3:,.0f} ms",
                f"{cold.first_s / answer.first_s:.1f} x" if answer.hit_tokens else "",
                "NO" if wrong_tokens(answer, cold) else "yes",
            )
        )
    return "\n".join([*lines, ""])


def as_json(report: Report) -> dict[str, object]:
    """``requests``, ``prompt_tokens``, ``hit_tokens`` are of the answers from the node; times are medians."""
    return {
        "requests": len(report.warm),
        "prompt_tokens": report.prompt_tokens,
        "hit_tokens": report.hit_tokens,
        "wrong_tokens": report.wrong_tokens,
        "seconds": round(report.seconds, 3),
        "ttft_cold_s": round(_median_s(report.cold), 4),
        "ttft_warm_s": round(_median_s(report.warm), 4),
        "node_kills": 1,
        "requests_without_node": len(report.alone),
        "hit_tokens_without_node": sum(answer.hit_tokens for answer in report.alone),
    }


def summary(report: Report) -> str:
    """The whole result for a person."""
    cold_s, warm_s = _median_s(report.cold), _median_s(report.warm)
    compared = sum(len(answer.tokens) for answer in (*report.earlier, *report.warm, *report.alone))
    wrong = f"0 (of {compared}, with the node and without it)"
    if report.wrong_tokens:
        wrong = f"{report.wrong_tokens} of {compared}. This must never be: please report it."
    share = report.hit_tokens / report.prompt_tokens
    return "\n".join(
        [
            f"  hit tokens    {report.hit_tokens:,} of {report.prompt_tokens:,} ({share:.1%}), "
            "loaded instead of computed",
            f"  first token   {cold_s * 1e3:,.0f} ms cold, {warm_s * 1e3:,.0f} ms warm (medians)",
            f"  wrong tokens  {wrong}",
            f"  all of it     {report.seconds:.0f} s",
            "",
            NEXT,
        ]
    )


def missing() -> list[str]:
    """What an engine needs and this Python has not."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def run(tell: Teller, as_json_only: bool) -> int:
    """The command. Returns its exit status. RAISES ClickException where there is no vLLM."""
    if names := missing():
        raise click.ClickException(
            f"kvcache demo --engine needs {', '.join(names)}, which this Python has not: `make demo-engine` "
            "installs all of it in .venv-engines (2 GB) and runs the demo"
        )
    report = EngineDemo(tell).run()
    click.echo(json.dumps(as_json(report)) if as_json_only else summary(report))
    return report.exit_status


def _median_s(answers: Sequence[Answer]) -> float:
    return statistics.median(answer.first_s for answer in answers)


def _log_end(home: Path, name: str) -> str:
    return (home / f"{name}.log").read_text(errors="replace")[-1_000:]
