"""Sizes as operators write them."""

from __future__ import annotations

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.simulate.capacity import parse_capacities, parse_capacity
from kvcache.eviction.simulate.models import model_named
from kvcache.eviction.traces.generate import Workload, generate

TRACE = generate(Workload(request_count=20))
MODEL = model_named("llama-3.1-8b")
BLOCK_BYTES = 16 * MODEL.token_bytes


def test_every_form() -> None:
    assert parse_capacity("10%", TRACE, None).blocks == TRACE.block_count // 10
    assert parse_capacity("0.5%", TRACE, None).blocks == TRACE.block_count // 200
    assert parse_capacity("70", TRACE, None).blocks == 70
    assert parse_capacity("1GiB", TRACE, MODEL).blocks == (1 << 30) // BLOCK_BYTES
    assert parse_capacity("1.5 GiB", TRACE, MODEL).blocks == (3 << 29) // BLOCK_BYTES
    assert [size.text for size in parse_capacities(" 1%, 3% ,70", TRACE, None)] == ["1%", "3%", "70"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no size"),
        (",", "no size"),
        ("large", "no size"),
        ("-3%", "no size"),
        ("1e3", "no size"),
        ("1/2", "no size"),
        ("2.5", "part of a block"),
        ("4GiB", "depends on the model"),
        ("0", "one block is the least"),
        ("0.0001%", "less than one"),
        ("999999999999999%", "no size"),
        ("999999999999%", "blocks"),
    ],
)
def test_what_is_no_size(text: str, why: str) -> None:
    with pytest.raises(BadInput) as raised:
        parse_capacities(text, TRACE, None)
    assert why in raised.value.why


def test_less_than_a_block_of_the_model() -> None:
    with pytest.raises(BadInput) as raised:
        parse_capacity("1KiB", TRACE, MODEL)
    assert raised.value.code == "too_small"
    assert f"{BLOCK_BYTES:,}" in raised.value.why
    with pytest.raises(BadInput):
        parse_capacity("3Pigs", TRACE, MODEL)
