"""Hot is what is used often within a minute; the shared part of many prompts is found."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S
from kvcache.peers.heat import MARKS_MAX, WINDOW_NS, Heat, marks


def path(name: str, length: int, shared: int = 0) -> list[StorageKey]:
    names = [("all" if at < shared else name, at) for at in range(length)]
    return [StorageKey(repr(each).encode().ljust(32, b".")) for each in names]


@given(st.integers(0, 100_000))
def test_marks_are_few_rise_and_reach_the_end(length: int) -> None:
    found = list(marks(length))
    assert found == sorted(set(found))
    assert not length or (found[0] == 1 and found[-1] == length)
    assert len(found) <= 8 + 4 * max(0, length.bit_length() - 2) + 1
    assert all(after <= before * 1.25 + 1 for before, after in pairwise(found))


def test_a_prefix_is_hot_at_the_last_of_its_uses_and_told_once() -> None:
    counter = Heat(3)
    told = [counter.used(path("a", 10), at) for at in range(5)]
    assert told == [0, 0, 10, 0, 0]


def test_prompts_that_begin_alike_make_the_shared_part_hot() -> None:
    counter = Heat(4)
    told = [counter.used(path(f"p{number}", 40, shared=20), number) for number in range(4)]
    assert told == [0, 0, 0, 20]


def test_the_shared_part_is_found_to_a_quarter() -> None:
    for shared in (3, 17, 45, 100, 999):
        counter = Heat(2)
        counter.used(path("a", 2_000, shared), 0)
        assert shared * 0.75 <= counter.used(path("b", 2_000, shared), 1) <= shared


def test_uses_are_forgotten_after_a_minute() -> None:
    counter = Heat(3)
    assert [counter.used(path("a", 1), at * WINDOW_NS) for at in range(6)] == [0] * 6


def test_uses_in_the_window_before_count_by_their_share() -> None:
    counter = Heat(4)
    for _ in range(3):
        counter.used(path("a", 1), 0)
    assert counter.used(path("a", 1), WINDOW_NS + 30 * NS_PER_S) == 0  # 3 x 0.5 + 1
    counter = Heat(4)
    for _ in range(3):
        counter.used(path("a", 1), 0)
    assert counter.used(path("a", 1), WINDOW_NS) == 1  # 3 x 1.0 + 1


def test_what_is_counted_is_bounded() -> None:
    counter = Heat(2)
    for number in range(MARKS_MAX + 10):
        counter.used([StorageKey(number.to_bytes(32, "little"))], 0)
    assert len(counter._now) == MARKS_MAX
    assert counter.used([StorageKey((MARKS_MAX + 5).to_bytes(32, "little"))], 0) == 0
    assert counter.used([StorageKey((5).to_bytes(32, "little"))], 0) == 1
