"""What is learned of blocks that fall: classes that come back are written, and no more than may be."""

from __future__ import annotations

from kvcache.eviction.admission_learned import LearnedAdmission

TOUCHES = [1] * 100_000


def taught(share: float, capacity: int = 10**9, delay: int = 0) -> LearnedAdmission:
    """Blocks behind 3 found ones come back; those of long first prompts do not."""
    learned = LearnedAdmission(100_000, share, capacity)
    for at in range(0, 20_000, 10):
        turn, first = range(at, at + 2), range(at + 2, at + 10)
        learned.computed(turn, 3)
        learned.computed(first, 0)
        learned.fell(turn, TOUCHES)
        learned.fell(first, TOUCHES)
        learned.wrote(delay)
        learned.wanted(turn)
    return learned


def taken(learned: LearnedAdmission, found: int, count: int) -> float:
    """Of 300 branches of this kind, the share of blocks that would be written."""
    total = 0
    for at in range(50_000, 50_000 + 300 * count, count):
        branch = range(at, at + count)
        learned.computed(branch, found)
        total += learned.fell(branch, TOUCHES)
    return total / (300 * count)


def test_what_comes_back_is_written_first() -> None:
    assert taken(taught(0.2), 3, 2) > 0.95
    assert taken(taught(0.15), 0, 8) < 0.05


def test_the_border_class_is_written_in_part_and_by_whole_branches() -> None:
    """A fifth goes to the turns; of the other four fifths, half are left."""
    assert 0.35 < taken(taught(0.6), 0, 8) < 0.6
    learned = taught(0.6)
    for at in range(50_000, 50_800, 8):
        learned.computed(range(at, at + 8), 0)
        assert learned.fell(range(at, at + 8), TOUCHES) in (0, 8)


def test_what_comes_back_too_late_does_not_count() -> None:
    in_time, too_late = taught(0.2, capacity=5, delay=5), taught(0.2, capacity=5, delay=6)
    assert taken(in_time, 3, 2) > 0.95
    assert taken(too_late, 0, 8) > 0


def test_before_anything_is_known_all_is_written() -> None:
    learned = LearnedAdmission(100, 0.3, 10)
    assert learned.fell(range(10), TOUCHES) == 10
