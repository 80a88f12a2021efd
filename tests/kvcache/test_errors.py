"""The error family: what it says, and that the page in docs explains every code and no other."""

from __future__ import annotations

import ast
import copy
import re
import socket
from pathlib import Path

import pytest

from kvcache.errors import CODES, BadInput, KVCacheError, NotAllowed, Unavailable, plainly

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "errors.md"
ERRORS = {"KVCacheError", "BadInput", "NotAllowed", "Unavailable"}


def sections() -> list[tuple[str, str, str]]:
    """(code, meaning, explanation) of each section of the page."""
    found = re.findall(r"^### (.+)\n\n\*(.+)\*\n\n((?:.+\n|\n(?!#))*)", PAGE.read_text(), re.MULTILINE)
    return [(code, meaning, text.strip()) for code, meaning, text in found]


def raised_codes() -> set[str]:
    """The code of every error that our sources make with a literal."""
    codes = set()
    for folder in ("kvcache", "client", "server", "eviction"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                    codes |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {code for code in codes if isinstance(code, str)}


class TestThePage:
    def test_explains_every_code_and_no_other(self) -> None:
        assert sorted(code for code, _, _ in sections()) == sorted(CODES)

    def test_says_what_the_code_says(self) -> None:
        assert {code: meaning for code, meaning, _ in sections()} == CODES

    def test_says_more_than_the_code_does(self) -> None:
        assert [code for code, _, text in sections() if len(text) < 80] == []

    def test_no_section_is_missed_by_this_test(self) -> None:
        assert PAGE.read_text().count("\n### ") == len(sections())


class TestCodes:
    def test_every_code_that_is_raised_is_declared(self) -> None:
        assert raised_codes() <= set(CODES)

    def test_codes_can_be_labels(self) -> None:
        assert [code for code in CODES if not re.fullmatch(r"[a-z]+(_[a-z]+)*", code)] == []

    def test_meanings_are_short_and_different(self) -> None:
        assert len(set(CODES.values())) == len(CODES)
        assert all(0 < len(meaning) < 90 and meaning.isprintable() for meaning in CODES.values())


class TestErrors:
    @pytest.mark.parametrize("kind", [BadInput, NotAllowed, Unavailable])
    def test_is_one_family(self, kind: type[KVCacheError]) -> None:
        error = kind("bad_block", "a block of 3 bytes", "blocks have 4", "send whole blocks")
        assert isinstance(error, KVCacheError)
        assert (error.code, error.what, error.why, error.todo) == error.args
        assert str(error) == "a block of 3 bytes [bad_block]; why: blocks have 4; to do: send whole blocks"

    def test_what_is_not_known_is_not_said(self) -> None:
        assert str(BadInput("bad_block", "a block")) == "a block [bad_block]"
        assert str(BadInput("bad_block", "a block", todo="x")) == "a block [bad_block]; to do: x"

    def test_a_copy_is_whole(self) -> None:
        error = NotAllowed("not_allowed", "a", "b", "c")
        again = copy.copy(error)
        assert (type(again), again.args, str(again)) == (NotAllowed, error.args, str(error))

    def test_a_code_must_be_declared(self) -> None:
        with pytest.raises(AssertionError):
            BadInput("no_such_code", "x")

    def test_the_kinds_are_apart(self) -> None:
        assert not issubclass(NotAllowed, BadInput)
        assert not issubclass(Unavailable, BadInput)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "anything", "/x"), "No such file or directory: /x"),
        (
            OSError(98, "error while attempting to bind on address ('::1', 1): in use"),
            "Address already in use",
        ),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("line 1"), "line 1"),
    ],
)
def test_what_the_system_says_is_said_in_words(error: Exception, said: str) -> None:
    assert plainly(error) == said
