"""What is learned of blocks that fall: classes that come back are written, and no more than may be."""

from __future__ import annotations

from kvcache.tiers.admission_learned import LearnedAdmission


def once(_: int) -> int:
    return 1


def taught(share: float, capacity: int = 10**9, delay: int = 0) -> LearnedAdmission:
    """Blocks behind 3 found ones come back; those of long first prompts do not."""
    learned = LearnedAdmission(100_000, share, capacity)
    for at in range(0, 20_000, 10):
        turn, first = range(at, at + 2), range(at + 2, at + 10)
        learned.computed(turn, 3)
        learned.computed(first, 0)
        learned.fell(turn, once)
        learned.fell(first, once)
        learned.wrote(delay)
        learned.wanted(turn)
    return learned


def taken(learned: LearnedAdmission, found: int, count: int) -> float:
    """Of 300 branches of this kind, the share of blocks that would be written."""
    total = 0
    for at in range(50_000, 50_000 + 300 * count, count):
        branch = range(at, at + count)
        learned.computed(branch, found)
        total += learned.fell(branch, once)
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
        assert learned.fell(range(at, at + 8), once) in (0, 8)


def test_what_comes_back_too_late_does_not_count() -> None:
    in_time, too_late = taught(0.2, capacity=5, delay=5), taught(0.2, capacity=5, delay=6)
    assert taken(in_time, 3, 2) > 0.95
    assert taken(too_late, 0, 8) > 0


def test_before_anything_is_known_all_is_written() -> None:
    learned = LearnedAdmission(100, 0.3, 10)
    assert learned.fell(range(10), once) == 10


def test_to_ask_again_counts_for_nothing() -> None:
    asked_once, asked_often = taught(0.2), taught(0.2)
    for _ in range(2_000):
        asked_often.fell(range(99_000, 99_010), once)
    asked_once.fell(range(99_000, 99_010), once)
    counts = [
        [(each.fell, each.wanted) for each in learned._classes.values()]
        for learned in (asked_once, asked_often)
    ]
    assert counts[0] == counts[1]


def test_what_was_remembered_first_is_forgotten_first() -> None:
    learned = LearnedAdmission(100, 0.3, 10**9)
    for at in range(0, 10_000, 10):
        learned.computed(range(at, at + 10), 0)
        learned.fell(range(at, at + 10), once)
    assert (len(learned._made), len(learned._fallen)) == (100, 100)
    learned.wanted(range(10_000))
    assert sum(each.wanted for each in learned._classes.values()) == 100
