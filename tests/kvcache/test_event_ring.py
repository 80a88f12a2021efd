"""The last batches: exactly those behind a number, or the word that they are gone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.event_ring import Ring, Told
from kvcache.wire import EventBatch, packed


def batch(seq: int) -> bytes:
    return packed(EventBatch("node", 1, seq, False, []))


def test_nothing_was_told_yet() -> None:
    ring = Ring()
    assert ring.behind(0) == []
    assert ring.behind(1) is None, "of another life"


def test_what_is_behind_a_batch_comes_in_order() -> None:
    ring = Ring()
    for seq in range(1, 6):
        ring.add(seq, batch(seq))
    assert ring.behind(0) == [batch(seq) for seq in range(1, 6)]
    assert ring.behind(3) == [batch(4), batch(5)]
    assert ring.behind(5) == []
    assert ring.behind(6) is None


def test_a_batch_that_was_left_out_is_our_own_fault() -> None:
    ring = Ring()
    ring.add(1, b"")
    with pytest.raises(AssertionError):
        ring.add(3, b"")


def test_a_batch_larger_than_all_is_kept_alone() -> None:
    ring = Ring(bytes_max=500)
    for seq, size in enumerate([100, 100, 1_000], 1):
        ring.add(seq, bytes(size))
    assert ring.behind(2) == [bytes(1_000)] and ring.behind(1) is None
    ring.check()
    ring.add(4, bytes(10))
    assert len(ring) == 1
    ring.check()


@given(st.lists(st.integers(0, 400), max_size=60), st.integers(0, 2_000), st.integers(1, 20))
def test_it_keeps_as_much_as_it_may(sizes: list[int], bytes_max: int, batches_max: int) -> None:
    ring, all_told = Ring(bytes_max, batches_max), [bytes(size) for size in sizes]
    for seq, told in enumerate(all_told, 1):
        ring.add(seq, told)
        ring.check()
        assert ring.behind(seq - 1) == [told]
        first = seq - len(ring)
        assert ring.behind(first) == all_told[first:seq]
        assert first == 0 or ring.behind(first - 1) is None
        dropped = all_told[first - 1 : seq]
        assert (
            first == 0 or len(dropped) > batches_max or sum(map(len, dropped)) + 64 * len(dropped) > bytes_max
        )


def test_a_batch_is_packed_once_and_read_back_where_somebody_asks() -> None:
    whole = EventBatch("node", 1, 2, False, [], beat=True)
    told = Told(whole)
    assert told.packed is told.packed == packed(whole)
    assert Told(packed=told.packed).batch == whole
