"""Weights: their ranges, and their table in a file."""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields

import pytest

from kvcache.errors import BadInput
from kvcache.routing.weights import RANGES, Weights


def test_every_number_has_a_range_that_its_default_is_in() -> None:
    assert {each.name for each in fields(Weights)} == {"form", *RANGES}
    Weights()


@pytest.mark.parametrize("name", sorted(RANGES))
def test_what_is_out_of_range_or_no_number_is_refused_by_its_name(name: str) -> None:
    low, high = RANGES[name]
    for value in (low - 1, high + 1, math.nan, math.inf, True, "1", None):
        with pytest.raises(BadInput, match=name) as caught:
            Weights(**{name: value})  # type: ignore[arg-type]  # That is what is tried.
        assert caught.value.code == "bad_config"


def test_a_table_of_a_file_changes_what_it_names() -> None:
    table = tomllib.loads('form = "multiplicative"\nload_host = 0.2\nchoices = 2\nprefill = 2')
    weights = Weights.from_table(table)
    assert (weights.form, weights.load_host, weights.choices) == ("multiplicative", 0.2, 2)
    assert weights.running == Weights().running


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"load_hosts": 1}, "did you mean 'load_host'"),
        ({"form": "square"}, "linear, multiplicative"),
        ({"choices": 2.5}, "whole number"),
        ({"age_ms_free": 5_000, "age_ms_max": 5_000}, "more than age_ms_free"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_in_plain_words(table: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Weights.from_table(table)
