"""How long a peer that fails is left alone."""

from __future__ import annotations

from kvcache.peers.load import REST_NS_MAX, REST_NS_MIN, Load


def rested(load: Load, now_ns: int, failures: int = 1) -> int:
    """For how long, after so many failures at once."""
    for _ in range(failures):
        load.rest(now_ns)
    ends = (now_ns + length for length in (REST_NS_MIN, 2 * REST_NS_MIN, 4 * REST_NS_MIN, REST_NS_MAX))
    end = next(end for end in ends if not load.is_resting(end))
    assert load.is_resting(end - 1)
    return end - now_ns


def test_it_rests_longer_each_time_up_to_a_bound() -> None:
    load, now_ns, found = Load(), 0, []
    for _ in range(5):
        found.append(rested(load, now_ns))
        now_ns += REST_NS_MAX
    assert found == [REST_NS_MIN, 2 * REST_NS_MIN, 4 * REST_NS_MIN, REST_NS_MAX, REST_NS_MAX]


def test_what_fails_together_is_one_failure() -> None:
    load = Load()
    assert rested(load, 0, failures=4) == REST_NS_MIN
    assert rested(load, REST_NS_MIN, failures=4) == 2 * REST_NS_MIN


def test_when_something_came_it_rests_shortly_again() -> None:
    load = Load()
    rested(load, 0)
    load.begin(REST_NS_MAX)
    load.end(1, REST_NS_MAX + 1)
    assert rested(load, REST_NS_MAX + 1) == REST_NS_MIN
