"""The demo with engines counts right, and says in one line what it lacks. The run itself: tests/engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvcache import demo_engine
from kvcache.demo import demo
from kvcache.demo_engine import Answer, Report, as_json, questions, summary, table, wrong_tokens
from kvcache.errors import Unavailable
from kvcache.testing.engines import EngineProcess

RIGHT = Answer([5, 6, 7], first_s=0.4, hit_tokens=0)
HIT = Answer([5, 6, 7], first_s=0.1, hit_tokens=992)
WRONG = Answer([5, 9, 7], first_s=0.1, hit_tokens=992)


def report(warm: Answer = HIT, earlier: Answer = RIGHT, alone: Answer = RIGHT) -> Report:
    asked = questions()
    every = len(asked)
    return Report(asked, [earlier] * 3, [RIGHT] * every, [warm] * every, [alone] * every, seconds=30.0)


def test_tokens_are_compared_one_by_one() -> None:
    assert wrong_tokens(HIT, RIGHT) == 0
    assert wrong_tokens(WRONG, RIGHT) == 1
    assert wrong_tokens(Answer([5, 6], 0.1, 0), RIGHT) == 1
    assert wrong_tokens(Answer([], 0.1, 0), RIGHT) == 3


def test_all_is_well_when_something_hit_and_nothing_differs() -> None:
    result = as_json(report())
    assert report().exit_status == 0
    assert result["hit_tokens"] == 5 * 992
    assert result["prompt_tokens"] == sum(len(question.tokens) for question in questions())
    assert (result["wrong_tokens"], result["ttft_cold_s"], result["ttft_warm_s"]) == (0, 0.4, 0.1)
    assert "wrong tokens  0 (of 39" in summary(report())


@pytest.mark.parametrize(
    ("bad", "wrong"),
    [(report(warm=WRONG), 5), (report(earlier=WRONG), 3), (report(alone=WRONG), 5), (report(warm=RIGHT), 0)],
)
def test_a_token_that_differs_anywhere_or_no_hit_is_a_failure(bad: Report, wrong: int) -> None:
    assert bad.exit_status == 1
    assert bad.wrong_tokens == wrong
    assert not wrong or "This must never be" in summary(bad)


def test_the_table_says_which_answer_differs() -> None:
    lines = table(report(), [HIT, WRONG, HIT, HIT, RIGHT]).splitlines()
    rows = [line for line in lines if line.startswith("  question")]
    assert [row.split()[-1] for row in rows] == ["yes", "NO", "yes", "yes", "yes"]
    assert "4.0 x" in rows[0]
    assert " x " not in rows[4]
    assert max(map(len, lines)) < 100


def test_questions_share_the_system_prompt_and_nothing_else() -> None:
    asked = questions()
    at = demo_engine.SYSTEM_TOKENS
    assert len({tuple(question.tokens[:at]) for question in asked}) == 1
    assert len({tuple(question.tokens[at : at + 8]) for question in asked}) == len(asked)
    assert {question.new for question in asked} == {False, True}


def test_a_python_without_an_engine_is_told_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_engine, "NEEDED", ("click", "no_such_engine"))
    done = CliRunner().invoke(demo, ["--engine"])
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith("Error: kvcache demo --engine needs no_such_engine, which this Python has not")
    assert "`make demo-engine`" in line


def test_options_of_the_other_demo_are_refused() -> None:
    done = CliRunner().invoke(demo, ["--engine", "--json", "--seconds", "3"])
    assert done.exit_code == click.UsageError.exit_code
    assert "it takes no --seconds" in done.output


@pytest.mark.slow
def test_importing_the_demo_imports_no_engine() -> None:
    script = "import sys, kvcache.demo_engine; print(*{'torch', 'vllm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_a_hit_on_what_the_second_engine_saved_itself_is_not_enough() -> None:
    only_own = report()
    only_own.warm[0] = RIGHT
    assert only_own.hit_tokens > 0
    assert only_own.exit_status == 1


@pytest.mark.slow
def test_an_engine_that_ends_early_is_reported_with_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(Unavailable, match=r"No module named kvcache\.no_such_worker"),
        EngineProcess("kvcache.no_such_worker", [], tmp_path / "log") as process,
    ):
        process.wait_ready()
