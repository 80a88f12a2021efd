"""Amounts as people read them."""

from __future__ import annotations

import pytest

from kvcache.eviction.amounts import gib_text, number_text


@pytest.mark.parametrize(
    ("gib", "text"),
    [(0.0156, "0.016 GiB"), (2.26, "2.3 GiB"), (10.4, "10 GiB"), (1_564.5, "1,564 GiB"), (15_645, "15 TiB")],
)
def test_amounts(gib: float, text: str) -> None:
    assert gib_text(gib * (1 << 30)) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (0.214, "0.21"), (3.5, "3.5"), (1_140, "1,140")])
def test_numbers(value: float, text: str) -> None:
    assert number_text(value) == text
