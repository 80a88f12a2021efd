"""``kvcache tune advise``: what it prints, and what it says to wrong input."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from kvcache.errors import BadInput
from kvcache.eviction.commands.tune import tune
from kvcache.eviction.traces.trace import write_trace
from tests.eviction.test_advice import scans


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("advise") / "scans.npz"
    write_trace(path, scans(20, 30, 10))
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(tune, ["advise", *arguments], catch_exceptions=True)


def test_a_person_reads_what_to_change(trace: str) -> None:
    said = run(trace, "--capacity", "60", "--among", "leaf-lru,leaf-arc").output
    assert "Change the policy from leaf-lru to leaf-arc." in said
    assert "kvcache tune set --policy leaf-arc" in said
    assert "leaf-arc                 " in said and "advised" in said
    assert "2 settings were tried on 100.0% of the blocks." in said


def test_one_object(trace: str) -> None:
    result = run(
        trace, "--capacity", "60", "--among", "leaf-lru,leaf-arc", "--json", "--model", "llama-3.1-8b"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["change"], found["policy"], found["settings"]) == (True, "leaf-arc", {})
    assert found["gain"] == pytest.approx(found["named"]["second_part"] - found["now"]["second_part"])
    assert found["requests"] == 500 and found["first_requests"] == 250
    assert found["said"][0].startswith("Change the policy")
    assert found["optimum"] >= found["named"]["prefix_token_hit_ratio"]


@pytest.mark.slow
def test_with_nvme_writes_are_shown(trace: str) -> None:
    said = run(trace, "--capacity", "30", "--nvme", "60", "--among", "leaf-lru").output
    assert "writes a day" in said and "NVMe takes" in said


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--capacity", "0"), "too_small"),
        (("--capacity", "60", "--policy", "belady"), "bad_config"),
        (("--capacity", "60", "--policy", "leaf-lro"), "bad_config"),
        (("--capacity", "60", "--among", "arc"), "bad_config"),
        (("--capacity", "60", "--among", ","), "bad_config"),
        (("--capacity", "60", "--set", "depth=1"), "bad_config"),
        (("--capacity", "60", "--dwpd", "1"), "bad_config"),
        (("--capacity", "60", "--nvme", "600", "--dwpd", "nan"), "bad_config"),
        (("--capacity", "60", "--nvme", "600", "--dwpd", "inf"), "bad_config"),
        (("--capacity", "60", "--admit", "sometimes"), "bad_config"),
        (("--capacity", "60", "--split", "99"), "too_small"),
        (("--capacity", "60", "--split", "0"), "bad_config"),
        (("--capacity", "40GiB"), "bad_config"),
    ],
)
def test_wrong_input_is_refused(trace: str, arguments: tuple[str, ...], code: str) -> None:
    error = run(trace, *arguments).exception
    assert isinstance(error, BadInput) and error.code == code, error
