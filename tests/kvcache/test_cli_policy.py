"""``kvcache policy``: ours pass the check, and each kind of fault is found and named."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from click.testing import CliRunner

from kvcache.cli_policy import check, find, findings, list_policies, show
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.eviction.registry import POLICIES
from kvcache.policy import RequestContext, TreeView


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(check, arguments)
    return result.exit_code, result.output


@pytest.mark.slow
@pytest.mark.parametrize("name", [*POLICIES, "leaf-hazard+keep"])
def test_ours_pass(name: str) -> None:
    code, output = run(name, "--request-us", "100000")
    assert code == 0, output
    assert "never replaced" in output
    assert "WRONG" not in output


class Wrong(LeafLru):
    """Names parents first."""

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return list(super().victims(context, count))[::-1]


class Failing(LeafLru):
    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        raise RuntimeError("no")


class Moody(LeafLru):
    """Not the same twice."""

    calls = 0

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        Moody.calls += 1
        return count if Moody.calls < 3_000 else count // 2


class Leaving(LeafLru):
    """Ends the process, and well."""

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        raise SystemExit(0)


class Meddling(LeafLru):
    """Reckons in the tree itself."""

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        named = super().victims(context, count)
        for block in named:
            self._tree.children[block] -= 1  # type: ignore[index]
        return named

    def __init__(self, tree: TreeView, capacity_bytes: int) -> None:
        super().__init__(tree, capacity_bytes)
        self._tree = tree


class Idle:
    """The short form, without an answer."""

    def score(self, block: int, meta: object, now: float) -> float:
        return 1 / 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (Wrong, "children go before parents in one call"),
        (Failing, "requests may find anything or nothing"),
        (Leaving, "requests may find anything or nothing"),
        (Meddling, "the tree is only read"),
        (Moody, "the same requests, the same answers"),
        (find(f"{__name__}:Idle"), "children go before parents in one call"),
    ],
)
def test_faults_are_found(made: type[LeafLru], fault: str) -> None:
    wrong = [finding.name for finding in findings(made, 1e6) if finding.fault]
    assert any(name.endswith(fault) for name in wrong), wrong


@pytest.mark.slow
def test_what_takes_too_long_is_refused() -> None:
    code, output = run("leaf-lru", "--request-us", "0.1", "--json")
    assert code == 1
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines if line["fault"]] == [
        "at 2% of the blocks: its speed",
        "at 10% of the blocks: its speed",
    ]


def test_lists_are_for_scripts_too() -> None:
    listed = json.loads(CliRunner().invoke(list_policies, ["--json"]).output)
    assert set(POLICIES) <= set(listed["policies"])
    assert "keep" in listed["around"]
    for text in listed["policies"].values():
        assert text.endswith("."), f"cut off: {text}"
        assert "`" not in text
    shown = json.loads(CliRunner().invoke(show, ["leaf-hazard", "--json"]).output)
    assert shown["settings"]["samples"]["default"] == 8
    assert json.loads(CliRunner().invoke(show, ["leaf-lru", "--json"]).output)["settings"] == {}
    assert "no settings" in CliRunner().invoke(show, ["leaf-lru"]).output


def test_names_and_settings_are_listed() -> None:
    listed = CliRunner().invoke(list_policies).output
    assert all(name in listed for name in POLICIES)
    assert "keep" in listed
    shown = CliRunner().invoke(show, ["leaf-hazard+keep"]).output
    assert "decline" in shown
    assert "tool_call_ms" in shown
