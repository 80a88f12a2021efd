"""What happens many times at once is said once."""

from __future__ import annotations

from kvcache.peers.seldom import EVERY_NS, Seldom


def test_the_same_is_said_again_after_a_while_only() -> None:
    seldom = Seldom()
    assert seldom.may_say(0, "a", "lost")
    assert not seldom.may_say(EVERY_NS - 1, "a", "lost")
    assert seldom.may_say(EVERY_NS - 1, "a", "late") and seldom.may_say(EVERY_NS - 1, "b", "lost")
    assert seldom.may_say(EVERY_NS, "a", "lost")
    assert not seldom.may_say(2 * EVERY_NS - 2, "a", "late")


def test_what_was_said_long_ago_is_forgotten() -> None:
    seldom = Seldom()
    for at in range(100):
        assert seldom.may_say(at * EVERY_NS, str(at))
    assert len(seldom._said_ns) == 1
