"""Curves drawn with characters."""

from __future__ import annotations

from kvcache.eviction.commands.picture import Line, draw


def test_a_curve_rises_from_left_to_right() -> None:
    drawn = draw([Line("up", [(1, 0.0), (10, 0.5), (100, 1.0)])], [(1, "1"), (10, "10"), (100, "100")])
    lines = drawn.splitlines()
    marks = [(row, line.index("*")) for row, line in enumerate(lines[:16]) if "*" in line]
    assert [row for row, _ in marks] == list(range(16))
    assert [at for _, at in marks] == sorted((at for _, at in marks), reverse=True)
    assert lines[0].startswith(" 100%|") and lines[16].startswith("   0%+")
    assert lines[17].split() == ["1", "10", "100"]
    assert "* up" in lines[-1]


def test_the_first_is_seen_where_curves_meet() -> None:
    points = [(1.0, 0.3), (2.0, 0.3)]
    drawn = draw([Line("a", points), Line("b", points)], [])
    assert "o" not in "".join(drawn.splitlines()[:16])
    assert "* a   o b" in drawn


def test_one_point_is_a_curve() -> None:
    assert "*" in draw([Line("a", [(5, 0.01)])], [(5, "five")])
    assert "   2%|" in draw([Line("a", [(5, 0.01)])], [])


def test_labels_give_way_to_each_other() -> None:
    drawn = draw([Line("a", [(1, 0.1), (1.01, 0.2), (1e6, 0.3)])], [(1, "first"), (1.01, "second")])
    assert "first" in drawn and "second" not in drawn
