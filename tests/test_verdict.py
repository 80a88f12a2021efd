"""The closing word of CI: a skipped or missing test is not a passed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

VERDICT = Path(__file__).parent.parent / ".ci" / "verdict.py"


def run(report: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return subprocess.run([sys.executable, VERDICT, report], capture_output=True, text=True, check=False)


def case(outcome: str = "") -> str:
    return f'<testcase classname="tests.a" name="test_a">{outcome}</testcase>'


def test_all_passed(tmp_path: Path) -> None:
    done = run(tmp_path / "test.xml", case(), case())
    assert (done.returncode, done.stdout) == (0, "2 passed, 0 failed, 0 skipped\n")


@pytest.mark.parametrize(
    "outcome", ["<failure/>", "<error/>", '<skipped message="no engine"/>', '<skipped message="xfail"/>']
)
def test_anything_else_fails(tmp_path: Path, outcome: str) -> None:
    done = run(tmp_path / "test.xml", case(), case(outcome))
    assert done.returncode == 1
    assert done.stdout.endswith("1 passed, 1 failed, 0 skipped\n")


def test_a_machine_is_an_excuse_but_not_for_an_engine(tmp_path: Path) -> None:
    excused = case('<skipped message="Skipped: not on this machine: huge pages"/>')
    assert run(tmp_path / "test.xml", case(), excused).stdout == "1 passed, 0 failed, 1 skipped\n"
    assert run(tmp_path / "test-engines.xml", case(), excused).returncode == 1


def test_no_test_is_a_failure(tmp_path: Path) -> None:
    assert run(tmp_path / "test.xml").returncode == 1
    assert subprocess.run([sys.executable, VERDICT], capture_output=True, check=False).returncode == 1
    absent = [sys.executable, VERDICT, tmp_path / "absent.xml"]
    assert subprocess.run(absent, capture_output=True, check=False).returncode == 1
