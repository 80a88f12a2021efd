"""Event batches are decoded straight into their types, within the same limits as everything else."""

from __future__ import annotations

import tracemalloc

import msgpack
import msgspec
import pytest

from kvcache import wire
from kvcache.errors import BadInput
from kvcache.wire_events import run_lengths

EVENT = wire.BlockEvent("stored", b"n" * 16, "host", b"p" * 8, b"h" * 32, b"\x01\x00")
BATCH = wire.EventBatch(
    "node",
    1 << 62,
    7,
    False,
    [EVENT],
    namespaces=[{"model": "m", "block_tokens": 16}],
    digests={"host": b"d" * 24},
    load={"free_bytes": 1.5, "leases": 2.0},
)


def plain(**fields: object) -> dict[str, object]:
    made = msgspec.to_builtins(BATCH, builtin_types=(bytes,))
    assert isinstance(made, dict)
    return {**made, **fields}


def body(message: object) -> bytes:
    packed = msgpack.packb([7, message], use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def test_both_ways_of_packing_write_the_same() -> None:
    assert wire.encode(7, BATCH) == wire.frame(7, wire.packed(BATCH))
    assert wire.encode(7, BATCH)[wire.HEADER.size :] == body(plain())


@pytest.mark.parametrize("call", [0, 127, 128, 1 << 16, 1 << 32, (1 << 64) - 1])
def test_a_batch_is_read_whatever_its_number(call: int) -> None:
    assert wire.decode_reply(wire.encode(call, BATCH)[wire.HEADER.size :]) == (call, BATCH)


def test_a_batch_in_another_order_is_read_all_the_same() -> None:
    fields = plain()
    fields["type"] = fields.pop("type")
    assert list(fields)[-1] == "type"
    assert wire.decode_reply(body(fields)) == (7, BATCH)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("events", [{}] * 65_537),
        ("events", [None] * (wire.BODY_BYTES_MAX - 1_000)),
        ("namespaces", [{}] * 4_097),
        ("namespaces", [{}] * (wire.BODY_BYTES_MAX - 1_000)),
        ("load", {str(number): 0.0 for number in range(4_097)}),
        ("digests", {str(number): b"" for number in range(4_097)}),
        ("source", "x" * 4_097),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_more_than_a_batch_may_hold_is_refused_at_little_cost(name: str, wrong: object) -> None:
    packed = body(plain(**{name: wrong}))
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=name):
            wire.decode_reply(packed)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_the_last_length_holds_for_all_behind_it() -> None:
    assert run_lengths(event(5, 1, 2)) == lengths(1, 2, 2)
    assert run_lengths(event(4, 1)) == lengths(1, 1, 1, 1)
    assert run_lengths(event(3, 1, 2)) == lengths(1, 2)


def test_lengths_that_do_not_fit_are_not_made_to() -> None:
    assert run_lengths(event(6, 1, 2)) == lengths(1, 2, 2), "and the index refuses it"
    assert run_lengths(event(2, 1, 2)) == lengths(1, 2)
    assert run_lengths(event(3, 1, 0)) == lengths(1, 0)


def event(count: int, *runs: int) -> wire.BlockEvent:
    return wire.BlockEvent("stored", b"n" * 16, "host", b"", bytes(8 * count), lengths(*runs))


def lengths(*runs: int) -> bytes:
    return b"".join(length.to_bytes(2, "little") for length in runs)
